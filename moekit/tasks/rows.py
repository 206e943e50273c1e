"""The items of a task: rows, or a file of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd

from moekit import arguments, json_text
from moekit.arguments import check, check_bytes, shown
from moekit.headlines import first_line

# The most bytes of a file of items.
MOST = 1 << 30

Rows = str | Path | Sequence[Mapping[str, Any]]


def dataset(name: str, rows: Rows) -> datasets.Dataset:
    """The data set of the task ``name``.

    Raises:
        ValueError: it cannot be read, or holds no items.
    """
    if isinstance(rows, str | Path):
        path = check(f"data[{name!r}]", rows, arguments.Path())
        found, whose = _of_file(name, path), str(path)
    else:
        found, whose = list(rows) if arguments.is_many(rows) else [rows], shown(rows)
    if not found or not all(isinstance(row, Mapping) and row for row in found):
        raise ValueError(
            f"data of {name}: {whose} holds no items; expected an object a line, or a list of objects"
        )
    try:
        return datasets.Dataset.from_list([dict(row) for row in found])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"data of {name}: {whose} has items with fields of unlike types ({first_line(error, 200)})"
        ) from None


def _of_file(name: str, path: Path) -> list:
    if not path.is_file():
        raise ValueError(
            f"data of {name}: there is no file {path}; expected a .json, .jsonl, .csv or .tsv file"
        )
    check_bytes(path, f"the items of {name}", MOST)
    try:
        if path.suffix in (".csv", ".tsv"):
            # An answer can be "None" or "NA", or nothing.
            table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=False)
            return table.to_dict(orient="records")
        return _of_json(path.read_text("utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"data of {name}: {path} cannot be read ({first_line(error, 200)})") from None


def _of_json(text: str) -> list:
    """The items of a list, or of lines.

    Raises:
        ValueError: it is neither.
    """
    found, where = [], "it"
    try:
        if text.lstrip().startswith("["):
            return json_text.loads(text, json_text.MANY_VALUES)
        # JSON's strings may have characters in them at which splitlines would split, too.
        for number, line in enumerate(text.split("\n"), 1):
            where = f"line {number}"
            if line.strip():
                found.append(json_text.loads(line))
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    return found
