"""One lock for folders of results, of data and of checkpoints."""

import errno
import fcntl

import pytest

from moekit import locks, results
from moekit.checkpoint.writing import _job_of
from moekit.data.lock import locked


def test_a_lock_is_one_process_and_goes_with_its_file(tmp_path):
    with open(tmp_path / "a", "w") as file, open(tmp_path / "a") as other:
        assert locks.take(file) is True and locks.take(file) is True and locks.take(other) is False
    with open(tmp_path / "a") as other:
        assert locks.take(other) is True


def test_who_comes_second_is_told(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="is being prepared by process"), locked(tmp_path):
        pass
    with (
        _job_of(tmp_path / "p", "{}"),
        pytest.raises(ValueError, match="another run"),
        _job_of(tmp_path / "p", "{}"),
    ):
        pass


def test_a_file_system_without_locks_is_written_to_at_once(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def never(*_):
        raise AssertionError("nobody has the lock")

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr("moekit.results.time.sleep", never)
    with open(tmp_path / "a", "w") as file:
        assert locks.take(file) is None
    with locked(tmp_path / "data"), _job_of(tmp_path / "made", "{}"), results.whole(tmp_path / "a") as part:
        part.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
