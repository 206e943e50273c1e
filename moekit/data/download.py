"""Downloads that end with the right file or with one clear error, after any number of interruptions.

``NAME.part`` holds the bytes that have arrived; ``NAME.part.json`` records the server and the file that they come from. A
later run, or another process, requests only the rest, or the whole file if it has changed on the server. The complete
file gets its name last; ``NAME.json`` then holds its origin, size and SHA-256.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from email.utils import formatdate
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from moekit.data import record
from moekit.data.progress import bar
from moekit.headlines import first_line

# One mirror refuses clients that do not identify as a browser.
AGENT = "Mozilla/5.0 (compatible; moekit)"
CHUNK = 1 << 20


class DownloadError(OSError):
    """All mirrors failed to deliver the file; the message gives the answer of each mirror."""


class NoSpace(OSError):
    """The disk has too little free space; the message says how much is missing."""


class Refused(OSError):
    """A mirror refuses to deliver the file."""


@dataclass(frozen=True)
class Patience:
    """The limits of the attempts at a download.

    Attributes:
        drops: the most successive broken transfers without new bytes; a transfer with new bytes resets the count.
        refusals: the most successive attempts without a connection, or with an error of the server.
        stall: seconds without a byte after which a connection counts as broken.
        pause: seconds before the first new attempt; each later pause is twice as long, up to ``longest``.
    """

    drops: int = 25
    refusals: int = 4
    stall: float = 30.0
    pause: float = 0.5
    longest: float = 10.0


@dataclass(frozen=True)
class Downloaded:
    """The record of a file: its origin and content. ``mtime_ns`` is the time of change of the file on this disk."""

    url: str
    size: int
    sha256: str
    mtime_ns: int
    etag: str | None = None
    last_modified: str | None = None
    finished: str | None = None


def download(
    urls: Sequence[str],
    path: str | Path,
    sha256: str | None = None,
    spare: int = 0,
    check: Callable[[Path], None] = lambda path: None,
    patience: Patience = Patience(),
) -> tuple[Downloaded, bool]:
    """Download ``path`` from the first of ``urls`` that delivers it, unless the file exists and agrees with its record.

    Args:
        sha256: the expected hash of the file; None expects that of an earlier download of ``path``, where its record is
            there, and else accepts any content. The hash is recorded.
        spare: bytes of disk space that are needed in addition to the file.
        check: raises ValueError if a complete file is not the expected one (for example a login page).

    Returns:
        The file's record, and whether anything was downloaded.

    Raises:
        DownloadError: all mirrors failed to deliver the file, or to deliver it with the expected hash.
        NoSpace: the disk has too little free space; at most the length of the file was requested.
        ValueError: ``path`` exists already, and it is not as this function left it.
    """
    path = Path(path)
    known = verified(path, sha256)
    if known is not None:
        return known, False
    if path.exists():
        raise ValueError(
            f"{path} is there, but not as moekit's record {_record_of(path).name} has it (or there is no record): it "
            "may be incomplete or changed. Move it away, then run again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = record.read(_record_of(path)) or {}
    expected = earlier.get("sha256") if sha256 is None else sha256
    part = Part(path)
    failures = []
    # The mirror that the part came from is first.
    for url in sorted(urls, key=lambda url: url != part.url):
        try:
            _fetch(url, part, spare, patience)
            digest = sha256_of(part.path)
            if expected is not None and digest != expected:
                told = f"the file's SHA-256 is {digest}, expected {expected}"
                if sha256 is None:
                    told += f" as of the first download; remove {_record_of(path)} to accept another file"
                raise Refused(told)
            check(part.path)
        except (Refused, ValueError) as error:
            failures.append(f"{url}: {error}")
            if part.complete:
                part.discard()
        else:
            return part.finish(digest), True
    raise DownloadError(f"{path.name} could not be downloaded. " + "; ".join(failures))


def verified(path: Path, sha256: str | None = None) -> Downloaded | None:
    """The record of ``path`` if the file exists and is unchanged since the download; else None.

    Size and time of change are compared. The file is read and hashed only if the time differs (as in a copied folder).
    """
    known, status = record.read(_record_of(path)), record.fingerprint(path)
    if known is None or status is None or known["size"] != status["size"]:
        return None
    if sha256 not in (None, known["sha256"]):
        return None
    if known["mtime_ns"] != status["mtime_ns"]:
        if sha256_of(path) != known["sha256"]:
            return None
        known["mtime_ns"] = status["mtime_ns"]
        record.write(_record_of(path), known)
    return Downloaded(**known)


def discard(path: Path) -> None:
    """Remove a downloaded file that is damaged or not the expected one, and its record."""
    path.unlink(missing_ok=True)
    _record_of(path).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, bar(f"check {path.name}", path.stat().st_size) as progress:
        while data := file.read(CHUNK):
            digest.update(data)
            progress.update(len(data))
    return digest.hexdigest()


def human(size: float) -> str:
    """Bytes as readable text: ``27.3 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


