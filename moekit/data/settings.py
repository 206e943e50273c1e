"""The settings of ``prepare``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.arguments import Choice, Flag, Kind, Texts, Whole, check
from moekit.data.sources import CHECKPOINTS

# The settings that are no path. The notebook's parameters are checked by the same kinds.
KINDS: dict[str, Kind] = {
    "checkpoint": Choice(("none", *CHECKPOINTS)),
    "workers": Whole(0, most=256),
    "keep_empty": Flag(),
    "mirrors": Texts(),
    "bpe": Choice(("auto", "gpt2", "demo")),
    "delete_archive": Flag(),
}


@dataclass(frozen=True)
class Settings:
    """The data and the checkpoint to prepare.

    Attributes:
        source: "demo" (the repository's own text), "wikitext-103", or own text: a file, a folder or a glob.
        checkpoint: "none", or one of :data:`moekit.data.sources.CHECKPOINTS`, such as "en_moe_lm_15b" or "en_dense_lm_1_3b".
        data_dir: the folder of all files.
        workers: the number of processes.
        keep_empty: keep empty lines, as ``multiprocessing_bpe_encoder --keep-empty``.
        mirrors: addresses to try before the built-in ones; the path of the file is appended to each
            (``gpt2_bpe/encoder.json``, ``models/lm/en_moe_lm_15b.tar.gz``, ``wikitext-103-raw-v1.zip``).
        bpe: "gpt2", for the released models, or "demo", for the demo model; the files of "demo" need no download.
        delete_archive: remove the archive of a checkpoint after it is unpacked.
    """

    source: str
    checkpoint: str
    data_dir: Path
    workers: int
    keep_empty: bool
    mirrors: tuple[str, ...]
    bpe: str
    delete_archive: bool


def settings(
    source: str | Path = "demo",
    checkpoint: str = "none",
    data_dir: str | Path = "data",
    workers: int = 0,
    keep_empty: bool = True,
    mirrors: str | Sequence[str] = (),
    bpe: str = "auto",
    delete_archive: bool = False,
) -> Settings:
    """Check the values, alone and against each other, and make :class:`Settings` of them.

    Args:
        workers: the number of processes; 0 means one per core.
        mirrors: addresses; one text may hold several, separated by commas or blanks.
        bpe: "auto" is "demo" for the demo's text without a checkpoint, otherwise "gpt2".

    Raises:
        ValueError: a value is invalid, or two values contradict each other.
    """
    for name, value in (("source", source), ("data_dir", data_dir)):
        if not str(value).strip():
            raise ValueError(f"{name} is empty; expected the path of a file or folder")
    checkpoint = check("checkpoint", checkpoint, KINDS["checkpoint"])
    workers = check("workers", workers, KINDS["workers"])
    keep_empty = check("keep_empty", keep_empty, KINDS["keep_empty"])
    mirrors = check("mirrors", mirrors, KINDS["mirrors"])
    bpe = check("bpe", bpe, KINDS["bpe"])
    delete_archive = check("delete_archive", delete_archive, KINDS["delete_archive"])
    addresses = [address for text in mirrors for address in text.replace(",", " ").split()]
    for address in addresses:
        if not address.startswith(("http://", "https://")):
            raise ValueError(
                f"mirrors: {address[:80]!r} does not begin with http:// or https://; expected an address that does"
            )
    if bpe == "demo" and checkpoint != "none":
        raise ValueError(
            f"bpe='demo' does not go with {checkpoint}, which reads GPT-2's pieces: expected 'gpt2'"
        )
    if bpe == "auto":
        bpe = "demo" if str(source) == "demo" and checkpoint == "none" else "gpt2"
    return Settings(
        source=str(source),
        checkpoint=checkpoint,
        data_dir=Path(data_dir).expanduser().resolve(),
        workers=workers or len(os.sched_getaffinity(0)),
        keep_empty=keep_empty,
        mirrors=tuple(addresses),
        bpe=bpe,
        delete_archive=delete_archive,
    )
