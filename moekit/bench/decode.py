"""Decoding: milliseconds per token and tokens per second, at several batch sizes, after prompts of 128 tokens."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from moekit.api import Model
from moekit.bench import measure
from moekit.bench.fetched import counts_of, told
from moekit.bench.figures import Figure, spread
from moekit.bench.measure import Ceilings
from moekit.bench.setting import Setting, add_fetching, ceiling_figures, random_work, wholes
from moekit.nn import graphs
from moekit.nn.cost import flop_per_token
from moekit.nn.dispatch import owned
from moekit.nn.resident import Counts
from moekit.nn.transformer import Transformer
from moekit.profiling.work import DECODED, Size
from moekit.ranks import Rank
from moekit.worker.prompts import dealt
from moekit.worker.steps import Decode, Prefill, Work, seconds_a_step

# Sequences a rank.
MOST = 16_384


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batches", type=wholes(MOST), default=[1, 64], help="sequences a rank, such as 1,64 (the default)"
    )
    add_fetching(parser)


def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """Measure; see :func:`limit` for the limits."""
    if why := setting.too_large():
        return [Figure("decode", None, "ms", note=why)]
    with setting.model() as (model, ceilings):
        rows = ceiling_figures(ceilings, setting.dtype)
        for batch in args.batches:
            rows += measured(model, setting, ceilings, batch)
    return rows


def limit(
    setting: Setting, ceilings: Ceilings, experts: list[float], batch: int, fetched: float = 0.0
) -> float:
    """The least seconds of a step with ``batch`` sequences per rank.

    A step reads once all weights outside the experts, and the weights of the chosen experts; its operations may take longer
    than these reads. ``experts`` is the number of experts of each MoE layer that a rank reads (:class:`Reads`). Keys
    and values are not counted. The device fetches ``fetched`` bytes of experts from the host.
    """
    read = setting.sizes.shared + sum(experts) * setting.sizes.expert
    flop = batch * flop_per_token(setting.config, 1)
    return max(ceilings.seconds(read, flop), fetched / ceilings.fetch)


def measured(model: Model, setting: Setting, ceilings: Ceilings, batch: int) -> list[Figure]:
    ranks, new = setting.world_size, DECODED[setting.device]
    # One call warms up.
    size = Size("decode", new, batch, setting.config.max_positions, calls=1 + setting.repeats)
    work = random_work(model, size)
    found: list[Decoded] = model.ranks.call(decode, work, setting.repeats)
    step = seconds_a_step([f.seconds for f in found])
    reads = Reads.of([f.chosen for f in found])
    least = limit(setting, ceilings, reads.by_a_rank, batch, fetched_a_step(found))
    gpu = max(f.peak.gpu_gib or 0 for f in found) or None
    host = max(f.peak.host_gib or 0 for f in found) or None
    note = f"{spread(found[0].seconds)}; {reads}"
    if setting.resident is not None:
        note += f"; {told(found[0].fetched, found[0].steps)}"
    row = {"gpu_gib": gpu, "host_gib": host, "note": note}
    goal = setting.goal(f"decode {batch}", ceilings)
    name = f"decode, batch {batch}" + (f" on each of {ranks} ranks" if ranks > 1 else "")
    if batch == 1:
        main = Figure(name, step * 1e3, "ms a token", least * 1e3, goal, lower=True, **row)
    else:
        row["note"] = f"{step * 1e3:.2f} ms a step; {note}"
        main = Figure(name, ranks * batch / step, "tokens/s", ranks * batch / least, goal, **row)

    rows = [main]
    if batch == 1 and ranks > 1:
        others = [[] for _ in range(ranks - 1)]
        calls = [dealt([[0], *others], [call[0].tokens, *others]) for call in work.prompts]
        single = replace(work, prompts=calls)
        alone: list[Decoded] = model.ranks.call(decode, single, setting.repeats)
        # The others have no tokens to wait for.
        seconds = statistics.median(alone[0].seconds)
        note = f"{spread(alone[0].seconds)}; the other ranks serve their experts"
        best = limit(
            setting, ceilings, Reads.of([f.chosen for f in alone]).by_a_rank, 1, fetched_a_step(alone)
        )
        name = "decode, one sequence in all"
        rows.append(Figure(name, seconds * 1e3, "ms a token", best * 1e3, lower=True, note=note))

    return [*rows, *generated(model, setting, ceilings, work, step, least)]


def fetched_a_step(ranks: Sequence[Decoded]) -> float:
    """The bytes of experts that a rank fetches in a step; the rank that fetches most decides."""
    return max(one.fetched.nbytes for one in ranks) / ranks[0].steps


def generated(
    model: Model, setting: Setting, ceilings: Ceilings, work: Work, step: float, least: float
) -> list[Figure]:
    """The speed of ``Model.generate`` with the prompts of ``work``, beside that of its steps alone.

    Args:
        step, least: the seconds of a step, and their limit.
    """
    # After this many prompts of one shape, the ranks have a graph of the pass that reads them.
    warm_up = graphs.AFTER + 1 if setting.device == "cuda" else 1
    repeats = max(2, setting.repeats // 3)
    prompts = [ids[1:] for own in work.prompts[0] for ids in own.tokens.tolist()]
    tokens = 2 * DECODED[setting.device]

    def generate() -> None:
        model.generate(prompts, max_new_tokens=tokens, progress=False)

    seconds = measure.median(generate, torch.device("cpu"), repeats=repeats, warm_up=warm_up)
    reading = seconds_a_step(model.ranks.call(read, work, repeats, warm_up))
    batch, length = work.prompts[0][0].tokens.shape
    name = f"generate, batch {batch}"
    rate = len(prompts) * tokens / seconds
    share = 100 * tokens * step / seconds
    known = 100 * (reading + (tokens - 1) * step) / seconds
    return [
        Figure(
            name,
            rate,
            "tokens/s",
            len(prompts) / least,
            note=f"{len(prompts)} x {tokens} tokens and {length} of prompt in {seconds:.2f} s",
        ),
        Figure(
            f"{name}, of its steps' rate",
            share,
            "%",
            100,
            setting.goal("generate share", ceilings),
            note=f"{reading * 1e3:.2f} ms to read the prompts, which is {reading / seconds:.1%}; with the steps {known:.1f} %",
        ),
    ]


class Reads(NamedTuple):
    """The experts that a step reads of each MoE layer, as means over the steps.

    Attributes:
        ranks: whose tokens these are.
        experts: of a layer.
        by_any: [L], those that any rank's tokens choose.
        by_a_rank: [L], those of one rank. A rank reads those of its experts that any rank's tokens choose. Ranks wait for one
            another in each layer, so the rank that reads the most decides.
    """

    ranks: int
    experts: int
    by_any: list[float]
    by_a_rank: list[float]

    @classmethod
    def of(cls, chosen: Sequence[np.ndarray]) -> Reads:
        """What is read where each rank's tokens choose ``chosen`` (:attr:`Decoded.chosen`)."""
        by_any = np.logical_or.reduce(list(chosen))
        held = [owned(by_any.shape[2], len(chosen), rank) for rank in range(len(chosen))]
        # [W, steps, L]
        read = np.stack([by_any[:, :, own.start : own.stop].sum(axis=2) for own in held])
        everywhere, most = read.sum(axis=0), read.max(axis=0)
        return cls(len(held), by_any.shape[2], everywhere.mean(axis=0).tolist(), most.mean(axis=0).tolist())

    def __str__(self) -> str:
        if not self.by_any:
            return "no experts"
        said = f"{statistics.mean(self.by_any):.1f} of {self.experts} experts a layer"
        return said if self.ranks == 1 else f"{said}, {statistics.mean(self.by_a_rank):.1f} on one rank"


