"""The tensors of one file, each made when it is asked for: who compares shapes or copies bytes needs none."""

from __future__ import annotations

import functools
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit.checkpoint.archive import Record
from moekit.checkpoint.stretch import Stretch


class Header(NamedTuple):
    """What a file's header tells of a tensor, whose numbers are somewhere in ``record``.

    Attributes:
        offset: of its first number, in numbers.
        strides: None of numbers without gaps.
        bytes: of its storage.
    """

    record: Record
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None
    bytes: int

    @property
    def contiguous(self) -> bool:
        """Whether the numbers lie one after the other, and there are some."""
        return _contiguous(self.shape, self.strides)

    def tensor(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor in ``storage``, all of the file."""
        part = storage[self.record.start : self.record.start + self.bytes]
        made = torch.empty(0, dtype=self.dtype, device="cpu")
        if self.strides is None:
            return made.set_(part).view(self.shape)
        return made.set_(part, self.offset, self.shape, self.strides)


# A checkpoint has few shapes.
@functools.lru_cache(maxsize=1024)
def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> bool:
    if strides is None:
        return 0 not in shape
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return step > 0


class Weights(MutableMapping[str, Tensor]):
    """The tensors of a file by their keys, memory-mapped. A tensor is made when it is asked for first.

    Attributes:
        path: the file.
        memory: all of it, [bytes] uint8.
        records: the record of the file that each key's tensor lies in.
        cut: of a tensor that lies in several files, where the part here begins, and the shape of the whole; the part
            is [numbers].
        folder: the folder inside the file's archive, which torch names after the file; None in old files.
    """

    def __init__(
        self, path: Path, memory: np.ndarray, folder: str | None, storage: torch.UntypedStorage | None = None
    ):
        self.path, self.memory, self.folder, self.storage = path, memory, folder, storage
        self._held: dict[str, Tensor | Header] = {}
        self.records: dict[str, Record] = {}
        self.cut: dict[str, tuple[int, tuple[int, ...]]] = {}

    def __getitem__(self, key: str) -> Tensor:
        found = self._held[key]
        if isinstance(found, Header):
            found = self._held[key] = found.tensor(self.storage)
        return found

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        self._held[key] = tensor

    def __delitem__(self, key: str) -> None:
        del self._held[key]

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, key: str, header: Header) -> None:
        """Take up the tensor that ``header`` tells of."""
        self._held[key], self.records[key] = header, header.record

    def header(self, key: str) -> Tensor | Header:
        """What has the dtype and the shape of the part that is here."""
        return self._held[key]

    def numbers(self, key: str) -> Tensor | Stretch:
        """The part that is here, to be copied."""
        held = self._held[key]
        if isinstance(held, Header) and held.contiguous:
            start = held.record.start + held.offset * held.dtype.itemsize
            return Stretch(self.memory, start, held.dtype, held.shape)
        return self[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.cut[key][1] if key in self.cut else tuple(self._held[key].shape)
