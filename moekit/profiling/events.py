"""From the events of torch's profiler to what a rank did at each moment of a call.

A rank does one thing at a time: a kernel runs, or its device waits. On a GPU kernels are the device's; on a CPU they are the
outermost operations of the thread that calls the model. All times are integers in nanoseconds.
"""

from __future__ import annotations

import bisect
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moekit.nn.parts import FETCH, PREFIX
from moekit.worker.profiling import TEMPLATE, Recorded
from moekit.worker.steps import CALL

# Categories of what runs on a device.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# The range of an exchange on the CPU, which counts as one kernel: its work is done by other threads.
EXCHANGE = "exchange"


@dataclass(frozen=True)
class Kernel:
    """Something that ran.

    Attributes:
        name: of the kernel, or of the operation on a CPU.
        start, end: when it ran.
        ranges: names of the ranges in which the host launched it, outermost first.
        launched: when the host launched it.
        graph: whether a CUDA graph launched it.
    """

    name: str
    start: int
    end: int
    ranges: tuple[str, ...]
    launched: int
    graph: bool = False

    @property
    def fetches(self) -> bool:
        """Whether it copies experts to the device."""
        return self.ranges[-1:] != () and self.ranges[-1].startswith(f"{FETCH} ")


@dataclass(frozen=True)
class Seen:
    """What one rank did.

    Attributes:
        calls: start and end of each.
        kernels: those in the calls.
        template: those of the pass that names a graph's.
        fetches: for each time that experts were fetched in a call: when, and the ranges around it, whose last one has the bytes.
    """

    calls: list[tuple[int, int]]
    kernels: list[Kernel]
    template: list[Kernel]
    fetches: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A kernel, or a time without one, as a row of the table: ``exclusive`` is what no earlier kernel ran through.

    ``place`` is that of the kernel among those of the call; for a time without one, of the kernel that follows it.
    """

    call: int
    place: int
    kernel: Kernel
    start: int
    duration: int
    exclusive: int
    waits: str = ""


def events_of(recorded: Recorded) -> list[dict[str, Any]]:
    """The events of a rank, with ``start`` and, where they take time, ``end`` on rank 0's clock."""
    found = json.loads(zlib.decompress(recorded.events))
    for event in found:
        if event["ph"] != "M":
            event["start"] = recorded.base + recorded.clock + round(1000 * event["ts"])
        if "dur" in event:
            event["end"] = event["start"] + round(1000 * event["dur"])
    return found


def seen(events: Sequence[dict[str, Any]], on_device: bool) -> Seen:
    """What a rank did, from its events; ``on_device`` says whether a GPU computed."""
    marks = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)]
    thread = next(e["tid"] for e in marks if e["name"] == PREFIX + CALL)
    ranges = Ranges(
        (e["start"], e["end"], e["name"].removeprefix(PREFIX)) for e in marks if e["tid"] == thread
    )
    kernels = sorted(
        _on_device(events, ranges) if on_device else _on_host(events, ranges, thread),
        key=lambda kernel: (kernel.start, kernel.end),
    )
    calls = sorted((e["start"], e["end"]) for e in marks if e["name"] == PREFIX + CALL)
    return Seen(
        calls,
        [k for k in kernels if CALL in k.ranges],
        [replace(k, ranges=k.ranges[1:]) for k in kernels if k.ranges[:1] == (TEMPLATE,)],
        [
            (start, around)
            for start, _, name in ranges.all
            if name.startswith(f"{FETCH} ") and CALL in (around := ranges.around(start))
        ],
    )


def _on_device(events: Sequence[dict[str, Any]], ranges: Ranges) -> Iterator[Kernel]:
    launches = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    for event in events:
        if event.get("cat") not in ON_DEVICE:
            continue
        launch = launches.get(event["args"].get("correlation"))
        at = event["start"] if launch is None else launch["start"]
        graph = launch is not None and "GraphLaunch" in launch["name"]
        yield Kernel(event["name"], event["start"], event["end"], ranges.around(at), at, graph)


def _on_host(events: Sequence[dict[str, Any]], ranges: Ranges, thread: Any) -> Iterator[Kernel]:
    # An exchange is a range and one kernel: the operations in it only start what other threads do.
    whole = [(start, end, name) for start, end, name in ranges.all if name == EXCHANGE]
    found = whole + [
        (e["start"], e["end"], e["name"]) for e in events if e.get("cat") == "cpu_op" and e["tid"] == thread
    ]
    last = -1
    for start, end, name in sorted(found, key=lambda one: (one[0], -one[1])):
        if end <= last:
            continue
        last = end
        # The ranges around the middle: an exchange is not around itself.
        yield Kernel(name, start, end, tuple(r for r in ranges.around(start) if r != EXCHANGE), start)


