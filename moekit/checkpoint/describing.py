"""The contents of a checkpoint's folder, for tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from moekit.checkpoint.files import find
from moekit.checkpoint.keys import NUMBER
from moekit.checkpoint.reading import read
from moekit.checkpoint.shards import tensors
from moekit.nn.quantise import dtype_name


def describe(checkpoint: str | Path) -> list[dict[str, Any]]:
    """The contents of a checkpoint's folder, one row per file, for tables.

    Returns:
        Rows with ``file``, ``bytes``, ``kind`` ("shared" or "rank"), ``rank`` (None for the shared one), ``experts``
        (a MoE layer), ``moe_layers``, ``dtype`` (of all tensors), ``experts_dtype`` (of the experts' tensors, "" if
        there are none) and ``tensors``.

    Raises:
        ValueError: as :func:`find` and :func:`read`.
    """
    files = find(checkpoint)
    ranks = {path: rank for rank, path in enumerate(files.ranks)}
    rows = []
    for path in files.all:
        found = tensors(read(path), path)
        own = {key: n for key in found if len(n := NUMBER.findall(key)) == 2}
        rows.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "kind": "rank" if path in ranks else "shared",
                "rank": ranks.get(path),
                "experts": len({n[1] for n in own.values()}),
                "moe_layers": len({n[0] for n in own.values()}),
                "dtype": _types(found.values()),
                "experts_dtype": _types(found[key] for key in own),
                "tensors": len(found),
            }
        )
    return rows


def _types(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
