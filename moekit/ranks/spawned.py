"""Several ranks of this machine, a process each."""

import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from moekit.ranks.base import RankError, Ranks, gone, headline
from moekit.ranks.devices import usable_cores
from moekit.ranks.server import join

START_LIMIT = 180.0  # seconds for the interpreters to start, import torch and join the process group


LOOK = 0.2  # seconds between two looks at the processes; also how long a death may trail the errors it causes


LOG_TAIL = 4000  # bytes of a rank's log that go into an error


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
        self.call(join, str(self._folder / "rendezvous"), timeout, timeout=START_LIMIT)

    def _launch(self, rank: int) -> None:
        """Start the interpreter of one rank: the pipe is its stdin, the log its stdout and stderr."""
        device = str(self.devices[rank])
        me = f"{rank}, {self.world_size}, {device!r}, driver={os.getpid()}, folder={str(self._folder)!r}"
        path = [os.path.abspath(entry) for entry in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from moekit.ranks.server import serve; serve({me})"
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
            raise gone(self._why_gone)
        job = cloudpickle.dumps((fn, args, kwargs))
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("the ranks are busy with another call: wait for it to end")
        try:
            return self._run(job, math.inf if timeout is None else timeout, on_report)
        except BaseException as error:
            self._why_gone = f"stopped after {headline(error)}"
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
