"""Steps of the real path that are repeated and timed: the benches time them, and the profiler looks at them.

The work is that of ``evaluate`` and ``generate``: :mod:`moekit.worker.scoring` and :mod:`moekit.worker.decoding` do it. What a step
is, how it is warmed up and where it begins is decided here, so that a profile without the profiler takes a bench's time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moekit.batches import Batch, shares
from moekit.nn import graphs
from moekit.nn.config import ModelConfig
from moekit.nn.intervene import Intervention
from moekit.nn.parts import part
from moekit.nn.record import Options
from moekit.ranks import Rank
from moekit.worker import decoding, scoring
from moekit.worker.greedy import Greedy
from moekit.worker.measuring import synchronise
from moekit.worker.prompts import Prompts
from moekit.worker.sampling import Chosen, Settings

# The range of what is timed, beside those of the model (moekit/nn/parts.py).
CALL = "call"
# Calls that are timed without the profiler, where a call is all steps.
TIMED = 3
# Decode steps before the ones that are timed; after them the rank has a graph of a step.
STEPS_BEFORE = 8
# The key of the generation on the ranks.
KEY = -1


@dataclass(frozen=True)
class Work:
    """What every rank does.

    Attributes:
        mode: "score", "prefill" or "decode".
        steps: how many steps are looked at; "decode" makes all of them in one call.
        batches: for "score": the batches of one step, as many for each rank.
        prompts: for the others: the prompts of each rank, and for "decode" those of each call.
        fraction, vocab, seed: as in :func:`moekit.worker.scoring.scores_of`.
    """

    mode: str
    steps: int
    fraction: float | None
    vocab: int
    seed: int
    batches: Sequence[Batch] = ()
    prompts: Sequence[Sequence[Prompts]] = ()
    intervention: Intervention | None = None


def seconds_a_step(times: Sequence[Sequence[float]]) -> float:
    """The time of a step: the median of each rank's ``times``, on the slowest rank."""
    return max(float(np.median(own)) for own in times)


class Steps:
    """A call is one step, which is always the same, unless a subclass says otherwise.

    ``calls`` are those under a profiler, and ``plain`` those that are timed without.
    """

    def __init__(self, rank: Rank, work: Work):
        self.rank, self.work = rank, work
        self.calls = self.plain = work.steps

    def step(self) -> object:
        raise NotImplementedError

    def warm_up(self) -> None:
        """Make calls until the next one takes as long as all later ones."""
        raise NotImplementedError

    def ready(self) -> None:
        """What comes before a call, and is no part of it."""

    def timed(self) -> list[float]:
        """Make a call: the seconds of each of its steps."""
        with part(CALL), part("step 0"):
            start = time.perf_counter()
            self.step()
            synchronise(self.rank.device)
            return [time.perf_counter() - start]

    def seconds(self, calls: int) -> list[list[float]]:
        """The seconds of each step, for so many calls."""
        found = []
        for _ in range(calls):
            self.ready()
            found.append(self.timed())
        return found

    def graph(self) -> graphs.Graph | graphs.InParts | None:
        """What the steps replay; None where they have no graph."""
        return None

    def counts(self) -> np.ndarray:
        """[steps or 1, L, E] int64, the choices of this rank's tokens for each expert in the last call, by MoE layer.

        It has one step where all are alike.
        """
        raise NotImplementedError

    def end(self) -> object:
        """Nothing stays."""


class Score(Steps):
    """Steps of ``evaluate``."""

    def __init__(self, rank: Rank, work: Work):
        super().__init__(rank, work)
        self.share = shares(work.batches, rank.world_size)[rank.rank]

    def step(self, trace: Options | None = None) -> scoring.Scored:
        w = self.work
        how = {"fraction": w.fraction, "vocab": w.vocab, "seed": w.seed, "intervention": w.intervention}
        return scoring.scores_of(self.rank, [self.share], trace=trace, **how)

    def warm_up(self) -> None:
        for _ in range(graphs.AFTER + 1 if self.rank.device.type == "cuda" else 1):
            self.step()

    def graph(self) -> graphs.Graph | None:
        kept = self.rank.state.get(scoring.GRAPH)
        return None if kept is None else kept.graph

    def counts(self) -> np.ndarray:
        config = self.rank.state["model"].config
        if not config.moe_layers:
            return np.zeros((1, 0, 0), dtype=np.int64)
        return counted(self.step(Options().of(config)).parts, config)[None]


