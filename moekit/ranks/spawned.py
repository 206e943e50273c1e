"""Several ranks of this machine, a process each."""

import contextlib
import errno
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from moekit.interrupts import hold_interrupts
from moekit.processes import channel
from moekit.processes.forkserver import Forked, Server
from moekit.ranks.base import Each, Rank, RankError, Ranks, forked, gone, headline, own
from moekit.ranks.launch import await_server, launch
from moekit.ranks.server import join
from moekit.ranks.watch import Watch

# Seconds for the interpreters to start, import torch and join the process group.
START_LIMIT = 180.0

# Seconds between two looks at the processes. A rank's death may be seen this much later than the errors it causes.
LOOK = 0.2

# Seconds by which the cause of an error may come later than its echo from another rank.
ECHO = 2.0

# Seconds for killed processes to end.
END_LIMIT = 10.0

# Bytes of a rank's log that go into an error.
LOG_TAIL = 4000

# What a rank raises when it waits in vain for another one: gloo's and NCCL's words.
ECHOES = ("Timed out waiting", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL")


class SpawnedRanks(Ranks):
    """Several ranks, a process each. Whatever ends a call early ends them all.

    A process group that lost a member is of no further use, and nothing else frees peers from a collective.

    The ranks come up while the driver does something else, and the first call waits for them.
    """

    def __init__(self, devices: list[torch.device], timeout: float, silence: float):
        super().__init__(devices)
        self._timeout, self._silence, self._owner = timeout, silence, os.getpid()
        self._why_gone = "closed"
        self._lock, self._caller = threading.Lock(), None
        self._processes: list[subprocess.Popen | Forked] = []
        self._pipes: list[socket.socket] = []
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="moekit-ranks-"))
            self._end = weakref.finalize(
                self, _end_ranks, self._owner, self._processes, self._pipes, self._folder
            )
            server = await_server()
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

    def _launch(self, rank: int, server: Server | None) -> channel.Incoming:
        """Start one rank, at the end of a pipe."""
        me = Rank(rank, self.world_size, self.devices[rank])
        with hold_interrupts():
            # An interrupt in between would leave a process that is never ended.
            ours, theirs = socket.socketpair()
            self._pipes.append(ours)
            with theirs, open(self._log(rank), "wb") as log:
                self._processes.append(launch(me, self._folder, theirs, log.fileno(), server))
        return channel.Incoming(ours)

    def call(self, fn, *args, timeout=None, on_report=None, **kwargs):
        if os.getpid() != self._owner:
            raise forked(self._owner)
        if not self._end.alive:
            raise gone(self._why_gone)
        operation = getattr(fn, "__name__", type(fn).__name__)
        jobs = self._jobs(fn, args, kwargs)
        me = object()
        try:
            with self._lock:
                if self._caller is not None:
                    raise RuntimeError("the ranks are busy with another call: wait for it to end")
                self._caller = me
            self._await_joined()
            return self._run(operation, self._outgoing(jobs), timeout, on_report)
        except BaseException as error:
            if self._caller is me:
                self._give_up(operation, error)
            raise
        finally:
            if self._caller is me:
                self._caller = None

    def _jobs(self, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> list[bytes]:
        """What is sent to each rank; made once where all get the same."""
        if not any(isinstance(arg, Each) for arg in args):
            return [cloudpickle.dumps((fn, args, kwargs))] * self.world_size
        return [
            cloudpickle.dumps((fn, tuple(own(arg, rank) for arg in args), kwargs))
            for rank in range(self.world_size)
        ]

    def _outgoing(self, jobs: list[bytes]) -> dict[int, channel.Outgoing]:
        return {rank: channel.Outgoing(pipe, jobs[rank]) for rank, pipe in enumerate(self._pipes)}

    def _await_joined(self) -> None:
        if (joining := self._joining) is not None:
            self._joining = None
            self._run("join", joining, START_LIMIT, None, joined=False)

    def _give_up(self, operation: str, error: BaseException) -> None:
        """End the ranks after an error in a call; the error is another one where that tells more."""
        if isinstance(error, KeyboardInterrupt):
            self._why_gone = "interrupted"
            self.close()
            why = "interrupted, and the ranks stopped (no collective can be left): load the model again"
            raise KeyboardInterrupt(why) from None
        if not self._end.alive:
            raise gone(f"closed while they ran '{operation}'") from None
        self._why_gone = f"stopped after {headline(error)}"
        self.close()

    def _run(
        self,
        operation: str,
        unsent: dict[int, channel.Outgoing],
        timeout: float | None,
        on_report: Callable[[int, Any], None] | None,
        joined: bool = True,
    ) -> list[Any]:
        watch = Watch(operation, [process.pid for process in self._processes], self._silence, joined)
        results: dict[int, Any] = {}
        while watch.at_work:
            left = self._left(watch, timeout)
            for rank, kind, content in self._messages(unsent, watch, min(left, LOOK)):
                if kind == "result":
                    results[rank] = content
                    watch.finish(rank)
                elif kind == "error":
                    raise self._blame(rank, watch, *content)
                elif kind == "report":
                    watch.report(rank)
                    if on_report is not None:
                        on_report(rank, content)
            if time.monotonic() - watch.looked < LOOK:
                continue
            if dead := self._dead():
                raise self._death(dead[0], watch)
            if error := watch.look():
                raise error
        return [results[rank] for rank in range(self.world_size)]

    def _left(self, watch: Watch, timeout: float | None) -> float:
        """Seconds that are left to a call: of its own limit, or of the pool's since the last progress."""
        limit = self._timeout if timeout is None else timeout
        left = limit - (watch.unmoved if timeout is None else time.monotonic() - watch.began)
        if left <= 0:
            late = sorted(watch.at_work)
            what = "answer" if timeout is not None else "progress"
            raise TimeoutError(
                f"no {what} from ranks {late} in {limit:g} s{watch.late()}{self._log_tail(late[0])}"
            )
        return left

    def _messages(
        self, unsent: dict[int, channel.Outgoing], watch: Watch, seconds: float
    ) -> Iterator[tuple[int, str, Any]]:
        """Send and receive for at most this many seconds; yields (rank, kind, content) of each message but beats."""
        poll = select.poll()
        ranks = {}
        for rank, pipe in enumerate(self._pipes):
            ranks[pipe.fileno()] = rank
            poll.register(pipe, select.POLLIN | (select.POLLOUT if rank in unsent else 0))
        for descriptor, event in poll.poll(math.ceil(seconds * 1000)):
            rank = ranks[descriptor]
            if event & select.POLLOUT and rank in unsent:
                watch.move(rank)
                with contextlib.suppress(ConnectionError):
                    # A rank that is dead already is found below.
                    if not unsent[rank].write():
                        continue
                del unsent[rank]
            if not event & ~select.POLLOUT:
                continue
            try:
                message = self._incoming[rank].read()
            except (EOFError, OSError):
                raise self._death(rank, watch) from None
            watch.hear(rank)
            if message is None:
                if self._incoming[rank].large:
                    watch.move(rank)
                continue
            kind, content = cloudpickle.loads(message)
            if kind == "beat":
                watch.beat(rank, *content)
            else:
                yield rank, kind, content

    def _dead(self) -> list[int]:
        """The ranks whose process has ended, everything that they sent having been read."""
        ended = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
        return [rank for rank in ended if not channel.readable(self._pipes[rank])]

    def _blame(self, rank: int, watch: Watch, text: str, error: BaseException | None) -> RankError:
        """What a rank raised, unless it is an echo: peers of a rank that died or stopped raise too, and often first."""
        time.sleep(LOOK)
        for other, process in enumerate(self._processes):
            if process.poll() is not None:
                return self._death(other, watch)
        if any(words in text for words in ECHOES) and (cause := self._behind(rank, watch, headline_of(text))):
            return cause
        failure = RankError(rank, f"raised {text}{self._log_tail(rank)}")
        failure.__cause__ = error
        return failure

    def _behind(self, rank: int, watch: Watch, said: str) -> RankError | None:
        """Which rank made ``rank`` wait in vain in a collective; None if none can be told."""
        if stopped := [other for other in watch.stopped() if other != rank]:
            return RankError(
                stopped[0],
                f"does not answer while it runs '{watch.operation}'{watch.state(stopped[0])}, and rank {rank} gave up "
                f"waiting for it ({said}){watch.stack(stopped[0])}",
            )
        end = time.monotonic() + ECHO
        watch.at_work.discard(rank)
        while watch.at_work and time.monotonic() < end:
            for other, kind, content in self._messages({}, watch, LOOK):
                if kind == "error" and not any(words in content[0] for words in ECHOES):
                    failure = RankError(other, f"raised {content[0]}{self._log_tail(other)}")
                    failure.__cause__ = content[1]
                    return failure
                if kind in ("error", "result"):
                    watch.at_work.discard(other)
        late = sorted(watch.at_work, key=lambda other: (watch.signs[other].waits_for_peers(), other))
        if not late:
            return None
        return RankError(
            late[0],
            f"did not come to a collective in which rank {rank} waited for it ({said}); it runs '{watch.operation}'"
            f"{watch.state(late[0])}{watch.stack(late[0])}{self._log_tail(late[0])}",
        )

    def _death(self, rank: int, watch: Watch) -> RankError:
        try:
            code = self._processes[rank].wait(timeout=5)
        except subprocess.TimeoutExpired:
            return RankError(rank, f"closed its pipe{self._log_tail(rank)}")
        cause = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGABRT and (behind := self._behind(rank, watch, cause)):
            # NCCL ends a process this way when it gives up.
            return behind
        if code == -signal.SIGKILL:
            cause += " (often the out-of-memory killer: compare the memory a rank needs with what is free)"
        return RankError(rank, f"{cause} while it ran '{watch.operation}'{self._log_tail(rank)}")

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def _log_tail(self, rank: int) -> str:
        """The end of a rank's log; nothing where that is gone, as after a cleaning of the temporary folder."""
        tail = ""
        with contextlib.suppress(OSError), open(self._log(rank), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL))
            tail = log.read().decode(errors="replace").strip()
        return f"\n\nThe end of its log:\n{tail}" if tail else ""

    def close(self) -> None:
        with hold_interrupts():
            self._end()


def headline_of(text: str) -> str:
    return text.split("\n")[0][:200]


def _cannot_start(error: OSError) -> str:
    advice = "see that the temporary folder can be written, and load the model again"
    if isinstance(error, FileNotFoundError):
        advice = "see that the current folder and the temporary one are there, os.chdir to one that is, and load the model again"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "close files and models, or raise `ulimit -n`, and load the model again"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        advice = "end other processes, or raise `ulimit -u` and the memory, and load the model again"
    return f"no rank can be started ({headline(error)}): {advice}"


def _end_ranks(
    owner: int, processes: list[subprocess.Popen | Forked], pipes: list[socket.socket], folder: Path
) -> None:
    """End the ranks and forget their files; a fork of the process that started them leaves them alone."""
    if os.getpid() != owner:
        return
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
