"""The pool of ranks: what it promises, and what it leaves behind when something goes wrong."""

import contextlib
import fcntl
import functools
import itertools
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from processes import gone, limited

from moekit import ranks
from moekit.ranks import Each, RankError, Stream, links, start, streams
from moekit.ranks.devices import waking
from moekit.ranks.joined import Word, sharing
from moekit.ranks.piped import PipedRanks
from moekit.ranks.this_process import ThisProcess

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as if these functions stood in a notebook
HERE = Path(ranks.__file__).parents[2]
pytestmark = pytest.mark.slow


def pid(rank):
    return os.getpid()


@pytest.fixture(scope="module")
def three():
    with start(3, "cpu", timeout=60) as pool:
        yield pool


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """The folder for temporary files, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_stream_goes_to_the_ranks_while_they_run(three, world_size):
    made, seen = [], []

    def items(count):
        for number in range(count):
            made.append(number)
            yield Each([(number, rank, np.full(100_000, number)) for rank in range(world_size)])

    def work(rank, parts, factor):
        for number, mine, array in parts:
            assert mine == rank.rank and (array == number).all()
            rank.report(number * factor)
        return "done"

    def on_report(rank, message):
        seen.append((rank, message))
        # The driver never makes all items before the first is done.
        assert len(made) <= message / 10 + 1 + streams.AHEAD + (world_size > 1)

    with contextlib.nullcontext(three) if world_size > 1 else start(1, "cpu") as pool:
        assert (
            pool.call(work, Stream(items(20)), 10, on_report=on_report, timeout=60) == ["done"] * world_size
        )
        for rank in range(world_size):
            assert [message for one, message in seen if one == rank] == [10 * number for number in range(20)]
        # Without any item, and with items that the function leaves.
        assert pool.call(work, Stream(items(0)), 1) == ["done"] * world_size
        assert pool.call(lambda rank, parts: next(iter(parts))[0], Stream(items(9))) == [0] * world_size
        # Beside parts that differ between ranks, in any order, and without what a notebook's functions need.
        mixed = pool.call(
            lambda rank, one, parts, two: (one, [number for number, *_ in parts], two),
            Each(range(world_size)),
            Stream(Each(one.parts, plain=True) for one in items(3)),
            Each([{"rank": rank} for rank in range(world_size)]),
        )
        assert mixed == [(rank, [0, 1, 2], {"rank": rank}) for rank in range(world_size)]
        assert pool.call(lambda rank: rank.rank) == list(range(world_size))


def test_a_rank_that_ends_in_a_stream_is_named():
    def work(rank, numbers):
        for number in numbers:
            if number == 5 and rank.rank == 1:
                raise KeyError("five")

    with start(2, "cpu") as pool, pytest.raises(RankError, match="rank 1 raised KeyError: 'five'"):
        pool.call(work, Stream(itertools.count()), timeout=60)


def counting(rank, numbers):
    """Counts the items in its state, with a collective for each of them, and reports each."""
    for number in numbers:
        if rank.world_size > 1:
            dist.barrier()
        rank.state["count"] = rank.state.get("count", 0) + 1
        rank.report(number)
    return "done"


class Unpicklable:
    def __reduce__(self):
        raise ValueError("bad batch 5")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("fault", ["while it is made", "while it is pickled", "in a report"])
def test_an_error_of_the_drivers_own_leaves_the_ranks_usable(world_size, fault):
    """The stream ends, each rank has done the same steps, and the next call runs."""

    def items():
        for number in range(50):
            if number == 5 and fault == "while it is made":
                raise ValueError("bad batch 5")
            yield Unpicklable() if number == 5 and fault == "while it is pickled" else number

    def on_report(rank, number):
        if number == 5 and fault == "in a report":
            raise ValueError("bad batch 5")

    with start(world_size, "cpu", timeout=60) as pool:
        asked = Stream(items())
        if fault == "while it is pickled" and world_size == 1:
            # Nothing is pickled within a process.
            assert pool.call(counting, asked) == ["done"]
            return
        with pytest.raises(ValueError, match="^bad batch 5$") as caught:
            pool.call(counting, asked, on_report=on_report)
        assert caught.value.__cause__ is None
        counts = pool.call(lambda rank: rank.state.pop("count"))
        assert len(set(counts)) == 1, "all ranks have done the same steps"
        assert 5 <= counts[0] <= 6 + streams.AHEAD + (world_size > 1)
        seen = []
        assert (
            pool.call(counting, Stream(range(9)), on_report=lambda rank, n: seen.append(n))
            == ["done"] * world_size
        )
        assert sorted(seen) == sorted([*range(9)] * world_size)
        assert pool.call(lambda rank: rank.state["count"]) == [9] * world_size


def test_an_error_of_a_rank_after_one_of_the_drivers_tells_both():
    def work(rank, numbers):
        assert len(list(numbers)) == 9, "too few"

    def items():
        yield 1
        raise ValueError("bad batch")

    with start(2, "cpu") as pool, pytest.raises(RankError, match="AssertionError: too few") as caught:
        pool.call(work, Stream(items()), timeout=60)
    assert caught.value.__notes__ == ["Before it, in the driver: ValueError: bad batch"]
    with start(1, "cpu") as pool, pytest.raises(ValueError, match="bad batch") as caught:
        pool.call(work, Stream(items()))
    assert isinstance(caught.value.__cause__, AssertionError)


def test_results_come_in_rank_order(three):
    def work(rank, base, *, step):
        time.sleep(0.05 * (2 - rank.rank))  # the last rank answers first
        return base + step * rank.rank, rank.world_size, str(rank.device)

    assert three.call(work, 10, step=5) == [(10, 3, "cpu"), (15, 3, "cpu"), (20, 3, "cpu")]
    assert len(set(three.call(pid)) | {os.getpid()}) == 4


def test_state_lives_between_calls(three):
    def count(rank):
        rank.state["n"] = rank.state.get("n", rank.rank) + 1
        return rank.state["n"]

    assert three.call(count) == [1, 2, 3]
    assert three.call(count) == [2, 3, 4]


def test_all_reduce(three):
    def total(rank):
        x = torch.tensor([10.0**rank.rank])
        dist.all_reduce(x)
        return x

    assert [x.tolist() for x in three.call(total)] == [[111.0]] * 3


def test_reports_arrive_during_the_call(three, tmp_path):
    flag = tmp_path / "seen"

    def work(rank):
        for step in range(3):
            rank.report({"step": step})
        while rank.rank == 2 and not flag.exists():  # ends only if the driver saw a report before the result
            time.sleep(0.01)

    seen = []

    def on_report(rank, message):
        seen.append((rank, message["step"]))
        flag.touch()

    three.call(work, on_report=on_report, timeout=20)
    assert sorted(seen) == [(r, s) for r in range(3) for s in range(3)]
    assert [s for r, s in seen if r == 1] == [0, 1, 2]
    assert three.call(work, timeout=20) == [None] * 3  # nobody listens: no harm


def test_a_call_inside_a_call_is_refused(three):
    def on_report(rank, message):
        with pytest.raises(RuntimeError, match="busy"):
            three.call(pid)
        refused.append(rank)

    refused = []
    three.call(lambda rank: rank.report("hello"), on_report=on_report)
    assert sorted(refused) == [0, 1, 2]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["inside", "in another thread"])
def test_one_rank_runs_one_call_at_a_time(elsewhere):
    """Two threads that asked one rank mixed up its experts in slots, and all later results with them."""

    def second():
        with pytest.raises(RuntimeError, match="busy with another call: wait for it to end"):
            one.call(pid)
        refused.append(True)

    def on_report(rank, message):
        thread = threading.Thread(target=second) if elsewhere else None
        if thread is None:
            second()
        else:
            thread.start()
            thread.join()

    refused = []
    with ranks.start(1, "cpu") as one:
        one.call(lambda rank: rank.report("hello"), on_report=on_report)
        assert refused == [True] and one.call(pid) == [os.getpid()]
        with pytest.raises(ranks.RankError):
            one.call(lambda rank: 1 / 0)
        assert one.call(pid) == [os.getpid()]


def test_a_bad_argument_harms_no_rank(three):
    before = three.call(pid)
    with pytest.raises(TypeError, match="pickle"):
        three.call(pid, threading.Lock())
    assert three.call(pid) == before


def test_big_arguments_and_results_pass(three):
    def times(rank, x):
        return x * rank.rank

    x = np.ones(25_000_000)  # 200 MB
    results = three.call(times, x)
    assert [r.sum() for r in results] == [0, 25e6, 50e6]


def test_cores_are_dealt_and_output_is_kept_away(three, capfd):
    def threads(rank):
        print("from python")
        os.system("echo from a child")
        return torch.get_num_threads(), sys.stdin.read()

    assert three.call(threads) == [(max(1, ranks.usable_cores() // 3), "")] * 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS shows no one's sockets")
def test_nothing_listens_beyond_loopback(three):
    three.call(lambda rank: dist.barrier())
    for p in three.call(pid):
        connections = psutil.Process(p).net_connections("inet")
        assert connections  # gloo's
        assert all(c.laddr.ip in ("127.0.0.1", "::1") for c in connections)


def boom(rank):
    raise ValueError("boom at the gate")


def die(rank):
    print("last words")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "act, said, raised",
    [
        (boom, ["raised ValueError: boom at the gate", "Traceback", "in boom"], ValueError),
        (die, ["SIGKILL", "out-of-memory", "last words"], None),
        (lambda rank: os.kill(os.getpid(), signal.SIGSEGV), ["SIGSEGV", "Fatal Python error"], None),
        (lambda rank: sys.exit(3), ["raised SystemExit: 3"], SystemExit),
        (lambda rank: os._exit(3), ["exit code 3"], None),
        (lambda rank: threading.Lock(), ["raised TypeError", "pickle"], TypeError),
    ],
    ids=["raises", "killed", "crashes", "sys.exit", "os._exit", "unpicklable"],
)
def test_one_rank_fails_while_the_others_sit_in_a_collective(temp, act, said, raised):
    def work(rank):
        if rank.rank == 1:
            time.sleep(0.2)
            return act(rank)
        dist.all_reduce(torch.ones(1))

    pool = start(3 if act is die else 2, "cpu")  # peers of a rank that dies raise, too: 3 make it more likely
    pids = pool.call(pid)
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.call(work, timeout=60)
    assert time.monotonic() - began < 20  # of the 1800 that the collective would wait
    assert caught.value.rank == 1 and str(caught.value).startswith("rank 1 ")
    assert all(words in str(caught.value) for words in said)
    assert type(caught.value.__cause__) is (raised or type(None))
    assert gone(pids) and not list(temp.iterdir())
    with pytest.raises(RuntimeError, match=r"ranks are gone .*rank 1.* load the model again"):
        pool.call(pid)
    pool.close()


def test_a_rank_that_dies_in_the_middle_of_its_answer_is_named():
    def work(rank):
        if rank.rank == 1:
            rank.report("ready")
            threading.Timer(0.3, os._exit, [7]).start()
            return bytes(10_000_000)

    with start(2, "cpu") as pool, pytest.raises(RankError, match="rank 1 ended with exit code 7"):
        pool.call(work, on_report=lambda rank, message: time.sleep(1))  # so that the pipe is full


def test_a_rank_that_died_between_calls_is_named():
    with start(2, "cpu") as pool:
        pids = pool.call(pid)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
            pool.call(pid)
        assert gone(pids)


def test_a_death_is_seen_though_a_child_holds_the_pipe():
    def orphan(rank):
        if rank.rank == 0 or os.fork() == 0:
            time.sleep(60)
        else:
            os._exit(4)

    with start(2, "cpu") as pool, pytest.raises(RankError, match="rank 1 ended with exit code 4"):
        pool.call(orphan, timeout=30)


def pressed(call, kind, at):
    """What comes of ``call``, or None, and the lines that it has in the method of ``kind``; the interrupt key is pressed at one."""
    lines, result = 0, None

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code is not kind.call.__code__:
            return None
        lines += event == "line"
        if event == "line" and lines == at:
            signal.raise_signal(signal.SIGINT)
        return trace

    handler, tracer = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()
    sys.settrace(trace)
    try:
        with limited(20):
            result = call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracer)
        signal.signal(signal.SIGINT, handler)
    return result, lines


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_interrupt_key_at_any_line_of_a_call_leaves_ranks_that_work_or_are_gone(world_size, temp):
    kind, at, lines, survived = ThisProcess if world_size == 1 else PipedRanks, 0, 1, 0
    pool = start(world_size, "cpu")
    while at <= lines:
        at += 1
        result, lines = pressed(functools.partial(pool.call, number_of, at), kind, at)
        assert result in (None, [at] * world_size)
        try:
            assert pool.call(number_of, -at) == [-at] * world_size
            survived += 1
        except RuntimeError as error:
            assert str(error) == "the ranks are gone (interrupted): load the model again"
            assert world_size > 1
            pool = start(world_size, "cpu")
    pool.close()
    assert lines > 10 and survived and not list(temp.iterdir())


def test_a_second_interrupt_leaves_no_answers_to_the_next_call(monkeypatch):
    def give_up(pool, *failure, before=PipedRanks._give_up):
        signal.raise_signal(signal.SIGINT)
        before(pool, *failure)

    def on_report(rank, message):
        raise KeyboardInterrupt

    def work(rank):
        rank.report(None)
        return "of the first call"

    monkeypatch.setattr(PipedRanks, "_give_up", give_up)
    with start(2, "cpu") as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.call(work, on_report=on_report)
        with pytest.raises(RuntimeError, match=r"the ranks are gone \(interrupted\)"):
            pool.call(number_of, 1)


def number_of(rank, number):
    return number


def test_timeout_names_the_late_ranks():
    pool = start(2, "cpu")
    pids = pool.call(pid)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] in 0.5 s"):
        pool.call(lambda rank: time.sleep(60 * rank.rank), timeout=0.5)
    assert gone(pids)


def test_an_error_in_the_listener_ends_the_call():
    def refuse(rank, message):
        raise KeyError("listener")

    def work(rank):
        rank.report(1)
        time.sleep(60)

    pool = start(2, "cpu")
    pids = pool.call(pid)
    with pytest.raises(KeyError, match="listener"):
        pool.call(work, on_report=refuse)
    assert gone(pids)
    with start(1, "cpu") as alone:
        with pytest.raises(KeyError, match="listener"):
            alone.call(work, on_report=refuse)
        assert alone.call(pid) == [os.getpid()]


def test_a_rank_that_dies_at_the_start_is_named(temp, monkeypatch):
    def join(rank, *_):
        if rank.rank == 1:
            os._exit(9)
        time.sleep(60)

    monkeypatch.setattr("moekit.ranks.spawned.join", join)
    with pytest.raises(RankError, match="rank 1 ended with exit code 9"):
        start(2, "cpu")
    assert not list(temp.iterdir())


def never(rank, *_):
    time.sleep(600)


def test_the_start_has_a_limit(temp, monkeypatch):
    monkeypatch.setattr("moekit.ranks.spawned.join", never)
    monkeypatch.setattr("moekit.ranks.spawned.START_LIMIT", 0.3)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        start(2, "cpu")
    assert not list(temp.iterdir())


def test_closing_leaves_nothing(temp):
    pool = start(2, "cpu")
    pids = pool.call(pid)
    assert list(temp.iterdir())
    with pool:
        pass
    assert gone(pids, within=0.1) and not list(temp.iterdir())
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.call(pid)


def test_a_forgotten_pool_leaves_nothing(temp):
    pool = start(2, "cpu")
    pids = pool.call(pid)
    del pool
    assert gone(pids, within=0.1) and not list(temp.iterdir())


DRIVER = """
import os, time, torch, torch.distributed as dist
from moekit.ranks import start

