"""Records of finished steps and their files, as small JSON files.

With a record, a finished step does not run again, and an unfinished result is not used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moekit import json_text
from moekit.arguments import content

# The most bytes of a record.
MOST = 1 << 26


def read(path: Path) -> dict[str, Any] | None:
    """The record in ``path``; None if there is none, or it is damaged."""
    try:
        record = json_text.loads(content(path, "a record", MOST))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path`` atomically."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def fingerprint(path: Path) -> dict[str, int] | None:
    """The size and the time of change of a file, which are cheap to read; None if the file is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def once(
    path: Path,
    asked: dict[str, Any],
    inputs: Iterable[Path],
    outputs: Iterable[Path],
    work: Callable[[], dict[str, Any]],
) -> tuple[dict[str, Any], bool]:
    """Run ``work()``, unless the record in ``path`` has the same ``asked`` and inputs, and unchanged outputs.

    Args:
        asked: values on which the result depends, in addition to the inputs; plain values that JSON can store.
        work: writes ``outputs`` and returns its result, which JSON can store, too.

    Returns:
        The result, and whether the work ran now.
    """
    question = {"asked": asked, "inputs": {str(p.resolve()): fingerprint(p) for p in inputs}}
    made = list(outputs)
    old = read(path)
    if (
        old is not None
        and old.get("question") == question
        and old.get("outputs") == {p.name: fingerprint(p) for p in made}
    ):
        return old["result"], False
    result = work()
    write(path, {"question": question, "outputs": {p.name: fingerprint(p) for p in made}, "result": result})
    return result, True
