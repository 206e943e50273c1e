"""Tensors from memory-mapped files to where they belong, by several threads, each byte touched once by a core.

On the CPU a thread copies straight into the parameter. For a GPU it fills pinned buffers, from which the GPU fetches
them while the thread fills the next: so the files' pages, the cores and the bus work at the same time.

What it costs: reading a mapped page that is in the page cache is a copy at the speed of memory (8 GB/s a core, 27 GB/s
with eight on the machine of an H200; asking the kernel for the pages in advance, ``MADV_POPULATE_READ``, or ``pread`` are
no faster). Python is the cost: the 15B has 12,500 tensors, half of them a few kilobytes, and each call of torch
releases Python's lock and has to wait for it again. So one thread does what has to be done for each tensor, and
the others copy loads of 16 MiB, which go to the GPU as a whole, where one call deals out the tensors in them.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# More threads do not make the bus faster.
THREADS = 5
# Buffers of each thread, and the bytes of each buffer.
BUFFERS, LOAD_BYTES = 2, 16 << 20
# Bytes to which a tensor is aligned in a buffer, as the GPU prefers it.
ALIGNMENT = 256


@dataclass(frozen=True)
class Piece:
    """``source``, on the CPU, is to be copied to ``target`` of the same shape, which is contiguous; types may differ.

    The thread that copies it calls ``check`` before, which may raise.
    """

    # The tensor's name in errors.
    name: str
    source: Tensor
    target: Tensor
    check: Callable[[], None] | None = None


def copy(
    pieces: Iterable[Piece],
    device: torch.device,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy all pieces; what is copied is there when this returns.

    Args:
        pieces: made one after the other in this thread, while others copy.
        device: of all targets.
        threads: at most this many, and at most ``THREADS``.
        progress: called in this thread with the bytes copied since the last call.

    Raises:
        Whatever ``pieces`` or a check raises; RuntimeError with the piece's name if the shapes differ, or with that of
        the first of a load that cannot be copied.
    """
    carrier = Straight() if device.type == "cpu" else OntoGpu(device)
    threads = max(1, min(threads, THREADS))
    waiting: collections.deque[Future[int]] = collections.deque()

    def finish_one() -> None:
        copied = waiting.popleft().result()
        if progress is not None:
            progress(copied)

    threads_of_torch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "copying", torch.set_num_threads, (1,)) as pool:
            try:
                for load in carrier.loads(pieces):
                    if len(waiting) == 2 * threads:
                        finish_one()
                    waiting.append(pool.submit(_carry, carrier, load))
                while waiting:
                    finish_one()
            finally:
                # After an error or an interrupt, loads that no thread has begun are dropped.
                for future in waiting:
                    future.cancel()
    finally:
        carrier.finish()
        # A thread of torch's takes over the number that was set last, in whichever thread.
        torch.set_num_threads(threads_of_torch)


def _carry(carrier: Straight | OntoGpu, load: Load) -> int:
    """Check and copy one load; returns its bytes."""
    for check in load.checks:
        check()
    try:
        with torch.no_grad():
            carrier.carry(load)
    except RuntimeError as error:
        raise RuntimeError(f"{load.name} and what follows cannot be copied: {error}") from error
    return load.bytes


