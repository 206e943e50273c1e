"""The files that can be downloaded, and their addresses.

No hash of these files is known in advance. The hash of the first download is recorded, and later downloads are compared
with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moekit.data.bpe import read_merges, read_vocabulary
from moekit.data.dictionary import Dictionary

FAIRSEQ = "https://dl.fbaipublicfiles.com/fairseq"


@dataclass(frozen=True)
class Remote:
    """A file on the web.

    Attributes:
        path: the path of the file below a mirror.
        urls: the addresses of the file, in the order of the attempts.
        check: raises ValueError if a download is another file, such as a login page.
        unpacked: for an archive, about how many bytes its files have, for the check of free space; up to twice as many
            are accepted.
    """

    path: str
    urls: tuple[str, ...]
    check: Callable[[Path], object]
    unpacked: int = 0

    @property
    def name(self) -> str:
        return Path(self.path).name

    def addresses(self, mirrors: tuple[str, ...]) -> list[str]:
        """The addresses of the file on ``mirrors``, then its built-in addresses."""
        return [f"{mirror.rstrip('/')}/{self.path}" for mirror in mirrors] + list(self.urls)


def _begins_with(magic: bytes, kind: str) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        with open(path, "rb") as file:
            if file.read(len(magic)) != magic:
                raise ValueError(f"what arrived is no {kind} file")

    return check


def _fairseq(path: str, check: Callable[[Path], object], unpacked: int = 0) -> Remote:
    return Remote(path, (f"{FAIRSEQ}/{path}",), check, unpacked)


GPT2_BPE = (
    _fairseq("gpt2_bpe/encoder.json", read_vocabulary),
    _fairseq("gpt2_bpe/vocab.bpe", read_merges),
    _fairseq("gpt2_bpe/dict.txt", Dictionary),
)

WIKITEXT_103 = Remote(
    "wikitext-103-raw-v1.zip",
    (
        # This is the address of the author.
        "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
        # This address has not answered since 2024.
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-raw-v1.zip",
    ),
    _begins_with(b"PK", "zip"),
    unpacked=550_000_000,
)

# The released models with experts, then their dense siblings.
CHECKPOINTS = {
    name: _fairseq(f"models/lm/{name}.tar.gz", _begins_with(b"\x1f\x8b", "gzip"), unpacked)
    for name, unpacked in (
        ("en_moe_lm_15b", 30_000_000_000),
        ("en_moe_lm_52b", 105_000_000_000),
        ("en_dense_lm_125m", 300_000_000),
        ("en_dense_lm_355m", 800_000_000),
        ("en_dense_lm_1_3b", 2_700_000_000),
        ("en_dense_lm_2_7b", 5_400_000_000),
        ("en_dense_lm_6_7b", 13_400_000_000),
        ("en_dense_lm_13b", 25_800_000_000),
    )
}
