"""The events of all ranks as one trace in Chrome's format, which Perfetto reads too.

The format: "Trace Event Format" (Google, 2016). Used of it are complete events ("X", with ``ts`` and ``dur`` in microseconds),
flows ("s" and "f", from a launch to its kernel) and metadata ("M", the names of processes and threads).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

# Threads that no process of a rank has, for the lane of the parts.
PARTS_LANE = 0
# Numbers of processes of a rank: its host's and its device's.
EACH = 100


def trace_of(frame: pd.DataFrame, events: list[list[dict[str, Any]]], meta: dict[str, Any]) -> dict[str, Any]:
    """The trace, as what JSON holds.

    Args:
        frame: of a :class:`~moekit.profiling.profile.Profile`.
        events: of each rank, with ``start`` on one clock.
    """
    # The frame counts from the first call.
    zero = min(e["start"] for own in events for e in own if e.get("name") == "moekit: call" and "start" in e)
    found: list[dict[str, Any]] = []
    for rank, own in enumerate(events):
        found += _of_rank(rank, own, zero)
    for rank, rows in frame.groupby("rank"):
        found += _named(EACH * rank, f"rank {rank}: parts", EACH * rank)
        for row in rows.itertuples():
            if row.exclusive <= 0:
                continue
            begun = row.start + row.duration - row.exclusive if row.kernel else row.start
            layer = "" if row.layer < 0 else f"layer {row.layer}"
            found.append(
                {
                    "ph": "X",
                    "cat": "part",
                    "name": row.part,
                    "pid": EACH * rank,
                    "tid": PARTS_LANE,
                    "ts": round(1e6 * begun, 3),
                    "dur": round(1e6 * row.exclusive, 3),
                    "args": {
                        "layer": layer,
                        "step": row.step,
                        "kernel": row.kernel,
                        "bytes": row.bytes,
                        "flop": row.flop,
                    },
                }
            )
    return {"displayTimeUnit": "ms", "traceEvents": found, "otherData": {"moekit": meta}}


def _of_rank(rank: int, events: list[dict[str, Any]], zero: int) -> list[dict[str, Any]]:
    """The profiler's events, with processes and flows that no other rank has."""
    found: list[dict[str, Any]] = []
    processes: dict[Any, int] = {}
    for event in events:
        if event["ph"] == "M":
            continue
        pid = event.get("pid")
        if pid not in processes:
            number = EACH * rank + 1 + len(processes)
            processes[pid] = number
            device = event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
            found += _named(number, f"rank {rank}: {'device' if device else 'host'}", number)
        copied = {name: value for name, value in event.items() if name not in ("start", "end")}
        copied["pid"] = processes[pid]
        copied["ts"] = (event["start"] - zero) / 1e3
        if "id" in event:
            copied["id"] = f"{rank}:{event['id']}"
        found.append(copied)
    return found


def _named(pid: int, name: str, place: int) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": place}},
    ]
