"""The process that ranks are forked from is stopped, is killed, or tells things in the middle of something else."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from processes import gone, limited

from moekit.processes import forkserver
from moekit.processes.system import exit_code
from moekit.ranks import RankError, start
from moekit.ranks.launch import await_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not forkserver.available(), reason="ranks are forked on Linux alone"),
]


def pid(rank):
    return os.getpid()


def parent(rank):
    return os.getppid()


@pytest.fixture
def stopped():
    """Stops a process; at the end of the test it goes on."""
    pids = []

    def stop(number):
        pids.append(number)
        os.kill(number, signal.SIGSTOP)
        while psutil.Process(number).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)

    yield stop
    for number in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGCONT)


def test_a_pool_ends_in_the_middle_of_a_word_of_its_server(monkeypatch):
    """As the garbage collector ends one, wherever it runs."""
    with start(2, "cpu") as first, start(2, "cpu") as pool:
        pids = pool.call(pid)

        def loads(message, loads=forkserver.pickle.loads):
            pool.close()
            return loads(message)

        with monkeypatch.context() as patch, limited(30):
            patch.setattr(forkserver.pickle, "loads", loads)
            start(2, "cpu").close()
        assert gone(pids) and len(first.call(pid)) == 2


def test_a_server_that_is_stopped_costs_no_ranks_and_the_next_ones_have_another(stopped, monkeypatch):
    # Without the system's word, the end of a rank would not be seen before this.
    monkeypatch.setattr("moekit.ranks.spawned.END_LIMIT", 600)
    with limited(60), start(2, "cpu") as first:
        server = first.call(parent)[0]
        with start(2, "cpu") as pool:
            stopped(server)
            pids = pool.call(pid)
            os.kill(pids[1], signal.SIGKILL)
            with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
                pool.call(pid)
        assert gone(pids)
        with start(2, "cpu") as pool:
            assert server not in pool.call(parent)
        os.kill(server, signal.SIGCONT)
        assert first.call(parent) == [server] * 2
    # It is asked for no others.
    assert gone([server])


def test_a_server_that_stops_before_it_forks_is_named_and_the_next_ranks_start(stopped, monkeypatch):
    with start(2, "cpu") as first:
        server, ready = first.call(parent)[0], forkserver.prepare()

        def await_server():
            stopped(server)
            return ready

        with monkeypatch.context() as patch, pytest.raises(RuntimeError) as caught:
            patch.setattr("moekit.ranks.spawned.await_server", await_server)
            start(2, "cpu")
        assert str(caught.value) == (
            f"no rank can be started (TimeoutError: [Errno 110] process {server}, from which ranks are forked, has been "
            "stopped by a signal): find out what holds that process up, and load the model again, which starts another "
            "one in its place"
        )
        with start(2, "cpu") as pool:
            assert server not in pool.call(parent)
        living = first.call(pid)
        released, release = [], ready.release
        monkeypatch.setattr(ready, "release", lambda number: (released.append(number), release(number)))
        os.kill(server, signal.SIGCONT)
        # The rank that nobody waits for any more ends, and the system may use its number again.
        with limited(20):
            while not released or {child.pid for child in psutil.Process(server).children()} != set(living):
                ready.listen(0.05)
    assert gone([server])


def test_a_server_that_is_stopped_while_it_starts_is_not_waited_for(stopped, monkeypatch):
    monkeypatch.setenv("SEEN", "a server that is stopped while it starts")
    server = forkserver.prepare()
    stopped(server.process.pid)
    # Else another one is made at once.
    monkeypatch.setattr(server, "fits", lambda: True)
    assert await_server() is None
    assert not server.ready and not forkserver.Server.fits(server)


def test_an_interrupt_loses_no_word_of_the_server(monkeypatch):
    monkeypatch.setenv("SEEN", "a server that has not come up")
    server = forkserver.prepare()

    def loads(message, loads=forkserver.pickle.loads):
        signal.raise_signal(signal.SIGINT)
        return loads(message)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(forkserver.pickle, "loads", loads)
        server.wait_ready()
    assert server.ready


@pytest.mark.parametrize("code, told", [("exit(3)", 3), ("os.kill(os.getpid(), 9)", -9), ("exit(0)", 0)])
def test_the_system_tells_how_a_process_has_ended(code, told):
    code = f"import os, sys; sys.stdin.read(); {code}"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert exit_code(process.pid) is None
        process.stdin.close()
        assert gone([process.pid])
        found = exit_code(process.pid)
    assert found == told == process.returncode
    assert exit_code(2**30) is None
