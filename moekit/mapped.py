"""Files that are read through memory: one that is cut meanwhile is an error that names it, and does not end the process.

A page of a mapped file that lies behind the file's new end cannot be read. The system then sends SIGBUS, which ends a process,
such as a notebook's kernel, without a word. Within :func:`whole_files` a handler puts zeros in the place of such pages, so
that what reads goes on, and the block ends with an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import threading
from collections.abc import Iterator

# The layouts below are those of 64-bit Linux.
SUPPORTED = sys.platform == "linux" and ctypes.sizeof(ctypes.c_void_p) == 8
SA_SIGINFO = 4
# the offset of a fault's address in siginfo_t
ADDRESS = 16
MAP_FIXED = 0x10

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """``struct sigaction``."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_lock = threading.Lock()
# blocks in force, over all threads
_blocks = 0
# files that were cut within the blocks in force
_cut: list[str] = []
_before = _Action()


@contextlib.contextmanager
def whole_files() -> Iterator[None]:
    """In this block, a mapped file that becomes shorter while it is read is an error, on Linux.

    Raises:
        ValueError: (at the block's end) a file has become shorter.
    """
    known = _enter()
    try:
        yield
    finally:
        if (found := _leave(known)) is not None:
            raise ValueError(
                f"{found} has become shorter while it was read: fetch or copy it again, and let that end before it is read"
            )


def _enter() -> int:
    global _blocks
    with _lock:
        _blocks += 1
        if SUPPORTED and _blocks == 1:
            action = _Action(handler=ctypes.cast(_on_fault, ctypes.c_void_p), flags=SA_SIGINFO)
            _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_before))
        return len(_cut)


def _leave(known: int) -> str | None:
    """The first file that was cut since ``known`` were."""
    global _blocks
    with _lock:
        _blocks -= 1
        found = _cut[known] if len(_cut) > known else None
        if SUPPORTED and _blocks == 0:
            _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)
            _cut.clear()
        return found


def _fault(number: int, info: int, context: int) -> None:
    """Put zeros from the page that cannot be read to its mapping's end; let any other fault take its course."""
    address = ctypes.c_uint64.from_address(info + ADDRESS).value
    for start, end, path in _mappings():
        if start <= address < end and os.path.isabs(path):
            page = address - address % mmap.PAGESIZE
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
            made = _libc.mmap(page, end - page, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
            if made == page:
                _cut.append(path)
                return
    # Read again, the page faults again, and then whoever was to hear of it before does.
    _libc.sigaction(signal.SIGBUS, ctypes.byref(_before), None)


def _mappings() -> Iterator[tuple[int, int, str]]:
    """First address, end and file of each part of this process's memory."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            start, _, end = fields[0].partition("-")
            path = fields[5].removesuffix(" (deleted)") if len(fields) > 5 else ""
            yield int(start, 16), int(end, 16), path


_on_fault = _Handler(_fault)
if SUPPORTED:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_size_t
    _libc.mmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_ssize_t]