class Load:
    """What is copied together: tensors, or what shares a buffer.

    Attributes:
        name: of the first piece.
        bytes: of the sources.
        checks: to be made before anything is copied.
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
    """What shares a buffer.

    Attributes:
        dtype: of all its numbers.
        used: numbers that the buffer holds, gaps included.
        sources: (first number's place in the buffer, the bytes that go there).
        parts: (first number's place in the buffer, where they belong: [n], of whatever type).
    """

    def __init__(self, name: str, dtype: torch.dtype):
        super().__init__(name)
        self.dtype, self.used = dtype, 0
        self.sources: list[tuple[int, np.ndarray]] = []
        self.parts: list[tuple[int, Tensor]] = []


class Straight:
    """To the CPU: each tensor to its place."""

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
            piece.target.copy_(piece.source)

    @staticmethod
    def finish() -> None:
        """Nothing is left to wait for."""


class OntoGpu:
    """To a GPU, on a stream of its own for each thread."""

    def __init__(self, device: torch.device):
        self.device, self.caller = device, torch.cuda.current_stream(device)
        self.mine = threading.local()
        # Of all threads, since the GPU may still read a buffer when its thread has ended.
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
            # The targets' memory may still be in use there.
            mine.stream.wait_stream(self.caller)
        with torch.cuda.device(self.device), torch.cuda.stream(mine.stream):
            if not hasattr(mine, "ring"):
                buffers = [Pinned(LOAD_BYTES, self.device) for _ in range(BUFFERS)]
                self.buffers += buffers
                mine.ring = itertools.cycle(buffers)
            staged(load, next(mine.ring))

    def finish(self) -> None:
        """Wait until all loads have arrived; nothing is under way to a target that may be gone soon."""
        for stream in self.streams:
            stream.synchronize()


def check(piece: Piece) -> None:
    if piece.source.shape != piece.target.shape:
        wanted, got = list(piece.target.shape), list(piece.source.shape)
        raise RuntimeError(f"{piece.name} cannot be copied: its shape is {got}, expected {wanted}")


def packed(pieces: Iterable[Piece], size: int) -> Iterator[Shared]:
    """Loads of up to ``size`` bytes, several pieces in one, a large piece in several."""
    load: Shared | None = None
    for piece in pieces:
        check(piece)
        numbers, target = piece.source.contiguous().view(-1), piece.target.view(-1)
        source, each = numbers.view(torch.uint8).numpy(), numbers.itemsize
        room, step = size // each, ALIGNMENT // each
        start, total = 0, numbers.numel()
        unchecked = True
        while start < total:
            if load is None or load.dtype != numbers.dtype or load.used == room:
                if load is not None:
                    yield load
                load = Shared(piece.name, numbers.dtype)
            count = min(total - start, room - load.used)
            part = target if count == total else target[start : start + count]
            if unchecked:
                load.take_check(piece)
                unchecked = False
            load.parts.append((load.used, part))
            load.sources.append((load.used, source[start * each : (start + count) * each]))
            load.bytes += count * each
            load.used = min(room, -(-(load.used + count) // step) * step)
            start += count
    if load is not None:
        yield load


class Buffer(Protocol):
    """Memory on its way to a device."""

    room: np.ndarray  # [bytes] uint8

    def send(self, load: Shared) -> None:
        """Have what ``load`` put into ``room`` fetched, and dealt out to where it belongs."""

    def wait(self) -> None:
        """Until what was sent before, if anything, has been fetched."""


class Pinned:
    """A :class:`Buffer` that the GPU reads by itself, in the order of the current stream."""

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.room = self.memory.numpy()
        self.landed = torch.empty(size, dtype=torch.uint8, device=device)
        # A waiting thread leaves its core to others.
        self.fetched = torch.cuda.Event(blocking=True)

    def send(self, load: Shared) -> None:
        used = load.used * load.dtype.itemsize
        self.landed[:used].copy_(self.memory[:used], non_blocking=True)
        self.fetched.record()
        torch._foreach_copy_([target for _, target in load.parts], dealt(self.landed, load))

    def wait(self) -> None:
        self.fetched.synchronize()


def staged(load: Shared, buffer: Buffer) -> None:
    buffer.wait()
    each = load.dtype.itemsize
    for start, source in load.sources:
        # numpy's copy is a memcpy without Python's lock; torch's would bring threads of its own.
        np.copyto(buffer.room[start * each : start * each + len(source)], source)
    buffer.send(load)


def dealt(memory: Tensor, load: Shared) -> list[Tensor]:
    """The numbers of each part of ``load`` in a buffer's memory [bytes] uint8: one call cuts out all, gaps too."""
    sizes, end = [], 0
    for start, target in load.parts:
        sizes += [start - end, len(target)]
        end = start + len(target)
    numbers = memory[: load.used * load.dtype.itemsize].view(load.dtype)
    return list(numbers.split([*sizes, load.used - end])[1::2])
