"""Copies of tensors from memory-mapped files to their parameters, by several threads; a core reads each byte once.

On the CPU, a thread copies straight into the parameter. For a GPU, threads fill pinned buffers, and the GPU fetches a buffer
while they fill others. So page reads, copies and transfers happen at the same time.

Reading a mapped page in the page cache is as fast as a copy in memory. Each call of torch or NumPy releases Python's lock and
waits for it again, and the 15B has 12,500 tensors, half of them with a few kilobytes. So the caller's thread does all that is
Python: it packs tensors into loads of 32 MiB, in which neighbours in a file are one copy, and sends a load that is filled to
the GPU, where one call copies its tensors to their places. The other threads wait for a buffer and fill it, and do no more.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from moekit.checkpoint.loads import Load, Piece, Shared, Tensors, check_shape
from moekit.checkpoint.stretch import Stretch, stretch_of
from moekit.checkpoint.threads import pool, switching
from moekit.nn.quantise import quantise

# The most threads, the buffers beyond one for each of them, and the bytes of each buffer.
MOST_THREADS = 15
SPARE, LOAD_BYTES = 4, 32 << 20
# Seconds after which the caller's thread, which is busy with Python, lets others have Python's lock.
SWITCH = 0.0005
# The most matrices of a load that are quantised.
MATRICES = 64


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
        threads: the most threads; ``MOST_THREADS`` is a limit, too.
        progress: called in this thread with the bytes copied since the last call.
        kernels: whether the device may compute with Triton's kernels.

    Raises:
        Any error of ``pieces`` or of a check. RuntimeError if the shapes differ, with the name of the piece, or if a load
        cannot be copied, with the name of its first piece.
    """
    threads = max(1, min(threads, MOST_THREADS))
    carrier = Straight() if device.type == "cpu" else OntoGpu(device, kernels, threads + SPARE)
    # Fewer loads than there are buffers, so that a buffer is sent before it is filled again.
    most = threads + SPARE - 2
    waiting: collections.deque[tuple[Straight | OntoGpu, Load, Future[None]]] = collections.deque()

    def loads() -> Iterator[tuple[Straight | OntoGpu, Load]]:
        for there, some in itertools.groupby(pieces, lambda piece: piece.target.device.type == device.type):
            own = carrier if there else Straight()
            yield from ((own, load) for load in own.loads(some))

    def finish_one() -> None:
        own, load, carried = waiting.popleft()
        carried.result()
        _do(own.send, load)
        if progress is not None:
            progress(load.bytes)

    try:
        with switching(SWITCH), pool("copying", threads) as executor, carrier.in_order(), torch.no_grad():
            try:
                for own, load in loads():
                    while waiting and (len(waiting) == most or waiting[0][-1].done()):
                        finish_one()
                    waiting.append((own, load, executor.submit(_carry, own, load)))
                while waiting:
                    finish_one()
            finally:
                # After an error or an interrupt, loads that have not started are dropped.
                for _, _, carried in waiting:
                    carried.cancel()
    finally:
        carrier.finish()


def _carry(carrier: Straight | OntoGpu, load: Load) -> None:
    """Check one load, and do with it what takes long."""
    for check in load.checks:
        check()
    _do(carrier.carry, load)


def _do(what: Callable[[Load], None], load: Load) -> None:
    """An error of torch tells what was copied."""
    try:
        what(load)
    except RuntimeError as error:
        raise RuntimeError(f"{load.name} and what follows cannot be copied: {error}") from error


class Straight:
    """Copies on the CPU: each tensor goes straight to its target."""

    @staticmethod
    def loads(pieces: Iterable[Piece]) -> Iterator[Tensors]:
        load: Tensors | None = None
        for piece in pieces:
            check_shape(piece)
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
    @torch.no_grad()
    def carry(load: Tensors) -> None:
        for piece in load.pieces:
            source = piece.source.tensor() if isinstance(piece.source, Stretch) else piece.source
            if piece.scale is None:
                piece.target.view(source.shape).copy_(source)
            else:
                quantise(source, piece.target, piece.scale)

    @staticmethod
    def in_order() -> contextlib.AbstractContextManager[None]:
        """As :meth:`send`."""
        return contextlib.nullcontext()

    @staticmethod
    def send(load: Tensors) -> None:
        """Do nothing, since the copies are already complete."""

    @staticmethod
    def finish() -> None:
        """As :meth:`send`."""