def total(rank):
    x = torch.ones(1)
    dist.all_reduce(x)
    return os.getpid() if x.item() == 2 else None

def stuck(rank):
    rank.report("stuck")
    if rank.rank == 0:
        dist.all_reduce(torch.ones(1))
    while True:
        pass

ranks = start(2, "cpu")
print(*ranks.call(total), flush=True)
"""
SAY_WHAT_IS_OPEN = ("-W", "always::ResourceWarning")
STUCK = DRIVER + "ranks.call(stuck, on_report=lambda rank, message: print(message, flush=True))\n"


def drive(temp, *python, **options):
    """A driver in a process of its own, away from this repository, that finds moekit by a path alone."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "TMPDIR": str(temp)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": temp}
    return subprocess.Popen([sys.executable, *python], env=environment, **pipes, **options)


@pytest.mark.parametrize("how", ["source on stdin", "script without main guard or stdin"])
def test_any_kind_of_driver(tmp_path, how):
    temp, script = tmp_path / "temp", tmp_path / "script.py"
    temp.mkdir()
    script.write_text(DRIVER)
    if how == "source on stdin":
        with open(script) as source:
            driver = drive(temp, *SAY_WHAT_IS_OPEN, "-", stdin=source)
    else:
        driver = drive(temp, *SAY_WHAT_IS_OPEN, script, preexec_fn=lambda: os.close(0))
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 0 and not err, err
    assert gone([int(p) for p in out.split()], within=0.1) and len(out.split()) == 2
    assert not list(temp.iterdir())


