"""Ranks that die, stop or hang in each operation: the right one is named with what it did, and nothing is left."""

import itertools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist
from processes import gone, left_in_shared_memory

import moekit
from moekit import likelihood, ranks, scoring
from moekit.likelihood import Text
from moekit.ranks import RankError, RayRanks, start
from moekit.ranks.joined import JoinedRanks, Launch
from moekit.ranks.watch import Process, silence_limit

cloudpickle.register_pickle_by_value(sys.modules[__name__])
HERE = Path(ranks.__file__).parents[2]
pytestmark = pytest.mark.slow
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks the system for the state of a process")


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """The folder for temporary files, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def pid(rank):
    return os.getpid()


def out_of_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, resource.RLIM_INFINITY))
    torch.ones(100_000_000)


def boom():
    raise ValueError("boom at the gate")


FAULTS = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was ended by SIGKILL"),
    "crashes": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was ended by SIGSEGV"),
    "raises": (boom, "raised ValueError: boom at the gate"),
    "out of memory": (out_of_memory, "raised (RuntimeError: .*can.t allocate memory|MemoryError)"),
    "stopped": (
        lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "has been stopped by a signal, such as SIGSTOP",
    ),
    "hangs": (lambda: time.sleep(60), r"neither reported nor used the processor for 2 s"),
}
TWICE = ["Alice was beginning"] * 2  # one for each rank
OPERATIONS = {
    "load": ("load", lambda model: None),
    "evaluate": ("score", lambda model: model.evaluate("demo", progress=False)),
    "score": ("score", lambda model: model.score(TWICE)),
    "trace": ("score", lambda model: model.trace(TWICE, progress=False)),
    "generate": ("generate", lambda model: model.generate(TWICE, max_new_tokens=4)),
    "stream": ("begin", lambda model: list(model.stream(TWICE, max_new_tokens=4))),
}


def plant(rank, where, act, which=(1,)):
    """These ranks do ``act`` when they fill or run their model for the next time."""
    from moekit import checkpoint
    from moekit.nn.transformer import Transformer

    holder, name = (checkpoint, "fill") if where == "load" else (Transformer, "forward")
    before = getattr(holder, name)

    def fail(*args, **options):
        setattr(holder, name, before)
        time.sleep(0.1)
        act()
        return before(*args, **options)

    if rank.rank in which:
        setattr(holder, name, fail)


@LINUX
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_rank_is_named_and_nothing_is_left(temp, operation, fault, counted):
    if fault == "hangs" and operation not in ("load", "evaluate", "generate"):
        pytest.skip("the others wait in the same places")
    (act, said), (ran, call) = FAULTS[fault], OPERATIONS[operation]
    shared = set(os.listdir("/dev/shm"))
    # A stopped rank is not named for its silence. Where other programs have the processor, a healthy rank may be without it for
    # some seconds.
    silence = {"stopped": 600, "hangs": 2}.get(fault)
    with start(2, "cpu", timeout=60, silence=silence) as pool:
        pids = pool.call(pid)
        if operation == "load":
            pool.call(plant, "load", act)
        with pytest.raises(RankError, match=said) as caught:
            model = moekit.load("demo", ranks=pool, progress=False)
            pool.call(plant, operation, act)
            call(model)
    assert caught.value.rank == 1, caught.value
    if fault not in ("raises", "out of memory"):
        assert f"'{ran}'" in str(caught.value)
    if fault == "hangs":
        assert "in fail" in str(caught.value) or ".fail" in str(caught.value)
    assert gone(pids) and not list(temp.iterdir()) and not left_in_shared_memory(shared)
    counted(f"faults of a rank: {fault}", "with the rank named and nothing left")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), ValueError("boom"), KeyboardInterrupt()]
)
def test_a_single_rank_goes_on_after_an_error_in_mid_call(monkeypatch, error, counted):
    """In any pass of any call: what it had is given back where memory was short, and the next call gives the same."""
    from moekit.nn.transformer import Transformer

    calls = {
        "score": lambda model: model.score(TWICE)["logprob"].tolist(),
        "trace": lambda model: model.trace(TWICE, progress=False).experts.tolist(),
        "generate": lambda model: [
            one.text for one in model.generate(TWICE, max_new_tokens=6, progress=False)
        ],
        "beams": lambda model: [
            one.text for one in model.generate(TWICE, max_new_tokens=4, beam_size=2, progress=False)
        ],
        "stream": lambda model: [one.id for one in model.stream(TWICE, max_new_tokens=6)],
        "evaluate": lambda model: model.evaluate("demo", max_batches=2, progress=False).loss_base2,
    }
    before, made = Transformer.forward, []
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        wanted = {name: call(model) for name, call in calls.items()}
        state = set(model.ranks._rank.state)
        for name, call in calls.items():
            for at in (1, 2, 4):
                passes = 0

                def forward(*args, at=at, **options):
                    nonlocal passes
                    passes += 1
                    if passes == at:
                        tensor = torch.ones(1000)
                        made.append(weakref.ref(tensor))
                        raise error
                    return before(*args, **options)

                monkeypatch.setattr(Transformer, "forward", forward)
                kept = None
                try:
                    call(model)
                except (RankError, KeyboardInterrupt) as caught:
                    kept = caught
                monkeypatch.setattr(Transformer, "forward", before)
                if isinstance(error, torch.OutOfMemoryError) and kept is not None:
                    assert made[-1]() is None, f"{name}: the error keeps what the call had"
                assert call(model) == wanted[name], name
                assert set(model.ranks._rank.state) == state
                counted(
                    "errors in mid-call of a single rank",
                    "after which the next call gives the same",
                    kept is not None,
                )


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bad_step_costs_no_model(monkeypatch, world_size, counted):
    """The driver fails while it makes a step, and the ranks work on another one."""
    texts = [Text((2, *range(10, 20 + n)), 1) for n in range(12)]
    verbs = {
        (scoring, "shares"): lambda model: model.evaluate("demo", max_batches=24, progress=False).loss_base2,
        (likelihood, "parts_of"): lambda model: [
            one.logprobs.tolist() for one in likelihood.score_texts(model, texts, **how)
        ],
    }
    how = {"fraction": None, "seed": 1, "progress": False}
    for module in (scoring, likelihood):
        monkeypatch.setattr(module, "TOKENS_A_PASS", {"cpu": 24})
    with moekit.load("demo", world_size, "cpu", progress=False) as model:
        model.cached_tokens, pids = 24, model.ranks.call(pid)
        for (module, name), call in verbs.items():
            wanted, before = call(model), getattr(module, name)
            for bad in (0, 1, 4):
                steps = itertools.count()

                def make(*args, before=before, steps=steps, bad=bad):
                    if next(steps) == bad:
                        raise ValueError("a bad batch")
                    return before(*args)

                monkeypatch.setattr(module, name, make)
                with pytest.raises(ValueError, match="^a bad batch$"):
                    call(model)
                monkeypatch.setattr(module, name, before)
                assert call(model) == wanted and model.ranks.call(pid) == pids
                counted("errors of the driver's own while it makes a step", "after which the ranks go on")


@LINUX
def test_a_rank_that_is_stopped_at_the_start_is_named(temp, monkeypatch):
    def join(rank, *_):
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr("moekit.ranks.spawned.join", join)
    with pytest.raises(RankError, match="rank 1 has been stopped by a signal, .* while it ran 'join'"):
        start(2, "cpu", timeout=60, silence=600)
    assert not list(temp.iterdir())


@LINUX
def test_a_rank_that_was_stopped_between_calls_is_named_though_its_job_does_not_pass():
    with start(2, "cpu", timeout=60, silence=600) as pool:
        os.kill(pool.call(pid)[1], signal.SIGSTOP)
        with pytest.raises(
            RankError, match="rank 1 has been stopped by a signal, .* while it ran 'nothing', and"
        ):
            pool.call(nothing, bytes(10_000_000))


def nothing(rank, *_):
    return None


@LINUX
def test_one_of_eight_ranks_and_all_of_them_are_stopped_in_a_generation(temp):
    for which in ({5}, set(range(8))):
        with start(8, "cpu", timeout=60, silence=600) as pool:
            pids = pool.call(pid)
            model = moekit.load("demo", ranks=pool, progress=False)
            model.ranks.call(plant, "generate", FAULTS["stopped"][0], which)
            with pytest.raises(RankError, match="stopped by a signal, .* while it ran 'generate'") as caught:
                model.generate(TWICE * 4, max_new_tokens=4)
        others = re.search(r"so have ranks \[(.*)\]", str(caught.value))
        found = {caught.value.rank, *(map(int, others[1].split(", ")) if others else ())}
        assert found == which
        assert gone(pids) and not list(temp.iterdir())


@LINUX
def test_a_rank_that_stops_in_the_middle_of_its_answer_is_named():
    def work(rank):
        if rank.rank == 1:
            rank.report("ready")
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGSTOP]).start()
        return bytes(20_000_000 * rank.rank)

    said = "rank 1 has been stopped by a signal"
    with start(2, "cpu", timeout=60, silence=600) as pool, pytest.raises(RankError, match=said):
        pool.call(work, on_report=lambda rank, message: time.sleep(1))  # so that the pipe is full


@LINUX
def test_a_rank_of_a_launcher_that_is_stopped_is_named(monkeypatch):
    """This process is the one of rank 0, as torchrun starts it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    monkeypatch.setenv("MOEKIT_SILENCE", "600")
    code = "from moekit.ranks.joined import Launch; Launch.of().ranks('cpu')"
    environment = os.environ | {"RANK": "1", "PYTHONPATH": str(HERE)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as other:
        try:
            with Launch.of().ranks("cpu") as pool:
                own, pid_of_other = pool.call(pid)
                assert pid_of_other == other.pid
                with pytest.raises(RankError, match="rank 1 has been stopped by a signal"):
                    pool.call(stop_itself, timeout=60)
                assert gone([own])
        finally:
            other.kill()


def stop_itself(rank):
    if rank.rank == 1:
        FAULTS["stopped"][0]()
    dist.barrier()


# Ranks are stopped for a moment, and then for longer than a rank may be, together with their driver, which goes on first.
STOPS = (
    "kill -STOP {ranks}; sleep 0.15; kill -CONT {ranks}; sleep 0.1; "
    "kill -STOP {ranks} {driver}; sleep 1; kill -CONT {driver}; sleep 0.05; kill -CONT {ranks}"
)
DRIVER = """
import os, subprocess, sys, time
import torch, torch.distributed as dist
from moekit.ranks import start

def work(rank):
    rank.report(None)
    end, total = time.monotonic() + 1.8, torch.ones(1)
    while total.item() > 0:
        total.fill_(float(time.monotonic() < end))
        dist.all_reduce(total)
    return "done"

with start(2, "cpu", timeout=60) as pool:
    pids = pool.call(lambda rank: os.getpid())
    stop = sys.argv[1].format(ranks=" ".join(map(str, pids)), driver=os.getpid())
    begun = []
    def told(rank, _):
        begun.append(rank)
        if len(begun) == 2:
            subprocess.Popen(["sh", "-c", stop])
    print(*pool.call(work, on_report=told))
"""


@LINUX
def test_ranks_that_are_stopped_and_go_on_are_no_fault():
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, STOPS],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.stdout == "done done\n", ended.stderr