class OntoGpu:
    """Copies to a GPU through ``buffers`` in turn, in the order of a stream of its own."""

    def __init__(self, device: torch.device, kernels: bool, buffers: int):
        self.device, self.stream = device, torch.cuda.Stream(device)
        # The memory of the targets may still be in use on the caller's stream.
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with self.in_order():
            # In this order a load has left the memory where it lands before the next one arrives.
            memory = torch.empty(LOAD_BYTES, dtype=torch.uint8, device=device)
            ring = [Pinned(Landed(memory, kernels), self.stream) for _ in range(buffers)]
            self.ring = itertools.cycle(ring)

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        """In this block, what this thread asks of the device is in the order of the stream."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def loads(self, pieces: Iterable[Piece]) -> Iterator[Shared]:
        for load in packed(pieces, LOAD_BYTES):
            load.buffer = next(self.ring)
            yield load

    @staticmethod
    def carry(load: Shared) -> None:
        gather(load)

    @staticmethod
    def send(load: Shared) -> None:
        load.buffer.send(load)

    def finish(self) -> None:
        """Wait until all loads have arrived, so that the targets can be freed safely afterwards."""
        self.stream.synchronize()


def packed(pieces: Iterable[Piece], size: int) -> Iterator[Shared]:
    """Loads of up to ``size`` bytes; a load may hold several pieces, and a large piece takes several loads.

    Raises:
        RuntimeError: a row that is to be quantised is larger than ``size``.
    """
    load: Shared | None = None
    for piece in pieces:
        check_shape(piece)
        memory, begin, dtype, shape = (
            piece.source if isinstance(piece.source, Stretch) else stretch_of(piece.source)
        )
        each = dtype.itemsize
        room = size // each
        # A part of a matrix that is quantised consists of whole rows.
        whole = 1 if piece.scale is None else shape[-1]
        if whole > room:
            raise RuntimeError(f"{piece.name} cannot be quantised: a row of it has more than {size:,} bytes")
        start, total = 0, math.prod(shape)
        while start < total:
            first = begin + start * each
            at = load.place(memory, first) if load is not None and load.dtype is dtype else room
            if load is None or room - at < whole or len(load.matrices) == MATRICES:
                if load is not None:
                    yield load
                load, at = Shared(piece.name, dtype), 0
            count = min(total - start, (room - at) // whole * whole)
            if start == 0:
                load.take_check(piece)
            load.take(piece, at, start, count)
            load.copy(at, memory, first, count * each)
            start += count
    if load is not None:
        yield load


class Pinned:
    """A :class:`Buffer` in pinned memory, which the GPU reads in the order of ``stream``, the current one."""

    def __init__(self, landed: Landed, stream: torch.cuda.Stream):
        self.landed, self.stream = landed, stream
        # With a blocking event, a waiting thread does not occupy a core.
        self.fetched = torch.cuda.Event(blocking=True)
        self.memory: Tensor | None = None

    def send(self, load: Shared) -> None:
        used = load.used * load.dtype.itemsize
        self.landed.memory[:used].copy_(self.memory[:used], non_blocking=True)
        self.landed.expect(load)
        self.fetched.record(self.stream)
        self.landed.arrived(load)

    def wait(self) -> None:
        if self.memory is not None:
            # Mostly it is, and a thread that waits has to ask for Python's lock again.
            if not self.fetched.query():
                self.fetched.synchronize()
            return
        # Pinning takes milliseconds, so the thread does it that fills the buffer first.
        with torch.cuda.device(self.landed.memory.device):
            self.memory = torch.empty(len(self.landed.memory), dtype=torch.uint8, pin_memory=True)
        self.room = self.memory.numpy()


def gather(load: Shared) -> None:
    """Copy what is in ``load`` into its buffer, once that is free."""
    load.buffer.wait()
    room, each = load.buffer.room, load.each
    for source in load.sources:
        first = source.at * each
        # The copy of NumPy is a memcpy without Python's lock; a copy by torch would start further threads.
        np.copyto(room[first : first + len(source)], source.memory[source.start : source.stop])


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


def dealt(memory: Tensor, load: Shared) -> Sequence[Tensor]:
    """The numbers of each part of ``load`` in a buffer's memory [bytes] uint8; one call splits off all parts and gaps."""
    sizes, end = [], 0
    for start, target in load.parts:
        count = target.numel()
        sizes += [start - end, count]
        end = start + count
    numbers = memory[: load.used * load.dtype.itemsize].view(load.dtype)
    return torch.split_with_sizes(numbers, [*sizes, load.used - end])[1::2]
