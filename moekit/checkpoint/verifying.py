"""Every byte of a checkpoint read once: checksums, and numbers that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.checkpoint.files import find
from moekit.checkpoint.inspection import crc32, not_finite
from moekit.checkpoint.plan import survey
from moekit.checkpoint.reading import read
from moekit.checkpoint.threads import pool
from moekit.mapped import whole_files
from moekit.progress import bar


def verify(checkpoint: str | Path, *, show: bool = True) -> list[dict[str, Any]]:
    """Read all files of a checkpoint, copies of experts included.

    Returns:
        A row a file: ``file``, ``bytes``, ``tensors``, ``checksums`` (how many were compared), ``damaged`` (keys of tensors
        whose bytes do not have the checksum that the file tells), ``nan`` and ``infinite`` (numbers), ``nonfinite`` (the keys
        of the tensors that have them).

    Raises:
        ValueError: as :func:`moekit.checkpoint.find` and :func:`moekit.checkpoint.survey`.
    """
    files = find(checkpoint)
    survey(files)
    sizes = {path: path.stat().st_size for path in files.all}
    rows = []
    # Neither checksums nor torch's sums hold Python's lock.
    with (
        bar("verify", sum(sizes.values()), "B", show=show) as shown,
        pool("verifying") as executor,
    ):
        for (path, size), row in zip(sizes.items(), executor.map(_of_file, sizes), strict=True):
            rows.append({"file": path.name, "bytes": size} | row)
            shown.update(size)
    return rows


@whole_files()
def _of_file(path: Path) -> dict[str, Any]:
    weights = read(path)["model"]
    row: dict[str, Any] = {
        "tensors": len(weights),
        "checksums": 0,
        "damaged": [],
        "nan": 0,
        "infinite": 0,
        "nonfinite": [],
    }
    checked: dict[str, bool] = {}
    for key, tensor in weights.items():
        record = weights.records[key]
        if record.name not in checked:
            checked[record.name] = True
            if record.checksum is not None:
                row["checksums"] += 1
                content = weights.memory[record.start : record.start + record.size]
                checked[record.name] = crc32(content) == record.checksum
        if not checked[record.name]:
            row["damaged"].append(key)
        nan, infinite = not_finite(tensor)
        if nan or infinite:
            row["nonfinite"].append(key)
        row["nan"] += nan
        row["infinite"] += infinite
    return row