# ------------------------------------------------------------------------------------------------- on a rank


def read(rank: Rank, work: Work, repeats: int, warm_up: int) -> list[float]:
    """Seconds until the prompts are read and the tokens behind them are chosen, in each of ``repeats`` calls."""
    doing, found = Prefill(rank, work), []
    for _ in range(warm_up + repeats):
        measure.synchronise(rank.device)
        start = time.perf_counter()
        # The tokens are on the host, so the work of the device is complete.
        doing.begin()
        found.append(time.perf_counter() - start)
        doing.end()
    return found[warm_up:]


@dataclass(frozen=True)
class Decoded:
    """``seconds`` of a step in each call, and ``chosen`` [steps, L, E] bool: the experts that this rank's tokens choose.

    ``fetched`` is what happened to experts in all layers in ``steps`` steps.
    """

    seconds: list[float]
    peak: measure.Peak
    chosen: np.ndarray
    fetched: Counts
    steps: int


def decode(rank: Rank, work: Work, repeats: int) -> Decoded:
    """Time calls of ``work``, and count the experts of the last one in a run of its own."""
    model: Transformer = rank.state["model"]
    doing = Decode(rank, work)
    # The watch would take time from what is timed.
    with measure.memory(rank.device) as peak:
        doing.warm_up()
    seconds, fetched = [], Counts()
    for _ in range(repeats):
        doing.ready()
        before = counts_of(model)
        seconds.append(doing.timed()[0])
        fetched += counts_of(model) - before
    chosen = doing.counts() > 0
    doing.end()
    return Decoded(seconds, peak, chosen, fetched, repeats * work.steps)
