"""Signs of life of the ranks during a call, and what to say when they do not come.

A thread of each rank sends a beat every second while the rank works. A beat tells where the main thread is and how much
processor time the rank has used. The driver looks at the ranks several times a second. Three things end a call:

- A rank is *stopped*: the system says that a signal has stopped its process, at several looks in a row.
- A rank is *silent*: no byte comes from it and its processor time stands still. Its process is frozen, stuck or in a debugger.
- A rank is *idle*: it sends beats, and it neither reports nor uses the processor. Its main thread waits for something that
  does not come, such as a file system. A rank that waits in a collective is not to blame as long as another one can be.

Only time counts in which the driver itself runs and looks: a machine that slept has no stopped ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moekit.arguments import Number, check
from moekit.processes.system import LOOK, STOPPED, Process
from moekit.ranks.base import RankError

# Seconds between two beats of a rank.
BEAT = 1.0

# Seconds without a sign of life after which a call ends; the environment's MOEKIT_SILENCE overrides it.
SILENCE = 30.0

# The most seconds of a collective: torch counts them in nanoseconds, as int64.
LONGEST = 1e9

# Seconds of processor time from one beat to the next that count as work.
USED = 0.01

# Files of frames in which a rank waits for others.
WAITS_FOR_PEERS = ("torch/distributed/", "nn/dispatch.py")


def silence_limit(silence: float | None) -> float:
    """``silence`` in seconds; None: that of the environment, or :data:`SILENCE`. ValueError unless it is positive."""
    said = os.environ.get("MOEKIT_SILENCE", SILENCE) if silence is None else silence
    try:
        if (limit := float(said)) > 0:
            return limit
    except (TypeError, ValueError):
        pass
    name = "MOEKIT_SILENCE" if silence is None else "silence"
    raise ValueError(f"{name} is {said!r}: expected a number of seconds above 0")


def time_limit(timeout: float) -> float:
    """``timeout``, that of a collective, in seconds. ValueError unless it is positive, and one that a collective takes."""
    return check("timeout", timeout, Number(above=0, most=LONGEST))


class Member(Protocol):
    """The process of a rank as its driver sees it, on this machine or on another one.

    ``node`` is the name of its machine, "" for the driver's own.
    """

    node: str

    def state(self) -> Process | None:
        """Of its main thread; None where nobody tells."""
        ...

    def any_ready(self) -> bool:
        """Whether one of its threads runs or could."""
        ...

    def stopped(self) -> bool:
        """Whether a signal has stopped it, as far as anybody tells."""
        process = self.state()
        return process is not None and process.stopped


@dataclass
class Signs:
    """What is known of one rank: seconds since the last byte and since the last work, the last looks in a row at which its process
    was stopped, and its innermost frames."""

    silent: float = 0.0
    idle: float = 0.0
    stopped: int = 0
    frames: tuple[str, ...] = ()
    used: float = 0.0
    known: Process | None = None
    started: bool = False

    def waits_for_peers(self) -> bool:
        return any(name in frame for frame in self.frames[:3] for name in WAITS_FOR_PEERS)


class Watch:
    """The signs of all ranks during one call of ``operation``."""

    def __init__(self, operation: str, members: Sequence[Member], silence: float, started: bool):
        self.operation, self.members, self.silence = operation, members, silence
        self.signs = [Signs(started=started) for _ in members]
        self.at_work = set(range(len(members)))
        self.began = self.looked = time.monotonic()
        # Seconds since a rank reported or finished.
        self.unmoved = 0.0

    def hear(self, rank: int) -> None:
        """Bytes have come from ``rank``."""
        self.signs[rank].silent = 0.0

    def move(self, rank: int) -> None:
        """A part of a large message has gone to ``rank`` or come from it."""
        self.signs[rank].silent = self.signs[rank].idle = 0.0

    def beat(self, rank: int, frames: tuple[str, ...], used: float) -> None:
        signs = self.signs[rank]
        if used - signs.used > USED or not signs.started:
            signs.idle = 0.0
        signs.frames, signs.used, signs.started = frames, used, True

    def report(self, rank: int) -> None:
        self.unmoved = 0.0
        for signs in self.signs:
            signs.idle = 0.0

    def finish(self, rank: int) -> None:
        """A report counts for all ranks: those that waited for this one may have moved."""
        self.at_work.discard(rank)
        self.report(rank)

    @property
    def next_look(self) -> float:
        """Seconds until the next look, 0 if it is time for it."""
        return max(0.0, self.looked + LOOK - time.monotonic())

    def look(self) -> RankError | None:
        """Count the time since the last look; returns an error that names a rank that is stopped, or is silent or idle for too long."""
        now = time.monotonic()
        passed, self.looked = min(now - self.looked, BEAT), now
        self.unmoved += passed
        for rank in sorted(self.at_work):
            signs = self.signs[rank]
            signs.silent += passed
            signs.idle += passed
            signs.stopped = signs.stopped + 1 if self.members[rank].stopped() else 0
            if signs.silent > 1.5 * BEAT or signs.silent >= self.silence:
                self._ask_the_system(rank)
        stopped = [rank for rank in sorted(self.at_work) if self.signs[rank].stopped]
        # The one that was stopped first comes first.
        stopped.sort(key=lambda rank: -self.signs[rank].stopped)
        if stopped and self.signs[stopped[0]].stopped >= STOPPED:
            return self._stopped(stopped)
        for rank in sorted(self.at_work):
            # An interpreter that starts sends no beats, and a slow disk may hold it up.
            if self.signs[rank].started and self.signs[rank].silent >= self.silence:
                return self._silent(rank)
        idle = [rank for rank in sorted(self.at_work) if self._is_idle(rank)]
        to_blame = [rank for rank in idle if not self.signs[rank].waits_for_peers()]
        if to_blame or (idle and len(idle) == len(self.at_work)):
            return self._idle(to_blame or idle)
        return None

    def _is_idle(self, rank: int) -> bool:
        """A rank that is ready to run waits for the processor alone: others have it, and the rank is not stuck."""
        signs = self.signs[rank]
        if not signs.started or signs.idle < self.silence:
            return False
        process = self.members[rank].state()
        if process and process.ready:
            signs.idle = 0.0
        return signs.idle >= self.silence

    def _ask_the_system(self, rank: int) -> None:
        """A rank without beats that uses the processor is at work: one long call may keep Python's lock.

        One with a thread that is ready to run lives, too: others have the processor.
        """
        signs, process = self.signs[rank], self.members[rank].state()
        if self.members[rank].any_ready() or (
            process and signs.known and process.seconds > signs.known.seconds
        ):
            signs.silent = signs.idle = 0.0
        signs.known = process

    def error(self, rank: int, cause: str) -> RankError:
        return RankError(rank, cause, self.members[rank].node)

    def _stopped(self, ranks: list[int]) -> RankError:
        others = f"; so have ranks {ranks[1:]}" if ranks[1:] else ""
        return self.error(
            ranks[0],
            f"has been stopped by a signal, such as SIGSTOP, while it ran '{self.operation}', and does not go on{others}: find "
            f"out what stopped it, and load the model again{self.stack(ranks[0])}",
        )

    def _silent(self, rank: int) -> RankError:
        return self.error(
            rank,
            f"has given no sign of life for {self.silence:g} s while it ran '{self.operation}'"
            f"{self.state(rank)}: find out what holds it up, and load the model again, or set MOEKIT_SILENCE to more seconds"
            f"{self.stack(rank)}",
        )

    def _idle(self, ranks: list[int]) -> RankError:
        others = f"; so have ranks {ranks[1:]}" if ranks[1:] else ""
        return self.error(
            ranks[0],
            f"has neither reported nor used the processor for {self.silence:g} s while it ran '{self.operation}'"
            f"{self.state(ranks[0])}{others}: look at what it waits for, or set MOEKIT_SILENCE to more seconds"
            f"{self.stack(ranks[0])}",
        )

    def state(self, rank: int) -> str:
        process = self.members[rank].state()
        return f" ({process})" if process else ""

    def stack(self, rank: int) -> str:
        """Where the rank was at its last beat."""
        frames = "\n".join(self.signs[rank].frames)
        return f"\n\nWhere it was at its last sign, innermost first:\n{frames}" if frames else ""

    def late(self) -> str:
        """What the ranks that have not finished do."""
        spent = time.monotonic() - self.began
        return "".join(
            f"\n\nrank {rank} has run '{self.operation}' for {spent:.1f} s{self.state(rank)}{self.stack(rank)}"
            for rank in sorted(self.at_work)
        )
