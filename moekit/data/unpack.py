"""Archives from the web, unpacked without trust: only plain files, inside the folder, no more than was announced.

Everything goes to ``FOLDER.part`` first; what was finished there before an interruption is not written again. The
folder gets its name when the archive has been read to its end and its checksums are right.
"""

from __future__ import annotations

import errno
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from moekit.data import record
from moekit.data.download import NoSpace, human
from moekit.data.progress import bar

CHUNK = 1 << 20  # bytes read at a time; no header needs as many
MOST_MEMBERS = 100_000
OVERHEAD = 1536  # bytes of headers and padding that a member may add to its own


class CorruptArchive(ValueError):
    """The archive is cut short or damaged."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: where it goes, its size as announced, and a function that reads on in it."""

    name: PurePosixPath
    size: int
    read: Callable[[int], bytes]


# What reading a damaged archive raises: flipped bits in a zip also ask for unknown methods, passwords and odd places.
DAMAGE = (
    *(EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
    *(NotImplementedError, RuntimeError, OSError),
)


def unpack(archive: str | Path, folder: str | Path, limit: int) -> list[Path]:
    """Unpack a ``.tar.gz`` or ``.zip`` archive into the new folder ``folder``.

    If all of the archive lies in one folder, what is in it goes into ``folder`` directly.

    Args:
        limit: bytes that all files together may have.

    Returns:
        The files.

    Raises:
        CorruptArchive: it is cut short or damaged.
        ValueError: it is larger than ``limit``, or holds a link, a device, a path that leads out of the folder, or a
            name twice. Or ``folder`` exists.
        NoSpace: the disk is too small; what is done is kept.

    After a ValueError nothing is left of the archive's content.
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
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk, not of the archive
        staging.discard()
        raise CorruptArchive(f"{archive} is cut short or damaged: {error}") from None
    except ValueError:
        staging.discard()
        raise
    staging.finish()
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Staging:
    """The folder in the making, and which of its files are done, on disk so that another process can go on."""

    def __init__(self, folder: Path, source: dict[str, Any]) -> None:
        self.folder = folder
        self._root, self._note_path, self._file = (
            folder.with_name(folder.name + end) for end in (".part", ".part.json", ".part.file")
        )
        note = record.read(self._note_path)
        if note is None or note["source"] != source or not self._root.is_dir():
            self.discard()
            note = {"source": source, "done": {}}
        self._note = note
        self._root.mkdir(parents=True, exist_ok=True)

    def add(self, member: Member, tick: Callable[[], Any]) -> None:
        """Write a member unless it is done; ``tick()`` after every piece."""
        target, name = self._root / member.name, str(member.name)
        if name in self._note["done"] and self._note["done"][name] == record.fingerprint(target):
            return tick()
        free = shutil.disk_usage(self._root).free
        if free < member.size:
            raise NoSpace(
                f"{member.name} needs {human(member.size)} on disk, but {self._root} has only {human(free)} free; make "
                "room and run again (what is unpacked already is kept)"
            )
        written = 0
        with open(self._file, "wb") as file:
            while data := member.read(CHUNK):
                written += file.write(data)
                tick()
        if written != member.size:
            raise EOFError(f"{member.name} has {written} bytes instead of {member.size}")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file.replace(target)
        self._note["done"][name] = record.fingerprint(target)
        record.write(self._note_path, self._note)

    def finish(self) -> None:
        top = list(self._root.iterdir())
        if len(top) == 1 and top[0].is_dir():
            top[0].replace(self.folder)
        else:
            self._root.replace(self.folder)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._note_path.unlink(missing_ok=True)
        self._file.unlink(missing_ok=True)


def _checked(members: Iterator[Member], archive: Path, limit: int) -> Iterator[Member]:
    """The members, as long as all of them together are what an honest archive may hold."""
    seen: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    total = 0
    for member in members:
        if not member.name.parts:
            raise ValueError(f"{archive} holds a file without a name")
        parents = set(member.name.parents)
        if member.name in seen or member.name in folders or parents & seen:
            raise ValueError(f"{archive} holds {member.name} twice, or both as a file and as a folder")
        seen.add(member.name)
        folders |= parents
        total += member.size
        if total > limit or member.size < 0:
            raise ValueError(
                f"{archive} announces more than {human(limit)} of files; expected no more than that"
            )
        if len(seen) > MOST_MEMBERS:
            raise ValueError(f"{archive} holds more than {MOST_MEMBERS} files")
        yield member


def _members(file: BinaryIO, archive: Path, limit: int) -> Iterator[Member]:
    return _zip_members(file, archive) if archive.suffix == ".zip" else _tar_members(file, archive, limit)


def _tar_members(file: BinaryIO, archive: Path, limit: int) -> Iterator[Member]:
    stream = _Gunzip(file, limit + MOST_MEMBERS * OVERHEAD)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for info in tar:
            name = _inside(info.name, archive)
            if info.isdir():
                continue
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                kind = "link" if info.islnk() or info.issym() else "device or other special file"
                raise ValueError(
                    f"{archive} holds {info.name!r}, a {kind}; only plain files and folders are unpacked"
                )
            yield Member(name, info.size, tar.extractfile(info).read)
        if stream.last_read.strip(b"\0") or len(stream.last_read) != tarfile.BLOCKSIZE:
            raise EOFError("the mark at the end of the archive is missing")
        while stream.read(CHUNK):  # the checksum comes last
            pass


class _Gunzip(gzip.GzipFile):
    """A decompressed stream that neither ends later than ``limit`` bytes nor hands out much at a time."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        super().__init__(fileobj=file, mode="rb")
        self.limit = limit
        self.last_read = b""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= CHUNK:
            raise ValueError(f"{self.name} has a header of {size} bytes")
        self.last_read = super().read(size)
        if self.tell() > self.limit:
            raise ValueError(
                f"{self.name} unpacks to more than {human(self.limit)}; expected no more than that"
            )
        return self.last_read


def _zip_members(file: BinaryIO, archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(file) as content:
        for info in content.infolist():
            name = _inside(info.filename, archive)
            if info.is_dir():
                continue
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                raise ValueError(
                    f"{archive} holds {info.filename!r}, a link or device; only plain files and folders are unpacked"
                )
            if info.flag_bits & 1:
                raise ValueError(f"{archive} is encrypted")
            with content.open(info) as reader:
                yield Member(name, info.file_size, reader.read)


def _inside(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{archive} holds {name!r}, a path that leads out of the folder; it is refused")
    return path
