"""The lock of an open file or folder."""

from __future__ import annotations

import fcntl
from typing import IO


def take(lock: IO[str] | int) -> bool | None:
    """Take the lock of an open file, without waiting; the system releases it when the file is closed or its process ends.

    Returns:
        True: this process has it now. False: another one does. None: the file system has no locks.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
