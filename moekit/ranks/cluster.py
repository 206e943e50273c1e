"""What the driver knows of a Ray cluster: it asks the broker, and takes in what the broker tells of each rank."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle

from moekit.interrupts import hold_interrupts
from moekit.processes import channel
from moekit.processes.system import Process
from moekit.ranks.piped import Member, read_tail

# Seconds for the broker to end the actors.
END_LIMIT = 8.0

# Seconds by which a cause from the cluster may come later than the pipe that it breaks.
CAUSE = 3.0

# Packages whose own first lines import torch, which takes the broker a second and is not needed there: only their folders count.
WITHOUT_TORCH = "".join(
    f"package = sys.modules[{name!r}] = type(sys)({name!r}); package.__path__ = [{folder!r}]; "
    for name, folder in (
        ("moekit", str(Path(__file__).parents[1])),
        ("moekit.ranks", str(Path(__file__).parent)),
    )
)


class Distant(Member):
    """The process of a rank on another machine, as far as the cluster has told."""

    def __init__(self, cluster: Cluster, rank: int, node: str):
        self._cluster, self._rank, self.node = cluster, rank, node
        self.code: int | None = None
        # Why there is no process: it could not be started, or its actor is gone.
        self.why: str | None = None
        self.log = ""
        self.seen: tuple[str, float, bool] | None = None
        # Whether its process was stopped when that last changed.
        self.halted = False
        self._asked = -math.inf

    def _look(self) -> tuple[str, float, bool] | None:
        """What was last seen; another look is asked for and not waited for."""
        if time.monotonic() - self._asked > 1.0:
            self._asked = time.monotonic()
            self._cluster.send("look", rank=self._rank)
        self._cluster.listen()
        return self.seen

    def state(self):
        seen = self._look()
        return seen and Process(*seen[:2])

    def any_ready(self):
        # What was seen counts once: the next look may never come.
        seen = self._look()
        ready = bool(seen and seen[2])
        if ready:
            self.seen = (*seen[:2], False)
        return ready

    def stopped(self):
        self._cluster.listen()
        return self.halted

    def poll(self):
        self._cluster.listen()
        return self.code

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if self.why is not None or self._cluster.faults or time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"rank {self._rank}", timeout)
            self._cluster.listen(0.05)
        return self.code

    def lost(self, error):
        """A broken connection may be the first that is seen of a cause which the cluster knows a little later."""
        end = time.monotonic() + CAUSE
        while self.why is None and not self._cluster.faults and time.monotonic() < end:
            self._cluster.listen(0.05)
        if self.why is not None:
            return f"is lost: {self.why}"
        for rank, why in self._cluster.faults:
            of = "" if rank is None else f"node {self._cluster.members[rank].node} "
            return f"is lost: {of}{why}"
        if isinstance(error, OSError) and error.errno in (
            errno.ETIMEDOUT,
            errno.EHOSTUNREACH,
            errno.ENETUNREACH,
        ):
            return f"is lost: its node does not answer over the network ({error.strerror})"
        return "closed its connection, and neither its process nor its node tells why"

    def log_tail(self):
        return read_tail(self.log.encode())


class Cluster:
    """The driver's end of the pipe to the broker, and what has come on it."""

    def __init__(self) -> None:
        self.members: list[Distant] = []
        # Of a rank's node, or None for the whole cluster: what is wrong with it.
        self.faults: list[tuple[int | None, str]] = []
        self._answers: dict[str, Any] = {}
        self._pipe, theirs = socket.socketpair()
        path = [os.path.abspath(entry) for entry in sys.path]
        code = (
            f"import sys; sys.path[:] = {path!r}; {WITHOUT_TORCH}from moekit.ranks.broker import main; main()"
        )
        with hold_interrupts(), theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", code],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ
                | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
                process_group=0,
            )
        self._incoming = channel.Incoming(self._pipe)

    def send(self, name: str, **arguments: Any) -> None:
        with contextlib.suppress(OSError):
            channel.send(self._pipe, cloudpickle.dumps((name, arguments)))

    def ask(self, name: str, seconds: float, **arguments: Any) -> Any:
        """The broker's answer; ValueError with what it says if it refuses."""
        self.send(name, **arguments)
        end = time.monotonic() + seconds
        while name not in self._answers:
            self.listen(0.1)
            if "refused" in self._answers:
                raise ValueError(self._answers.pop("refused"))
            if self.faults:
                raise RuntimeError(self.faults[0][1])
            if time.monotonic() > end:
                raise TimeoutError(
                    f"Ray has not answered in {seconds:g} s: see that its head runs (`ray status`)"
                )
        return self._answers.pop(name)

    def start(self, orders: list[dict[str, Any]], nodes: list[str]) -> None:
        self.members = [Distant(self, rank, node) for rank, node in enumerate(nodes)]
        self.send("start", orders=orders)

    def listen(self, seconds: float = 0.0) -> None:
        """Take in what the broker has said, waiting for it at most this long."""
        try:
            while channel.readable(self._pipe, seconds):
                seconds = 0.0
                if (message := self._incoming.read()) is None:
                    continue
                kind, content = cloudpickle.loads(message)
                if kind == "fault":
                    self.faults.append(content)
                elif kind == "ended":
                    rank, self.members[rank].code, self.members[rank].log = content
                elif kind == "lost":
                    rank, self.members[rank].why = content
                elif kind == "stopped":
                    rank, self.members[rank].halted = content
                elif kind == "looked":
                    rank, self.members[rank].seen = content
                else:
                    self._answers[kind] = content
        except (EOFError, OSError):
            if not self.faults:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=1)
                how = f"exit code {self.process.poll()}"
                self.faults.append((None, f"the process that speaks with Ray ended ({how})"))

    def end(self) -> None:
        self.send("end")
        try:
            self.process.wait(timeout=END_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=END_LIMIT)
        self._pipe.close()