class Part:
    """The part of a file that has arrived, with the address and version of the file that it comes from."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(final.name + ".part")
        self._note_path = final.with_name(final.name + ".part.json")
        self.note = record.read(self._note_path) or {}
        self._outgrown = False

    @property
    def url(self) -> str | None:
        return self.note.get("url")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def complete(self) -> bool:
        return bool(self.note) and self.path.exists() and self.size == self.note["total"]

    @property
    def validator(self) -> str | None:
        """The tag or date that identifies the version of the file to the server; a weak tag does not identify it."""
        tag = self.note.get("etag")
        return tag if tag and not tag.startswith("W/") else self.note.get("last_modified")

    def restart(self, note: dict[str, str | int | None]) -> None:
        self.discard()
        record.write(self._note_path, note)
        self.note = note
        self.path.touch()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)
        self.note = {}

    def outgrown(self, reason: str) -> Exception:
        """Start again, since the file is not longer than the part. If that happens twice, the server's length is wrong."""
        size, total, before = self.size, self.note["total"], self._outgrown
        self._outgrown = True
        self.discard()
        if before:
            return Refused(f"{reason}: it announces {total} bytes, but has no more than {size}")
        return Broken(reason)

    def finish(self, sha256: str) -> Downloaded:
        """Give the file its name. The record is written first, because a file without a record is not accepted."""
        done = Downloaded(
            url=self.note["url"],
            size=self.size,
            sha256=sha256,
            mtime_ns=self.path.stat().st_mtime_ns,
            etag=self.note["etag"],
            last_modified=self.note["last_modified"],
            finished=formatdate(usegmt=True),
        )
        record.write(_record_of(self.final), asdict(done))
        self.path.replace(self.final)
        self._note_path.unlink()
        return done


class Broken(Exception):
    """A transfer broke, and a new attempt may succeed. ``refused`` tells whether it broke before its first byte."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


def _fetch(url: str, part: Part, spare: int, patience: Patience) -> None:
    """Complete ``part`` from ``url``; after a failure, try again within the limits of ``patience``."""
    drops = refusals = furthest = 0
    while not (part.url == url and part.complete):
        try:
            _attempt(url, part, spare, patience.stall)
        except Broken as broken:
            arrived = part.size if part.url == url else 0
            if arrived > furthest:
                drops, refusals, furthest = 0, 0, arrived
            drops, refusals = drops + (not broken.refused), refusals + broken.refused
            if drops > patience.drops or refusals > patience.refusals:
                raise Refused(f"{broken}, time after time; {human(arrived)} arrived") from None
            time.sleep(min(patience.pause * 2 ** min(drops + refusals, 10), patience.longest))


def _attempt(url: str, part: Part, spare: int, stall: float) -> None:
    """Request the missing bytes, or all bytes, and write them; return when the part is complete."""
    headers = {"User-Agent": AGENT}
    if part.url == url and part.validator and part.size:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.validator}
    with _open(url, headers, stall, part) as answer:
        first, total = _span(answer)
        note = {
            "url": url,
            "total": total,
            "etag": answer.headers["ETag"],
            "last_modified": answer.headers["Last-Modified"],
        }
        if first == 0:
            part.restart(note)
        elif note != part.note or first != part.size:
            part.discard()
            raise Broken("the server sent the rest of another file")
        free = shutil.disk_usage(part.path.parent).free
        if free < total - first + spare:
            raise NoSpace(
                f"{part.final.name} needs {human(total - first + spare)} more on disk, but {part.final.parent} has only "
                f"{human(free)} free; choose another data_dir or make room (what has arrived is kept)"
            )
        with open(part.path, "ab") as file, bar(part.final.name, total, first) as progress:
            for data in _chunks(answer, stall):
                file.write(data)
                progress.update(len(data))
    if not part.complete:
        raise Broken(f"the connection ended after {part.size} of {total} bytes")


def _open(url: str, headers: dict[str, str], stall: float, part: Part) -> HTTPResponse:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=stall)
    except urllib.error.HTTPError as error:
        reason = f"the server answers {error.code} {error.reason}"
        if error.code == 416:
            raise part.outgrown(reason) from None
        if error.code >= 500 or error.code in (408, 425, 429):
            raise Broken(reason, refused=True) from None
        raise Refused(reason) from None
    except urllib.error.URLError as error:
        raise Broken(f"no connection ({error.reason})", refused=True) from None
    except (OSError, HTTPException) as error:
        raise Broken(_why(error, stall)) from None


def _chunks(answer: HTTPResponse, stall: float) -> Iterator[bytes]:
    try:
        while data := answer.read1(CHUNK):
            yield data
    except (OSError, HTTPException) as error:
        raise Broken(_why(error, stall)) from None


def _why(error: Exception, stall: float) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {stall:g} s"
    return f"the connection broke ({first_line(error)})"


def _span(answer: HTTPResponse) -> tuple[int, int]:
    """The offset in the file of the bytes in ``answer``, and the length of the file."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"] or "")
    else:
        found = re.fullmatch(r"()(\d+)", answer.headers["Content-Length"] or "")
    if found is None:
        raise Refused(
            "the server does not say how long the file is, so an incomplete file could not be told from a whole one"
        )
    return int(found[1] or 0), int(found[2])