class Generation(Steps):
    """What reading and writing share: a greedy generation of each rank's prompts."""

    # Which prompts are next, and the tokens that follow them.
    turn, more = 0, 0

    def begin(self, trace: Options | None = None) -> Chosen | None:
        """Read the prompts: the tokens that follow; None on a rank without prompts."""
        w = self.work
        settings = Settings(
            w.vocab, fraction=w.fraction, seed=w.seed, intervention=w.intervention, trace=trace
        )
        longest = max(int(own.lengths.max(initial=0)) for call in w.prompts for own in call)
        prompts = w.prompts[self.turn][self.rank.rank]
        return decoding.begin(self.rank, KEY, prompts, settings, longest + self.more + 1)

    def end(self) -> list[dict[str, np.ndarray]]:
        return decoding.end(self.rank, KEY)

    def options(self) -> Options | None:
        config = self.rank.state["model"].config
        return Options().of(config) if config.moe_layers else None


class Prefill(Generation):
    """Reading of prompts. New prompts have no graph: only those of one shape do, from the fifth time on."""

    step = Generation.begin

    def warm_up(self) -> None:
        for _ in range(2):
            self.step()

    def counts(self) -> np.ndarray:
        if (options := self.options()) is None:
            return np.zeros((1, 0, 0), dtype=np.int64)
        self.begin(options)
        return counted(self.end(), self.rank.state["model"].config)[None]


class Decode(Generation):
    """Steps of one token each; a call is all of them, since the ranks do not report in between.

    Every call has prompts of its own, whose experts are not in slots already, and begins at the same positions.
    """

    def __init__(self, rank: Rank, work: Work):
        super().__init__(rank, work)
        self.calls, self.plain = 1, TIMED
        self.turn, self.more = -1, STEPS_BEFORE + work.steps

    def on(self, chosen: Chosen | None, steps: int) -> Chosen | None:
        """Write ``steps`` tokens more after those that were chosen."""
        # A rank reads only the tokens of its own sequences.
        last = [] if chosen is None else chosen.tokens[:, -1].tolist()
        rows = [list(range(len(own))) for own in self.work.prompts[0]]
        return decoding.run(self.rank, KEY, rows, [last] * self.rank.world_size, steps)

    def warm_up(self) -> None:
        self.ready()
        self.timed()

    def ready(self) -> None:
        self.end()
        self.turn += 1
        self.chosen = self.on(self.begin(), STEPS_BEFORE)

    def timed(self) -> list[float]:
        with part(CALL):
            synchronise(self.rank.device)
            start = time.perf_counter()
            # The tokens are on the host, so the work of the device is complete.
            self.on(self.chosen, self.work.steps)
            seconds = time.perf_counter() - start
        return [seconds / self.work.steps] * self.work.steps

    def graph(self) -> graphs.Graph | graphs.InParts | None:
        kept = self.rank.state[KEY].graph
        return kept.graph if isinstance(kept, Greedy) else kept

    def counts(self) -> np.ndarray:
        steps, config = self.work.steps, self.rank.state["model"].config
        if (options := self.options()) is None:
            return np.zeros((steps, 0, 0), dtype=np.int64)
        self.end()
        self.on(self.begin(options), STEPS_BEFORE + steps)
        parts = self.end()
        if not parts:
            return np.zeros((steps, len(config.moe_layers), config.experts), dtype=np.int64)
        # The first parts are of the prompts, and each of the last ones is of a step.
        return np.stack([counted([part], config) for part in parts[-steps:]])


DOING: dict[str, type[Steps]] = {"score": Score, "prefill": Prefill, "decode": Decode}


def counted(parts: Sequence[dict[str, np.ndarray]], config: ModelConfig) -> np.ndarray:
    """[L, E] int64: the dispatched choices of each expert, of parts of a trace."""
    # [n, L, K]
    experts = np.concatenate([part["experts"] for part in parts])
    kept = np.concatenate([part["kept"] for part in parts])
    layers = range(experts.shape[1])
    return np.stack([np.bincount(experts[:, i][kept[:, i]], minlength=config.experts) for i in layers])
