"""What is wrong with a trace in Chrome's format, as strictly as Perfetto reads it.

The rules are those of "Trace Event Format" (Google, 2016) and of what Perfetto's importer of JSON counts as an error and drops.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

KEYS = {
    "X": {"name": str, "cat": str, "ts": float, "dur": float, "pid": int, "tid": int, "args": dict},
    "s": {"name": str, "cat": str, "ts": float, "id": int, "pid": int, "tid": int},
    "f": {"name": str, "cat": str, "ts": float, "id": int, "pid": int, "tid": int, "bp": str},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
}
NAMES = ("process_name", "thread_name")


def read(text: str | bytes) -> Any:
    """JSON as the standard has it: NaN and infinity are none of it.

    Raises:
        ValueError: it is not.
    """

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=constant)


def problems(held: Any) -> list[str]:
    """A sentence for each thing that is wrong, of one kind at a time: what a later check needs, an earlier one has seen to."""
    if not isinstance(held, dict) or not isinstance(held.get("traceEvents"), list):
        return ["the trace is no object with a list of traceEvents"]
    found = []
    if held.get("displayTimeUnit") not in ("ms", "ns"):
        found.append("displayTimeUnit is neither ms nor ns")
    if not isinstance(held.get("otherData"), dict):
        found.append("otherData is no object")
    events = held["traceEvents"]
    for event in events:
        found += _event(event)
    return found or [*_names(events), *_lanes(events), *_flows(events)]


def nanoseconds(microseconds: float) -> int:
    return round(1000 * microseconds)


def _event(event: Any) -> list[str]:
    if not isinstance(event, dict) or event.get("ph") not in KEYS:
        return [f"no event of a known phase: {event}"]
    found = []
    for key, kind in KEYS[event["ph"]].items():
        value = event.get(key)
        kinds = (int, float) if kind is float else kind
        if isinstance(value, bool) or not isinstance(value, kinds):
            found.append(f"{key} is no {kind.__name__}: {event}")
        elif kind is float and not (math.isfinite(value) and value >= 0):
            found.append(f"{key} is below 0 or not finite: {event}")
        elif kind is float and abs(1000 * value - nanoseconds(value)) > 1e-3:
            found.append(f"{key} is no whole number of nanoseconds: {event}")
        elif key in ("pid", "tid") and not 0 < value < 2**32:
            found.append(f"{key} is 0 or no number of a process: {event}")
        elif kind is str and not value:
            found.append(f"{key} is empty: {event}")
    if not found and event["ph"] == "f" and event["bp"] != "e":
        found.append(f"a flow that ends in the next slice, and not in the one around it: {event}")
    if not found and event["ph"] == "M":
        name, args = event["name"], event["args"]
        good = {"process_sort_index": isinstance(args.get("sort_index"), int)} | dict.fromkeys(
            NAMES, isinstance(args.get("name"), str) and args.get("name") != ""
        )
        if not good.get(name, False):
            found.append(f"metadata that says nothing: {event}")
    return found


def _names(events: list[dict]) -> list[str]:
    """Each process and each thread with events has one name."""
    told = Counter(
        (e["pid"], e["tid"] if e["name"] == "thread_name" else None)
        for e in events
        if e["ph"] == "M" and e["name"] in NAMES
    )
    there = {(e["pid"], e["tid"]) for e in events if e["ph"] != "M"}
    there |= {(pid, None) for pid, _ in there}
    found = [f"{one} has no name" for one in there - set(told)]
    return found + [f"{one} has {times} names" for one, times in told.items() if times > 1]


def _lanes(events: list[dict]) -> list[str]:
    """The slices of a lane come in the order of time, and lie within one another or apart."""
    found, open_, last = [], {}, {}
    for event in events:
        if event["ph"] == "M":
            continue
        lane = event["pid"], event["tid"]
        start = nanoseconds(event["ts"])
        if start < last.get(lane, 0):
            found.append(f"before the event in front of it: {event}")
        last[lane] = start
        ends = open_.setdefault(lane, [])
        while ends and ends[-1] <= start:
            ends.pop()
        if event["ph"] != "X":
            if not ends:
                found.append(f"a flow with no slice around it: {event}")
            continue
        end = start + nanoseconds(event["dur"])
        if ends and end > ends[-1]:
            found.append(f"overlaps a slice that it is not in: {event}")
        elif end > start:
            ends.append(end)
    return found


def _flows(events: list[dict]) -> list[str]:
    """Each flow begins once, and then ends somewhere."""
    starts: dict[tuple, list[float]] = {}
    for event in events:
        if event["ph"] == "s":
            starts.setdefault((event["cat"], event["name"], event["id"]), []).append(event["ts"])
    ended, found = set(), []
    for event in events:
        if event["ph"] == "f":
            key = event["cat"], event["name"], event["id"]
            ended.add(key)
            if key not in starts:
                found.append(f"a flow that ends and does not begin: {event}")
            elif event["ts"] < min(starts[key]):
                found.append(f"a flow that ends before it begins: {event}")
    found += [f"a flow that begins {len(at)} times: {key}" for key, at in starts.items() if len(at) > 1]
    return found + [f"a flow that does not end: {key}" for key in starts.keys() - ended]
