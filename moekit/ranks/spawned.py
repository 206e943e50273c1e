"""Several ranks of this machine, a process each."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from moekit.headlines import headline
from moekit.interrupts import hold_interrupts
from moekit.processes import channel
from moekit.processes.forkserver import Forked, Server
from moekit.processes.system import Process, any_ready, end_of
from moekit.ranks.base import Rank
from moekit.ranks.launch import await_server, launch
from moekit.ranks.piped import START_LIMIT, Member, PipedRanks, how_ended, read_tail
from moekit.ranks.server import join

# Seconds for killed processes to end.
END_LIMIT = 10.0


@dataclass
class Child(Member):
    """A rank of this machine, started by its driver."""

    process: subprocess.Popen | Forked
    log: Path
    node: str = ""

    def state(self):
        return Process.of(self.process.pid)

    def any_ready(self):
        return any_ready(self.process.pid)

    def poll(self):
        return self.process.poll()

    def wait(self, timeout):
        return self.process.wait(timeout=timeout)

    def cause(self, code):
        server = self.process.ended_with() if isinstance(self.process, Forked) else None
        if server is not None:
            # Its pipe is closed before the system tells how it ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                how = how_ended(server.wait(END_LIMIT))
                return f"ended with process {server.pid}, which {how} and from which ranks are forked,"
        return super().cause(code)

    def lost(self, error):
        return "closed its pipe"

    def log_tail(self):
        return read_tail(end_of(self.log))


class SpawnedRanks(PipedRanks):
    """Several ranks of this machine, a process each.

    The ranks come up while the driver does something else, and the first call waits for them.
    """

    def __init__(self, devices: list[torch.device], timeout: float, silence: float):
        super().__init__(devices, timeout, silence)
        try:
            # Python's end takes what was made last first: the ranks end while the server can be asked.
            server = await_server()
            self._own(end_processes, self._members)
            self._incoming = [self._launch(rank, server) for rank in range(self.world_size)]
            jobs = self._jobs(join, (str(self._folder / "rendezvous"), timeout), {})
            # The first job, until the ranks have done it.
            self._joining: dict[int, channel.Outgoing] | None = self._outgoing(jobs)
            for message in self._joining.values():
                with contextlib.suppress(ConnectionError):
                    # A short message passes at once.
                    message.write()
        except BaseException as error:
            if hasattr(self, "_end"):
                self.close()
            if isinstance(error, OSError):
                raise RuntimeError(_cannot_start(error)) from error
            raise

    def _await_joined(self) -> None:
        if (joining := self._joining) is not None:
            self._joining = None
            self._run("join", joining, START_LIMIT, None)
            self._joined = True

    def _launch(self, rank: int, server: Server | None) -> channel.Incoming:
        """Start one rank, at the end of a pipe."""
        me = Rank(rank, self.world_size, self.devices[rank])
        with hold_interrupts():
            # An interrupt in between would leave a process that is never ended.
            ours, theirs = socket.socketpair()
            self._pipes.append(ours)
            path = self._folder / f"rank-{rank}.log"
            with theirs, open(path, "wb") as log:
                self._members.append(Child(launch(me, self._folder, theirs, log.fileno(), server), path))
        return channel.Incoming(ours)


def _cannot_start(error: OSError) -> str:
    advice = "see that the temporary folder can be written, and load the model again"
    if isinstance(error, FileNotFoundError):
        advice = "see that the current folder and the temporary one are there, os.chdir to one that is, and load the model again"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "close files and models, or raise `ulimit -n`, and load the model again"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        advice = "end other processes, or raise `ulimit -u` and the memory, and load the model again"
    if error.errno == errno.ETIMEDOUT:
        advice = "find out what holds that process up, and load the model again, which starts another one in its place"
    return f"no rank can be started ({headline(error)}): {advice}"


def end_processes(owner: int, members: list[Child], pipes: list[socket.socket], folder: Path) -> None:
    """End the ranks and forget their files; a fork of the process that started them leaves them alone."""
    if os.getpid() != owner:
        return
    processes = [member.process for member in members]
    for process in processes:
        with contextlib.suppress(OSError):
            # The process group is gone already.
            os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + END_LIMIT
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, end - time.monotonic()))
        if isinstance(process, Forked):
            process.release()
    for pipe in pipes:
        pipe.close()
    shutil.rmtree(folder, ignore_errors=True)
