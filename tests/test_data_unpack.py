"""Archives that nobody should trust: refused, with nothing written outside the folder and nothing left in it."""

from __future__ import annotations

import errno
import gzip
import io
import random
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moekit.data import CorruptArchive, NoSpace, unpack, unpacking

CONTENT = {f"model/model-rank-{i}.pt": random.Random(i).randbytes(50_000) for i in range(4)}
LIMIT = 1_000_000


def tar(path: Path, *extra: tarfile.TarInfo, content: dict[str, bytes] = CONTENT) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(tmp_path: Path, archive: Path, match: str, error: type[Exception] = ValueError) -> None:
    before = everything(tmp_path.parent)
    with pytest.raises(error, match=match):
        unpack(archive, tmp_path / "into" / "model", LIMIT)
    assert everything(tmp_path.parent) - before <= {str((tmp_path / "into").relative_to(tmp_path.parent))}


def unpacked(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {Path(name).name: data for name, data in CONTENT.items()}
    assert everything(folder.parent) == {folder.name, *(f"{folder.name}/{name}" for name in files)}


def test_tar_and_zip(tmp_path):
    files = unpack(tar(tmp_path / "a.tar.gz"), tmp_path / "tar" / "model", LIMIT)
    assert [path.name for path in files] == [f"model-rank-{i}.pt" for i in range(4)]
    unpacked(tmp_path / "tar" / "model")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("model")
        for name, data in CONTENT.items():
            archive.writestr(name, data)
    unpack(tmp_path / "a.zip", tmp_path / "zip" / "model", LIMIT)
    unpacked(tmp_path / "zip" / "model")


def test_without_one_folder_around_everything(tmp_path):
    archive = tar(tmp_path / "a.tar.gz", content={"./a": b"1", "b/c": b"2"})
    unpack(archive, tmp_path / "out", LIMIT)
    assert everything(tmp_path / "out") == {"a", "b", "b/c"}


@pytest.mark.parametrize(
    "bad, match",
    [
        (entry("../outside", size=3), "leads out of the folder"),
        (entry("model/../../outside", size=3), "leads out of the folder"),
        (entry("/tmp/moekit-outside", size=3), "leads out of the folder"),
        (entry("model/link", tarfile.SYMTYPE, "../../outside"), "a link"),
        (entry("model/link", tarfile.SYMTYPE, "model-rank-0.pt"), "a link"),
        (entry("model/link", tarfile.LNKTYPE, "../../outside"), "a link"),
        (entry("model/null", tarfile.CHRTYPE), "a device"),
        (entry("model/disk", tarfile.BLKTYPE), "a device"),
        (entry("model/pipe", tarfile.FIFOTYPE), "a device"),
        (entry("model/model-rank-0.pt", size=3), "twice"),
        (entry("model/model-rank-0.pt/below", size=3), "both as a file and as a folder"),
        (entry("model", size=3), "both as a file and as a folder"),
        (entry("model/huge", size=LIMIT), "announces more than 1 MB"),
    ],
    ids=lambda value: value.name if isinstance(value, tarfile.TarInfo) else None,
)
def test_tar_members_that_are_refused(tmp_path, bad, match):
    refused(tmp_path, tar(tmp_path / "a.tar.gz", bad), match)


def test_a_link_and_then_a_file_through_it(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    link = entry("model/out", tarfile.SYMTYPE, str(outside))
    refused(tmp_path, tar(tmp_path / "a.tar.gz", link, entry("model/out/file", size=3)), "a link")
    assert not list(outside.iterdir())


def test_a_stream_that_goes_on_after_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MOST_MEMBERS", 1000)
    inner = gzip.decompress(tar(tmp_path / "a.tar.gz").read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(inner + bytes(4_000_000)))
    refused(tmp_path, tmp_path / "b.tar.gz", "unpacks to more than")


def test_a_header_of_many_megabytes(tmp_path):
    info = entry("model/x")
    info.pax_headers = {"comment": "x" * 3_000_000}
    refused(tmp_path, tar(tmp_path / "a.tar.gz", info), "a header of 300")


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MOST_MEMBERS", 3)
    refused(tmp_path, tar(tmp_path / "a.tar.gz"), "more than 3 files and folders")


def test_folders_count_as_members(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MOST_MEMBERS", 10)
    folders = [entry(f"model/{i}", tarfile.DIRTYPE) for i in range(20)]
    refused(tmp_path, tar(tmp_path / "a.tar.gz", *folders), "more than 10 files and folders")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(20):
            archive.mkdir(f"model/{i}")
    refused(tmp_path, tmp_path / "a.zip", "more than 10 files and folders")


def test_folders_within_folders(tmp_path):
    deep = "/".join(["d"] * 1500)
    refused(tmp_path, tar(tmp_path / "a.tar.gz", entry(f"{deep}/file", size=3)), "1500 folders deep")
    refused(tmp_path, tar(tmp_path / "b.tar.gz", entry(deep, tarfile.DIRTYPE)), "1499 folders deep")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["n" * 300, "n" * 300 + "/file", "/".join(["n" * 250] * 20)])
def test_names_too_long_for_the_file_system(tmp_path, form, name):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=form) as archive:
        archive.addfile(entry("model/fine", size=3), io.BytesIO(b"abc"))
        archive.addfile(entry(f"model/{name}", size=3), io.BytesIO(b"abc"))
    refused(tmp_path, tmp_path / "a.tar.gz", "a name that is too long for the file system")


def test_an_archive_without_a_file(tmp_path):
    refused(tmp_path, tar(tmp_path / "a.tar.gz", content={}), "holds no file")
    refused(
        tmp_path, tar(tmp_path / "b.tar.gz", entry("model", tarfile.DIRTYPE), content={}), "holds no file"
    )
    for name, folders in (("c.zip", []), ("d.zip", ["model", "model/more"])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for folder in folders:
                archive.mkdir(folder)
        refused(tmp_path, tmp_path / name, "holds no file")


def test_a_member_without_a_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("fine", b"fine")
        with archive.open(zipfile.ZipInfo(""), "w") as file:
            file.write(b"nameless")
    refused(tmp_path, tmp_path / "a.zip", "a file without a name")
    refused(tmp_path, tar(tmp_path / "a.tar.gz", entry(".", size=3)), "a file without a name")


def test_long_names_are_cut_short_in_messages(tmp_path):
    bad = entry("../" + "x" * 100_000, size=3)
    with pytest.raises(ValueError, match="leads out of the folder") as caught:
        unpack(tar(tmp_path / "a.tar.gz", bad), tmp_path / "model", LIMIT)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 200


def test_the_note_is_written_once_whatever_the_number_of_files(tmp_path, monkeypatch):
    written = []
    write = unpacking.record.write
    monkeypatch.setattr(unpacking.record, "write", lambda *record: (written.append(record), write(*record)))
    files = unpack(
        tar(tmp_path / "a.tar.gz", content={str(i): b"x" for i in range(500)}), tmp_path / "model", LIMIT
    )
    assert (len(files), len(written)) == (500, 1)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    archive = tar(tmp_path / "a.tar.gz")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 49_999}))
        with pytest.raises(NoSpace, match="needs 50 kB on disk"):
            unpack(archive, tmp_path / "into" / "model", LIMIT)
    unpack(archive, tmp_path / "into" / "model", LIMIT)
    unpacked(tmp_path / "into" / "model")


