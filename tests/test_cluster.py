"""Ranks on several machines by Ray: the results of one rank, and what is said and left when something is lost.

The machines are network namespaces of this host, each with a Ray node of its own.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
import torch
import torch.distributed as dist
from machines import Machines, possible
from processes import gone

import moekit
from moekit import ranks
from moekit.ranks import RankError, RayRanks

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="makes network namespaces, as root and with iproute2"),
]
DEMO = Path(moekit.__file__).parent / "demo" / "model"
HERE = Path(moekit.__file__).parents[1]
# Seconds in which an error is promised to come.
PROMISED = 30


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    """A folder that the second machine sees empty."""
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def three(hidden):
    machines = Machines(3, hidden=hidden)
    try:
        yield machines
    finally:
        machines.close()


@pytest.fixture
def first(three):
    """Tests run on the machine of Ray's head."""
    with three.on(0):
        yield three


def pid(rank):
    return os.getpid()


def actors(machines):
    """The processes of actors, on all machines."""
    found = []
    for number in range(machines.count):
        for process in machines.processes(number):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "Supervisor" in " ".join(process.cmdline()):
                    found.append(process.pid)
    return found


def one_thread(rank):
    """Two threads add a product's terms in another order than one does."""
    torch.set_num_threads(1)


def figures(**how):
    with moekit.load("demo", device="cpu", progress=False, **how) as model:
        model.ranks.call(one_thread)
        plain = model.evaluate("demo", max_batches=4, progress=False).loss_base2
        dropping = model.evaluate(
            "demo", max_batches=4, batch_size=2, capacity_token_fraction=0.5, progress=False
        ).loss_base2
        text = model.generate("Alice was", max_new_tokens=4, temperature=0, progress=False)[0].text
        return (plain, dropping), text, [part["node"] for part in model.parts]


def test_four_ranks_on_two_machines_and_three_on_three_give_the_loss_of_one(first):
    losses, text, _ = figures(world_size=1)
    before = [first.sent(number) for number in range(3)]
    with RayRanks(4, gpus_per_node=2) as pool:
        share = max(1, ranks.usable_cores() // 2)
        assert pool.call(lambda rank: (rank.local_world_size, torch.get_num_threads())) == [(2, share)] * 4
        found, said, nodes = figures(ranks=pool)
        assert found == pytest.approx(losses, rel=0, abs=1e-10) and said == text
        assert len(set(nodes)) == 2 and nodes[0] == nodes[1] and nodes[2] == nodes[3]
        # A function of a notebook, an error of it, and the end of the ranks with it.
        with pytest.raises(
            RankError, match="rank 0 on node .* raised ValueError: boom at the gate"
        ) as caught:
            pool.call(boom)
        assert caught.value.node in nodes and isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(RuntimeError, match="load the model again"):
            pool.call(pid)
    assert sum(first.sent(number) > before[number] + 1e5 for number in range(3)) >= 2, "nothing crossed"
    found, said, nodes = figures(ranks="ray", world_size=3)
    assert found == pytest.approx(losses, rel=0, abs=1e-10) and said == text
    assert gone(actors(first))


def test_a_notebook_on_four_ranks_of_two_machines_gives_the_loss_of_one(first, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        HERE / "notebooks" / "run_inference.ipynb",
    ]
    command += [
        tmp_path / "out.ipynb",
        "-p",
        "output_dir",
        tmp_path / "out",
        "-p",
        "ranks",
        "ray",
        "-p",
        "world_size",
        4,
    ]
    command += ["-p", "max_batches", 4, "-p", "max_new_tokens", 4]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    with moekit.load("demo", 1, device="cpu", progress=False) as model:
        model.ranks.call(one_thread)
        p = found["parameters"]
        wanted = model.evaluate(
            "demo", p["subset"], p["tokens_per_sample"], p["batch_size"], max_batches=4, progress=False
        )
    assert found["loss_base2"] == pytest.approx(wanted.loss_base2, rel=0, abs=1e-10)
    # The table of parts names each rank's node.
    text = (tmp_path / "out.ipynb").read_text()
    assert len(set(re.findall(r"10\.77\.0\.\d", text))) == 2


def test_a_node_that_does_not_see_the_checkpoint_is_named_before_anything_is_loaded(first, hidden):
    shutil.copytree(DEMO, hidden / "model")
    with RayRanks(3, spread=True) as pool:
        (unseen,) = (node for node in pool.nodes if first.address(1) in node)
        with pytest.raises(
            ValueError, match=rf"node {re.escape(unseen)} .*does not see the checkpoint.*{hidden}"
        ):
            moekit.load(hidden / "model", ranks=pool, bpe="demo", progress=False)
        # The ranks are as they were.
        assert len(set(pool.call(pid))) == 3


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"world_size": 99, "placement_seconds": 1},
            "no place for 99 ranks of 1 CPU within 1 s; it has 3 nodes: 10.77.0.1 with 2 CPU",
        ),
        ({"world_size": 4, "spread": True, "placement_seconds": 1}, "each on a node of its own"),
        (
            {"device": "cuda", "world_size": 1, "placement_seconds": 1},
            "no place for 1 ranks of 1 CPU and 1 GPU",
        ),
        ({"device": "cuda"}, "no node of the cluster has a GPU"),
        ({"address": "ray://10.77.0.1:10001"}, "an address of Ray's client"),
        ({"address": "10.77.0.1:1"}, "no Ray cluster answers at address='10.77.0.1:1' .*refused"),
        ({"interface": "ib7", "world_size": 1}, "interface='ib7' has no IPv4 address"),
    ],
)
def test_what_the_cluster_cannot_give_is_said(first, options, said):
    with pytest.raises(ValueError, match=said):
        RayRanks(**options)


