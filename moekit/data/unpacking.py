"""Unpacking of untrusted archives: only plain files, inside the folder, and no more bytes than a limit.

All files go to ``FOLDER.part`` first. The folder gets its name when the archive has been read to its end and its
checksums are right. After an interruption the archive is read again from its beginning, since it is compressed. Files
that are already in ``FOLDER.part`` are compared with it and written only where they differ.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr
from typing import Any, BinaryIO

from moekit.data import record
from moekit.data.download import NoSpace, human
from moekit.data.progress import bar
from moekit.headlines import first_line

# Bytes per read, which is more than any header needs.
CHUNK = 1 << 20
# The most files and folders together.
MOST_MEMBERS = 100_000
# The most folders above a file. The removal of a tree recurses once per level.
DEEPEST = 64
# The most bytes of headers and padding per member, in addition to its content.
OVERHEAD = 1536


class RefusedArchive(ValueError):
    """The archive has content that is not accepted."""


class CorruptArchive(RefusedArchive):
    """The archive is cut short or damaged."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: its path, its size according to its header, and a function that reads its next bytes.

    A folder has no such function.
    """

    name: PurePosixPath
    size: int = 0
    read: Callable[[int], bytes] | None = None


# The errors of reading a damaged archive. Flipped bits in a zip can also lead to unknown methods, passwords and offsets.
DAMAGE = (
    *(EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
    *(NotImplementedError, RuntimeError, ValueError, struct.error),
)


def unpack(archive: str | Path, folder: str | Path, limit: int) -> list[Path]:
    """Unpack a ``.tar.gz`` or ``.zip`` archive into the new folder ``folder``.

    If all members of the archive are in one folder, the content of that folder goes directly into ``folder``.

    Args:
        limit: the most bytes of all files together.

    Returns:
        The paths of the files.

    Raises:
        CorruptArchive: the archive is cut short or damaged.
        RefusedArchive: the archive is larger than ``limit`` or holds no file; or it holds a link, a device, a path that
            leads out of the folder, a name twice, or a name that the file system does not accept.
        ValueError: ``folder`` exists.
        NoSpace: the disk has too little free space; the files so far are kept.

    The first two errors are also ValueErrors, and after them no content of the archive is left on the disk.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; move it away to have {archive.name} unpacked there")
    staging = Staging(folder, {"archive": archive.name, **(record.fingerprint(archive) or {})})
    try:
        with open(archive, "rb") as file, bar(f"unpack {archive.name}", archive.stat().st_size) as progress:
            for member in _checked(_members(file, archive, limit), archive, limit):
                staging.add(member, lambda: progress.update(file.tell() - progress.n))
    except NoSpace:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"the disk is full while {archive.name} is unpacked into {folder}; make room and run again (what is "
                "unpacked already is kept)"
            ) from None
        if error.errno == errno.ENAMETOOLONG:
            staging.discard()
            raise RefusedArchive(
                f"{archive} holds a name that is too long for the file system of {folder.parent}; it is refused"
            ) from None
        # Other error numbers come from the disk, not from the archive.
        if error.errno not in (None, errno.EINVAL):
            raise
        staging.discard()
        raise _damaged(archive, error) from None
    except RefusedArchive:
        staging.discard()
        raise
    except DAMAGE as error:
        staging.discard()
        raise _damaged(archive, error) from None
    staging.finish()
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _damaged(archive: Path, error: Exception) -> CorruptArchive:
    return CorruptArchive(f"{archive} is cut short or damaged: {first_line(error, 120)}")


class Staging:
    """The unfinished folder. A note beside it names its archive, so that another process can continue."""

    def __init__(self, folder: Path, source: dict[str, Any]) -> None:
        self.folder = folder
        self._root, self._note = (folder.with_name(folder.name + end) for end in (".part", ".part.json"))
        if record.read(self._note) != source:
            self.discard()
        self._root.mkdir(parents=True, exist_ok=True)
        record.write(self._note, source)

    def add(self, member: Member, tick: Callable[[], Any]) -> None:
        """Write the bytes of the member under its name; ``tick()`` is called after every piece."""
        target = self._root / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        there = target.stat().st_size if target.exists() else 0
        free = shutil.disk_usage(self._root).free
        if free < member.size - there:
            raise NoSpace(
                f"{member.name} needs {human(member.size - there)} on disk, but {self._root} has only {human(free)} "
                "free; make room and run again (what is unpacked already is kept)"
            )
        size = 0
        with open(target, "r+b" if there else "wb") as file:
            while data := member.read(CHUNK):
                if size >= there or file.read(len(data)) != data:
                    file.seek(size)
                    file.write(data)
                size += len(data)
                tick()
            if there > size:
                file.truncate(size)
        if size != member.size:
            raise EOFError(f"{member.name} has {size} bytes instead of {member.size}")

    def finish(self) -> None:
        top = list(self._root.iterdir())
        whole = top[0] if len(top) == 1 and top[0].is_dir() else self._root
        whole.replace(self.folder)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._note.unlink(missing_ok=True)