def test_a_disk_that_another_fills_meanwhile(tmp_path, monkeypatch):
    archive, add = tar(tmp_path / "a.tar.gz"), unpacking.Staging.add

    def full(self, member, tick):
        if member.name.name == "model-rank-2.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, member, tick)

    with monkeypatch.context() as patch:
        patch.setattr(unpacking.Staging, "add", full)
        with pytest.raises(NoSpace, match="the disk is full while a.tar.gz is unpacked"):
            unpack(archive, tmp_path / "into" / "model", LIMIT)
    unpack(archive, tmp_path / "into" / "model", LIMIT)
    unpacked(tmp_path / "into" / "model")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """Change a byte of a member that is stored, so that only the checksum can tell."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def no_end_mark(data: bytes) -> bytes:
    inner = gzip.decompress(data)
    last = list(CONTENT.values())[-1]
    # A whole number of 512-byte blocks.
    return gzip.compress(inner[: inner.index(last) + len(last) + 176])


def bad_header(data: bytes) -> bytes:
    inner = bytearray(gzip.decompress(data))
    inner[inner.index(b"model/model-rank-2.pt")] ^= 1
    return gzip.compress(bytes(inner))


def no_archive(data: bytes) -> bytes:
    return b"<html>403</html>"


@pytest.mark.parametrize("damage", [cut, flip, no_end_mark, bad_header, no_archive])
def test_a_damaged_tar(tmp_path, damage: Callable[[bytes], bytes]):
    archive = tar(tmp_path / "a.tar.gz")
    archive.write_bytes(damage(archive.read_bytes()))
    refused(tmp_path, archive, "cut short or damaged", CorruptArchive)


@pytest.mark.parametrize("damage", [cut, flip, no_archive])
def test_a_damaged_zip(tmp_path, damage):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in CONTENT.items():
            archive.writestr(name, data)
    (tmp_path / "a.zip").write_bytes(damage((tmp_path / "a.zip").read_bytes()))
    refused(tmp_path, tmp_path / "a.zip", "cut short or damaged", CorruptArchive)


@pytest.mark.parametrize(
    "name, mode, match",
    [
        ("../outside", stat.S_IFREG, "leads out"),
        ("/tmp/moekit-outside", stat.S_IFREG, "leads out"),
        ("link", stat.S_IFLNK, "a link or device"),
        ("pipe", stat.S_IFIFO, "a link or device"),
    ],
)
def test_zip_members_that_are_refused(tmp_path, name, mode, match):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("fine", b"fine")
        archive.writestr(info, b"../../outside")
    refused(tmp_path, tmp_path / "a.zip", match)


def test_a_zip_that_lies_about_a_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(5_000_000))
    data = (tmp_path / "a.zip").read_bytes()
    assert data.count((5_000_000).to_bytes(4, "little")) == 2
    (tmp_path / "b.zip").write_bytes(
        data.replace((5_000_000).to_bytes(4, "little"), (500).to_bytes(4, "little"))
    )
    refused(tmp_path, tmp_path / "b.zip", "cut short or damaged", CorruptArchive)
    refused(tmp_path, tmp_path / "a.zip", "announces more than 1 MB")


def test_an_interrupted_run_is_continued_file_by_file(tmp_path, monkeypatch):
    archive, folder = tar(tmp_path / "a.tar.gz"), tmp_path / "into" / "model"
    staging, add = tmp_path / "into" / "model.part", unpacking.Staging.add

    def interrupted(self, member, tick):
        if member.name.name == "model-rank-2.pt":
            member.read(1000)
            raise KeyboardInterrupt
        add(self, member, tick)

    with monkeypatch.context() as patch:
        patch.setattr(unpacking.Staging, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack(archive, folder, LIMIT)
    assert not folder.exists()
    done = {path.name: path.stat().st_ino for path in (staging / "model").iterdir()}
    assert sorted(done) == ["model-rank-0.pt", "model-rank-1.pt"]
    # A part, other bytes of the same size, and more bytes than there should be.
    (staging / "model" / "model-rank-1.pt").write_bytes(CONTENT["model/model-rank-1.pt"][:1000])
    (staging / "model" / "model-rank-2.pt").write_bytes(bytes(50_000))
    (staging / "model" / "model-rank-3.pt").write_bytes(CONTENT["model/model-rank-3.pt"] + b"more")
    before = (staging / "model" / "model-rank-0.pt").stat().st_mtime_ns

    unpack(archive, folder, LIMIT)
    unpacked(folder)
    assert (folder / "model-rank-0.pt").stat().st_ino == done["model-rank-0.pt"]
    assert (folder / "model-rank-0.pt").stat().st_mtime_ns == before, (
        "a file that was done is not written again"
    )


def test_another_archive_does_not_continue_the_first(tmp_path, monkeypatch):
    folder = tmp_path / "into" / "model"
    first = tar(tmp_path / "a.tar.gz", content={**CONTENT, "model/model-rank-0.pt": b"old"})
    finish = unpacking.Staging.finish
    monkeypatch.setattr(unpacking.Staging, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        unpack(first, folder, LIMIT)
    monkeypatch.setattr(unpacking.Staging, "finish", finish)
    unpack(tar(first), folder, LIMIT)
    unpacked(folder)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        unpack(tar(tmp_path / "a.tar.gz"), tmp_path / "model", LIMIT)
    assert not list((tmp_path / "model").iterdir())