@pytest.mark.parametrize(
    "number, stopped", [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, False)]
)
def test_no_rank_outlives_its_driver(tmp_path, number, stopped):
    def heed():  # a shell's job in the background is started deaf to SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    driver = drive(tmp_path, "-c", STUCK, start_new_session=True, preexec_fn=heed)
    try:
        pids = [int(p) for p in driver.stdout.readline().split()]
        assert len(pids) == 2, driver.stderr.read()
        assert [driver.stdout.readline(), driver.stdout.readline()] == ["stuck\n"] * 2
        for rank in pids if stopped else ():
            psutil.Process(rank).suspend()
        os.killpg(driver.pid, number)
        _, err = driver.communicate(timeout=20)
    finally:
        driver.kill()
    assert gone(pids)
    if number == signal.SIGINT:
        last = err.strip().split("\n")[-1]
        assert last.startswith("KeyboardInterrupt: interrupted") and last.endswith("load the model again")
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_no_rank_outlives_its_driver_though_a_child_of_the_driver_holds_the_pipes(tmp_path):
    fork = "child = os.fork()\nif child:\n    print(child, flush=True)\ntime.sleep(30)\nos._exit(0)\n"
    driver = drive(tmp_path, "-c", DRIVER + fork)
    pids = [int(p) for p in driver.stdout.readline().split()]
    child = int(driver.stdout.readline())
    driver.kill()
    assert len(pids) == 2 and gone(pids)
    os.kill(child, signal.SIGKILL)
    driver.communicate(timeout=20)


