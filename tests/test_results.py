"""Results appear whole: after an error, a kill at any moment, and on a full disk."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import saving
from processes import ran
from synthetic_traces import synthetic

from moekit import moving, results
from moekit.routing.trace import Trace

HERE = Path(__file__).parent
KILLS = int(os.environ.get("KILLS", "50"))
pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Ends a block at any call."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, version: int) -> None:
    with results.together(folder) as place:
        for name in ("a.txt", "b.txt", "c.txt"):
            with open(place / name, "w") as file:
                for _ in range(3):
                    file.write(f"{version} " * 5000)
        (place / "sub").mkdir()
        (place / "sub" / "d.txt").write_text(str(version))


def test_files_appear_together(tmp_path):
    folder = tmp_path / "made" / "out"
    with results.together(folder) as place:
        (place / "a.txt").write_text("a")
        assert list(folder.iterdir()) == [place]
    assert contents(folder) == {"a.txt": b"a"}
    with results.whole(folder / "b.txt") as part:
        part.write_text("b")
        assert not (folder / "b.txt").exists()
    assert contents(folder) == {"a.txt": b"a", "b.txt": b"b"}


def test_an_error_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError), results.together(tmp_path) as place:
        (place / "a.txt").write_text("new")
        raise KeyError
    assert contents(tmp_path) == {"a.txt": b"old"}


def descriptors() -> set[int]:
    """Those that are open, without the one that reads the folder."""
    found = set(map(int, os.listdir("/proc/self/fd")))
    return {number for number in found if os.path.lexists(f"/proc/self/fd/{number}")}


def test_200_moments_of_an_end(tmp_path):
    """An exception at one of the calls that a save makes, drawn at random: old or new files, each whole, nothing else."""
    folder = tmp_path / "out"

    def ended_at(call: int | None, version: int) -> int:
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += 1
            if calls == call:
                sys.setprofile(None)
                raise Killed

        sys.setprofile(count)
        try:
            write(folder, version)
        finally:
            sys.setprofile(None)
        return calls

    write(folder, 0)
    total, draw, kept = ended_at(None, 0), random.Random(0), 0
    for version in range(1, 201):
        before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.txt")}
        open_before = descriptors()
        try:
            ended_at(draw.randrange(1, total), version)
        except Killed:
            pass
        # A process that is killed leaves no descriptor. Here one would keep a lock, for which each later save waits 10 s.
        for left in descriptors() - open_before:
            os.close(left)
        after = {
            p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.txt") if ".moekit" not in str(p)
        }
        kept += after == before
        for name, held in after.items():
            said = held.split()
            assert len(said) == (1 if name.name == "d.txt" else 15_000) and len(set(said)) == 1
    assert 50 < kept < 200
    for left in folder.glob(f"{results.PREFIX}*"):
        os.utime(left, (0, 0))
    write(folder, 201)
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt", "c.txt", "sub"]


def test_files_of_notebooks_are_whole_after_kills(tmp_path, counted):
    ended = ran(HERE / "saving.py", tmp_path, str(KILLS), "1", seconds=30 + 5 * KILLS)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    counted("kills while results are saved", "with every file whole", found["killed"] - len(found["broken"]))
    counted("of these, kills around the moves", "with every file whole", found["moved"])
    counted("kills while results are saved", "with files of two runs", len(found["mixed"]))
    counted("kills while results are saved", "with a file that cannot be read", len(found["broken"]))
    assert found["killed"] >= 0.6 * KILLS and found["moved"] >= 0.3 * KILLS
    assert found["broken"] == found["mixed"] == found["left"] == []


def test_a_full_disk_is_one_sentence_and_touches_nothing(tmp_path):
    """On a file system of 40 kB, where there is leave to mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no leave to mount a file system")
    try:
        (disk / "results.json").write_text('{"parameters": {"version": 1}}')
        (disk / "table.csv").write_text("old")
        before = contents(disk)
        with pytest.raises(results.NotWritten, match=f"^{disk}: the disk is full.*name another folder$"):
            saving.save(disk, 2)
        assert contents(disk) == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    """A move replaces whatever has the name, even where nothing can be written into it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with (
            pytest.raises(results.NotWritten, match=f"{name} is a device, a pipe or a socket"),
            results.whole(tmp_path / name) as part,
        ):
            part.write_text("new")
    assert (tmp_path / "pipe").is_fifo() and contents_of_files(tmp_path) == []


@pytest.mark.parametrize("leads_to", ["kept", "nowhere"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, leads_to):
    """By either door; the folder itself may be a link."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    out = tmp_path / "out"
    for name in ("a", "b", "c"):
        (out / name).symlink_to(f"../{leads_to}")
    with results.together(out) as place:
        for name in ("a", "b"):
            (place / name).write_text("new")
    with results.whole(out / "c") as part:
        part.write_text("new")
    assert contents(tmp_path / "real") == dict.fromkeys("abc", b"new") and out.is_symlink()
    assert not any(path.is_symlink() for path in (tmp_path / "real").iterdir())
    assert (tmp_path / "kept").read_text() == "kept" and not (tmp_path / "nowhere").exists()