def _checked(members: Iterator[Member], archive: Path, limit: int) -> Iterator[Member]:
    """The files among ``members``, with an error as soon as a member, or their total, is not accepted."""
    seen: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    total = 0
    for number, member in enumerate(members, start=1):
        if number > MOST_MEMBERS:
            raise RefusedArchive(f"{archive} holds more than {MOST_MEMBERS} files and folders; it is refused")
        if len(member.name.parts) > DEEPEST:
            raise RefusedArchive(
                f"{archive} holds {repr(str(member.name))}, which lies {len(member.name.parts) - 1} folders deep; "
                f"expected fewer than {DEEPEST}"
            )
        if member.read is None:
            continue
        if not member.name.parts:
            raise RefusedArchive(f"{archive} holds a file without a name; it is refused")
        parents = set(member.name.parents)
        if member.name in seen or member.name in folders or parents & seen:
            raise RefusedArchive(
                f"{archive} holds {repr(str(member.name))} twice, or both as a file and as a folder; it is refused"
            )
        seen.add(member.name)
        folders |= parents
        total += member.size
        if total > limit or member.size < 0:
            raise RefusedArchive(
                f"{archive} announces more than {human(limit)} of files; expected no more than that"
            )
        yield member
    if not seen:
        raise RefusedArchive(f"{archive} holds no file; expected at least one")


def _members(file: BinaryIO, archive: Path, limit: int) -> Iterator[Member]:
    return _zip_members(file, archive) if archive.suffix == ".zip" else _tar_members(file, archive, limit)


def _tar_members(file: BinaryIO, archive: Path, limit: int) -> Iterator[Member]:
    stream = _Gunzip(file, limit + MOST_MEMBERS * OVERHEAD)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (info := tar.next()) is not None:
            # Without this, tarfile keeps every member in memory.
            tar.members.clear()
            name = _inside(info.name, archive)
            if info.isdir():
                yield Member(name)
                continue
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                kind = "link" if info.islnk() or info.issym() else "device or other special file"
                raise RefusedArchive(
                    f"{archive} holds {repr(info.name)}, a {kind}; only plain files and folders are unpacked"
                )
            yield Member(name, info.size, tar.extractfile(info).read)
        if stream.last_read.strip(b"\0") or len(stream.last_read) != tarfile.BLOCKSIZE:
            raise EOFError("the mark at the end of the archive is missing")
        # The checksum is at the end of the stream.
        while stream.read(CHUNK):
            pass


class _Gunzip(gzip.GzipFile):
    """A decompressed stream with at most ``limit`` bytes, which returns small pieces."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        super().__init__(fileobj=file, mode="rb")
        self.limit = limit
        self.last_read = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= CHUNK:
            raise RefusedArchive(f"{self.name} has a header of {size} bytes; expected at most {CHUNK}")
        self.last_read = super().read(size)
        if self.tell() > self.limit:
            raise RefusedArchive(
                f"{self.name} unpacks to more than {human(self.limit)}; expected no more than that"
            )
        return self.last_read


def _zip_members(file: BinaryIO, archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(file) as content:
        for info in content.infolist():
            name = _inside(info.filename, archive)
            # ZipInfo.is_dir() fails for an empty name.
            if info.filename.endswith("/"):
                yield Member(name)
                continue
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                raise RefusedArchive(
                    f"{archive} holds {repr(info.filename)}, a link or device; only plain files and folders are "
                    "unpacked"
                )
            if info.flag_bits & 1:
                raise RefusedArchive(f"{archive} is encrypted; expected an archive that needs no password")
            if not info.filename:
                raise RefusedArchive(f"{archive} holds a file without a name; it is refused")
            with content.open(info) as reader:
                yield Member(name, info.file_size, reader.read)


def _inside(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise RefusedArchive(
            f"{archive} holds {repr(name)}, a path that leads out of the folder; it is refused"
        )
    return path
