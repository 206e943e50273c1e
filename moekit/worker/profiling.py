"""Steps of the real path on a rank, under torch's profiler.

The work is that of ``evaluate`` and ``generate``: :mod:`moekit.worker.scoring` and :mod:`moekit.worker.decoding` do it, and the
profiler only looks. The driver (moekit/profiling) makes a table of what the ranks saw.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity

from moekit.batches import Batch, shares
from moekit.nn import graphs
from moekit.nn.intervene import Intervention
from moekit.nn.parts import part, shown
from moekit.nn.record import Options
from moekit.ranks import Rank
from moekit.worker import decoding, scoring
from moekit.worker.measuring import synchronise
from moekit.worker.prompts import Prompts
from moekit.worker.sampling import Settings

# Names of the ranges around the work, beside those of the model (moekit/nn/parts.py).
CALL, TEMPLATE, CLOCK = "call", "template", "clock"
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
# Calls that are timed without the profiler, where a call is all steps.
TIMED = 3
# Decode steps before the ones that are looked at; after them the rank has a graph of a step.
STEPS_BEFORE = 8
# The key of the generation on the ranks.
KEY = -2


@dataclass(frozen=True)
class Work:
    """What every rank does.

    Attributes:
        mode: "score", "prefill" or "decode".
        steps: how many steps are looked at.
        batches: for "score": the batches of one step, as many for each rank.
        prompts: for the others: the prompts of each rank.
        fraction, vocab, seed: as in :func:`moekit.worker.scoring.scores_of`.
    """

    mode: str
    steps: int
    fraction: float | None
    vocab: int
    seed: int
    batches: Sequence[Batch] = ()
    prompts: Sequence[Prompts] = ()
    intervention: Intervention | None = None


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
        plain = [seconds for _ in range(doing.plain) for seconds in doing.timed()]
        events, base, clock, profiled = looked_at(rank, doing)
        counts = doing.counts()
    finally:
        doing.end()
    offset, jitter = apart(rank)
    return Recorded(events, base, clock + offset, jitter, plain, profiled, counts)


def looked_at(rank: Rank, doing: Score | Prefill | Decode) -> tuple[bytes, int, int, list[float]]:
    """The calls under the profiler: its events, their base, the clock's offset to that of this machine, and seconds."""
    activities = [ProfilerActivity.CPU]
    if rank.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    with without_remarks():
        profiler.start()
    try:
        with shown():
            readings = []
            for _ in range(READINGS):
                with part(CLOCK):
                    readings.append(time.time_ns())
            if (graph := doing.graph()) is not None:
                # The kernels of a graph have no ranges. These, in the same order, do.
                with part(TEMPLATE):
                    graph.work(*graph.inputs)
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
    with tempfile.TemporaryFile() as aside:
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


# ------------------------------------------------------------------------------------------------ what is done


def timed(step: Callable[[], object], device: torch.device) -> list[float]:
    """The seconds of a call that is one step."""
    with part(CALL), part("step 0"):
        start = time.perf_counter()
        step()
        synchronise(device)
        return [time.perf_counter() - start]


class Score:
    """Steps of ``evaluate``; a call is one step."""

    def __init__(self, rank: Rank, work: Work):
        self.rank, self.work, self.calls, self.plain = rank, work, work.steps, work.steps
        self.share = shares(work.batches, rank.world_size)[rank.rank]

    def run(self, trace: Options | None = None):
        w = self.work
        how = {"fraction": w.fraction, "vocab": w.vocab, "seed": w.seed, "intervention": w.intervention}
        return scoring.scores_of(self.rank, [self.share], trace=trace, **how)

    def warm_up(self) -> None:
        for _ in range(graphs.AFTER + 1 if self.rank.device.type == "cuda" else 1):
            self.run()

    def timed(self) -> list[float]:
        return timed(self.run, self.rank.device)

    def graph(self) -> graphs.Graph | None:
        kept = self.rank.state.get(scoring.GRAPH)
        return None if kept is None else kept.graph

    def counts(self) -> np.ndarray:
        config = self.rank.state["model"].config
        if not config.moe_layers:
            return np.zeros((1, 0, 0), dtype=np.int64)
        _, parts = self.run(Options().of(config))
        return counted(parts, config)[None]

    def end(self) -> None:
        """Nothing stays."""


