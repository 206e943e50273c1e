"""Whether the weights are what was written: checksums, and numbers that are not finite. What is found is remembered.

A zip archive holds the CRC32 of each of its members, which torch does not check. The threads that copy compute it, once:
for a file that has not changed since, and of which the same tensors are read, the earlier result counts. A member is
checked as a whole, also where only some of its rows or experts are read, as the checksum is of all its bytes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit.arguments import first_few
from moekit.checkpoint.archive import Record
from moekit.checkpoint.contents import clip
from moekit.checkpoint.keys import Place
from moekit.checkpoint.reading import Source, stamp
from moekit.checkpoint.stretch import Stretch
from moekit.checkpoint.weights import Weights

try:
    # It is five times as fast as zlib's, where it is installed.
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

# A file that was written a moment ago may be written again without a change of its stamp: clocks of files are coarse.
# Seconds.
SETTLED = 2.0
# Results of files.
MOST_REMEMBERED = 4096


class NonFinite(NamedTuple):
    """A tensor with numbers that are not finite; ``layer`` and ``expert`` count from 0, None where it is no expert's."""

    file: str
    key: str
    layer: int | None
    expert: int | None
    nan: int
    infinite: int

    def __str__(self) -> str:
        where = "" if self.expert is None else f" (layer {self.layer}, expert {self.expert})"
        return f"{self.file}: {clip(self.key)}{where}: {self.nan:,} NaN, {self.infinite:,} infinite"


# A key, what is read of its tensor, and where it goes.
Wanted = tuple[str, Tensor | Stretch, Place]


class Inspection:
    """Of one file, what is checked before its tensors are used, and what was found.

    Attributes:
        nonfinite: tensors with numbers that are not finite; complete once all checks were made.
    """

    def __init__(self, source: Source, weights: Weights, wanted: list[Wanted]):
        self.source, self.weights = source, weights
        read = [(key, tuple(part.shape), tuple(self.record(key))) for key, part, _ in wanted]
        told = repr((str(source.path.resolve()), source.stamp, read))
        self.name = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
        remembered = _recall(self.name)
        self.known = remembered is not None
        self.nonfinite: list[NonFinite] = remembered or []
        self.begun: set[str] = set()

    def record(self, key: str) -> Record:
        return self.weights.records[key]

    def check(self, wanted: Wanted) -> Callable[[], None] | None:
        """The check to make before a tensor is used; None if it was made before, of a file that has not changed since.

        The check raises a ValueError that names file and tensor if the bytes are not those that were written.
        """
        if self.known:
            return None
        record = self.record(wanted[0])
        new = record.name not in self.begun
        self.begun.add(record.name)
        return functools.partial(self._check, wanted, record if new else None)

    def _check(self, wanted: Wanted, record: Record | None) -> None:
        key, part, place = wanted
        if record is not None:
            check_sum(self.weights, key)
        if isinstance(part, Stretch) and part.dtype in INFINITE and _finite(part):
            return
        nan, infinite = not_finite(part.tensor() if isinstance(part, Stretch) else part)
        if nan or infinite:
            layer, expert = place.where or (None, None)
            self.nonfinite.append(NonFinite(self.source.path.name, key, layer, expert, nan, infinite))

    def remember(self) -> None:
        """Keep the result for the next time, once all checks were made."""
        if self.known or stamp(self.source.path) != self.source.stamp:
            return
        if time.time() - max(self.source.stamp[-2:]) / 1e9 > SETTLED:
            _keep(self.name, self.nonfinite)


# By type: whole numbers of its size, with a sign and without, and the bits of its infinities as those: the positive one's with
# a sign, the negative one's without. Each is the smallest of its sign that is not finite.
INFINITE = {
    torch.float16: (np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float32: (np.int32, np.uint32, 0x7F800000, 0xFF800000),
}


def _finite(part: Stretch) -> bool:
    """Whether all numbers are finite, by their bits: calls of torch would take longer than to read the numbers."""
    signed, unsigned, positive, negative = INFINITE[part.dtype]
    content = part.memory[part.start : part.start + part.nbytes]
    return not len(content) or bool(
        content.view(signed).max() < positive and content.view(unsigned).max() < negative
    )


def not_finite(tensor: Tensor) -> tuple[int, int]:
    """How many numbers are NaN, and how many infinite."""
    numbers = tensor.float() if tensor.itemsize == 1 else tensor
    # Half precision may overflow in the sum, but a sum that is finite has finite terms only.
    if not numbers.is_floating_point() or numbers.sum().isfinite():
        return 0, 0
    return int(numbers.isnan().sum()), int(numbers.isinf().sum())


def check_sum(weights: Weights, key: str) -> None:
    """Compare the checksum of a tensor's record, where the file tells one.

    Raises:
        ValueError: the bytes are not those that were written.
    """
    record = weights.records[key]
    content = weights.memory[record.start : record.start + record.size]
    if record.checksum is not None and crc32(content) != record.checksum:
        raise ValueError(
            f"{weights.path}: {clip(key)} is damaged (its bytes do not have the checksum {record.checksum:08x} that the "
            "file tells): fetch the file again"
        )


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moekit" / "checked"


def _recall(name: str) -> list[NonFinite] | None:
    """What an earlier inspection found; None if there was none."""
    try:
        return [NonFinite(*found) for found in json.loads((_folder() / name).read_text())]
    except (OSError, ValueError, TypeError, RuntimeError):
        return None


def _keep(name: str, nonfinite: list[NonFinite]) -> None:
    """Write it down; where that cannot be done, the next load checks again."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        if len(os.listdir(folder)) >= MOST_REMEMBERED:
            _forget(folder)
        part = folder / f"{name}.{os.getpid()}.part"
        part.write_text(json.dumps(nonfinite))
        os.replace(part, folder / name)


def _forget(folder: Path) -> None:
    """Remove the oldest results, a quarter of them: to look at the time of each takes longer than to check a small file."""
    kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in kept[: len(kept) - MOST_REMEMBERED * 3 // 4]:
        path.unlink(missing_ok=True)


def warn_unchecked(opened: dict[Path, Weights]) -> None:
    """Say once which files tell no checksums of their weights."""
    without = [
        path.name
        for path, weights in opened.items()
        if any(record.checksum is None and record.size for record in weights.records.values())
    ]
    if without:
        warnings.warn(
            f"{len(without)} of {len(opened)} files tell no checksums ({clip(first_few(sorted(without)))}): "
            "damage in their weights cannot be noticed",
            stacklevel=3,
        )


def warn_nonfinite(nonfinite: Iterable[NonFinite]) -> None:
    """Warn of weights that are not finite: how many tensors, and the first of them."""
    found = sorted(set(nonfinite), key=str)
    if found:
        numbers = sum(one.nan + one.infinite for one in found)
        warnings.warn(
            f"{numbers:,} weights in {len(found)} tensors are not finite, so results may be NaN: "
            + "; ".join(map(str, found[:3]))
            + ("; ..." if len(found) > 3 else ""),
            stacklevel=3,
        )
