"""What is read from files, kept until one of them changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Read = TypeVar("Read")


def stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from what it was before; None if the file is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def kept(most: int) -> Callable[[Callable[..., Read]], Callable[..., Read]]:
    """A decorator for a function of paths, which a process calls once for the same files.

    Args:
        most: how many results are kept.
    """

    def decorate(read: Callable[..., Read]) -> Callable[..., Read]:
        @functools.lru_cache(most)
        def of_stamped(files: tuple[Path, ...], stamps: tuple) -> Read:
            return read(*files)

        @functools.wraps(read)
        def of(*files: str | Path) -> Read:
            files = tuple(map(Path, files))
            return of_stamped(files, tuple(map(stamp, files)))

        return of

    return decorate
