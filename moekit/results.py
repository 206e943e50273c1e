"""Files that appear whole or not at all, over those of an earlier run.

    with results.together("out") as folder:          # a temporary folder inside out/
        table.to_csv(folder / "table.csv")
        figure.savefig(folder / "figure.png")
    # Here both files lie in out/. Had an error ended the block, out/ would be as before.

The files are written into a temporary folder, flushed to the disk, and then moved to their names one after the other. A
move within a file system replaces a file at once, so that a reader, a kill or a full disk never meets half a file.

No file system moves several files at once. So a mark in the temporary folder says when all files are there, and from then
on they get to their names: a process of their own moves them, which a kill of the run does not reach. If that one ends in
the middle, too, as when a machine loses its power, the next save or :func:`settle` in the folder does the rest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moekit import json_text, locks, moving
from moekit.arguments import Path as PathKind
from moekit.arguments import check, content
from moekit.interrupts import hold_interrupts

PREFIX, LOCK = ".moekit-", ".lock"
# seconds after which a temporary folder without a lock was left by a killed run
OLD = 60
# The most bytes of the names of a save's files.
MOST = 1 << 26
# seconds that the moves of one run wait for those of another
PATIENCE = 10.0
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class NotWritten(OSError, ValueError):
    """Results could not be written; the files of an earlier run are untouched. Jupyter shows its one sentence."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@contextlib.contextmanager
def together(folder: str | Path, make: bool = True) -> Iterator[Path]:
    """A temporary folder, whose files move to ``folder`` together when the block ends without an error.

    ``folder`` itself may be a link. A link in it that has the name of one of the files is replaced, and what it leads to stays
    as it is: in a folder from elsewhere it may lead anywhere.

    Args:
        make: make ``folder`` where it is missing.

    Raises:
        NotWritten: (an OSError and a ValueError) the folder is missing or cannot be written to, or its disk is full; or a
            file's name is that of a folder or a device, or lies behind a link that leads out of ``folder``.
    """
    folder = Path(folder).expanduser().resolve()
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        place = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_process(os.getpid())}", dir=folder))
    except OSError as error:
        raise NotWritten(_sentence(folder, error)) from None
    try:
        # The file has its name once it is locked, so that nobody takes the folder for one that was left.
        with open(place / f"{LOCK}.new", "w") as lock:
            locks.take(lock)
            os.replace(lock.name, place / LOCK)
            yield place
            _move(place, folder, lock)
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(_sentence(folder, error)) from error
    finally:
        with contextlib.suppress(OSError):
            _settle(place, folder)


@contextlib.contextmanager
def whole(path: str | Path, make: bool = False) -> Iterator[Path]:
    """The temporary path of one file, which moves to ``path`` when the block ends without an error.

    As with :func:`together`, a link of that name is replaced, and what it leads to stays as it is.

    Args:
        make: make the folder of ``path`` where it is missing.

    Raises:
        NotWritten: as :func:`together`.
        ValueError: ``path`` is no path.
    """
    target = _target(path)
    with together(target.parent, make) as folder:
        yield folder / target.name


def _target(path: str | Path) -> Path:
    """What a file of the name ``path`` replaces: a link itself, and not what it leads to."""
    path = check("path", path, PathKind())
    # A folder that may not be looked into tells of no link.
    return path.parent.resolve() / path.name if os.path.islink(path) else path.resolve()


def check_file(path: str | Path, make: bool = False) -> None:
    """Check that :func:`whole` could write ``path`` now: for long work that writes at its end.

    Args:
        make: make the folder of ``path`` where it is missing.

    Raises:
        NotWritten, ValueError: as :func:`whole`.
    """
    target = _target(path)
    with contextlib.suppress(PermissionError):
        # Into the folder of a device only root may write, and the device is what is wrong.
        _check_replaceable(target)
    check_writable(target.parent, make)


def check_writable(folder: str | Path, make: bool = True) -> None:
    """Check that files could be written into ``folder`` now: for long work that writes at its end. A missing folder is made.

    Args:
        make: False refuses a missing folder.

    Raises:
        NotWritten: as :func:`together`.
    """
    with together(folder, make):
        pass


def settle(folder: str | Path) -> None:
    """Move what killed runs had written whole, and remove what they had not: no process holds their lock any more.

    A folder without a lock may be one that another process has made a moment ago; its name tells the process.
    """
    folder = Path(folder)
    for place in sorted(folder.glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):
            if (place / LOCK).is_file():
                with open(place / LOCK) as lock:
                    if locks.take(lock):
                        _settle(place, folder)
            elif time.time() - place.stat().st_mtime > OLD or _is_orphan(place):
                shutil.rmtree(place, ignore_errors=True)


