"""A lock for a folder, so that only one process writes to it at a time."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moekit import locks

NAME = ".moekit.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this process; the system releases the lock when the process ends in any way.

    Some file systems have no locks: there nothing keeps other processes out.

    Raises:
        ValueError: another process holds the lock, and the message names that process; or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / NAME, "a+")
    except OSError as error:
        raise ValueError(
            f"data_dir={str(folder)!r} cannot be written to ({error.strerror}); choose another"
        ) from None
    with opened as file:
        if locks.take(file) is False:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is being prepared by {holder}; wait for it to finish, or choose another data_dir"
            )
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
