"""Decoding: milliseconds per token and tokens per second, at several batch sizes, after prompts of 128 tokens."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from moekit.api import Model
from moekit.bench import measure
from moekit.bench.fetched import counts_of, told
from moekit.bench.figures import Figure, spread
from moekit.bench.measure import Ceilings
from moekit.bench.setting import Setting, add_fetching, ceiling_figures, wholes
from moekit.nn import graphs
from moekit.nn.cost import flop_per_token
from moekit.nn.gate import Routing
from moekit.nn.resident import Counts
from moekit.ranks import Rank
from moekit.worker import decoding as decode
from moekit.worker.prompts import dealt
from moekit.worker.sampling import Settings

PROMPT = 128
# Sequences a rank.
MOST = 16_384
# New tokens of a measurement, which is one call.
NEW = {"cpu": 8, "cuda": 64}
# Steps after which a rank has a graph of a step.
WARM_UP = 8
# The key of the generation on the ranks.
KEY = -1


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

    A step reads once all weights outside the experts, and the weights of the experts that it chooses; its operations may
    take longer than these reads. ``experts`` is the number of distinct chosen experts in each MoE layer, as a mean over
    the steps. With several ranks, each rank reads its share of the experts. Keys and values are not counted. The device
    fetches ``fetched`` bytes of experts from the host.
    """
    read = setting.sizes.shared + sum(experts) / setting.world_size * setting.sizes.expert
    flop = batch * flop_per_token(setting.config, 1)
    return max(ceilings.seconds(read, flop), fetched / ceilings.fetch)


def measured(model: Model, setting: Setting, ceilings: Ceilings, batch: int) -> list[Figure]:
    ranks, new = setting.world_size, NEW[setting.device]
    found: list[Decoded] = model.ranks.call(time_decoding, batch, new, setting.repeats)
    seconds = statistics.median(found[0].seconds) / new
    # The slowest rank decides.
    fetched = max(f.fetched.nbytes for f in found) / found[0].steps
    least = limit(setting, ceilings, found[0].experts, batch, fetched)
    gpu = max(f.peak.gpu_gib or 0 for f in found) or None
    host = max(f.peak.host_gib or 0 for f in found) or None
    note = f"{spread(found[0].seconds)}; {reached(found[0].experts, setting)}"
    if setting.resident is not None:
        note += f"; {told(found[0].fetched, found[0].steps)}"
    row = {"gpu_gib": gpu, "host_gib": host, "note": note}
    goal = setting.goal(f"decode {batch}", ceilings)
    name = f"decode, batch {batch}" + (f" on each of {ranks} ranks" if ranks > 1 else "")
    if batch == 1:
        main = Figure(name, seconds * 1e3, "ms a token", least * 1e3, goal, lower=True, **row)
    else:
        row["note"] = f"{seconds * 1e3:.2f} ms a step; {note}"
        main = Figure(name, ranks * batch / seconds, "tokens/s", ranks * batch / least, goal, **row)

    rows = [main]
    if batch == 1 and ranks > 1:
        alone: list[Decoded] = model.ranks.call(time_decoding, 1, new, setting.repeats, True)
        seconds = statistics.median(alone[0].seconds) / new
        note = f"{spread(alone[0].seconds)}; the other ranks serve their experts"
        best = limit(setting, ceilings, alone[0].experts, 1)
        name = "decode, one sequence in all"
        rows.append(Figure(name, seconds * 1e3, "ms a token", best * 1e3, lower=True, note=note))

    prompts = [prompt(number, setting.config.vocab_rows) for number in range(batch * ranks)]
    tokens = 2 * new

    def work() -> None:
        model.generate(prompts, max_new_tokens=tokens, progress=False)

    # After this many prompts of one shape, the ranks have a graph of the pass that reads them.
    warm_up = graphs.AFTER + 1 if setting.device == "cuda" else 1
    whole = measure.median(work, torch.device("cpu"), repeats=max(2, setting.repeats // 3), warm_up=warm_up)
    rate = len(prompts) * tokens / whole
    note = f"{len(prompts)} x {tokens} tokens and {PROMPT} of prompt in {whole:.2f} s"
    return [*rows, Figure(f"generate, batch {batch}", rate, "tokens/s", ranks * batch / least, note=note)]


def reached(experts: list[float], setting: Setting) -> str:
    if not experts:
        return "no experts"
    return f"{statistics.mean(experts):.1f} of {setting.config.experts} experts a layer"


def prompt(number: int, vocab: int) -> list[int]:
    return np.random.default_rng([number]).integers(4, vocab, PROMPT - 1).tolist()


# ------------------------------------------------------------------------------------------------- on a rank


@dataclass(frozen=True)
class Decoded:
    """``seconds`` of each call of ``decoding.run``, and the mean number of distinct experts of a step in each MoE layer.

    ``fetched`` is what happened to experts in all layers in ``steps`` steps.
    """

    seconds: list[float]
    peak: measure.Peak
    experts: list[float]
    fetched: Counts
    steps: int


def time_decoding(rank: Rank, batch: int, new: int, repeats: int, in_all: bool = False) -> Decoded:
    """Time :func:`moekit.worker.decoding.run`, ``new`` tokens per call, and count the experts in a separate run.

    Each rank has ``batch`` sequences; ``in_all``: the first rank has them, and the others have none.

    Before each measurement, the prompts are read again and a few tokens are decoded. So all measurements have the same
    positions, and the rank has a graph of a step. Each has prompts of its own, whose experts are not in slots already.
    """
    model = rank.state["model"]
    vocab = model.config.vocab_rows
    rows = [[] if in_all and r else list(range(batch)) for r in range(rank.world_size)]
    fetched = Counts()

    def decoded(settings: Settings, turn: int = 0) -> float:
        nonlocal fetched
        first = turn * batch * rank.world_size
        numbers = [[r * batch + row for row in own] for r, own in enumerate(rows)]
        prompts = dealt(numbers, [[prompt(first + number, vocab) for number in own] for own in numbers])
        chosen = decode.begin(rank, KEY, prompts[rank.rank], settings, PROMPT + WARM_UP + new + 1)
        for steps in (WARM_UP, new):
            before = counts_of(model)
            measure.synchronise(rank.device)
            start = time.perf_counter()
            # A rank reads only the tokens of its sequences.
            last = [[] if chosen is None else chosen.tokens[:, -1].tolist()] * rank.world_size
            chosen = decode.run(rank, KEY, rows, last, steps)
            # The tokens are on the host, so the work of the device is complete.
            seconds = time.perf_counter() - start
        decode.end(rank, KEY)
        fetched += counts_of(model) - before
        return seconds

    with measure.memory(rank.device) as peak:
        decoded(Settings(vocab))
        fetched = Counts()
        seconds = [decoded(Settings(vocab), turn) for turn in range(1, 1 + repeats)]
    counted = fetched

    distinct: dict[int, list[int]] = {layer: [] for layer in model.config.moe_layers}

    def count(layer: int, routing: Routing) -> None:
        # A pass with one token per sequence is a decode step; prompts are longer.
        if routing.experts.shape[1] == 1:
            distinct[layer].append(len(routing.experts.unique()))

    decoded(Settings(vocab, record=count))
    experts = [statistics.mean(found) for found in distinct.values() if found]
    return Decoded(seconds, peak, experts, counted, repeats * new)
