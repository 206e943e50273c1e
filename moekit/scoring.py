"""Scoring batches on all ranks, and what comes of it: the verbs that score call these functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.batches import Batch
from moekit.handle import Handle
from moekit.interrupts import import_whole
from moekit.nn.config import PAD
from moekit.progress import bar as progress_bar
from moekit.routing import trace as tracing
from moekit.worker import scoring

if TYPE_CHECKING:
    import pandas as pd


TOKENS_A_PASS = {"cpu": 4096, "cuda": 65_536}  # how many tokens pay off in one forward pass
STEPS_A_CALL = 8
WARM_SHAPES = 4  # that a GPU is warmed up for; texts may have hundreds


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`Model.evaluate` found.

    Attributes:
        loss_base2: mean negative log-probability a token, in bits.
        perplexity: ``2 ** loss_base2``.
        ntokens: tokens scored.
        seconds: scoring alone, without loading and, on GPUs, without :meth:`Model.warm_up`.
        tokens_per_second: ``ntokens / seconds``.
        tokens: a row a token, sorted by sample and position: ``sample_id``, ``position`` (in the sample, from 0),
            ``token`` (dictionary id), ``logprob`` (natural log, float32).
        trace: what the router did, a :class:`moekit.routing.trace.Trace`, if it was asked for.
    """

    loss_base2: float
    perplexity: float
    ntokens: int
    seconds: float
    tokens_per_second: float
    tokens: pd.DataFrame
    trace: tracing.Trace | None = None


def warm_up(
    model: Handle, batches: Sequence[Batch], fraction: float | None, vocab: int, progress: bool = True
) -> None:
    """On GPUs, score a step of each shape and forget it, unless one like it has been: a first pass compiles kernels,
    which later processes find on the disk, and connects ranks, and its seconds tell nothing of the work.
    """
    if model.device != "cuda":
        return
    fresh = {}
    for step in plan_steps(batches, model.world_size, TOKENS_A_PASS[model.device]):
        like = (len(step), step[0].tokens.shape, step[0].padded(), fraction is None, vocab)
        if like not in model.warm and len(fresh) < WARM_SHAPES:
            fresh.setdefault(like, step)
    if fresh:
        with progress_bar("warming up", len(fresh), " passes", show=progress, delay=1.0) as bar:
            for step in fresh.values():
                model.ranks.call(scoring.score, [step], fraction=fraction, vocab=vocab, seed=0)
                bar.update(1)
        model.warm |= fresh.keys()


def score_batches(
    model: Handle,
    batches: Sequence[Batch],
    *,
    fraction: float | None,
    vocab: int,
    seed: int,
    progress: bool,
    trace: tracing.Collector | None = None,
) -> dict:
    """Score batches on all ranks: batch index -> float32 [B, T] log-probabilities of its targets."""
    import_whole("pandas")  # what comes of the scores needs it
    real = [(b.ids.tolist(), (b.tokens != PAD).sum(axis=1).tolist()) for b in batches]
    lengths = {sample: n for ids, tokens in real for sample, n in zip(ids, tokens, strict=True)}
    if model.intervention is not None:
        model.intervention.check(lengths)
    longest = max(lengths.values(), default=0)
    if model.config.learned_positions and longest > model.config.max_positions:
        raise ValueError(
            f"a sample has {longest} tokens, <s> and context included, and the model "
            f"{model.config.max_positions} learned positions: cut the data into shorter ones"
        )
    scores = {}
    targets = sum(int((b.targets != PAD).sum()) for b in batches)
    with progress_bar("scoring", targets, " tokens", show=progress) as bar:
        steps = plan_steps(batches, model.world_size, TOKENS_A_PASS[model.device])
        while some := list(itertools.islice(steps, STEPS_A_CALL)):
            found = model.ranks.call(
                scoring.score,
                some,
                fraction=fraction,
                vocab=vocab,
                seed=seed,
                trace=None if trace is None else trace.options,
                intervention=model.intervention,
                on_report=lambda rank, tokens: bar.update(tokens),
            )
            for pairs, parts in found:
                scores.update(pairs)
                if trace is not None:
                    trace.add(parts)
    return scores


def plan_steps(batches: Iterable[Batch], world_size: int, tokens: int) -> Iterator[list[Batch]]:
    """Pack batches into steps of up to about ``tokens`` tokens a rank; batches of a step are of one shape.

    A step's batches go to the ranks in turn, each rank taking its own in one forward pass.
    """
    shapes: dict[tuple, list[Batch]] = {}
    for batch in batches:
        shapes.setdefault((batch.tokens.shape, batch.padded()), []).append(batch)
    for alike in shapes.values():
        size = world_size * max(1, tokens // alike[0].tokens.size)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def summarize(batches: Sequence[Batch], scores: dict, seconds: float, skip_first: bool) -> Evaluation:
    """Put scored batches into fairseq's figures (``eval_lm`` in fairseq_cli/eval_lm.py).

    Args:
        skip_first: the first target of each sample is the begin-of-sentence symbol, which does not count.
    """
    import numpy as np
    import pandas as pd

    parts: dict[str, list] = {"sample_id": [], "position": [], "token": [], "logprob": []}
    for batch in batches:
        for row, sample in enumerate(batch.ids):
            real = batch.scored(row)
            token, logprob = (
                batch.targets[row][real][skip_first:],
                scores[batch.index][row][real][skip_first:],
            )
            parts["sample_id"].append(np.full(len(token), sample))
            parts["position"].append(np.arange(skip_first, skip_first + len(token)))
            parts["token"].append(token)
            parts["logprob"].append(logprob)
    if not any(len(part) for part in parts["token"]):
        raise ValueError("the data has no tokens to score")
    tokens = pd.DataFrame({name: np.concatenate(part) for name, part in parts.items()})
    tokens = tokens.sort_values(["sample_id", "position"], kind="stable", ignore_index=True)
    loss = -tokens["logprob"].to_numpy(np.float64).mean() / math.log(2)
    return Evaluation(float(loss), float(2**loss), len(tokens), seconds, len(tokens) / seconds, tokens)
