"""Persistent ranks: functions that run on every rank of a process group, for as long as a notebook lives.

`start` gives a pool; `pool.call(fn, ...)` runs `fn(rank, ...)` on each rank, and what `fn` keeps in
`rank.state` is there in the next call. One rank is this very process; several are new interpreters on this
machine, each at the end of a duplex pipe. They are launched directly, since `multiprocessing` would run the
caller's `__main__` again in each of them. No rank outlives its driver, however the driver ends.

An established engine (Ray) may later offer the same `call` to the same functions across machines.
"""

import contextlib
import math
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import cloudpickle
import torch
import torch.distributed as dist

START_LIMIT = 180.0  # seconds for the interpreters to start, import torch and join the process group
LOOK = 0.2  # seconds between two looks at the processes; also how long a death may trail the errors it causes
LOG_TAIL = 4000  # bytes of a rank's log that go into an error


class RankError(RuntimeError):
    """A rank raised or died: `rank` is its index, `cause` says what happened to it.

    `__cause__` is the exception that the rank raised, if it raised one and that can be pickled.
    """

    def __init__(self, rank: int, cause: str):
        super().__init__(rank, cause)
        self.rank, self.cause = rank, cause

    def __str__(self) -> str:
        return f"rank {self.rank} {self.cause}"


@dataclass
class Rank:
    """What a function that runs on a rank sees.

    `state` lives as long as the pool. With `world_size` > 1 the default process group of `torch.distributed`
    is initialised (NCCL on GPUs, gloo on the CPU); a single rank has none.
    """

    rank: int
    world_size: int
    device: torch.device
    state: dict = field(default_factory=dict)
    send_report: Callable[[Any], None] | None = field(default=None, repr=False)

    def report(self, message: Any) -> None:
        """Send `message`, anything picklable, to the driver's `on_report`; how often is up to the caller."""
        if self.send_report is not None:
            self.send_report(message)


class Ranks(ABC):
    """A pool of ranks, `devices[r]` being that of rank r. A context manager; closing it twice is fine."""

    def __init__(self, devices: list[torch.device]):
        self.devices = devices
        self.world_size = len(devices)

    @abstractmethod
    def call(
        self,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        on_report: Callable[[int, Any], None] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Run `fn(rank, *args, **kwargs)` on every rank and return the results in rank order.

        `on_report(rank_index, message)` is called here while the ranks run. Results are pickled: move tensors
        to the CPU first, and know that arrays travel faster. Raises RankError when a rank raises or dies,
        TimeoutError when `timeout` seconds are over, RuntimeError when the pool is closed or busy.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the ranks and forget what they hold."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start(world_size: int, device: str = "auto", timeout: float = 1800.0) -> Ranks:
    """Start `world_size` ranks on this machine; a collective may wait for `timeout` seconds.

    `device` is "cuda" (rank r on cuda:r), "cpu" (the usable cores dealt evenly) or "auto" ("cuda" if there is
    one). Raises ValueError for a world size or device that cannot be, RankError or TimeoutError when a rank
    does not come up.
    """
    devices = choose_devices(world_size, device)
    return ThisProcess(devices) if world_size == 1 else SpawnedRanks(devices, timeout)


def choose_devices(world_size: int | None, device: str) -> list[torch.device]:
    """One device a rank, or a ValueError that says what to ask for instead; None: a rank for every GPU, one without."""
    if world_size is None:
        world_size = 1 if device == "cpu" else max(1, torch.cuda.device_count())
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise ValueError(f"world_size is {world_size!r}: expected a whole number of at least 1")
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f'device is {device!r}: expected "auto", "cuda" or "cpu"')
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return [torch.device("cpu")] * world_size
    count = torch.cuda.device_count()
    if world_size > count:
        instead = f'world_size={count} or device="cpu"' if count else 'device="cpu"'
        raise ValueError(f"world_size {world_size} needs as many GPUs, and torch sees {count}: use {instead}")
    return [torch.device("cuda", rank) for rank in range(world_size)]


