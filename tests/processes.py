"""Whether processes have ended."""

import time
from collections.abc import Collection

import psutil


def gone(pids: Collection[int], within: float = 10.0) -> bool:
    """Whether all these processes have ended within so many seconds, or have nobody who asks how."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not any(map(_there, pids)):
            return True
        time.sleep(0.02)
    return False


def _there(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
