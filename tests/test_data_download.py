"""Downloads from a server that misbehaves: the right file in the end or one clear error, and never half a file."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from data_server import Page, Server, tag_of

from moekit.data import DownloadError, NoSpace, Patience, download, record
from moekit.data.download import _record_of

BODY = random.Random(1).randbytes(2_100_000)
# As long, so that only its tag tells it from BODY.
OTHER = random.Random(2).randbytes(2_100_000)
FAST = Patience(stall=0.3, pause=0.001, longest=0.01)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def got_whole(path: Path, body: bytes = BODY) -> None:
    assert path.read_bytes() == body
    assert names(path.parent) == [path.name, path.name + ".json"]
    assert json.loads(_record_of(path).read_text())["sha256"] == hashlib.sha256(body).hexdigest()


def test_a_second_run_asks_nobody(tmp_path):
    page = Page(BODY)
    with Server({"/f": page}) as server:
        first, now = download([server.url("/f")], tmp_path / "f", patience=FAST)
        assert now
        got_whole(tmp_path / "f")
    # The server is gone.
    second, now = download([server.url("/f")], tmp_path / "f", patience=FAST)
    assert not now and second == first and len(page.requests) == 1


def test_twenty_drops_cost_twenty_requests_and_no_byte_twice(tmp_path):
    page = Page(BODY, drops=20, drop_after=100_000)
    with Server({"/f": page}) as server:
        download([server.url("/f")], tmp_path / "f", patience=Patience(drops=1, pause=0.001, longest=0.01))
    got_whole(tmp_path / "f")
    assert len(page.requests) == 21 and page.sent == len(BODY)


@pytest.mark.parametrize(
    "kind", [{"ranges": False}, {"validators": False}, {"weak": True}, {"drop_after": 0}], ids=str
)
def test_twenty_drops_where_nothing_can_be_resumed(tmp_path, kind):
    page = Page(BODY, **{"drops": 20, "drop_after": 100_000, **kind})
    with Server({"/f": page}) as server:
        download([server.url("/f")], tmp_path / "f", patience=FAST)
    got_whole(tmp_path / "f")
    assert len(page.requests) == 21
    # Nothing says that the rest would be of the same file.
    if "weak" in kind or "validators" in kind:
        assert not any("Range" in request for request in page.requests)


def test_it_gives_up_on_a_server_that_only_drops(tmp_path):
    page = Page(BODY, drops=10**9, drop_after=0)
    with (
        Server({"/f": page}) as server,
        pytest.raises(DownloadError, match="the connection ended after 0 of 2100000 bytes, time after time"),
    ):
        download([server.url("/f")], tmp_path / "f", patience=Patience(drops=3, pause=0.001))
    assert len(page.requests) == 4 and not (tmp_path / "f").exists()


def test_a_stalled_connection_is_given_up_and_resumed(tmp_path):
    page = Page(BODY, stalls=2, drop_after=1_000_000)
    with Server({"/f": page}) as server:
        started = time.monotonic()
        download([server.url("/f")], tmp_path / "f", patience=FAST)
        # Far below the server's own 10 s.
        assert time.monotonic() - started < 8
    got_whole(tmp_path / "f")
    assert len(page.requests) == 3 and page.sent == len(BODY)


@pytest.mark.parametrize("status", [301, 403, 404])
def test_the_next_mirror_is_asked_when_the_first_refuses(tmp_path, status):
    first, second = Page(status=status), Page(BODY)
    with Server({"/first": first, "/second": second}) as server:
        got, _ = download([server.url("/first"), server.url("/second")], tmp_path / "f", patience=FAST)
        assert got.url == server.url("/second")
    got_whole(tmp_path / "f")
    assert len(first.requests) == 1


def test_a_server_in_trouble_is_asked_again_but_not_for_ever(tmp_path):
    page = Page(status=503)
    with Server({"/f": page}) as server, pytest.raises(DownloadError, match="503"):
        download([server.url("/f")], tmp_path / "f", patience=Patience(refusals=2, pause=0.001))
    assert len(page.requests) == 3


def test_every_mirror_is_named_in_the_error(tmp_path):
    with Server({}) as server:
        url = server.url("/gone")
    with pytest.raises(DownloadError, match=r"f could not be downloaded.*no connection") as error:
        download([url, url + "2"], tmp_path / "f", patience=Patience(refusals=1, pause=0.001))
    assert url in str(error.value) and url + "2" in str(error.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("if_range", [True, False], ids=["whole new file", "rest of the new file"])
def test_a_file_that_changes_between_two_attempts(tmp_path, if_range):
    page = Page(BODY, drops=1, drop_after=1_000_000, later=OTHER, if_range=if_range)
    with Server({"/f": page}) as server:
        download([server.url("/f")], tmp_path / "f", patience=FAST)
    got_whole(tmp_path / "f", OTHER)
    assert page.requests[1]["Range"] == "bytes=1000000-" and page.requests[1]["If-Range"] == tag_of(BODY)


def test_a_later_download_is_compared_with_the_first_one(tmp_path):
    path = tmp_path / "f"
    with Server({"/f": Page(BODY), "/other": Page(OTHER)}) as server:
        download([server.url("/f")], path, patience=FAST)
        path.unlink()
        said = f"{server.url('/other')}: the file's SHA-256 is .*, expected .* as of the first download; remove {path}.json to"
        with pytest.raises(DownloadError, match=said):
            download([server.url("/other")], path, patience=FAST)
        assert names(tmp_path) == ["f.json"]
        # Another mirror may have the file as it was.
        download([server.url("/other"), server.url("/f")], path, patience=FAST)
        got_whole(path)
        path.unlink()
        _record_of(path).unlink()
        download([server.url("/other")], path, patience=FAST)
        got_whole(path, OTHER)
        # A hash that is given holds, and not that of the record.
        path.unlink()
        download([server.url("/f")], path, hashlib.sha256(BODY).hexdigest(), patience=FAST)
    got_whole(path)


def test_a_file_that_is_now_shorter_than_what_has_arrived(tmp_path):
    shorter = OTHER[:1_000_000]
    page = Page(BODY, drops=1, drop_after=1_500_000, later=shorter, if_range=False)
    with Server({"/f": page}) as server:
        download([server.url("/f")], tmp_path / "f", patience=FAST)
    got_whole(tmp_path / "f", shorter)


def test_a_truncated_file_is_never_taken_for_whole(tmp_path):
    page = Page(BODY, announced=len(BODY) + 10)
    with (
        Server({"/f": page}) as server,
        pytest.raises(DownloadError, match="announces 2100010 bytes, but has no more than 2100000"),
    ):
        download([server.url("/f")], tmp_path / "f", patience=FAST)
    assert names(tmp_path) == []


def test_a_file_of_unknown_length_is_refused(tmp_path):
    with (
        Server({"/f": Page(BODY, length=False)}) as server,
        pytest.raises(DownloadError, match="does not say how long"),
    ):
        download([server.url("/f")], tmp_path / "f", patience=FAST)
    assert names(tmp_path) == []


def test_a_known_hash_is_checked_and_the_next_mirror_asked(tmp_path):
    sha256 = hashlib.sha256(BODY).hexdigest()
    with Server({"/bad": Page(OTHER), "/good": Page(BODY)}) as server:
        with pytest.raises(DownloadError, match=f"expected {sha256}"):
            download([server.url("/bad")], tmp_path / "f", sha256, patience=FAST)
        assert names(tmp_path) == []
        download([server.url("/bad"), server.url("/good")], tmp_path / "f", sha256, patience=FAST)
    got_whole(tmp_path / "f")


def test_what_is_not_the_file_asked_for_gets_no_name(tmp_path):
    def check(path: Path) -> None:
        if path.read_bytes() != BODY:
            raise ValueError("a page that asks for a login")

    with Server({"/login": Page(b"<html>"), "/f": Page(BODY)}) as server:
        with pytest.raises(DownloadError, match="login"):
            download([server.url("/login")], tmp_path / "f", check=check, patience=FAST)
        assert names(tmp_path) == []
        download([server.url("/login"), server.url("/f")], tmp_path / "f", check=check, patience=FAST)
    got_whole(tmp_path / "f")


def test_a_killed_process_is_continued_by_another(tmp_path):
    page = Page(BODY, slow=lambda: time.sleep(0.05))
    with Server({"/f": page}) as server:
        code = f"from moekit.data import download; download([{server.url('/f')!r}], {str(tmp_path / 'f')!r})"
        child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "no_proxy": "127.0.0.1"})
        part = tmp_path / "f.part"
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 300_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        assert not (tmp_path / "f").exists()
        arrived, page.slow = part.stat().st_size, None
        download([server.url("/f")], tmp_path / "f", patience=FAST)
    got_whole(tmp_path / "f")
    assert [request.get("Range") for request in page.requests] == [None, f"bytes={arrived}-"]


def test_a_part_is_continued_where_it_came_from(tmp_path):
    """The first mirror is back, but what lies here came from the second."""
    first, second = Page(BODY), Page(BODY)
    with Server({"/first": first, "/second": second}) as server:
        note = {"url": server.url("/second"), "total": len(BODY), "etag": tag_of(BODY), "last_modified": None}
        (tmp_path / "f.part.json").write_text(json.dumps(note))
        (tmp_path / "f.part").write_bytes(BODY[:1_000_000])
        download([server.url("/first"), server.url("/second")], tmp_path / "f", patience=FAST)
    got_whole(tmp_path / "f")
    assert first.requests == [] and second.sent == len(BODY) - 1_000_000


@pytest.mark.parametrize("step", ["f.json.part", "f.part"], ids=["before the record", "before the name"])
def test_killed_after_the_last_byte(tmp_path, monkeypatch, step):
    rename = Path.replace

    def killed(self, target):
        if self.name == step:
            raise KeyboardInterrupt
        return rename(self, target)

    with Server({"/f": Page(BODY)}) as server, monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            download([server.url("/f")], tmp_path / "f", patience=FAST)
    assert not (tmp_path / "f").exists()
    # The server is gone; all is here.
    download([server.url("/f")], tmp_path / "f", patience=FAST)
    got_whole(tmp_path / "f")


def test_disk_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**7, 10**7, 3_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with Server({"/f": Page(BODY)}) as server:
        with pytest.raises(NoSpace, match=r"needs 3\.1 MB more on disk.*has only 3 MB free"):
            download([server.url("/f")], tmp_path / "f", spare=1_000_000, patience=FAST)
        assert (tmp_path / "f.part").stat().st_size == 0
        download([server.url("/f")], tmp_path / "f", spare=800_000, patience=FAST)
    got_whole(tmp_path / "f")


def test_a_file_that_changed_on_disk_is_noticed(tmp_path):
    with Server({"/f": Page(BODY)}) as server:
        download([server.url("/f")], tmp_path / "f", patience=FAST)
        # Copied: another time, the same bytes.
        os.utime(tmp_path / "f", (0, 0))
        assert download([server.url("/f")], tmp_path / "f", patience=FAST)[1] is False
        (tmp_path / "f").write_bytes(BODY[:-1] + b"!")
        with pytest.raises(ValueError, match="Move it away"):
            download([server.url("/f")], tmp_path / "f", patience=FAST)


def test_a_file_that_somebody_else_put_there_is_not_trusted(tmp_path):
    (tmp_path / "f").write_bytes(BODY[:1000])
    with pytest.raises(ValueError, match="may be incomplete"):
        download(["http://127.0.0.1:9/f"], tmp_path / "f", patience=FAST)
    assert (tmp_path / "f").read_bytes() == BODY[:1000]


@pytest.mark.parametrize("kind", ["pipe", "holes"])
def test_a_record_that_is_none_counts_as_none(tmp_path, kind):
    """One from elsewhere may be a pipe that nobody writes, or a terabyte that takes no disk."""
    path = tmp_path / "f"
    note = _record_of(path)
    if kind == "pipe":
        os.mkfifo(note)
    else:
        note.touch()
        os.truncate(note, 1 << 40)
    assert record.read(note) is None
    with Server({"/f": Page(BODY)}) as server:
        download([server.url("/f")], path, patience=FAST)
    got_whole(path)
    assert record.read(note)["sha256"] == hashlib.sha256(BODY).hexdigest()
