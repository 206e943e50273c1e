"""The events of all ranks as one trace in Chrome's format, which Perfetto reads too.

The format: "Trace Event Format" (Google, 2016). Used of it are complete events ("X", with ``ts`` and ``dur`` in microseconds),
flows ("s" and "f", from a launch to its kernel) and metadata ("M", the names of processes and threads).

Perfetto's reader (src/trace_processor/importers/json in its sources) is stricter than the format. It drops a time below zero, and a
slice that overlaps another one of its lane without being in it; it takes the numbers of flows from numbers or hexadecimal text;
and process 0 and thread 0 are the idle ones of a machine. A kernel may begin while the one before it in its stream still runs
(programmatic dependent launch), so a stream may have several lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from moekit.profiling.events import ON_DEVICE

if TYPE_CHECKING:
    import pandas as pd

# The thread of the parts.
PARTS_LANE = 1
# Numbers of processes of a rank: its parts, its host and its device.
EACH = 100
# Numbers of threads from a stream to its next lane; no device has so many streams.
LANES = 100_000
Event = dict[str, Any]


def trace_of(frame: pd.DataFrame, events: list[list[Event]], meta: dict[str, Any]) -> dict[str, Any]:
    """The trace, as what JSON holds.

    What ran before the first call is left out: a reading of clocks, and the pass that names a graph's kernels.

    Args:
        frame: of a :class:`~moekit.profiling.profile.Profile`.
        events: of each rank, with ``start`` on one clock.
    """
    # The frame counts from the first call.
    zero = min(e["start"] for own in events for e in own if e.get("name") == "moekit: call" and "start" in e)
    found: list[Event] = []
    flows: dict[tuple[int, Any], int] = {}
    for rank, own in enumerate(events):
        found += _of_rank(rank, own, zero, flows)
    for rank, rows in frame.groupby("rank"):
        pid = EACH * (int(rank) + 1)
        found += _named(pid, f"rank {rank}: parts") + [_lane(pid, PARTS_LANE, "parts")]
        found += _in_order(_parts(pid, rows))
    return {"displayTimeUnit": "ms", "traceEvents": found, "otherData": {"moekit": meta}}


def _parts(pid: int, rows: pd.DataFrame) -> Iterator[Event]:
    for row in rows.itertuples():
        if row.exclusive <= 0:
            continue
        # Whole nanoseconds, so that neighbours do not overlap.
        end = round(1e9 * (row.start + row.duration))
        begun = end - round(1e9 * row.exclusive)
        args = {"layer": "" if row.layer < 0 else f"layer {row.layer}"}
        args |= {"step": row.step, "kernel": row.kernel, "bytes": row.bytes, "flop": row.flop}
        yield {
            "ph": "X",
            "cat": "part",
            "name": row.part,
            "pid": pid,
            "tid": PARTS_LANE,
            "ts": begun / 1e3,
            "dur": (end - begun) / 1e3,
            "args": args,
        }


def _of_rank(rank: int, events: list[Event], zero: int, flows: dict[tuple[int, Any], int]) -> list[Event]:
    """The profiler's events, with processes and flows that no other rank has; ``flows`` has the numbers so far."""
    shown = [e for e in events if e["ph"] in "Xsf" and e["start"] >= zero]
    devices = {e["pid"] for e in shown if e.get("cat") in ON_DEVICE}
    beside = _beside(e for e in shown if e.get("cat") in ON_DEVICE)
    started, ended = ({e["id"] for e in shown if e["ph"] == phase} for phase in "sf")
    processes: dict[Any, int] = {}
    lanes: set[tuple[int, int]] = set()
    names: list[Event] = []
    found: list[Event] = []
    for event in shown:
        if event["ph"] != "X" and event["id"] not in started & ended:
            continue
        copied = {name: value for name, value in event.items() if name not in ("start", "end")}
        pid, tid = event["pid"], event["tid"]
        if pid not in processes:
            processes[pid] = EACH * (rank + 1) + 1 + len(processes)
            names += _named(processes[pid], f"rank {rank}: {'device' if pid in devices else 'host'}")
        name, thread = f"thread {tid}", tid
        if pid in devices:
            # A stream may be number 0, and no thread is.
            further = beside.get((pid, tid, event["start"]), 0)
            name, thread = f"stream {tid}" + ", overlapping" * (further > 0), tid + 1 + LANES * further
        lane = processes[pid], thread
        if lane not in lanes:
            lanes.add(lane)
            names.append(_lane(*lane, name))
        copied["pid"], copied["tid"] = lane
        copied["ts"] = (event["start"] - zero) / 1e3
        if event["ph"] == "X":
            copied["dur"] = (event["end"] - event["start"]) / 1e3
        if "id" in event:
            copied["id"] = flows.setdefault((rank, event["id"]), len(flows) + 1)
        found.append(copied)
    return names + _in_order(found)


def _beside(kernels: Iterable[Event]) -> dict[tuple[Any, Any, int], int]:
    """By process, stream and start: how many lanes a stream's kernel is away from the first, so that those of a lane are apart."""
    found: dict[tuple[Any, Any, int], int] = {}
    ends: dict[tuple[Any, Any], list[int]] = {}
    for event in sorted(kernels, key=lambda e: (e["start"], e["end"])):
        stream = event["pid"], event["tid"]
        own = ends.setdefault(stream, [])
        further = next((i for i, end in enumerate(own) if end <= event["start"]), len(own))
        own[further : further + 1] = [event["end"]]
        found[(*stream, event["start"])] = further
    return found


def _in_order(events: Iterator[Event] | list[Event]) -> list[Event]:
    """As they began; what lies around another event comes before it, and a flow comes after the event that it is bound to."""
    return sorted(events, key=lambda e: (e["ts"], e["ph"] != "X", -e.get("dur", 0)))


def _named(pid: int, name: str) -> list[Event]:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 1, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 1, "args": {"sort_index": pid}},
    ]


def _lane(pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
