"""What a user of ``prepare_data.ipynb`` asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.arguments import Choice, Flag, Kind, ParameterError, Text, Texts, Whole
from moekit.data.sources import CHECKPOINTS
from moekit.notebook import parameters

PARAMETERS: dict[str, Kind] = {
    "source": Text(),
    "checkpoint": Choice(("none", *CHECKPOINTS)),
    "data_dir": Text(),
    "workers": Whole(0),
    "keep_empty": Flag(),
    "mirrors": Texts(),
    "bpe": Choice(("auto", "gpt2", "demo")),
    "delete_archive": Flag(),
}
DEFAULTS = {
    "source": "demo",
    "checkpoint": "none",
    "data_dir": "data",
    "workers": 0,
    "keep_empty": True,
    "mirrors": [],
    "bpe": "auto",
    "delete_archive": False,
}
MOST_WORKERS = 256


@dataclass(frozen=True)
class Settings:
    """What to prepare.

    Attributes:
        source: "demo" (the repository's own text), "wikitext-103", or own text: a file, a folder or a glob.
        checkpoint: "none", "en_moe_lm_15b" or "en_moe_lm_52b".
        data_dir: everything goes below it.
        workers: processes.
        keep_empty: keep empty lines, as ``multiprocessing_bpe_encoder --keep-empty``.
        mirrors: addresses to ask before the built-in ones, each followed by the file's path there
            (``gpt2_bpe/encoder.json``, ``models/lm/en_moe_lm_15b.tar.gz``, ``wikitext-103-raw-v1.zip``).
        bpe: "gpt2", which the released models read, or "demo", which the demo model reads and which is here already.
        delete_archive: remove a checkpoint's archive when it is unpacked.
    """

    source: str
    checkpoint: str
    data_dir: Path
    workers: int
    keep_empty: bool
    mirrors: tuple[str, ...]
    bpe: str
    delete_archive: bool


def settings(variables: Mapping[str, Any]) -> Settings:
    """The settings that parameters describe: a notebook's ``globals()``, or a dict with those that are no defaults.

    Raises:
        ParameterError: (a ValueError) one makes no sense, or is no parameter.
    """
    p = parameters.check({**DEFAULTS, **variables}, PARAMETERS)
    if p.workers > MOST_WORKERS:
        raise ParameterError(f"workers={p.workers}: expected at most {MOST_WORKERS}, or 0 for one a core")
    for name in ("source", "data_dir"):
        if not getattr(p, name).strip():
            raise ParameterError(f"{name} is empty")
    mirrors = [address for text in p.mirrors for address in text.replace(",", " ").split()]
    for address in mirrors:
        if not address.startswith(("http://", "https://")):
            raise ParameterError(f"mirrors: {address!r} does not begin with http:// or https://")
    if p.bpe == "demo" and p.checkpoint != "none":
        raise ParameterError(
            f"bpe='demo' does not go with {p.checkpoint}, which reads GPT-2's pieces: expected 'gpt2'"
        )
    if p.bpe == "auto":
        p.bpe = "demo" if p.source == "demo" and p.checkpoint == "none" else "gpt2"
    return Settings(
        source=p.source,
        checkpoint=p.checkpoint,
        data_dir=Path(p.data_dir).expanduser().resolve(),
        workers=p.workers or len(os.sched_getaffinity(0)),
        keep_empty=p.keep_empty,
        mirrors=tuple(mirrors),
        bpe=p.bpe,
        delete_archive=p.delete_archive,
    )