def _settle(place: Path, folder: Path) -> None:
    if place.is_symlink():
        return
    if (place / moving.WHOLE).is_file():
        if not _stays(place, folder):
            return
        with _alone(folder):
            moving.move(place, folder)
    shutil.rmtree(place, ignore_errors=True)


def _stays(place: Path, folder: Path) -> bool:
    """Whether the mark names files of ``place`` that go below ``folder``: in a folder from elsewhere it may name any."""
    try:
        names = json_text.loads(content(place / moving.WHOLE, "a list of files", MOST))
        return isinstance(names, list) and all(
            Path(name).name not in ("", "..")
            and "\0" not in name
            and all((top / name).parent.resolve().is_relative_to(top.resolve()) for top in (place, folder))
            for name in names
        )
    except (OSError, ValueError, TypeError, RuntimeError):
        return False


def _move(place: Path, folder: Path, lock: IO[str]) -> None:
    """Move every file below ``place`` to its name below ``folder``, once all of them are on the disk."""
    files = sorted(path for path in place.rglob("*") if path.is_file() and path != place / LOCK)
    targets = [folder / path.relative_to(place) for path in files]
    for path, target in zip(files, targets, strict=True):
        _check_replaceable(target)
        if not target.parent.resolve().is_relative_to(folder):
            raise NotWritten(
                f"{target.parent} leads out of {folder}: remove that link or name another folder"
            )
        _flush(path)
        target.parent.mkdir(parents=True, exist_ok=True)
    # What a run left that was killed meanwhile is older.
    settle(folder)
    # An interrupt waits until all files have their names.
    with hold_interrupts(), _alone(folder) as other:
        _mark(place, [str(path.relative_to(place)) for path in files])
        if len(files) > 1:
            # The process keeps the locks, so that nobody takes its files for those of a run that was killed.
            _outliving(place, folder, [lock.fileno(), *other])
        moving.move(place, folder)
    for changed in {target.parent for target in targets}:
        _flush(changed)


def _check_replaceable(target: Path) -> None:
    """Check that a file may take the place of what ``target`` is now."""
    if target.is_dir():
        raise NotWritten(
            f"{target} is a folder, expected a file or nothing there: remove or rename it, or name another path"
        )
    # Who may write into /dev would lose the device. A link into /proc, as /dev/stdout is, is an open file.
    opened = target.is_symlink() and os.readlink(target).startswith("/proc/")
    if opened or (target.exists() and not target.is_file()):
        raise NotWritten(
            f"{target} is a device, a pipe or a socket, which no file replaces: name another path"
        )


def _mark(place: Path, names: list[str]) -> None:
    """Say on the disk that all files are there; the mark itself appears whole."""
    part = place / f"{moving.WHOLE}.part"
    part.write_text(json.dumps(names), "utf-8")
    _flush(part)
    os.replace(part, place / moving.WHOLE)
    _flush(place)


def _outliving(place: Path, folder: Path, kept: list[int]) -> None:
    """Move in a process that no kill of this one ends, and wait for it; where none can be started, the caller moves."""
    program = [sys.executable, "-I", "-S", moving.__file__, str(place), str(folder)]
    streams = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in range(3)]
    locks = [(os.POSIX_SPAWN_DUP2, held, max(kept) + 1 + n) for n, held in enumerate(kept)]
    with contextlib.suppress(OSError, NotImplementedError):
        mover = os.posix_spawn(program[0], program, os.environ, file_actions=streams + locks, setsid=True)
        end = time.monotonic() + PATIENCE
        while os.waitpid(mover, os.WNOHANG) == (0, 0) and time.monotonic() < end:
            time.sleep(0.002)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[list[int]]:
    """Hold the folder's lock, so that the moves of two runs do not mix; it gives the descriptors that hold it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + PATIENCE
        while locks.take(descriptor) is False and time.monotonic() < end:
            time.sleep(0.01)
        yield [descriptor]
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _process(pid: int) -> str:
    return f"{socket.gethostname()}-{pid}-"


def _is_orphan(place: Path) -> bool:
    """Whether the process of this machine that made a temporary folder has ended."""
    pid = place.name.removeprefix(PREFIX).removeprefix(f"{socket.gethostname()}-").partition("-")[0]
    named = pid.isdecimal() and place.name.startswith(f"{PREFIX}{_process(int(pid))}")
    return named and locks.has_ended(int(pid))


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
