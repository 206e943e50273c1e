"""One notebook at a time in one folder."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".moekit.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the system frees it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it, and the message names that process; or it is no folder to write to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / NAME, "a+")
    except OSError as error:
        raise ValueError(
            f"data_dir={str(folder)!r} cannot be written to ({error.strerror}); choose another"
        ) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is being prepared by {holder}; wait for it to finish, or choose another data_dir"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