def usable_cores() -> int:
    """The cores that this process may use: its affinity, within the limit of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


class ThisProcess(Ranks):
    """A single rank without a process: no pickling, no process group.

    An error leaves it usable, since no other rank waits for this one. `timeout` has no effect: interrupt it.
    """

    def __init__(self, devices: list[torch.device]):
        super().__init__(devices)
        self._rank: Rank | None = Rank(0, 1, devices[0])
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))

    def call(self, fn, *args, timeout=None, on_report=None, **kwargs):
        if self._rank is None:
            raise _gone("closed")
        self._rank.send_report = on_report and (lambda message: on_report(0, message))
        # The caller's own current GPU may be another one by now.
        here = (
            torch.cuda.device(self._rank.device)
            if self._rank.device.type == "cuda"
            else contextlib.nullcontext()
        )
        try:
            with here:
                return [fn(self._rank, *args, **kwargs)]
        except (Exception, SystemExit) as error:
            raise RankError(0, f"raised {_headline(error)}") from error

    def close(self) -> None:
        self._rank = None


class SpawnedRanks(Ranks):
    """Several ranks, a process each. Whatever ends a call early ends them all.

    A process group that lost a member is of no further use, and nothing else frees peers from a collective.
    """

    def __init__(self, devices: list[torch.device], timeout: float):
        super().__init__(devices)
        self._why_gone = "closed"
        self._busy = threading.Lock()
        self._folder = Path(tempfile.mkdtemp(prefix="moekit-ranks-"))
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[Connection] = []
        self._end = weakref.finalize(self, _end_ranks, self._processes, self._pipes, self._folder)
        for rank in range(self.world_size):
            self._launch(rank)
        self.call(_join, str(self._folder / "rendezvous"), timeout, timeout=START_LIMIT)

    def _launch(self, rank: int) -> None:
        """Start the interpreter of one rank: the pipe is its stdin, the log its stdout and stderr."""
        device = str(self.devices[rank])
        me = f"{rank}, {self.world_size}, {device!r}, driver={os.getpid()}, folder={str(self._folder)!r}"
        path = [os.path.abspath(entry) for entry in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from moekit.ranks import _serve; _serve({me})"
        loopback = "lo" if sys.platform == "linux" else "lo0"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, usable_cores() // self.world_size)),
            "GLOO_SOCKET_IFNAME": loopback,
            "NCCL_SOCKET_IFNAME": loopback,
            "MPLBACKEND": "agg",
        }
        ours, theirs = socket.socketpair()
        self._pipes.append(Connection(ours.detach()))
        with theirs, open(self._log(rank), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-X", "faulthandler", "-c", code],
                stdin=theirs,
                stdout=log,
                stderr=log,
                env=environment,
                process_group=0,  # out of reach of the interrupt key, and its own children end with it
            )
        self._processes.append(process)

    def call(self, fn, *args, timeout=None, on_report=None, **kwargs):
        if not self._end.alive:
            raise _gone(self._why_gone)
        job = cloudpickle.dumps((fn, args, kwargs))
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("the ranks are busy with another call: wait for it to end")
        try:
            return self._run(job, math.inf if timeout is None else timeout, on_report)
        except BaseException as error:
            self._why_gone = f"stopped after {_headline(error)}"
            self.close()
            if isinstance(error, KeyboardInterrupt):
                why = "interrupted, and the ranks stopped (no collective can be left): load the model again"
                raise KeyboardInterrupt(why) from None
            raise
        finally:
            self._busy.release()

    def _run(self, job: bytes, timeout: float, on_report: Callable[[int, Any], None] | None) -> list[Any]:
        deadline = time.monotonic() + timeout
        for pipe in self._pipes:
            with contextlib.suppress(ConnectionError):  # a rank that is dead already is found below
                pipe.send_bytes(job)
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            left = deadline - time.monotonic()
            if left <= 0:
                late = [rank for rank in range(self.world_size) if rank not in results]
                raise TimeoutError(f"no answer from ranks {late} in {timeout:g} s{self._log_tail(late[0])}")
            for pipe in wait(self._pipes, min(left, LOOK)):
                rank = self._pipes.index(pipe)
                try:
                    message = pipe.recv_bytes()
                except (EOFError, OSError):
                    raise self._death(rank) from None
                kind, content = cloudpickle.loads(message)
                if kind == "result":
                    results[rank] = content
                elif kind == "error":
                    raise self._blame(rank, *content)
                elif on_report is not None:
                    on_report(rank, content)
            if dead := self._dead():
                raise self._death(dead[0])
        return [results[rank] for rank in range(self.world_size)]

    def _dead(self) -> list[int]:
        """The ranks whose process has ended, everything that they sent having been read."""
        ended = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
        return [rank for rank in ended if not self._pipes[rank].poll()]

    def _blame(self, rank: int, text: str, error: BaseException | None) -> RankError:
        """What a rank raised, unless it is an echo: peers of a rank that died raise too, and often first."""
        time.sleep(LOOK)
        for other, process in enumerate(self._processes):
            if process.poll() is not None:
                return self._death(other)
        failure = RankError(rank, f"raised {text}{self._log_tail(rank)}")
        failure.__cause__ = error
        return failure

    def _death(self, rank: int) -> RankError:
        try:
            code = self._processes[rank].wait(timeout=5)
        except subprocess.TimeoutExpired:
            return RankError(rank, f"closed its pipe{self._log_tail(rank)}")
        cause = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            cause += " (often the out-of-memory killer: compare the memory a rank needs with what is free)"
        return RankError(rank, cause + self._log_tail(rank))

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def _log_tail(self, rank: int) -> str:
        with open(self._log(rank), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL))
            tail = log.read().decode(errors="replace").strip()
        return f"\n\nThe end of its log:\n{tail}" if tail else ""

    def close(self) -> None:
        self._end()


def _gone(why: str) -> RuntimeError:
    return RuntimeError(f"the ranks are gone ({why}): load the model again")


def _headline(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().split("\n")[0]


def _end_ranks(processes: list[subprocess.Popen], pipes: list[Connection], folder: Path) -> None:
    for process in processes:
        with contextlib.suppress(OSError):  # its group is gone already
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
    for pipe in pipes:
        pipe.close()
    shutil.rmtree(folder, ignore_errors=True)


# What runs in the process of a rank.


def _serve(rank: int, world_size: int, device: str, driver: int, folder: str) -> None:
    """Answer the driver's jobs one by one, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, jobs, driver, folder), daemon=True).start()
    sending = threading.Lock()

    def send(message: bytes) -> None:
        with sending:
            pipe.send_bytes(message)

    def send_report(message: Any) -> None:
        send(cloudpickle.dumps(("report", message)))

    me = Rank(rank, world_size, torch.device(device), send_report=send_report)
    while True:
        send(_answer(me, jobs.get()))


def _listen(pipe: Connection, jobs: queue.SimpleQueue, driver: int, folder: str) -> None:
    """Queue the jobs; end this process when the driver is gone, even while it sits in a collective."""
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == driver:  # a forked child of the driver may hold the pipe open
            if pipe.poll(1.0):
                jobs.put(pipe.recv_bytes())
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _answer(me: Rank, job: bytes) -> bytes:
    """Run one job and pickle what comes of it; nothing of it stays referenced here between calls."""
    try:
        fn, args, kwargs = cloudpickle.loads(job)
        return cloudpickle.dumps(("result", fn(me, *args, **kwargs)))
    except BaseException as error:
        text = f"{_headline(error)}\n\n{''.join(traceback.format_exception(error)).strip()}"
        try:
            cloudpickle.loads(cloudpickle.dumps(error))
        except Exception:
            return cloudpickle.dumps(("error", (text, None)))
        return cloudpickle.dumps(("error", (text, error)))


def _join(me: Rank, rendezvous: str, timeout: float) -> None:
    """The first job: join the process group. It meets in a file, as a TCP store listens on all addresses."""
    on_gpu = me.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(me.device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(rendezvous, me.world_size),
        rank=me.rank,
        world_size=me.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=me.device if on_gpu else None,
    )
