"""Files that appear whole or not at all, over those of an earlier run.

    with results.together("out") as folder:          # a temporary folder inside out/
        table.to_csv(folder / "table.csv")
        figure.savefig(folder / "figure.png")
    # Here both files lie in out/. Had an error ended the block, out/ would be as before.

The files are written into a temporary folder, flushed to the disk, and then moved to their names one after the other. A
move within a file system replaces a file at once, so that a reader, a kill or a full disk never meets half a file. The
moves are the last step, and the interrupt key waits for them. No file system moves several files at once: a kill between
two moves leaves whole files of two runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moekit.interrupts import hold_interrupts

PREFIX, LOCK = ".moekit-", ".lock"
# seconds after which a temporary folder without a lock was left by a killed run
OLD = 60
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NotWritten(OSError, ValueError):
    """Results could not be written; the files of an earlier run are untouched. Jupyter shows its one sentence."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def together(folder: str | Path, make: bool = True) -> Iterator[Path]:
    """A temporary folder, whose files move to ``folder`` together when the block ends without an error.

    Args:
        make: make ``folder`` where it is missing.

    Raises:
        NotWritten: (an OSError and a ValueError) the folder is missing or cannot be written to, or its disk is full.
    """
    folder = Path(folder).expanduser().resolve()
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        _remove_left_over(folder)
        place = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_process(os.getpid())}", dir=folder))
    except OSError as error:
        raise NotWritten(_sentence(folder, error)) from None
    try:
        with open(place / LOCK, "w") as lock:
            _locked(lock)
            yield place
            _move(place, folder)
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(_sentence(folder, error)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def whole(path: str | Path, make: bool = False) -> Iterator[Path]:
    """The temporary path of one file, which moves to ``path`` when the block ends without an error.

    Args:
        make: make the folder of ``path`` where it is missing.

    Raises:
        NotWritten: as :func:`together`.
    """
    path = Path(path).expanduser().resolve()
    with together(path.parent, make) as folder:
        yield folder / path.name


def _move(place: Path, folder: Path) -> None:
    """Move every file below ``place`` to its name below ``folder``, once all of them are on the disk."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path != place / LOCK)
    targets = [folder / path.relative_to(place) for path in files]
    for path, target in zip(files, targets, strict=True):
        if target.is_dir():
            raise NotWritten(f"{target} is a folder, expected a file or nothing there: remove or rename it")
        _flush(path)
        target.parent.mkdir(parents=True, exist_ok=True)
    # Nothing is left to do but this: with some microseconds a file, a kill seldom falls in between.
    with hold_interrupts():
        for path, target in zip(files, targets, strict=True):
            os.replace(path, target)
    for changed in {target.parent for target in targets}:
        _flush(changed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_left_over(folder: Path) -> None:
    """Remove the temporary folders of runs that were killed: no process holds their lock any more.

    A folder without a lock may be one that another process has made a moment ago; its name tells the process.
    """
    for place in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if (place / LOCK).is_file():
                with open(place / LOCK) as lock:
                    if _locked(lock):
                        shutil.rmtree(place, ignore_errors=True)
            elif time.time() - place.stat().st_mtime > OLD or _is_orphan(place):
                shutil.rmtree(place, ignore_errors=True)


def _process(pid: int) -> str:
    return f"{socket.gethostname()}-{pid}-"


def _is_orphan(place: Path) -> bool:
    """Whether the process of this machine that made a temporary folder has ended."""
    pid = place.name.removeprefix(PREFIX).removeprefix(f"{socket.gethostname()}-").partition("-")[0]
    if not pid.isdecimal() or not place.name.startswith(f"{PREFIX}{_process(int(pid))}"):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _locked(lock: IO[str]) -> bool:
    """Take the lock, which ends with the file or the process; False where another has it, or there are no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sentence(folder: Path, error: OSError) -> str:
    if error.errno in FULL:
        return (
            f"{folder}: the disk is full or the file too large ({os.strerror(error.errno)}), so nothing was written and "
            "earlier files are as they were; free some space or name another folder"
        )
    if not isinstance(error, PermissionError) and not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        return f"{folder} {found}, so nothing was written: make it or name another folder"
    reason = error.strerror or type(error).__name__
    return f"{folder}: nothing can be written there ({reason}); name another folder"
