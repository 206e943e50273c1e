"""Ranks at the ends of pipes: how a call goes to them and comes back, and whom an error names."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import torch

from moekit.headlines import first_line, headline
from moekit.interrupts import hold_interrupts
from moekit.processes import channel
from moekit.processes.system import temporary_folder
from moekit.ranks import watch as watching
from moekit.ranks.base import Each, RankError, Ranks, Stream, busy, forked, gone, noting
from moekit.ranks.server import join_at, keep_store
from moekit.ranks.streams import Feed, in_a_job, pickled
from moekit.ranks.watch import Watch

# Seconds for the interpreters to start, import torch and join the process group.
START_LIMIT = 180.0

# Seconds by which a rank's death may be seen later than the errors that it causes, and between two looks for their cause.
LATER = 0.2

# Seconds by which the cause of an error may come later than its echo from another rank.
ECHO = 2.0

# What a rank raises when it waits in vain for another one: gloo's and NCCL's words.
ECHOES = ("Timed out waiting", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL")


class Member(watching.Member):
    """The process of a rank, with what a pool needs of it."""

    @abstractmethod
    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    @abstractmethod
    def wait(self, timeout: float) -> int:
        """The exit code once it has ended, or subprocess.TimeoutExpired."""

    def cause(self, code: int) -> str:
        """How it ended, by its exit ``code``."""
        return how_ended(code)

    @abstractmethod
    def lost(self, error: BaseException | None) -> str:
        """What to say of a pipe that broke with ``error`` while nobody tells of the process's end."""

    @abstractmethod
    def log_tail(self) -> str:
        """The end of what it has written, headed by a line that says so; "" where there is nothing."""


