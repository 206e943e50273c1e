"""Python in a process of its own; whether processes have ended, and what they have left; a limit for what would hang."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

HERE = Path(__file__).parent


def ran(*arguments: str | Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """What came of Python with these arguments; it finds the project and what stands beside the tests."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


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


def left_in_shared_memory(before: Collection[str], within: float = 2.0) -> set[str]:
    """The names in /dev/shm that are new and stay. What another program has there for a moment is gone after ``within`` seconds."""
    end = time.monotonic() + within
    while (left := set(os.listdir("/dev/shm")) - set(before)) and time.monotonic() < end:
        time.sleep(0.02)
    return left


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """In this block of the main thread, a TimeoutError after so many seconds, also where it waits for a lock."""

    def late(*_: object) -> None:
        raise TimeoutError(f"this takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
