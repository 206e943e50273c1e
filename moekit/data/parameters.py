"""What a user of ``prepare_data.ipynb`` asked for, checked before anything is done.

papermill turns ``-p keep_empty true`` into the string "true", ``-p source 007`` into the number 7 and
``-p workers 1e1`` into a float, and it only warns of a name that the notebook does not have. All of that ends here.
"""

from __future__ import annotations

import ast
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.data.sources import CHECKPOINTS

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


def check_parameters(given: Mapping[str, Any]) -> Settings:
    """The settings that a notebook's variables describe: ``check_parameters(globals())``.

    Args:
        given: values by name; of a running notebook's variables, those that are no parameters are left alone, but not
            those that papermill put there.

    Raises:
        ValueError: a value is not what it must be, or papermill was given a name that is no parameter.
    """
    values = {
        "source": "demo",
        "checkpoint": "none",
        "data_dir": "data",
        "workers": 0,
        "keep_empty": True,
        "mirrors": [],
        "bpe": "auto",
        "delete_archive": False,
    }
    for name in _injected(given.get("In", ())):
        if name not in values:
            close = difflib.get_close_matches(name, values, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(values)}"
            raise ValueError(f"prepare_data.ipynb has no parameter {name}{hint}")
    values |= {name: given[name] for name in values if name in given}

    source = _text(values, "source")
    checkpoint = _choice(values, "checkpoint", ("none", *CHECKPOINTS))
    bpe = _choice(values, "bpe", ("auto", "gpt2", "demo"))
    if bpe == "auto":
        bpe = "demo" if source == "demo" and checkpoint == "none" else "gpt2"
    elif bpe == "demo" and checkpoint != "none":
        raise ValueError(
            f"{checkpoint} reads GPT-2's pieces: with this checkpoint bpe must be 'gpt2', not 'demo'"
        )
    return Settings(
        source=source,
        checkpoint=checkpoint,
        data_dir=Path(_text(values, "data_dir")).expanduser().resolve(),
        workers=_workers(values["workers"]),
        keep_empty=_flag(values, "keep_empty"),
        mirrors=_mirrors(values["mirrors"]),
        bpe=bpe,
        delete_archive=_flag(values, "delete_archive"),
    )


def _injected(cells: Any) -> list[str]:
    """The names that papermill set, from the cell that it put in."""
    return [
        target.id
        for cell in cells
        if isinstance(cell, str) and cell.startswith("# Parameters\n")
        for statement in ast.parse(cell).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        hint = (
            "; papermill turns digits into numbers, unless given as -r"
            if isinstance(value, int | float)
            else ""
        )
        raise ValueError(f"{name}={value!r} must be a text{hint}")
    return value


def _choice(values: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    if values[name] not in choices:
        raise ValueError(f"{name}={values[name]!r} must be one of {', '.join(map(repr, choices))}")
    return values[name]


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values[name]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")
    return value


def _workers(value: Any) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"workers={value!r} must be a whole number, 0 for one a core")
    if not 0 <= value <= MOST_WORKERS:
        raise ValueError(f"workers={value!r} must be from 0 (one a core) to {MOST_WORKERS}")
    return int(value) or len(os.sched_getaffinity(0))


def _mirrors(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if not isinstance(value, list | tuple):
        raise ValueError(f"mirrors={value!r} must be a list of addresses")
    for address in value:
        if not isinstance(address, str) or not address.startswith(("http://", "https://")):
            raise ValueError(f"mirrors: {address!r} must begin with http:// or https://")
    return tuple(value)
