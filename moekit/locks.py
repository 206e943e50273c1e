"""Whether somebody still holds a file or folder, and whether a process has ended."""

from __future__ import annotations

import fcntl
import os
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


def has_ended(pid: int) -> bool:
    """Whether no process of this machine has the number ``pid``."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