def test_no_file_goes_through_a_link_that_leads_out(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to("../elsewhere")
    with (
        pytest.raises(results.NotWritten, match="sub leads out of"),
        results.together(tmp_path / "out") as place,
    ):
        (place / "sub").mkdir()
        (place / "sub" / "a").write_text("new")
    assert contents(tmp_path / "elsewhere") == {} and [p.name for p in (tmp_path / "out").iterdir()] == [
        "sub"
    ]


def test_an_open_file_is_not_replaced(tmp_path):
    """``/dev/stdout`` is such a link, and leads to a file where the output goes to one."""
    with open(tmp_path / "log", "w") as log:
        (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{log.fileno()}")
        with (
            pytest.raises(results.NotWritten, match="stdout is a device"),
            results.whole(tmp_path / "stdout") as part,
        ):
            part.write_text("new")
    assert (tmp_path / "stdout").is_symlink() and (tmp_path / "log").read_text() == ""


def test_a_limit_on_the_size_of_files(tmp_path):
    (tmp_path / "tokens.parquet").write_text("old")
    code = (
        "import resource, sys, pathlib, saving\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: saving.save(pathlib.Path(sys.argv[1]), 1)\n"
        "except OSError as error: print(type(error).__name__, error)\n"
    )
    ended = ran("-c", code, tmp_path, seconds=120)
    said = f"NotWritten {tmp_path}: the disk is full or the file too large"
    assert ended.stdout.startswith(said), ended.stderr
    assert contents(tmp_path) == {"tokens.parquet": b"old"}


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(results.NotWritten, match="file is not a folder"), results.together(tmp_path / "file"):
        pass
    with (
        pytest.raises(ValueError, match="nowhere does not exist.*make it"),
        results.whole(tmp_path / "nowhere" / "x"),
    ):
        pass
    with pytest.raises(OSError, match="folder.txt is a folder, expected a file"):
        with results.together(tmp_path) as place:
            (place / "a.txt").write_text("")
            (place / "folder.txt").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.txt"]


def test_a_folder_is_checked_before_anything_is_written(tmp_path):
    results.check_writable(tmp_path / "new" / "folder")
    assert contents(tmp_path / "new" / "folder") == {}
    (tmp_path / "file").write_text("old")
    for folder, make, said in (
        (tmp_path / "file", True, "file is not a folder"),
        (tmp_path / "nowhere", False, "nowhere does not exist"),
        (Path("/proc/self"), True, "/proc/[0-9]+: nothing can be written there"),
    ):
        with pytest.raises(results.NotWritten, match=said):
            results.check_writable(folder, make)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]


def test_a_file_is_checked_before_anything_is_written(tmp_path):
    """What ends the block of ``whole`` is known before it; a link is replaced, wherever it leads."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("/nowhere/file")
    for name in ("new", "file", "link"):
        results.check_file(tmp_path / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "opened").symlink_to("/proc/self/fd/9")
    (tmp_path / "circle").symlink_to("circle")
    for name, said in (
        ("folder", "folder is a folder, expected a file"),
        ("opened", "opened is a device, a pipe or a socket"),
        ("circle", "lead round in a circle"),
        ("file/new", "file is not a folder"),
        ("nowhere/new", "nowhere does not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            results.check_file(tmp_path / name)
        with pytest.raises(ValueError, match=said), results.whole(tmp_path / name) as part:
            part.write_text("new")
    results.check_file(tmp_path / "made" / "new", make=True)
    names = ["circle", "file", "folder", "link", "made", "opened"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "file").read_text() == "old"


def test_what_a_killed_run_left_goes_and_what_a_running_one_writes_stays(tmp_path):
    left = tmp_path / f"{results.PREFIX}left"
    left.mkdir()
    (left / "a.txt").write_text("half")
    (left / results.LOCK).write_text("")
    young, old = (tmp_path / f"{results.PREFIX}{name}" for name in ("young", "old"))
    young.mkdir()
    old.mkdir()
    os.utime(old, (0, 0))
    with results.together(tmp_path) as place:
        assert not left.exists() and not old.exists() and young.exists()
        with results.together(tmp_path) as other:
            assert place.is_dir()
            (other / "b.txt").write_text("b")
        (place / "a.txt").write_text("a")
    young.rmdir()
    assert contents(tmp_path) == {"a.txt": b"a", "b.txt": b"b"}


def half_moved(folder: Path, names: str, done: int) -> Path:
    """What a run leaves that ended, with the process that moves, after ``done`` moves."""
    place = folder / f"{results.PREFIX}ended"
    place.mkdir()
    (place / results.LOCK).write_text("")
    for number, name in enumerate(names):
        (folder / name if number < done else place / name).write_text("new")
    (place / moving.WHOLE).write_text(json.dumps([*names]))
    return place


@pytest.mark.parametrize("done", range(4))
@pytest.mark.parametrize("by", ["settle", "save"])
def test_what_is_whole_gets_to_its_names_by_the_next_save_or_reading(tmp_path, done, by):
    for name in "abc":
        (tmp_path / name).write_text("old")
    half_moved(tmp_path, "abc", done)
    if by == "settle":
        results.settle(tmp_path)
    else:
        with results.whole(tmp_path / "d") as part:
            assert all((tmp_path / name).read_text() == "new" for name in "abc")
            part.write_text("new")
    assert contents(tmp_path) == dict.fromkeys("abc" if by == "settle" else "abcd", b"new")


HOSTILE = [
    '["../mine"]',
    '["sub/../../mine"]',
    '["link/mine"]',
    '["/"]',
    '[".."]',
    '[""]',
    '["a\\u0000b"]',
    "[5]",
    "5",
    "{",
    "[" * 100_000,
]


@pytest.mark.parametrize("mark", HOSTILE)
def test_a_mark_from_elsewhere_moves_nothing_out_of_its_folder(tmp_path, mark):
    """As an archive may hold one beside a trace."""
    folder = tmp_path / "folder"
    trace, _ = synthetic(tokens=20)
    folder.mkdir()
    (tmp_path / "mine").write_text("mine")
    (folder / "mine").write_text("theirs")
    (folder / "link").symlink_to(tmp_path)
    place = folder / f"{results.PREFIX}x"
    (place / "link").mkdir(parents=True)
    (place / "sub").mkdir()
    (place / "link" / "mine").write_text("theirs")
    (place / results.LOCK).touch()
    (place / moving.WHOLE).write_text(mark)
    trace.save(folder / "t")
    assert len(Trace.load(folder / "t")) == 20
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "mine"]


def test_a_mark_of_holes_takes_no_memory(tmp_path):
    """A file may have a terabyte and take no disk."""
    place = tmp_path / f"{results.PREFIX}x"
    place.mkdir()
    (place / results.LOCK).touch()
    (place / moving.WHOLE).touch()
    os.truncate(place / moving.WHOLE, 1 << 40)
    trace, _ = synthetic(tokens=20)
    trace.save(tmp_path / "t")
    assert len(Trace.load(tmp_path / "t")) == 20


def test_a_folder_from_elsewhere_is_no_link(tmp_path):
    (tmp_path / "mine").mkdir()
    half_moved(tmp_path / "mine", "a", 0).rename(tmp_path / "ended")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / f"{results.PREFIX}x").symlink_to(tmp_path / "ended")
    results.settle(folder)
    assert (tmp_path / "ended" / "a").read_text() == "new"


def test_a_trace_is_read_after_what_was_whole_has_got_to_its_name(tmp_path):
    trace, _ = synthetic(tokens=20)
    trace.save(tmp_path / "t")
    (tmp_path / "t").rename(tmp_path / "kept")
    trace.meta["run"] = "older"
    trace.save(tmp_path / "t")
    place = half_moved(tmp_path, "t", 0)
    (tmp_path / "kept").rename(place / "t")
    assert "run" not in Trace.load(tmp_path / "t").meta and not place.exists()


def test_a_save_comes_after_what_an_earlier_one_left_meanwhile(tmp_path):
    with results.together(tmp_path) as place:
        (place / "a").write_text("newest")
        (place / "b").write_text("newest")
        half_moved(tmp_path, "ab", 1)
    assert contents(tmp_path) == {"a": b"newest", "b": b"newest"}


def test_saves_of_two_processes_do_not_mix(tmp_path):
    code = (
        "import sys, pathlib; from moekit import results\n"
        "folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "for _ in range(20):\n"
        "    with results.together(folder) as place:\n"
        "        for name in 'abcdefgh': (place / name).write_text(version)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], env=environment) for n in range(2)
    ]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert len(set(contents(tmp_path).values())) == 1 and len(contents(tmp_path)) == 8


def test_without_a_process_that_moves_the_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_spawn", lambda *_, **__: (_ for _ in ()).throw(OSError("no processes")))
    write(tmp_path, 1)
    assert sorted(contents_of_files(tmp_path)) == ["a.txt", "b.txt", "c.txt", "sub/d.txt"]


def contents_of_files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_jupyter_shows_one_sentence():
    assert results.NotWritten("full")._render_traceback_() == ["NotWritten: full"]