def test_a_long_call_that_keeps_pythons_lock_is_a_sign_of_life():
    def work(rank):
        return sum(range(150_000_000 * rank.rank))  # some seconds without a beat

    with start(2, "cpu", silence=2) as pool:
        assert pool.call(work)[1] == 150_000_000 * 149_999_999 // 2


@LINUX
def test_a_collective_that_timed_out_blames_no_healthy_rank():
    def work(rank):
        if rank.rank == 1:
            pause(20)
        dist.all_reduce(torch.ones(1))

    said = "rank 1 did not come to a collective in which rank 0 waited"
    with start(2, "cpu", timeout=3) as pool, pytest.raises(RankError, match=said):
        pool.call(work, timeout=60)


def pause(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_a_call_without_a_limit_has_that_of_the_pool():
    pool = start(2, "cpu", timeout=3)
    with pytest.raises(
        TimeoutError,
        match=r"(?s)no progress from ranks \[1\] in 3 s.*rank 1 has run 'work_of_pauses' for 3.*in pause",
    ):
        pool.call(work_of_pauses)


def work_of_pauses(rank):
    pause(60 * rank.rank)


def test_reports_are_progress():
    def work(rank):
        for _ in range(4):
            pause(1)
            rank.report(1)
        return rank.rank

    with start(2, "cpu", timeout=3) as pool:
        assert pool.call(work) == [0, 1]


@pytest.mark.parametrize("said", ["", "soon", "-1", "0", "nan"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, said):
    monkeypatch.setenv("MOEKIT_SILENCE", said)
    with pytest.raises(ValueError, match="MOEKIT_SILENCE is .*expected a number of seconds above 0"):
        silence_limit(None)
    assert silence_limit(3) == 3


@pytest.mark.parametrize("timeout", ["x", None, float("nan"), float("inf"), -1, 0, 1e10])
def test_a_timeout_that_is_none_is_refused_by_every_pool(monkeypatch, timeout):
    monkeypatch.setattr("moekit.ranks.pools.SpawnedRanks", lambda *_: pytest.fail("ranks were started"))
    launched = Launch(0, 2, 0, "localhost")
    for pool in (
        lambda: start(1, "cpu", timeout=timeout),
        lambda: start(2, "cpu", timeout=timeout),
        lambda: RayRanks(2, device="cpu", timeout=timeout),
        lambda: JoinedRanks(launched, torch.device("cpu"), timeout),
    ):
        with pytest.raises(ValueError, match="timeout=.*: expected a number above 0 up to 1e"):
            pool()


def test_the_state_of_this_process():
    if sys.platform == "linux":
        assert Process.of(os.getpid()).state == "R" and not Process.of(os.getpid()).stopped
    assert Process.of(2**30) is None


# ------------------------------------------------------------------------------------------ the life of a pool


def test_a_fork_of_the_driver_ends_nobodys_ranks():
    with start(2, "cpu") as pool:
        pids = pool.call(pid)
        for ending in ("exit", "close", "use"):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    if ending == "exit":
                        pool._end.atexit and pool._end()  # what sys.exit does
                        code = 0
                    elif ending == "close":
                        pool.close()
                        code = 0
                    else:
                        with pytest.raises(
                            RuntimeError, match="belong to process .* this one is its fork: load the model"
                        ):
                            pool.call(pid)
                        code = 0
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0
        assert pool.call(pid) == pids


def test_a_fork_cannot_use_a_single_rank_of_its_parent():
    with start(1, "cpu") as pool:
        child = os.fork()
        if child == 0:
            try:
                pool.call(pid)
                os._exit(1)
            except RuntimeError:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def test_a_cleaned_temporary_folder_hides_no_cause(temp):
    with start(2, "cpu") as pool:
        for folder in temp.iterdir():
            subprocess.run(["rm", "-r", folder], check=True)
        os.kill(pool.call(pid)[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
            pool.call(pid)


def test_closing_during_a_call_says_so():
    pool = start(2, "cpu")
    threading.Timer(0.5, pool.close).start()
    with pytest.raises(
        RuntimeError, match=r"the ranks are gone \(closed while they ran 'work_of_pauses'\): load"
    ) as caught:
        pool.call(work_of_pauses)
    assert not isinstance(caught.value, RankError)
    with pytest.raises(RuntimeError, match=r"gone \(closed\)"):
        pool.call(pid)


def test_two_threads_load_at_once():
    found, errors = [], []

    def work():
        try:
            with moekit.load("demo", 2, "cpu", progress=False) as model:
                found.append(model.score("Alice was beginning")["logprob"].sum())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and found[0] == pytest.approx(found[1], rel=1e-6)


NO_RANKS = {
    "a folder that is gone": "os.mkdir('x'); os.chdir('x'); os.rmdir('../x')",
    "no descriptors": "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) + 1,) * 2)",
}


@LINUX
@pytest.mark.parametrize("fork", ["0", "1"])
@pytest.mark.parametrize("trouble", NO_RANKS)
def test_what_keeps_ranks_from_starting_is_one_sentence(tmp_path, trouble, fork):
    code = f"import os, sys; sys.path.insert(0, ''); from moekit.ranks import start; {NO_RANKS[trouble]}\nstart(2, 'cpu')"
    environment = os.environ | {"PYTHONPATH": str(HERE), "MOEKIT_FORK": fork}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    last = ended.stderr.strip().split("\n")[-1]
    assert last.startswith("RuntimeError: no rank can be started (") and last.endswith("load the model again")


# ------------------------------------------------------------------------------------------ where ranks come from


def parent(rank):
    return os.getppid(), os.environ.get("SEEN"), os.getcwd(), len(sys.path)


@LINUX
def test_ranks_are_forked_and_have_the_drivers_environment_folder_and_path(tmp_path, monkeypatch):
    with start(2, "cpu") as first:
        (server, *_), (same, *_) = first.call(parent)
        assert server == same != os.getpid() and psutil.Process(server).num_threads() == 1
        monkeypatch.setenv("SEEN", "yes")  # libraries may read it when they are loaded: a server of its own
        monkeypatch.chdir(tmp_path)
        with start(2, "cpu") as second:
            (other, seen, folder, length), _ = second.call(parent)
            assert other != server and seen == "yes" and Path(folder) == tmp_path and length == len(sys.path)
            assert len(first.call(pid)) == 2
            draws = second.call(lambda rank: __import__("random").random())
            assert draws[0] != draws[1]
    assert gone([server])  # nobody asks it for others


@LINUX
def test_ranks_end_with_their_server_and_the_next_ones_start():
    with start(2, "cpu") as pool:
        pids, server = pool.call(pid), pool.call(parent)[0][0]
        os.kill(server, signal.SIGKILL)
        assert gone(pids)
        said = rf"rank \d ended with process {server}, which was ended by SIGKILL \(.*\) and from which ranks are forked, while"
        with pytest.raises(RankError, match=said):
            pool.call(pid)
    with start(2, "cpu") as pool:
        assert len(pool.call(pid)) == 2


@LINUX
def test_the_server_ends_without_work_and_with_its_driver(monkeypatch, tmp_path):
    monkeypatch.setattr("moekit.processes.forkserver.IDLE", 0.5)
    monkeypatch.setenv("SEEN", "a server of its own")
    with start(2, "cpu") as pool:
        server = pool.call(parent)[0][0]
    assert gone([server])
    with start(2, "cpu") as pool:
        assert pool.call(parent)[0][0] != server
    code = (
        f"import os, sys; sys.path.insert(0, {str(HERE)!r}); from moekit.ranks import start; pool = start(2, 'cpu');"
        "print(*pool.call(lambda rank: (os.getpid(), os.getppid())), flush=True); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert gone({int(word.strip("(),")) for word in ended.stdout.split()}) and ended.stdout


@LINUX
def test_what_a_killed_driver_left_goes_with_the_next_start(temp):
    """It is killed when it has made its folder, and before there is a rank that would remove it."""
    code = (
        "import os; from moekit.ranks import spawned, start;"
        "spawned.SpawnedRanks._launch = lambda *_: os.kill(os.getpid(), 9); start(2, 'cpu')"
    )
    environment = os.environ | {"TMPDIR": str(temp), "PYTHONPATH": str(HERE), "MOEKIT_FORK": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    (left,) = temp.iterdir()
    with start(2, "cpu") as pool:
        assert not left.exists() and len(pool.call(pid)) == 2
    # That of a process that lives, and that of a process with the same number in another container.
    *_, space, number, _ = left.name.split("-")
    changes = {f"-{number}-": f"-{os.getppid()}-", f"-{space}-": f"-{'0' * 8}-"}
    others = [temp / left.name.replace(*change) for change in changes.items()]
    for folder in others:
        folder.mkdir()
    start(2, "cpu").close()
    assert sorted(temp.iterdir()) == sorted(others)


def test_ranks_start_without_a_server(temp, monkeypatch):
    monkeypatch.setenv("MOEKIT_FORK", "0")
    with start(2, "cpu") as pool:
        assert [ppid for ppid, *_ in pool.call(parent)] == [os.getpid()] * 2
        pids = pool.call(pid)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
            pool.call(pid)
    assert gone(pids) and not list(temp.iterdir())


# ------------------------------------------------------------------------------------------ pools made apart


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pool_that_was_closed_is_refused(world_size):
    pool = start(world_size, "cpu")
    pool.close()
    with pytest.raises(ValueError, match=r"ranks are gone \(closed\): start others with moekit.ranks.start"):
        moekit.load("demo", ranks=pool, progress=False)


def test_a_pool_made_apart_holds_one_model_at_a_time(reference):
    with start(2, "cpu") as pool:
        first = moekit.load("demo", ranks=pool, progress=False)
        assert (first.world_size, first.device) == (2, "cpu")
        scores = first.score("Alice was")["logprob"].tolist()
        with pytest.raises(ValueError, match="hold a model: close that one first"):
            moekit.load("demo", ranks=pool, progress=False)
        first.close()
        with pytest.raises(RuntimeError, match="closed"):
            first.score("Alice was")
        assert pool.call(lambda rank: len(rank.state)) == [0, 0]
        moekit.load("demo", ranks=pool, progress=False)  # dropped at once
        again = moekit.load("demo", ranks=pool, progress=False)
        assert again.score("Alice was")["logprob"].tolist() == scores
        assert (
            pool.call(lambda rank: (rank.local_world_size, rank.cores))
            == [(2, max(1, ranks.usable_cores() // 2))] * 2
        )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"world_size": 2}, "world_size is 2, and ranks has 1"),
        ({"device": "cuda"}, "device is 'cuda', and ranks is on cpu"),
        ({"ranks": "here"}, "ranks='here': expected one of local, ray"),
        ({"ranks": [1]}, r"ranks is \[1\]: expected a pool"),
    ],
)
def test_arguments_that_contradict_the_pool_are_refused(options, said):
    with start(1, "cpu") as pool, pytest.raises(ValueError, match=said):
        moekit.load("demo", **{"ranks": pool, "progress": False} | options)


# ------------------------------------------------------------------------------------------ many times


def test_interrupts_at_random_moments(tmp_path, counted):
    trials = os.environ.get("INTERRUPTS", "4")
    program = [sys.executable, str(Path(__file__).with_name("interrupted.py")), trials, "1", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=60 + 60 * int(trials)
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counted("interrupts at random moments", "after which the kernel works", int(trials))


@LINUX
def test_what_is_left_in_shared_memory_is_seen():
    before, name = set(os.listdir("/dev/shm")), f"moekit-test-{os.getpid()}"
    path = Path("/dev/shm", name)
    path.touch()
    try:
        assert left_in_shared_memory(before, within=0.2) == {name}
        threading.Timer(0.3, path.unlink).start()
        assert left_in_shared_memory(before) == set()
    finally:
        path.unlink(missing_ok=True)


def held(process):
    return process.num_fds(), process.num_threads(), len(process.children(recursive=True))


@LINUX
def test_starts_and_stops_leave_nothing(temp, counted):
    times = int(os.environ.get("SOAK", "0")) // 100 or 20
    with start(2, "cpu"):
        pass
    before, shared = held(psutil.Process()), set(os.listdir("/dev/shm"))
    for _ in range(times):
        with start(2, "cpu") as pool:
            pids = pool.call(pid)
        assert gone(pids)
    # Children of an earlier test may have ended meanwhile.
    assert all(now <= then for now, then in zip(held(psutil.Process()), before, strict=True))
    assert not list(temp.iterdir()) and not left_in_shared_memory(shared)
    counted("starts and stops of two ranks", "that left nothing", times)


def test_many_calls_take_no_more(temp, counted):
    times = int(os.environ.get("SOAK", "400")) // 4

    def use(model):
        model.evaluate("demo", max_batches=1, progress=False)
        model.generate(TWICE, max_new_tokens=1, progress=False)
        model.trace(["Alice was beginning"], progress=False)
        model.score("Alice was beginning")

    def memory(model):
        own = psutil.Process()
        others = [psutil.Process(p) for p in model.ranks.call(pid)]
        return [p.memory_info().rss for p in (own, *others)], [
            (p.num_fds(), p.num_threads()) for p in (own, *others)
        ]

    with moekit.load("demo", 2, "cpu", progress=False) as model:
        for _ in range(max(10, times // 4)):
            use(model)
        before, handles = memory(model)
        for _ in range(times):
            use(model)
        after, now = memory(model)
    assert now == handles
    assert all(a - b < 20_000_000 for a, b in zip(after, before, strict=True)), (before, after)
    grown = max(a - b for a, b in zip(after, before, strict=True)) / 1e6
    counted("small calls on two ranks", f"with memory grown by {grown:.1f} MB at most", 4 * times)
