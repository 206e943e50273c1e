"""Tensors from memory-mapped files to where they belong, by several threads, each byte touched once by a core.

On the CPU a thread copies straight into the parameter. For a GPU it fills pinned buffers, from which the GPU fetches
them while the thread fills the next: so the files' pages, the cores and the bus work at the same time.

What it costs: reading a mapped page that is in the page cache is a copy at the speed of memory (10 GB/s a core and
more; asking the kernel for the pages in advance, ``MADV_POPULATE_READ``, makes it slower, and ``pread`` is no faster).
A few cores so outrun the bus. What is dear is Python: 15,000 tensors, half of them a few kilobytes, each with some calls
that hold its lock or have to take it again while others want it. So tensors share a buffer, which goes to the GPU as a
whole, and from where it lands there one call deals out all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

THREADS = 8  # more do not make the bus faster
BUFFERS, BUFFER_BYTES = 2, 16 << 20  # of each thread
ALIGNMENT = 256  # of what lies in a buffer: any number type, and good for the GPU
REPORT_BYTES = 16 << 20


@dataclass(frozen=True)
class Piece:
    """``source``, on the CPU, is to be copied to ``target`` of the same shape, which is contiguous; types may differ."""

    name: str  # for errors
    source: Tensor
    target: Tensor


def copy(
    groups: Sequence[Callable[[], Iterable[Piece]]],
    device: torch.device,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy all pieces of all groups; what is copied is there when this returns.

    Args:
        groups: each is called in one of the threads and gives its pieces, for example those of a file that it opens.
        device: of all targets.
        threads: at most this many, and at most ``THREADS``.
        progress: called in this thread with the bytes copied since the last call.

    Raises:
        Whatever a group raises, and RuntimeError with the piece's name if it cannot be copied. The others stop.
    """
    waiting: queue.SimpleQueue[Callable[[], Iterable[Piece]]] = queue.SimpleQueue()
    said: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()  # bytes, an error, or "done"
    stop = threading.Event()
    for group in groups:
        waiting.put(group)
    carrier = onto_gpu(device) if device.type == "cuda" else straight()

    def work() -> None:
        try:
            with torch.no_grad(), carrier() as carry:
                fresh = 0
                for piece in _pieces(waiting):
                    if stop.is_set():
                        break
                    try:
                        carry(piece)
                    except RuntimeError as error:
                        raise RuntimeError(f"{piece.name} cannot be copied: {error}") from error
                    fresh += piece.source.nbytes
                    if fresh >= REPORT_BYTES:
                        said.put(fresh)
                        fresh = 0
            said.put(fresh)
        except BaseException as error:
            said.put(error)
        finally:
            said.put(None)

    team = [
        threading.Thread(target=work, name=f"copying-{i}", daemon=True)
        for i in range(max(1, min(threads, THREADS, len(groups))))
    ]
    threads_of_torch = torch.get_num_threads()
    for thread in team:
        thread.start()
    failure: BaseException | None = None
    working = len(team)
    try:
        while working:
            word = said.get()
            if isinstance(word, BaseException):
                failure = failure or word
                stop.set()
            elif word is None:
                working -= 1
            elif word and progress is not None:
                progress(word)
    finally:  # an interrupt, too
        stop.set()
        for thread in team:
            thread.join()
        torch.set_num_threads(threads_of_torch)  # or threads to come would take over what these chose
    if failure is not None:
        raise failure


def _pieces(waiting: queue.SimpleQueue) -> Iterator[Piece]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield from waiting.get_nowait()()


Carrier = Callable[[], contextlib.AbstractContextManager[Callable[[Piece], None]]]  # entered by each thread


def straight() -> Carrier:
    """To the CPU."""

    @contextlib.contextmanager
    def carrier() -> Iterator[Callable[[Piece], None]]:
        torch.set_num_threads(1)  # of this thread: it is one of several
        yield lambda piece: piece.target.copy_(piece.source)

    return carrier


def onto_gpu(device: torch.device) -> Carrier:
    """To a GPU, on a stream of its own for each thread; on leaving, all has arrived."""
    caller = torch.cuda.current_stream(device)

    @contextlib.contextmanager
    def carrier() -> Iterator[Callable[[Piece], None]]:
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_stream(caller)  # where the targets' memory may still be in use
            staging = Staging([Pinned(BUFFER_BYTES, device) for _ in range(BUFFERS)])
            yield staging.carry
            staging.send()
            stream.synchronize()

    return carrier


class Part(NamedTuple):
    """Numbers of type ``dtype`` that lie from byte ``start`` on in a buffer, and where they belong."""

    start: int
    dtype: torch.dtype
    target: Tensor  # [n], of whatever type

    def of(self, memory: Tensor) -> Tensor:
        return memory[self.start : self.start + len(self.target) * self.dtype.itemsize].view(self.dtype)


class Buffer(Protocol):
    """Memory on its way to a device: filled, sent, and free again when it has been fetched."""

    memory: Tensor  # [bytes] uint8

    def send(self, used: int, parts: Sequence[Part]) -> None:
        """Have the first ``used`` bytes of ``memory`` fetched, and ``parts`` of them copied to their targets."""

    def wait(self) -> None:
        """Until what was sent before, if anything, has been fetched."""


class Pinned:
    """A :class:`Buffer` that the GPU reads by itself, in the order of the current stream."""

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.landed = torch.empty(size, dtype=torch.uint8, device=device)
        self.fetched = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others

    def send(self, used: int, parts: Sequence[Part]) -> None:
        self.landed[:used].copy_(self.memory[:used], non_blocking=True)
        self.fetched.record()
        if parts:
            torch._foreach_copy_([part.target for part in parts], [part.of(self.landed) for part in parts])

    def wait(self) -> None:
        self.fetched.synchronize()


class Staging:
    """Buffers of one size in turn, each shared by small pieces, several for a large one."""

    def __init__(self, buffers: Sequence[Buffer]):
        self.ring = itertools.cycle([(buffer, buffer.memory.numpy()) for buffer in buffers])
        self.size = len(buffers[0].memory)
        self.parts: list[Part] = []
        self.turn()

    def carry(self, piece: Piece) -> None:
        if piece.source.shape != piece.target.shape:
            wanted, got = list(piece.target.shape), list(piece.source.shape)
            raise RuntimeError(f"its shape is {got}, expected {wanted}")
        numbers, target = piece.source.contiguous().view(-1), piece.target.view(-1)
        source, each = numbers.view(torch.uint8).numpy(), numbers.itemsize
        start, total = 0, numbers.numel()
        while start < total:
            count = min(total - start, (self.size - self.used) // each)
            if count == 0:
                self.send()
                self.turn()
                continue
            # numpy's copy is a memcpy without Python's lock; torch's would bring threads of its own.
            end = self.used + count * each
            np.copyto(self.room[self.used : end], source[start * each : (start + count) * each])
            self.parts.append(Part(self.used, numbers.dtype, target[start : start + count]))
            self.used = min(self.size, -(-end // ALIGNMENT) * ALIGNMENT)
            start += count

    def send(self) -> None:
        """Send what the buffer holds."""
        self.buffer.send(self.used, self.parts)
        self.parts = []

    def turn(self) -> None:
        """Go on with the next buffer."""
        self.buffer, self.room = next(self.ring)
        self.buffer.wait()
        self.used = 0