def test_a_single_rank_is_this_process():
    reports = []
    with start(1, "cpu") as pool:
        assert (pool.world_size, pool.devices) == (1, [torch.device("cpu")])
        assert pool.call(pid) == [os.getpid()]
        assert not dist.is_initialized()

        def work(rank, x):
            rank.report("half")
            rank.state["x"] = x
            return rank.world_size

        assert pool.call(work, 3, on_report=lambda *report: reports.append(report)) == [1]
        assert pool.call(work, 4) == [1]  # no listener is left over from the call before
        assert reports == [(0, "half")]
        with pytest.raises(RankError, match="rank 0 raised ValueError: boom") as caught:
            pool.call(boom)
        assert isinstance(caught.value.__cause__, ValueError) and caught.value.rank == 0
        with pytest.raises(RankError, match="SystemExit"):
            pool.call(lambda rank: sys.exit(1))
        # An exit of the driver's own part is no rank's.
        with pytest.raises(SystemExit, match="7"):
            pool.call(work, 4, on_report=lambda *report: sys.exit(7))
        assert pool.call(lambda rank: rank.state["x"]) == [4]
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.call(pid)


@pytest.mark.parametrize(
    "gpus, world_size, device, said",
    [
        (0, 0, "cpu", "world_size=0: expected a whole number"),
        (0, 2.5, "cpu", "world_size=2.5: expected a whole number"),
        (0, True, "cpu", "world_size=True: expected a whole number"),
        (0, 10**9, "cpu", "world_size=1000000000: expected at most 4096"),
        (0, 2, "gpu", "device='gpu': expected one of auto, cuda, cpu"),
        (0, 1, "cuda", 'torch sees 0: use device="cpu"'),
        (1, 4, "auto", 'torch sees 1: use world_size=1 or device="cpu"'),
    ],
)
def test_what_cannot_be_is_refused(monkeypatch, gpus, world_size, device, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError) as caught:
        start(world_size, device)
    assert said in str(caught.value)


