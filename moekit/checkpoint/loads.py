"""What is copied together: pieces of tensors, and the loads that they are packed into."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moekit.checkpoint.stretch import Stretch

# The alignment, in bytes, of a tensor in a buffer, at which GPU copies are fast.
ALIGNMENT = 256
# Tensors of a file are one copy with at most so many bytes between them, and so aligned to each other, as torch writes them.
GAP, NEIGHBOUR = 4096, 64


class Piece(NamedTuple):
    """A copy of ``source``, on the CPU, to ``target``, which is contiguous; dtypes may differ.

    The target has the source's shape, or is [n], and ``shape`` tells the shape that it has in the model. The thread that copies
    the piece first calls ``check``, which may raise an error. With ``scale`` [R], the source [R, C] is quantised to ``target``
    and ``scale`` (:func:`moekit.nn.quantise.quantise`).
    """

    # The tensor's name in errors.
    name: str
    source: Tensor | Stretch
    target: Tensor
    check: Callable[[], None] | None = None
    scale: Tensor | None = None
    shape: tuple[int, ...] | None = None


def check_shape(piece: Piece) -> None:
    shape = piece.target.shape if piece.shape is None else piece.shape
    if piece.source.shape != shape:
        wanted, got = list(shape), list(piece.source.shape)
        raise RuntimeError(f"{piece.name} cannot be copied: its shape is {got}, expected {wanted}")


class Load:
    """Pieces that are copied together.

    Attributes:
        name: the name of the first piece.
        bytes: the total size of the sources.
        checks: the checks to run before the copy.
    """

    def __init__(self, name: str):
        self.name, self.bytes = name, 0
        self.checks: list[Callable[[], None]] = []

    def take_check(self, piece: Piece) -> None:
        if piece.check is not None:
            self.checks.append(piece.check)


class Tensors(Load):
    def __init__(self, name: str):
        super().__init__(name)
        self.pieces: list[Piece] = []


class Bytes:
    """Those of ``memory`` from ``start`` to ``stop``, and the index of their first number in the buffer, ``at``."""

    __slots__ = ("at", "memory", "start", "stop")

    def __init__(self, at: int, memory: np.ndarray, start: int):
        self.at, self.memory, self.start, self.stop = at, memory, start, start

    def __len__(self) -> int:
        return self.stop - self.start


class Shared(Load):
    """A load in one buffer.

    Attributes:
        dtype, each: the dtype of all numbers in the buffer, and the bytes of each.
        used: the count of numbers in the buffer, including gaps.
        sources: what to copy, and where it goes in the buffer; neighbours in a file are one.
        last: the last one of them.
        parts: (index of the first number in the buffer, the target [n] of any dtype).
        matrices: (index of the first number in the buffer, the target [r, C], the scale [r]), whole rows to quantise.
        buffer: where its bytes meet; who carries it sets it.
    """

    buffer: Buffer

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(name)
        self.dtype, self.each, self.used = dtype, dtype.itemsize, 0
        self.sources: list[Bytes] = []
        self.last: Bytes | None = None
        self.parts: list[tuple[int, Tensor]] = []
        self.matrices: list[tuple[int, Tensor, Tensor]] = []

    def place(self, memory: np.ndarray, start: int) -> int:
        """The index in the buffer of the number at ``memory[start]``: in line with the last source, if they are neighbours."""
        last = self.last
        if last is not None and last.memory is memory and 0 <= start - last.stop <= GAP:
            ahead = start - last.start
            if ahead % NEIGHBOUR == 0:
                return last.at + ahead // self.each
        step = ALIGNMENT // self.each
        return -(-self.used // step) * step

    def copy(self, at: int, memory: np.ndarray, start: int, size: int) -> None:
        """Note that ``size`` bytes of ``memory`` from ``start`` on go to the index ``at``, which :meth:`place` gave."""
        last = self.last
        if last is None or last.memory is not memory or (at - last.at) * self.each != start - last.start:
            last = self.last = Bytes(at, memory, start)
            self.sources.append(last)
        last.stop = start + size
        self.used = at + size // self.each
        self.bytes += size

    def take(self, piece: Piece, at: int, start: int, count: int) -> None:
        """Note where the ``count`` numbers of ``piece`` from ``start`` on go, which are at the index ``at`` of the buffer."""
        if piece.scale is None:
            target = piece.target.view(-1) if piece.shape is None else piece.target
            self.parts.append((at, target if count == target.numel() else target[start : start + count]))
        else:
            columns = piece.target.shape[-1]
            rows = slice(start // columns, (start + count) // columns)
            self.matrices.append((at, piece.target[rows], piece.scale[rows]))


class Buffer(Protocol):
    """A staging buffer for copies to a device; ``room`` is [bytes] uint8."""

    room: np.ndarray

    def send(self, load: Shared) -> None:
        """Start the transfer of the data of ``load`` in ``room``, and the copies to its targets."""

    def wait(self) -> None:
        """Wait until the previous transfer, if any, is complete."""