class Generation:
    """What reading and writing share: a greedy generation of each rank's prompts."""

    def __init__(self, rank: Rank, work: Work):
        self.rank, self.work = rank, work
        self.rows = [list(range(len(part))) for part in work.prompts]
        self.slots = (
            max(int(part.lengths.max(initial=0)) for part in work.prompts) + steps_in_all(work.steps) + 2
        )

    def begin(self, trace: Options | None = None) -> np.ndarray:
        """Read the prompts; the token [B] that follows each of this rank's."""
        w = self.work
        settings = Settings(
            w.vocab, fraction=w.fraction, seed=w.seed, intervention=w.intervention, trace=trace
        )
        return decoding.begin(self.rank, KEY, w.prompts[self.rank.rank], settings, self.slots).tokens[:, -1]

    def on(self, tokens: np.ndarray, steps: int) -> np.ndarray:
        """Write ``steps`` tokens more; the last one [B] of each sequence."""
        # A rank reads only the tokens of its own sequences.
        read = [tokens.tolist()] * self.rank.world_size
        return decoding.run(self.rank, KEY, self.rows, read, steps).tokens[:, -1]

    def end(self) -> list[dict[str, np.ndarray]]:
        return decoding.end(self.rank, KEY)

    def options(self) -> Options | None:
        config = self.rank.state["model"].config
        return Options().of(config) if config.moe_layers else None


class Prefill(Generation):
    """Reading of prompts; a call is one step."""

    def __init__(self, rank: Rank, work: Work):
        super().__init__(rank, work)
        self.calls = self.plain = work.steps

    def warm_up(self) -> None:
        for _ in range(2):
            self.begin()

    def timed(self) -> list[float]:
        return timed(self.begin, self.rank.device)

    def graph(self) -> None:
        """Prompts that are new have no graph: only those of one shape do, from the fifth time on."""

    def counts(self) -> np.ndarray:
        if (options := self.options()) is None:
            return np.zeros((1, 0, 0), dtype=np.int64)
        self.begin(options)
        return counted(self.end(), self.rank.state["model"].config)[None]


class Decode(Generation):
    """Steps of one token each; a call is all of them, since the ranks do not report in between."""

    calls, plain = 1, TIMED

    def warm_up(self) -> None:
        self.tokens = self.on(self.begin(), STEPS_BEFORE)

    def timed(self) -> list[float]:
        with part(CALL):
            synchronise(self.rank.device)
            start = time.perf_counter()
            self.tokens = self.on(self.tokens, self.work.steps)
            seconds = time.perf_counter() - start
        return [seconds / self.work.steps] * self.work.steps

    def graph(self) -> graphs.Graph | None:
        return self.rank.state[KEY].graph

    def counts(self) -> np.ndarray:
        """Of the steps under the profiler, which are the last ones."""
        steps, config = self.work.steps, self.rank.state["model"].config
        if (options := self.options()) is None:
            return np.zeros((steps, 0, 0), dtype=np.int64)
        self.end()
        self.on(self.begin(options), steps_in_all(steps))
        # The first part is of the prompts, and each other one of a step.
        parts = self.end()[-steps:]
        return np.stack([counted([part], config) for part in parts])


def steps_in_all(steps: int) -> int:
    """Decode steps of which the last ``steps`` are looked at."""
    return STEPS_BEFORE + (TIMED + 1) * steps


DOING = {"score": Score, "prefill": Prefill, "decode": Decode}


def counted(parts: Sequence[dict[str, np.ndarray]], config) -> np.ndarray:
    """[L, E] int64: the dispatched choices of each expert, of parts of a trace."""
    # [n, L, K]
    experts = np.concatenate([part["experts"] for part in parts])
    kept = np.concatenate([part["kept"] for part in parts])
    layers = range(experts.shape[1])
    return np.stack([np.bincount(experts[:, i][kept[:, i]], minlength=config.experts) for i in layers])