def test_devices(monkeypatch):
    assert ranks.choose_devices(2, "cpu") == [torch.device("cpu")] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks.choose_devices(2, "auto") == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_gpu_comes_up_while_a_block_works(monkeypatch):
    """A stand-in for CUDA's start, as there may be no GPU: the block waits for it, unless it fails, and what goes wrong in it is
    not said."""
    entered, left, woken, at_the_end = threading.Event(), threading.Event(), [], []

    def empty(*_, **how):
        entered.set()
        left.wait(10)
        woken.append(how)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("moekit.ranks.devices.torch.empty", empty)
    monkeypatch.setattr("moekit.ranks.devices.atexit.register", lambda *call: at_the_end.append(call))
    with pytest.raises(ValueError, match="the file is damaged"), waking([torch.device("cuda", 0)]):
        assert entered.wait(10)
        raise ValueError("the file is damaged")
    assert not woken
    left.set()
    # Python's end waits for the thread.
    [(join, limit)] = at_the_end
    join(limit)
    assert woken == [{"device": torch.device("cuda", 0)}]
    with waking([torch.device("cuda", 0)]):
        pass
    assert len(woken) == 2 and len(at_the_end) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "waking"]
    for others in ([], [torch.device("cpu")], [torch.device("cuda", i) for i in range(2)]):
        with waking(others):
            assert not [thread for thread in threading.enumerate() if thread.name == "waking"]