class Ranges:
    """Nested ranges of one thread."""

    def __init__(self, ranges: Iterable[tuple[int, int, str]]):
        self.all = sorted(ranges, key=lambda one: (one[0], -one[1]))
        # The moments at which the innermost range changes, and the ranges from there on.
        self.moments: list[int] = []
        self.stacks: list[tuple[str, ...]] = []
        open_: list[tuple[int, str]] = []
        for start, end, name in self.all:
            self._close(open_, start)
            open_.append((end, name))
            self._note(start, open_)
        self._close(open_, None)

    def _close(self, open_: list[tuple[int, str]], until: int | None) -> None:
        while open_ and (until is None or open_[-1][0] <= until):
            end, _ = open_.pop()
            self._note(end, open_)

    def _note(self, moment: int, open_: list[tuple[int, str]]) -> None:
        self.moments.append(moment)
        self.stacks.append(tuple(name for _, name in open_))

    def around(self, moment: int) -> tuple[str, ...]:
        """The names of the ranges around ``moment``, outermost first."""
        place = bisect.bisect_right(self.moments, moment) - 1
        return self.stacks[place] if place >= 0 else ()


def rows_of(call: int, start: int, end: int, kernels: Sequence[Kernel], on_device: bool) -> list[Row]:
    """Every moment of a call from ``start`` to ``end`` as one row's ``exclusive`` time.

    The time of two kernels at once counts for the one that began first. A time without a kernel is "idle" if the next kernel
    was launched already, and "host" if the device waits for the host. A GPU fetches experts beside what it computes: of such
    a copy, only the time in which no kernel runs is exclusive, and the copy is a row for each time with and without one.
    """
    rows: list[Row] = []
    copies: list[tuple[int, Kernel]] = []
    now = start

    def gap(until: int, place: int) -> None:
        if until > now:
            following = kernels[place] if place < len(kernels) else None
            queued = on_device and following is not None and following.launched < now
            ranges = () if following is None else following.ranges
            nothing = Kernel("", now, until, ranges, now)
            rows.append(
                Row(call, place, nothing, now, until - now, until - now, "idle" if queued else "host")
            )

    for place, kernel in enumerate(kernels):
        if on_device and kernel.fetches:
            copies.append((place, kernel))
            continue
        gap(min(kernel.start, end), place)
        now = max(now, min(kernel.start, end))
        exclusive = max(0, min(kernel.end, end) - now)
        rows.append(Row(call, place, kernel, kernel.start, kernel.end - kernel.start, exclusive))
        now = max(now, min(kernel.end, end))
    gap(end, len(kernels))
    return _with_copies(call, end, rows, copies) if copies else rows


def _with_copies(call: int, end: int, rows: list[Row], copies: list[tuple[int, Kernel]]) -> list[Row]:
    """``rows``, where ``copies`` take the times in which nothing else runs."""
    gaps = [(row.start, row.start + row.duration) for row in rows if row.waits]
    found: list[Row] = []
    taken: list[tuple[int, int]] = []
    for place, copy in copies:
        begun, over = max(copy.start, taken[-1][1]) if taken else copy.start, min(copy.end, end)
        if begun >= over:
            continue
        taken.append((begun, over))
        for a, b, waited in _pieces(begun, over, gaps):
            found.append(Row(call, place, copy, a, b - a, waited * (b - a)))
    for row in rows:
        if not row.waits:
            found.append(row)
            continue
        for a, b, copied in _pieces(row.start, row.start + row.duration, taken):
            if not copied:
                found.append(replace(row, start=a, duration=b - a, exclusive=b - a))
    return sorted(found, key=lambda row: row.start)


def _pieces(start: int, end: int, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, bool]]:
    """The pieces of a time within ``spans``, which are sorted and apart, and those between them: start, end, whether within."""
    now = start
    for left, right in spans[max(0, bisect.bisect_right(spans, (start, math.inf)) - 1) :]:
        if left >= end:
            break
        if right <= now:
            continue
        if left > now:
            yield now, left, False
        yield max(left, now), min(right, end), True
        now = min(right, end)
    if now < end:
        yield now, end, False
