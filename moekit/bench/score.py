"""Scoring: tokens per second at several numbers of blocks per call, with routing block by block as in fairseq."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moekit.api import Model
from moekit.batches import Batch
from moekit.bench import measure
from moekit.bench.fetched import counts_of, told
from moekit.bench.figures import Figure, spread
from moekit.bench.measure import Ceilings
from moekit.bench.setting import Setting, add_fetching, ceiling_figures, random_work, wholes
from moekit.nn.cost import flop_per_token
from moekit.nn.gate import Routing
from moekit.nn.memory import TOKENS_A_PASS
from moekit.nn.passes import Pass
from moekit.nn.resident import Counts
from moekit.nn.transformer import Transformer
from moekit.profiling.naming import BY_NAME
from moekit.profiling.work import Size
from moekit.ranks import Rank
from moekit.scoring import score_batches
from moekit.symbols import PAD
from moekit.units import GIB
from moekit.worker.steps import Score, Work, seconds_a_step

FRACTION = 0.05
# Blocks a call and rank.
MOST = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--blocks",
        type=wholes(MOST),
        default=[1, 4, 32],
        help="a call and rank, such as 1,4,32 (the default)",
    )
    add_fetching(parser)


def run(setting: Setting, args: argparse.Namespace) -> list[Figure]:
    """Measure; see :func:`limit` for the limits."""
    if why := setting.too_large():
        return [Figure("score", None, "tokens/s", note=why)]
    with setting.model() as (model, ceilings):
        # What evaluate is compared with is measured in any case: passes of the size that its passes have.
        a_pass = blocks_a_pass(setting)
        found = {
            blocks: measured(model, setting, ceilings, blocks)
            for blocks in dict.fromkeys((*args.blocks, a_pass))
        }
        rows = [
            *ceiling_figures(ceilings, setting.dtype),
            *(row for some in found.values() for row in some),
            *whole(model, setting, ceilings, a_pass, found[a_pass][0]),
        ]
        goal = setting.goal("against one", ceilings)
    if setting.world_size > 1:
        best = max(some[0].value for some in found.values())
        rows.append(against_one(setting, list(found), best, goal))
    return rows


def blocks_a_pass(setting: Setting) -> int:
    """The blocks of one of ``evaluate``'s passes on a rank; see :func:`moekit.scoring.plan_steps`."""
    return max(1, TOKENS_A_PASS[setting.device] // setting.config.max_positions)


def against_one(setting: Setting, blocks: list[int], best: float, goal: float | None) -> Figure:
    """The best rate of all ranks, ``best``, as a multiple of the best rate of one rank alone, from the same run."""
    work = f"{setting.world_size} ranks against one, best of each"
    alone = replace(setting, world_size=1)
    if why := alone.too_large():
        return Figure(work, None, "times", setting.world_size, goal, note=f"alone it {why}")
    with alone.model() as (model, ceilings):
        one = max(measured(model, alone, ceilings, count)[0].value for count in blocks)
    note = f"{best:.0f} tokens/s against {one:.0f}"
    return Figure(work, best / one, "times", setting.world_size, goal, note=note)


def limit(setting: Setting, ceilings: Ceilings, blocks: int, fetched: float = 0.0) -> float:
    """The most tokens per second of all ranks, if a call reads all weights of a rank once and computes its operations.

    The slower of the two decides (:func:`moekit.nn.cost.flop_per_token`). Exchanges between ranks are not counted.
    A rank fetches ``fetched`` bytes of experts from the host.
    """
    length = setting.config.max_positions
    flop = blocks * length * flop_per_token(setting.config, length)
    seconds = max(ceilings.seconds(setting.rank_bytes(), flop), fetched / ceilings.fetch)
    return setting.world_size * blocks * length / seconds


def measured(model: Model, setting: Setting, ceilings: Ceilings, blocks: int) -> list[Figure]:
    """The figures for ``blocks`` blocks per call and rank."""
    length, ranks = setting.config.max_positions, setting.world_size
    size = Size("score", setting.repeats, blocks, length)
    found: list[Scored] = model.ranks.call(score, random_work(model, size, FRACTION))
    calls = found[0].seconds
    seconds = seconds_a_step([f.seconds for f in found])
    gpu = max(f.peak.gpu_gib or 0 for f in found) or None
    host = max(f.peak.host_gib or 0 for f in found) or None
    rows = [
        Figure(
            f"score, {blocks} x {length} tokens a call",
            ranks * blocks * length / seconds,
            "tokens/s",
            limit(setting, ceilings, blocks, max(f.fetched.nbytes for f in found) / len(calls)),
            setting.goal(f"score {blocks}", ceilings),
            gpu_gib=gpu,
            host_gib=host,
            note=f"{seconds * 1e3:.1f} ms a call ({spread(calls)}); {found[0].routing}"
            + (f"; {told(found[0].fetched, len(calls))}" if setting.resident is not None else ""),
        )
    ]
    if gpu is not None and blocks * length == TOKENS_A_PASS["cuda"]:
        rows.append(
            Figure(
                "peak GPU memory of that",
                gpu,
                "GiB",
                sum(setting.run().parts(0)[part] for part in ("weights", "slots")) / GIB,
                setting.goal("score memory", ceilings),
                lower=True,
            )
        )
    if ranks > 1 and setting.config.moe_layers:
        share = max(f.exchange for f in found)
        note = "the rank that spends most; waiting for others included"
        goal = setting.goal("all-to-all", ceilings)
        rows.append(Figure("exchanges, share of that", 100 * share, "%", None, goal, lower=True, note=note))
    return rows


def whole(model: Model, setting: Setting, ceilings: Ceilings, blocks: int, alone: Figure) -> list[Figure]:
    """The speed of ``Model.evaluate`` with batches of one block, including packing and the transfers to and from the ranks.

    Args:
        blocks: of each of its passes on a rank, of which there are two.
        alone: the figure of passes over ``blocks`` blocks, whose limit is that of evaluate, too.
    """
    count = 2 * setting.world_size * blocks
    batches = [batch(setting, i) for i in range(count)]

    def work() -> None:
        score_batches(
            model, batches, fraction=FRACTION, vocab=setting.config.vocab_rows, seed=1, progress=False
        )

    seconds = measure.median(work, torch.device("cpu"), repeats=max(2, setting.repeats // 3), warm_up=1)
    rate = count * setting.config.max_positions / seconds
    name, goal = f"evaluate, {count} blocks", setting.goal("evaluate share", ceilings)
    return [
        Figure(
            name,
            rate,
            "tokens/s",
            alone.limit,
            note=f"packed by scoring.plan_steps, {blocks} blocks a pass and rank",
        ),
        Figure(f"{name}, of the scoring rate", 100 * rate / alone.value, "%", 100, goal),
    ]


def batch(setting: Setting, index: int) -> Batch:
    """A block of random tokens."""
    return random_batch(index, setting.config.max_positions, setting.config.vocab_rows)


def random_batch(index: int, length: int, vocab: int) -> Batch:
    ids = np.random.default_rng(index).integers(4, vocab, (1, length + 1), dtype=np.int32)
    return Batch(index, np.array([index]), ids[:, :-1], ids[:, 1:], np.zeros(1, dtype=np.int64))


# ------------------------------------------------------------------------------------------------- on a rank


@dataclass(frozen=True)
class Scored:
    """``seconds`` of each call, the share of a call in exchanges, a description of the routing, and what was fetched."""

    seconds: list[float]
    peak: measure.Peak
    exchange: float
    routing: str
    fetched: Counts


def score(rank: Rank, work: Work) -> Scored:
    """Time the steps of ``work``, and look at the routing."""
    model: Transformer = rank.state["model"]
    doing = Score(rank, work)
    routing = describe(rank, doing.share.batches, work.fraction)
    # The watch would take time from what is timed.
    with measure.memory(rank.device) as peak:
        doing.warm_up()
    before = counts_of(model)
    seconds = [call[0] for call in doing.seconds(work.steps)]
    fetched = counts_of(model) - before
    for (_, found), batch in zip(doing.step().scores, doing.share.batches, strict=True):
        assert np.isfinite(found[batch.targets != PAD]).all(), "a log-probability is no finite number"
    exchange = exchanged(rank, doing.step) if rank.world_size > 1 and model.config.moe_layers else 0.0
    return Scored(seconds, peak, exchange, routing, fetched)


@torch.inference_mode()
def describe(rank: Rank, batches: Sequence[Batch], fraction: float | None = FRACTION) -> str:
    """The routing of random tokens by random weights: with few chosen experts, the bench would do less work than a real model."""
    model: Transformer = rank.state["model"]
    if not model.config.moe_layers:
        return "no experts"
    seen: list[tuple[Tensor, Tensor]] = []

    def note(layer: int, routing: Routing) -> None:
        seen.append((routing.experts, routing.kept))

    tokens = torch.from_numpy(np.concatenate([b.tokens for b in batches])).to(rank.device).long()
    model(tokens, Pass(fraction, groups=len(batches), record=note))
    experts = model.config.experts
    loads = torch.stack([chosen.flatten().bincount(minlength=experts) for chosen, _ in seen]).float()
    reached, most = (loads > 0).sum(dim=1).float().mean(), (loads.amax(dim=1) / loads.mean(dim=1)).mean()
    dropped = 1 - torch.stack([kept.float().mean() for _, kept in seen]).mean()
    return f"{reached:.0f} of {experts} experts, {most:.1f}x at most, {dropped:.1%} dropped"


# Names of the kernels that move rows or wait for other ranks. The second product of the experts also moves rows if it
# writes results straight into the peers' memory; that time is not counted.
MOVING = ("nccl", "_meet", *(name for name, part in BY_NAME.items() if part in ("dispatch", "combine")))


def exchanged(rank: Rank, work: Callable[[], object]) -> float:
    """The share of the time of ``work`` in which this rank moves rows or waits for slower ranks."""
    if rank.device.type == "cuda":
        # Count NCCL kernels: a CUDA graph replays them without Python calls. Profilers start at different times on
        # different ranks, hence the barrier; it is an all-reduce and is left out.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            dist.barrier()
            seconds = sum(measure.seconds(work, rank.device, repeats=3, warm_up=0))
        kernels = [event for event in seen.key_averages() if event.key.startswith(MOVING)]
        moving = (event for event in kernels if "AllReduce" not in event.key)
        spent = sum(event.self_device_time_total for event in moving) / 1e6
    else:
        with clocked() as calls:
            seconds = sum(measure.seconds(work, rank.device, repeats=3, warm_up=0))
        spent = sum(calls)
    assert spent > 0, "nothing was exchanged"
    return spent / seconds


@contextlib.contextmanager
def clocked() -> Iterator[list[float]]:
    """Yields a list that collects the seconds of each ``all_to_all_single`` in the context."""
    exchange = dist.all_to_all_single
    calls: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = exchange(*args, **kwargs)
        calls.append(time.perf_counter() - start)
        return result

    dist.all_to_all_single = timed
    try:
        yield calls
    finally:
        dist.all_to_all_single = exchange