def test_a_network_over_which_nodes_do_not_reach_one_another_is_named(first):
    first.interface("dark0")
    said = (
        r"node .* \(10\.99\.\d\.1\) cannot reach node .* at 10\.99\.\d\.1 over dark0 \(.*RayRanks\(interface="
    )
    with pytest.raises(RuntimeError, match=said):
        RayRanks(2, gpus_per_node=1, interface="dark0")


def boom(rank):
    if rank.rank == 0:
        raise ValueError("boom at the gate")
    dist.barrier()


def work(rank, act=None, on=None):
    """Collectives without end; ``on`` this rank, ``act`` comes in between."""
    rank.report(os.getpid())
    for step in itertools.count():
        if step == 20 and rank.rank == on:
            act()
        dist.all_reduce(torch.ones(1000))
        time.sleep(0.02)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def soon(fault, count):
    """Begin ``fault``, a context, as soon as all ranks work; ``told`` is called with each report."""
    stack, seen = contextlib.ExitStack(), []

    def told(rank, message):
        seen.append(message)
        if len(seen) == count:
            stack.began = time.monotonic()
            stack.enter_context(fault)

    stack.told, stack.seen = told, seen
    with stack:
        yield stack


def lost(fault, silence=20, act=None, on=None, count=3):
    """What is raised when ``fault`` comes during a call of ranks on as many machines, and seconds until then."""
    with RayRanks(count, gpus_per_node=1, silence=silence) as pool, soon(fault, count) as begun:
        with pytest.raises(RuntimeError) as caught:
            pool.call(work, act, on, on_report=begun.told)
        seconds = time.monotonic() - begun.began
        assert seconds < PROMISED
        assert gone(begun.seen), "a rank is left"
    return caught.value, seconds, pool.nodes


@pytest.mark.parametrize(
    "act, said",
    [
        (kill, r"was ended by SIGKILL .* while it ran 'work'"),
        (stop, r"has been stopped by a signal, such as SIGSTOP, while it ran 'work', and does not go on"),
    ],
)
def test_a_rank_that_dies_or_stops_is_named_with_its_node(first, counted, act, said):
    error, seconds, nodes = lost(contextlib.nullcontext(), 600, act, on=1, count=2)
    assert isinstance(error, RankError) and error.rank == 1 and error.node == nodes[1]
    assert re.search(said, str(error), re.DOTALL), str(error)
    counted(f"{act.__name__} a rank on another machine", f"named in {seconds:.1f} s")
    assert gone(actors(first))


def test_a_cut_link_is_named_and_the_next_start_works(first, counted):
    """In the same process, on all three machines: the second fault here, and another one in the last test."""
    error, seconds, _ = lost(first.apart(1, 2))
    assert isinstance(error, RankError) and re.search("cannot be reached from node", str(error)), str(error)
    counted("two nodes that do not hear each other", f"named in {seconds:.1f} s")
    error, seconds, _ = lost(first.cut_off(2))
    assert isinstance(error, RankError) and first.address(2) in str(error), str(error)
    assert re.search("cannot be reached|does not answer", str(error)), str(error)
    counted("a node without its cable", f"named in {seconds:.1f} s")


DRIVER = """
import sys
from moekit.ranks import RayRanks
pool = RayRanks(3, gpus_per_node=1)
import os
print(*pool.call(lambda rank: os.getpid()), flush=True)
pool.call(lambda rank: __import__("time").sleep(100))
"""


def test_no_rank_and_no_actor_outlives_the_driver(first):
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    ) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 3
        driver.kill()
    assert gone(pids) and gone(actors(first))


def test_a_node_that_is_killed_and_a_lost_head_end_the_call(first, counted):
    """The last test: these machines are of no use afterwards."""
    error, seconds, _ = lost(once(lambda: first.kill(2)))
    assert isinstance(error, RankError) and first.address(2) in error.node, str(error)
    counted("a node that is killed", f"named in {seconds:.1f} s")
    with RayRanks(2, gpus_per_node=1) as pool:
        seen = []

        def told(rank, message):
            seen.append(message)
            if len(seen) == 2:
                first.kill(0, "gcs_server")

        began = time.monotonic()
        with pytest.raises(RuntimeError, match="Ray's head at .* does not answer"):
            pool.call(work, on_report=told)
        seconds = time.monotonic() - began
        assert seconds < PROMISED and gone(seen)
    counted("Ray's head that is killed", f"named in {seconds:.1f} s")
    with pytest.raises(ValueError, match="no Ray cluster answers"):
        RayRanks(2)


@contextlib.contextmanager
def once(fault):
    fault()
    yield
