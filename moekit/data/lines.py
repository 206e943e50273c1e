"""Processing of large text files in blocks of whole lines, by several processes, with bounded memory."""

from __future__ import annotations

import itertools
import mmap
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

Result = TypeVar("Result")

# Bytes of a block: large compared with the cost of sending it to a process, and small compared with memory and caches.
BLOCK = 1 << 19
# The limit in seconds for one block, which is far more than a block takes.
PATIENCE = 3600.0
LINE_END = re.compile(rb"\r\n?|\n")


class Block(NamedTuple):
    """The bytes ``start`` to ``end`` of a file; each offset is at the end of a line or of the file."""

    path: Path
    start: int
    end: int

    def read(self) -> list[str]:
        """The lines as fairseq reads them: without their ends, which are only ``\\n``, ``\\r\\n`` or ``\\r``.

        Raises:
            ValueError: the file is not UTF-8, which fairseq cannot read either; the error names the line and the byte.
        """
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.end - self.start)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            at = self.start + error.start
            raise ValueError(
                f"{self.path}, line {_line_number(self.path, at)}: byte {at} ({data[error.start]:#04x}) is not UTF-8; "
                "convert the file (iconv -f <its encoding> -t utf-8), or drop such bytes (iconv -c -t utf-8)"
            ) from None
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        # The empty text after the last line end is not a line.
        if lines[-1] == "":
            lines.pop()
        return lines


def blocks(path: Path, size: int = BLOCK) -> Iterator[Block]:
    """``path`` cut at line ends into blocks of about ``size`` bytes; a longer line stays whole."""
    start = 0
    with open(path, "rb") as file:
        while end := _line_end(file, start, size):
            yield Block(path, start, end)
            start = end


def _line_end(file: BinaryIO, start: int, size: int) -> int:
    """The end of the line with the last of the ``size`` bytes from ``start`` on; 0 if the file has no such bytes."""
    at = file.seek(start + size - 1)
    while chunk := file.read(1 << 16):
        if found := LINE_END.search(chunk):
            half = found[0] == b"\r" and found.end() == len(chunk) and file.read(1) == b"\n"
            return at + found.end() + half
        at += len(chunk)
    length = file.seek(0, os.SEEK_END)
    return length if length > start else 0


def in_order(
    work: Callable[[Block], Result], todo: Iterable[Block], workers: int
) -> Iterator[tuple[Block, Result]]:
    """Each block with ``work(block)``, in the order of ``todo``; at most a few results wait in memory.

    Args:
        work: a function that pickle can send to another process.
        workers: the number of processes; with one worker or one block, this process does the work.
    """
    todo = iter(todo)
    first = list(itertools.islice(todo, 2))
    todo = itertools.chain(first, todo)
    if workers == 1 or len(first) < 2:
        for block in todo:
            yield block, work(block)
        return
    pool = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_start_worker)
    try:
        waiting: deque = deque()
        for block in todo:
            waiting.append((block, pool.submit(work, block)))
            if len(waiting) > 2 * workers:
                block, result = waiting.popleft()
                yield block, result.result(PATIENCE)
        for block, result in waiting:
            yield block, result.result(PATIENCE)
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """The start method of workers: a fork of a server with only this package, without notebook threads or a GPU."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["moekit.data.encode", "moekit.data.binarise"])
    return context


def _start_worker() -> None:
    """Prepare a worker: it ignores interrupts, which the parent handles, and it ends when the parent ends in any way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _line_number(path: Path, at: int) -> int:
    """The number, from 1, of the line with byte ``at``."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return 1 + sum(1 for _ in LINE_END.finditer(data, 0, at))