def test_ranks_that_a_launcher_bound_to_cores_of_their_own_use_all_of_these():
    words = [
        Word(host, "cpu", frozenset(cores), "10.0.0.1", 1, None)
        for host, cores in (("a", {0, 1}), ("a", {2, 3}), ("b", {0, 1, 2, 3}), ("b", {0, 1, 2, 3}))
    ]
    assert sharing(words) == [1, 1, 2, 2]
    machines = (0, 0, 1, 1)
    bound, shared = (
        ranks.Rank(0, 4, torch.device("cpu"), machines=machines, sharing=share) for share in (1, 2)
    )
    assert (bound.cores, shared.cores) == (ranks.usable_cores(), max(1, ranks.usable_cores() // 2))


@pytest.mark.parametrize("seconds", [0.1, 30.0, 131_072.0, 1e9, math.inf])
def test_a_connection_is_kept_alive_for_any_silence(seconds):
    with links.listen("127.0.0.1") as listener, socket.create_connection(listener.getsockname()) as link:
        links.keep_alive(link, seconds)
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if sys.platform == "linux":
            every = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            assert every == max(1, round(min(seconds / 4, 32_767)))
            after = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert after == min(seconds * 1000, 2**31 - 1)


def test_ranks_are_accepted_by_a_driver_with_many_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    try:
        with links.listen("127.0.0.1") as low:
            number = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1500)
        with socket.socket(fileno=number) as listener:
            rank = threading.Thread(target=joins, args=(listener.getsockname(),))
            rank.start()
            found = links.accept_all(listener, b"secret", [1], 30.0, 20.0)
            rank.join()
        assert list(found) == [1]
        found[1].close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def joins(driver: tuple[str, int]) -> None:
    links.connect(driver, b"secret", 1, 30.0, 20.0).close()