class PipedRanks(Ranks):
    """Ranks that are processes, with a pipe to each. Whatever ends a call early ends them all.

    A process group that lost a member is of no further use, and nothing else frees peers from a collective. A subclass
    starts the processes: it fills ``_members``, ``_pipes`` and ``_incoming``, sets ``_end`` to a ``weakref.finalize`` that
    ends them (:meth:`_own` does, where this process starts them), and ``_joined`` once they have a process group.
    """

    def __init__(self, devices: list[torch.device], timeout: float, silence: float):
        super().__init__(devices)
        self._timeout, self._silence, self._owner = timeout, silence, os.getpid()
        self._why_gone = "closed"
        self._lock, self._busy, self._joined = threading.Lock(), False, False
        self._members: list[Member] = []
        self._pipes: list[socket.socket] = []
        self._incoming: list[channel.Incoming] = []

    def call(self, fn, *args, timeout=None, on_report=None, **kwargs):
        if os.getpid() != self._owner:
            raise forked(self._owner)
        if not self._end.alive:
            raise gone(self._why_gone)
        operation = getattr(fn, "__name__", type(fn).__name__)
        feed = next((Feed(arg, self._pipes) for arg in args if isinstance(arg, Stream)), None)
        jobs = self._jobs(fn, args, kwargs)
        failed = []
        # A second interrupt while the first one ends the ranks would leave them in the middle of this call.
        with hold_interrupts() as as_before:
            with self._lock:
                if self._busy:
                    raise busy()
                self._busy = True
            try:
                with as_before():
                    self._await_joined()
                    results = self._run(operation, self._outgoing(jobs), timeout, on_report, feed, failed)
            except BaseException as error:
                if failed:
                    error.add_note(f"Before it, in the driver: {headline(failed[0])}")
                self._give_up(operation, error)
                raise
            finally:
                self._busy = False
        if failed:
            raise failed[0]
        return results

    def _jobs(self, fn: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> list[bytes]:
        """What is sent to each rank: what all get, made once, and after it what a rank alone gets."""
        each = [arg for arg in args if isinstance(arg, Each)]
        for_all = cloudpickle.dumps((fn, tuple(map(in_a_job, args)), kwargs))
        if not each:
            return [for_all] * self.world_size
        return [for_all + pickled(each, rank) for rank in range(self.world_size)]

    def _outgoing(self, jobs: list[bytes]) -> dict[int, channel.Outgoing]:
        return {rank: channel.Outgoing(pipe, jobs[rank]) for rank, pipe in enumerate(self._pipes)}

    def _own(self, end: Callable[..., None], children: list) -> None:
        """Make the folder of the ``children``, the ranks that this process starts, and have them end with this pool.

        ``_end`` becomes a call of ``end`` with the owner, the children, the pipes and the folder, which it removes.
        """
        with hold_interrupts():
            # An interrupt in between would leave a folder that is never removed.
            self._folder = temporary_folder()
            self._end = weakref.finalize(self, end, self._owner, children, self._pipes, self._folder)

    def _meet(self, host: str, seconds: float) -> None:
        """Have ranks of several machines, whose pipes are there, join at a store on ``host`` that they reach in ``seconds``."""
        self._incoming = [channel.Incoming(pipe) for pipe in self._pipes]
        if self.world_size > 1:
            port = self.call(keep_store, host, timeout=START_LIMIT)[0]
            self.call(join_at, host, port, seconds, self._timeout, timeout=START_LIMIT)
        self._joined = True

    def _await_joined(self) -> None:
        """Wait until the ranks have come up, where they did not before."""

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
        feed: Feed | None = None,
        failed: list[Exception] | None = None,
    ) -> list[Any]:
        """The results. After an error of the driver's own, which goes into ``failed``, the ranks finish what they were sent."""
        failed = [] if failed is None else failed
        watch = Watch(operation, self._members, self._silence, self._joined)
        results: dict[int, Any] = {}
        while watch.at_work:
            left = self._left(watch, timeout)
            if feed is not None and not unsent:
                if failed:
                    feed.end()
                with noting(failed):
                    unsent = feed.more()
            for rank, kind, content in self._messages(unsent, watch, min(left, watch.next_look)):
                if kind == "result":
                    results[rank] = content
                    watch.finish(rank)
                elif kind == "error":
                    raise self._blame(rank, watch, *content)
                elif kind == "report":
                    watch.report(rank)
                    if on_report is not None and not failed:
                        with noting(failed) if feed is not None else contextlib.nullcontext():
                            on_report(rank, content)
                elif kind == "taken":
                    feed.taken(rank)
            if watch.next_look:
                continue
            if dead := self._dead():
                raise self._death(dead[0], watch)
            if error := self._fault(watch) or watch.look():
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
                f"no {what} from ranks {late} in {limit:g} s{watch.late()}{self._members[late[0]].log_tail()}"
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
            except (EOFError, OSError) as error:
                raise self._death(rank, watch, error) from None
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
        ended = [rank for rank, member in enumerate(self._members) if member.poll() is not None]
        return [rank for rank in ended if not channel.readable(self._pipes[rank])]

    def _blame(self, rank: int, watch: Watch, text: str, error: BaseException | None) -> RankError:
        """What a rank raised, unless it is an echo: peers of a rank that died or hangs raise too, and often first."""
        time.sleep(LATER)
        for other, member in enumerate(self._members):
            if member.poll() is not None:
                return self._death(other, watch)
        if any(words in text for words in ECHOES) and (
            cause := self._behind(rank, watch, first_line(text, 200))
        ):
            return cause
        failure = watch.error(rank, f"raised {text}{self._members[rank].log_tail()}")
        failure.__cause__ = error
        return failure

    def _behind(self, rank: int, watch: Watch, said: str) -> RankError | None:
        """Which rank made ``rank`` wait in vain in a collective; None if none can be told."""
        end = time.monotonic() + ECHO
        watch.at_work.discard(rank)
        while watch.at_work and time.monotonic() < end:
            for other, kind, content in self._messages({}, watch, LATER):
                if kind == "error" and not any(words in content[0] for words in ECHOES):
                    failure = watch.error(other, f"raised {content[0]}{self._members[other].log_tail()}")
                    failure.__cause__ = content[1]
                    return failure
                if kind in ("error", "result"):
                    watch.at_work.discard(other)
        late = sorted(watch.at_work, key=lambda other: (watch.signs[other].waits_for_peers(), other))
        if not late:
            return None
        return watch.error(
            late[0],
            f"did not come to a collective in which rank {rank} waited for it ({said}); it runs '{watch.operation}'"
            f"{watch.state(late[0])}{watch.stack(late[0])}{self._members[late[0]].log_tail()}",
        )

    def _death(self, rank: int, watch: Watch, lost: BaseException | None = None) -> RankError:
        member = self._members[rank]
        try:
            code = member.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return watch.error(rank, f"{member.lost(lost)}{member.log_tail()}")
        cause = member.cause(code)
        if code == -signal.SIGABRT and (behind := self._behind(rank, watch, cause)):
            # NCCL ends a process this way when it gives up.
            return behind
        return watch.error(rank, f"{cause} while it ran '{watch.operation}'{member.log_tail()}")

    def _fault(self, watch: Watch) -> Exception | None:
        """What else ends a call, such as a lost machine."""
        return None

    def close(self) -> None:
        with hold_interrupts():
            self._end()


def how_ended(code: int) -> str:
    """How a process ended, by its exit code, which is negative for a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    cause = f"was ended by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        cause += " (often the out-of-memory killer: compare the memory a rank needs with what is free)"
    return cause


def read_tail(text: bytes) -> str:
    """What :meth:`Member.log_tail` says of the end of a log."""
    tail = text.decode(errors="replace").strip()
    return f"\n\nThe end of its log:\n{tail}" if tail else ""
