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
    """A copy of ``source``, on the CPU, to ``target``, which is contiguous and has the same shape; dtypes may differ.

    The thread that copies the piece first calls ``check``, which may raise an error. With ``scale`` [R], the source [R, C]
    is quantised to ``target`` and ``scale`` (:func:`moekit.nn.quantise.quantise`).
    """

    # The tensor's name in errors.
    name: str
    source: Tensor | Stretch
    target: Tensor
    check: Callable[[], None] | None = None
    scale: Tensor | None = None


def check_shape(piece: Piece) -> None:
    if piece.source.shape != piece.target.shape:
        wanted, got = list(piece.target.shape), list(piece.source.shape)
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


class Shared(Load):
    """A load in one buffer.

    Attributes:
        dtype: the dtype of all numbers in the buffer.
        used: the count of numbers in the buffer, including gaps.
        sources: (index of the first number in the buffer, the bytes to copy there); neighbours in a file are one.
        parts: (index of the first number in the buffer, the target [n] of any dtype).
        matrices: (index of the first number in the buffer, the target [r, C], the scale [r]), whole rows to quantise.
        buffer: where its bytes meet; who carries it sets it.
    """

    buffer: Buffer

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(name)
        self.dtype, self.used = dtype, 0
        self.sources: list[tuple[int, np.ndarray]] = []
        # Of the last source: the memory that it lies in, its first byte there, and the byte after it.
        self.last: tuple[np.ndarray | None, int, int] = None, 0, 0
        self.parts: list[tuple[int, Tensor]] = []
        self.matrices: list[tuple[int, Tensor, Tensor]] = []

    def place(self, memory: np.ndarray, start: int) -> int:
        """The index in the buffer of the number at ``memory[start]``: in line with the last source, if they are neighbours."""
        last, begin, end = self.last
        if last is memory and 0 <= start - end <= GAP and (start - begin) % NEIGHBOUR == 0:
            return self.sources[-1][0] + (start - begin) // self.dtype.itemsize
        step = ALIGNMENT // self.dtype.itemsize
        return -(-self.used // step) * step

    def copy(self, at: int, memory: np.ndarray, start: int, size: int) -> None:
        """Note that ``size`` bytes of ``memory`` from ``start`` on go to the index ``at``, which :meth:`place` gave."""
        last, begin, _ = self.last
        if last is memory and (at - self.sources[-1][0]) * self.dtype.itemsize == start - begin:
            at, _ = self.sources.pop()
        else:
            begin = start
        self.sources.append((at, memory[begin : start + size]))
        self.last = memory, begin, start + size
        self.used = at + (start + size - begin) // self.dtype.itemsize

    def take(self, piece: Piece, at: int, start: int, count: int) -> None:
        """Note where the ``count`` numbers of ``piece`` from ``start`` on go, which are at the index ``at`` of the buffer."""
        if piece.scale is None:
            target = piece.target if piece.target.dim() == 1 else piece.target.view(-1)
            self.parts.append((at, target if count == len(target) else target[start : start + count]))
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
