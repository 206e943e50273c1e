"""Copies of tensors from memory-mapped files to their parameters, by several threads; a core reads each byte once.

On the CPU, a thread copies straight into the parameter. For a GPU, a thread fills pinned buffers, and the GPU fetches a
buffer while the thread fills the next one. So page reads, copies and transfers happen at the same time.

Reading a mapped page in the page cache is as fast as a copy in memory: 8 GB/s per core, and 27 GB/s with eight cores on
the machine of an H200. Reading the pages in advance with ``MADV_POPULATE_READ``, or with ``pread``, is no faster. Most
of the cost is Python: the 15B has 12,500 tensors, half of them with a few kilobytes, and each call of torch releases
Python's lock and waits for it again. So one thread does the work per tensor. The other threads copy loads of 16 MiB. A
load goes to the GPU as a whole, where one call copies its tensors to their places.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moekit.checkpoint.threads import pool
from moekit.nn.quantise import quantise

# The most threads; more do not increase the transfer rate.
THREADS = 5
# Buffers of each thread, and the bytes of each buffer.
BUFFERS, LOAD_BYTES = 2, 16 << 20
# The most matrices of a load that are quantised.
MATRICES = 64
# The alignment, in bytes, of a tensor in a buffer, at which GPU copies are fast.
ALIGNMENT = 256


@dataclass(frozen=True)
class Piece:
    """A copy of ``source``, on the CPU, to ``target``, which is contiguous and has the same shape; dtypes may differ.

    The thread that copies the piece first calls ``check``, which may raise an error. With ``scale`` [R], the source [R, C]
    is quantised to ``target`` and ``scale`` (:func:`moekit.nn.quantise.quantise`).
    """

    # The tensor's name in errors.
    name: str
    source: Tensor
    target: Tensor
    check: Callable[[], None] | None = None
    scale: Tensor | None = None


def copy(
    pieces: Iterable[Piece],
    device: torch.device,
    threads: int,
    progress: Callable[[int], None] | None = None,
    kernels: bool = False,
) -> None:
    """Copy all pieces, and return when all copies are complete.

    Args:
        pieces: an iterable that this thread reads while other threads copy.
        device: the device of the targets, but for those on the CPU.
        threads: the most threads; ``THREADS`` is a limit, too.
        progress: called in this thread with the bytes copied since the last call.
        kernels: whether the device may compute with Triton's kernels.

    Raises:
        Any error of ``pieces`` or of a check. RuntimeError if the shapes differ, with the name of the piece, or if a load
        cannot be copied, with the name of its first piece.
    """
    carrier = Straight() if device.type == "cpu" else OntoGpu(device, kernels)
    threads = max(1, min(threads, THREADS))
    waiting: collections.deque[Future[int]] = collections.deque()

    def loads() -> Iterator[tuple[Straight | OntoGpu, Load]]:
        for there, some in itertools.groupby(pieces, lambda piece: piece.target.device.type == device.type):
            own = carrier if there else Straight()
            yield from ((own, load) for load in own.loads(some))

    def finish_one() -> None:
        copied = waiting.popleft().result()
        if progress is not None:
            progress(copied)

    try:
        with pool("copying", threads) as executor:
            try:
                for own, load in loads():
                    if len(waiting) == 2 * threads:
                        finish_one()
                    waiting.append(executor.submit(_carry, own, load))
                while waiting:
                    finish_one()
            finally:
                # After an error or an interrupt, loads that have not started are dropped.
                for future in waiting:
                    future.cancel()
    finally:
        carrier.finish()


def _carry(carrier: Straight | OntoGpu, load: Load) -> int:
    """Check and copy one load; returns the number of its bytes."""
    for check in load.checks:
        check()
    try:
        with torch.no_grad():
            carrier.carry(load)
    except RuntimeError as error:
        raise RuntimeError(f"{load.name} and what follows cannot be copied: {error}") from error
    return load.bytes


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
        sources: (index of the first number in the buffer, the bytes to copy there).
        parts: (index of the first number in the buffer, the target [n] of any dtype).
        matrices: (index of the first number in the buffer, the target [r, C], the scale [r]), whole rows to quantise.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(name)
        self.dtype, self.used = dtype, 0
        self.sources: list[tuple[int, np.ndarray]] = []
        self.parts: list[tuple[int, Tensor]] = []
        self.matrices: list[tuple[int, Tensor, Tensor]] = []

    def take(self, piece: Piece, start: int, count: int) -> None:
        """Note where the ``count`` numbers of ``piece`` from ``start`` on go, which come next in the buffer."""
        if piece.scale is None:
            target = piece.target.view(-1)
            self.parts.append((self.used, target if count == len(target) else target[start : start + count]))
        else:
            columns = piece.target.shape[-1]
            rows = slice(start // columns, (start + count) // columns)
            self.matrices.append((self.used, piece.target[rows], piece.scale[rows]))


class Straight:
    """Copies on the CPU: each tensor goes straight to its target."""

    @staticmethod
    def loads(pieces: Iterable[Piece]) -> Iterator[Tensors]:
        load: Tensors | None = None
        for piece in pieces:
            check(piece)
            load = load or Tensors(piece.name)
            load.pieces.append(piece)
            load.take_check(piece)
            load.bytes += piece.source.nbytes
            if load.bytes >= LOAD_BYTES:
                yield load
                load = None
        if load is not None:
            yield load

    @staticmethod
    def carry(load: Tensors) -> None:
        for piece in load.pieces:
            if piece.scale is None:
                piece.target.copy_(piece.source)
            else:
                quantise(piece.source, piece.target, piece.scale)

    @staticmethod
    def finish() -> None:
        """Do nothing, since the copies are already complete."""


class OntoGpu:
    """Copies to a GPU, with a separate stream for each thread."""

    def __init__(self, device: torch.device, kernels: bool):
        self.kernels = kernels
        self.device, self.caller = device, torch.cuda.current_stream(device)
        self.mine = threading.local()
        # The streams of all threads: the GPU may still read a buffer after its thread has ended.
        self.streams: list[torch.cuda.Stream] = []
        self.buffers: list[Pinned] = []

    @staticmethod
    def loads(pieces: Iterable[Piece]) -> Iterator[Shared]:
        return packed(pieces, LOAD_BYTES)

    def carry(self, load: Shared) -> None:
        mine = self.mine
        if not hasattr(mine, "stream"):
            mine.stream = torch.cuda.Stream(self.device)
            self.streams.append(mine.stream)
            # The memory of the targets may still be in use on the caller's stream.
            mine.stream.wait_stream(self.caller)
        with torch.cuda.device(self.device), torch.cuda.stream(mine.stream):
            if not hasattr(mine, "ring"):
                buffers = [Pinned(LOAD_BYTES, self.device, self.kernels) for _ in range(BUFFERS)]
                self.buffers += buffers
                mine.ring = itertools.cycle(buffers)
            staged(load, next(mine.ring))

    def finish(self) -> None:
        """Wait until all loads have arrived, so that the targets can be freed safely afterwards."""
        for stream in self.streams:
            stream.synchronize()


def check(piece: Piece) -> None:
    if piece.source.shape != piece.target.shape:
        wanted, got = list(piece.target.shape), list(piece.source.shape)
        raise RuntimeError(f"{piece.name} cannot be copied: its shape is {got}, expected {wanted}")


def packed(pieces: Iterable[Piece], size: int) -> Iterator[Shared]:
    """Loads of up to ``size`` bytes; a load may hold several pieces, and a large piece takes several loads.

    Raises:
        RuntimeError: a row that is to be quantised is larger than ``size``.
    """
    load: Shared | None = None
    for piece in pieces:
        check(piece)
        numbers = piece.source.contiguous().view(-1)
        source, each = numbers.view(torch.uint8).numpy(), numbers.itemsize
        room, step = size // each, ALIGNMENT // each
        # A part of a matrix that is quantised consists of whole rows.
        whole = 1 if piece.scale is None else piece.source.shape[-1]
        if whole > room:
            raise RuntimeError(f"{piece.name} cannot be quantised: a row of it has more than {size:,} bytes")
        start, total = 0, numbers.numel()
        unchecked = True
        while start < total:
            full = load is not None and (room - load.used < whole or len(load.matrices) == MATRICES)
            if load is None or load.dtype != numbers.dtype or full:
                if load is not None:
                    yield load
                load = Shared(piece.name, numbers.dtype)
            count = min(total - start, (room - load.used) // whole * whole)
            if unchecked:
                load.take_check(piece)
                unchecked = False
            load.take(piece, start, count)
            load.sources.append((load.used, source[start * each : (start + count) * each]))
            load.bytes += count * each
            load.used = min(room, -(-(load.used + count) // step) * step)
            start += count
    if load is not None:
        yield load


class Buffer(Protocol):
    """A staging buffer for copies to a device; ``room`` is [bytes] uint8."""

    room: np.ndarray

    def send(self, load: Shared) -> None:
        """Start the transfer of the data of ``load`` in ``room``, and the copies to its targets."""

    def wait(self) -> None:
        """Wait until the previous transfer, if any, is complete."""


class Pinned:
    """A :class:`Buffer` in pinned memory, which the GPU reads in the order of the current stream."""

    def __init__(self, size: int, device: torch.device, kernels: bool):
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.room = self.memory.numpy()
        self.landed = Landed(torch.empty(size, dtype=torch.uint8, device=device), kernels)
        # With a blocking event, a waiting thread does not occupy a core.
        self.fetched = torch.cuda.Event(blocking=True)

    def send(self, load: Shared) -> None:
        used = load.used * load.dtype.itemsize
        self.landed.memory[:used].copy_(self.memory[:used], non_blocking=True)
        self.landed.expect(load)
        self.fetched.record()
        self.landed.arrived(load)

    def wait(self) -> None:
        self.fetched.synchronize()


def staged(load: Shared, buffer: Buffer) -> None:
    buffer.wait()
    each = load.dtype.itemsize
    for start, source in load.sources:
        # The copy of NumPy is a memcpy without Python's lock; a copy by torch would start further threads.
        np.copyto(buffer.room[start * each : start * each + len(source)], source)
    buffer.send(load)


class Landed:
    """A buffer's memory on the device of the targets, from which loads go to their targets.

    Matrices are quantised one by one, or all of a load at once in one kernel (moekit/nn/kernels/rounding.py).

    Attributes:
        memory: [bytes] uint8.
        at_once: whether one kernel quantises all matrices of the load that is expected.
    """

    def __init__(self, memory: Tensor, kernels: bool = False):
        self.memory, self.kernels, self.at_once = memory, kernels, False
        if kernels:
            # Triton is imported only where it is used.
            from moekit.nn.kernels import rounding

            self.rounding = rounding
            width = rounding.ENTRIES.value
            self.table = torch.empty(MATRICES, width, dtype=torch.int64, pin_memory=memory.is_cuda)
            self.sent = torch.empty_like(self.table, device=memory.device)

    def expect(self, load: Shared) -> None:
        """Decide how the matrices of ``load`` are quantised, and send what one kernel for all reads of each."""
        self.at_once = bool(self.kernels and load.matrices) and self.rounding.able(
            self.memory.device, load.dtype, load.matrices[0][1].dtype
        )
        if self.at_once:
            base, each = self.memory.data_ptr(), load.dtype.itemsize
            matrices = [(base + start * each, target, scale) for start, target, scale in load.matrices]
            self.table.numpy()[: len(matrices)] = self.rounding.entries(matrices)
            self.sent.copy_(self.table, non_blocking=True)

    def arrived(self, load: Shared) -> None:
        """Copy and quantise ``load``, which is in the memory and was expected, to its targets."""
        if load.parts:
            torch._foreach_copy_([target for _, target in load.parts], dealt(self.memory, load))
        if self.at_once:
            shapes = [target.shape for _, target, _ in load.matrices]
            rows, columns = sum(rows for rows, _ in shapes), max(columns for _, columns in shapes)
            kind = load.matrices[0][1].dtype
            self.rounding.quantise(self.sent, len(shapes), rows, columns, load.dtype, kind)
            return
        numbers = self.memory[: load.used * load.dtype.itemsize].view(load.dtype)
        for start, target, scale in load.matrices:
            quantise(numbers[start : start + target.numel()].view(target.shape), target, scale)


def dealt(memory: Tensor, load: Shared) -> list[Tensor]:
    """The numbers of each part of ``load`` in a buffer's memory [bytes] uint8; one call splits off all parts and gaps."""
    sizes, end = [], 0
    for start, target in load.parts:
        sizes += [start - end, len(target)]
        end = start + len(target)
    numbers = memory[: load.used * load.dtype.itemsize].view(load.dtype)
    return list(numbers.split([*sizes, load.used - end])[1::2])
