"""Records of what was done, and with which files, as small JSON files.

They keep a step from being done twice, and a result that is half done from being used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any] | None:
    """The record in ``path``; None if there is none, or if it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write(path: Path, record: dict[str, Any]) -> None:
    """Put ``record`` into ``path``, in one step."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def fingerprint(path: Path) -> dict[str, int] | None:
    """The size and the time of change of a file, which are cheap to read; None if there is no such file."""
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
    """``work()``, unless the record in ``path`` shows that it was done: same question, same inputs, outputs untouched.

    Args:
        asked: what the result depends on besides the inputs; plain values that JSON keeps.
        work: makes ``outputs`` and returns its result, plain values again.

    Returns:
        The result, and whether the work was done now.
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
