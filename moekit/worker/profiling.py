"""Steps of the real path on a rank, under torch's profiler.

The steps are those that the benches time (:mod:`moekit.worker.steps`), and the profiler only looks. The driver
(moekit/profiling) makes a table of what the ranks saw.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from moekit.nn.parts import part, shown
from moekit.ranks import Rank
from moekit.worker.measuring import synchronise
from moekit.worker.steps import DOING, Steps, Work

# Names of the ranges around the work, beside those of the model (moekit/nn/parts.py).
TEMPLATE, CLOCK = "template", "clock"
# The events of the profiler that are kept, by their category.
KEPT = (
    "cpu_op",
    "user_annotation",
    "kernel",
    "gpu_memcpy",
    "gpu_memset",
    "cuda_runtime",
    "cuda_driver",
    "ac2g",
)
# Readings of both clocks; the quickest one counts.
READINGS = 9


@dataclass(frozen=True)
class Recorded:
    """What a rank saw.

    Attributes:
        events: the profiler's events, JSON compressed with zlib.
        base: nanoseconds that the events' times count from.
        clock: nanoseconds to add to the profiler's clock for that of rank 0.
        jitter: nanoseconds by which ``clock`` may be wrong.
        plain, profiled: seconds of each step, without and with the profiler; more of the former for "decode".
        counts: [steps, L, E] int64, dispatched choices of this rank's tokens for each expert, by MoE layer. All steps of
            "score" and "prefill" are alike, and there is one.
    """

    events: bytes
    base: int
    clock: int
    jitter: int
    plain: list[float]
    profiled: list[float]
    counts: np.ndarray


@torch.inference_mode()
def profile(rank: Rank, work: Work) -> Recorded:
    """Do the work: to warm up, timed, under the profiler, and once more to count the rows of each expert."""
    if torch.autograd._profiler_enabled():
        # It would end, and lose what it saw.
        raise RuntimeError("torch's profiler runs in this process already: end it before model.profile")
    doing = DOING[work.mode](rank, work)
    try:
        doing.warm_up()
        plain = [one for call in doing.seconds(doing.plain) for one in call]
        events, base, clock, profiled = looked_at(rank, doing)
        counts = doing.counts()
    finally:
        doing.end()
    offset, jitter = apart(rank)
    return Recorded(events, base, clock + offset, jitter, plain, profiled, counts)


def looked_at(rank: Rank, doing: Steps) -> tuple[bytes, int, int, list[float]]:
    """The calls under the profiler: its events, their base, the clock's offset to that of this machine, and seconds."""
    activities = [ProfilerActivity.CPU]
    if rank.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    doing.ready()
    with without_remarks():
        profiler.start()
    try:
        with shown():
            readings = []
            for _ in range(READINGS):
                with part(CLOCK):
                    readings.append(time.time_ns())
            if (graph := doing.graph()) is not None:
                # The kernels of a graph have no ranges. These, in the same order, do; they may write to their inputs.
                with part(TEMPLATE):
                    graph.work(*(own.clone() for own in graph.inputs))
            synchronise(rank.device)
            if rank.world_size > 1:
                # Profilers need different times to start, and that is no part of a step.
                dist.barrier()
            profiled = [seconds for _ in range(doing.calls) for seconds in doing.timed()]
    finally:
        # A process has one profiler: one that went on would spoil the next profile.
        with without_remarks():
            profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.json"
        profiler.export_chrome_trace(str(path))
        # The profiler may write NaN, which no reader of JSON has to take.
        found = json.loads(path.read_text(), parse_constant=lambda _: None)
    base = int(found.get("baseTimeNanoseconds", 0))
    events = [e for e in found["traceEvents"] if e.get("cat") in KEPT or e.get("ph") == "M"]
    return zlib.compress(json.dumps(events).encode(), 3), base, clock_of(events, base, readings), profiled


def clock_of(events: Sequence[dict[str, Any]], base: int, readings: Sequence[int]) -> int:
    """The nanoseconds to add to the profiler's times for those of ``time.time_ns``, which gave ``readings``."""
    seen = sorted(
        (e for e in events if e.get("name") == f"moekit: {CLOCK}" and e["cat"] == "user_annotation"),
        key=lambda e: e["ts"],
    )
    quickest, reading = min(zip(seen, readings, strict=True), key=lambda pair: pair[0]["dur"])
    return reading - base - round(1000 * (quickest["ts"] + quickest["dur"] / 2))


def apart(rank: Rank, rounds: int = 25) -> tuple[int, int]:
    """The nanoseconds to add to this machine's clock for that of rank 0, and by how many it may be wrong.

    Ranks of one machine share its clock. Ranks of several leave a barrier at nearly the same time: the median over
    ``rounds`` barriers counts.
    """
    if rank.local_world_size == rank.world_size:
        return 0, 0
    mine = []
    for _ in range(rounds):
        dist.barrier()
        synchronise(rank.device)
        mine.append(time.time_ns())
    all_of_them: list[list[int]] = [[] for _ in range(rank.world_size)]
    dist.all_gather_object(all_of_them, mine)
    ahead = np.array(mine) - np.array(all_of_them[0])
    low, middle, high = np.quantile(ahead, [0.25, 0.5, 0.75])
    return -round(middle), round(high - low)


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Keep what the profiler says at its start and end away from the standard error: only lines of others pass."""
    with tempfile.TemporaryFile() as aside, warnings.catch_warnings():
        # Torch before 2.13 speaks of cycles, which nobody asked for.
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        before = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            aside.seek(0)
            for line in aside:
                if b"profiler_st" not in line:
                    os.write(2, line)
