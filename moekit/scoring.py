"""Scoring of batches on all ranks, and its results; the methods of a model that score call these functions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.arguments import Flag, check, first_few
from moekit.batches import Batch, lengths_of, shares
from moekit.handle import Handle
from moekit.interrupts import import_whole
from moekit.nn.memory import TOKENS_A_PASS
from moekit.nn.quantise import dtype_name
from moekit.progress import bar as progress_bar
from moekit.ranks import Each, Stream
from moekit.routing import trace as tracing
from moekit.symbols import PAD
from moekit.worker import scoring

if TYPE_CHECKING:
    import pandas as pd


# The most shapes that a GPU is warmed up for; the texts of a run may have hundreds of shapes.
WARM_SHAPES = 4


@dataclass(frozen=True)
class Evaluation:
    """The result of :meth:`moekit.api.Model.evaluate`.

    Attributes:
        loss_base2: mean negative log-probability per token, in bits.
        perplexity: ``2 ** loss_base2``.
        ntokens: the number of scored tokens.
        seconds: the time of scoring, without loading and, on GPUs, without :func:`warm_up`.
        tokens_per_second: ``ntokens / seconds``.
        tokens: one row per token, sorted by sample and position: ``sample``, ``position`` (in the sample, from
            0), ``token`` (dictionary id of the input), ``target`` (dictionary id of the next token, which is predicted),
            ``logprob`` (of the target, natural log, float32). A trace has the same columns.
        trace: the routing, a :class:`moekit.routing.trace.Trace`; None if no trace was requested.
    """

    loss_base2: float
    perplexity: float
    ntokens: int
    seconds: float
    tokens_per_second: float
    tokens: pd.DataFrame
    trace: tracing.Trace | None = None

    def __repr__(self) -> str:
        return (
            f"<evaluation of {self.ntokens:,} tokens: {self.loss_base2:.4f} bits a token, perplexity {self.perplexity:.2f}, "
            f"{self.tokens_per_second:,.0f} tokens a second>"
        )


def warm_up(
    model: Handle, batches: Sequence[Batch], fraction: float | None, vocab: int, progress: bool = True
) -> None:
    """On GPUs, score a step of each new shape and discard the result.

    A first pass compiles kernels, which later processes find on the disk, and connects the ranks. Its time would distort
    the time of scoring.
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
                alone = Stream([Each(shares(step, model.world_size))])
                model.ranks.call(scoring.score, alone, fraction=fraction, vocab=vocab, seed=0)
                bar.update(1)
        model.warm |= fresh.keys()


def not_finite(model: Handle, batches: Sequence[Batch], scores: dict, **how: Any) -> str | None:
    """A sentence on log-probabilities that are NaN or infinite: how many, of which samples, and from which layer on.

    None where only values at targets that are ``PAD`` are not finite.

    Args:
        how: the arguments ``fraction``, ``vocab`` and ``seed`` of :func:`score_batches`.
    """
    bad = {b.index: (b.targets != PAD) & ~np.isfinite(scores[b.index]) for b in batches}
    count = sum(int(places.sum()) for places in bad.values())
    if not count:
        return None
    first = next(batch for batch in batches if bad[batch.index].any())
    samples = [int(b.ids[row]) for b in batches for row in np.flatnonzero(bad[b.index].any(axis=1))]
    named = first_few(samples)
    total = sum(int((b.targets != PAD).sum()) for b in batches)
    found = model.ranks.call(scoring.first_not_finite, first, intervention=model.intervention, **how)[0]
    kind = dtype_name(model.dtype)
    if found is None:
        where = "all layers give finite numbers, so the output's log-probabilities overflow"
    elif any(model.ranks.call(scoring.weights_not_finite, found)):
        # An expert's weights lie on one rank alone.
        where = f"the weights of the {found} are not finite already: the checkpoint is damaged, or overflows {kind}"
    else:
        where = f"the {found} is the first whose output is not finite"
    remedy = "; load the model with dtype='bfloat16' or 'float32'" if kind == "float16" else ""
    return f"{count:,} of {total:,} log-probabilities are not finite ({kind}), in samples {named}: {where}{remedy}"


def score_batches(
    model: Handle,
    batches: Sequence[Batch],
    *,
    fraction: float | None,
    vocab: int,
    seed: int,
    progress: bool,
    trace: tracing.Collector | None = None,
    loads: dict[int, tuple[int, np.ndarray, np.ndarray]] | None = None,
    whole: Sequence[Batch] | None = None,
) -> dict:
    """Score batches on all ranks: batch index -> float32 [B, T] log-probabilities of its targets.

    It warns, once per call, of log-probabilities that are not finite.

    Args:
        fraction: the capacity in effect (:meth:`moekit.handle.Handle.capacity`).
        loads: gets, for each batch's index, the choices of the fullest expert of any layer, and [B, T] each how many
            choices of a token asked for a place in a buffer, and how many found none; None counts nothing. Without ``trace``.
        whole: all batches of the user's call, among which an intervention's samples have to be; None: ``batches``.
    """
    # The table of the scores needs pandas.
    import_whole("pandas")
    needed = model.intervention is not None or model.config.learned_positions
    lengths = lengths_of(batches if whole is None else whole) if needed else {}
    if model.intervention is not None:
        model.intervention.check(lengths)
    longest = max(lengths.values(), default=0) if model.config.learned_positions else 0
    if longest > model.config.max_positions:
        raise ValueError(
            f"a sample has {longest} tokens, <s> and context included, and the model "
            f"{model.config.max_positions} learned positions: cut the data into shorter ones"
        )
    scores: dict[int, np.ndarray] = {}
    finite = True
    show = check("progress", progress, Flag())
    targets = {b.index: np.count_nonzero(b.targets != PAD) for b in batches} if show else {}
    with progress_bar("scoring", sum(targets.values()), " tokens", show=show) as bar:

        def take(rank: int, found: scoring.Found) -> None:
            """What a rank has found of a step, while the ranks go on with the next."""
            nonlocal finite
            scores.update(zip(found.indices, found.logprobs, strict=True))
            finite = finite and bool(np.isfinite(found.logprobs).all())
            if trace is not None:
                trace.add(found.parts)
            elif loads is not None:
                for part in found.parts:
                    counts = zip(part["fullest"].tolist(), part["made"], part["dropped"], strict=True)
                    loads.update(zip(part["batch"].tolist(), counts, strict=True))
            bar.update(sum(targets.get(index, 0) for index in found.indices))

        steps = plan_steps(batches, model.world_size, TOKENS_A_PASS[model.device])
        model.ranks.call(
            scoring.score,
            Stream(Each(shares(step, model.world_size), plain=True) for step in steps),
            fraction=fraction,
            vocab=vocab,
            seed=seed,
            trace=None if trace is None else trace.options,
            intervention=model.intervention,
            loads=loads is not None,
            on_report=take,
        )
    how = {"fraction": fraction, "vocab": vocab, "seed": seed}
    if not finite and (said := not_finite(model, batches, scores, **how)):
        warnings.warn(said, RuntimeWarning, stacklevel=3)
    return scores


def plan_steps(batches: Iterable[Batch], world_size: int, tokens: int) -> Iterator[list[Batch]]:
    """Pack batches into steps of up to about ``tokens`` tokens per rank; the batches of a step have one shape.

    The batches of a step go to the ranks in turn, and each rank runs its batches in one forward pass.
    """
    for alike in _by_shape(batches):
        size = world_size * max(1, tokens // alike[0].tokens.size)
        yield from (some for some in _in_kinds(alike, size) if some)


def _by_shape(batches: Iterable[Batch]) -> list[list[Batch]]:
    """The batches of each shape, in the order in which the shapes come."""
    shapes: dict[tuple[int, int], list[Batch]] = {}
    for batch in batches:
        shapes.setdefault(batch.tokens.shape, []).append(batch)
    return list(shapes.values())


def _in_kinds(alike: Sequence[Batch], size: int) -> Iterator[list[Batch]]:
    """Batches of one shape, ``size`` at a time: first those that are as the first one, with padding or without, then the others.

    The ranks wait for the first step, so it is there once as many batches as it has have been looked at.
    """
    first = alike[0].padded()
    ready: list[Batch] = []
    others: list[Batch] = []
    for start in range(0, len(alike), size):
        for batch in alike[start : start + size]:
            (ready if batch.padded() == first else others).append(batch)
        if len(ready) >= size:
            yield ready[:size]
            ready = ready[size:]
    yield ready
    yield from (others[start : start + size] for start in range(0, len(others), size))


def token_table(
    batches: Sequence[Batch],
    columns: Mapping[str, Mapping[int, np.ndarray]],
    *,
    skip_first: bool = False,
    whose: str = "the data",
) -> pd.DataFrame:
    """The scored tokens of batches, as ``Evaluation.tokens`` has them, with these columns in place of ``logprob``.

    Args:
        columns: by their names, the values of each batch by its index, [B, T].
        skip_first: whether the first target of each sample is the begin-of-sentence symbol, which does not count.
        whose: the source of the tokens, which the error names.

    Raises:
        ValueError: there are no tokens.
    """
    import pandas as pd

    parts = [_scored(alike, columns, skip_first) for alike in _by_shape(batches)]
    if not sum(len(part["token"]) for part in parts):
        raise ValueError(f"{whose} has no tokens to score")
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = _in_order(found["sample"], found["position"])
    if order is not None:
        found = {name: values[order] for name, values in found.items()}
    return pd.DataFrame(found, copy=False)


def _scored(
    alike: Sequence[Batch], columns: Mapping[str, Mapping[int, np.ndarray]], skip_first: bool
) -> dict[str, np.ndarray]:
    """The columns of :func:`token_table` for batches of one shape, with the rows of the batches sorted by sample."""
    ids, tokens, targets, starts = (
        np.concatenate([getattr(batch, name) for batch in alike])
        for name in ("ids", "tokens", "targets", "starts")
    )
    by_sample = np.argsort(ids, kind="stable")
    counts = (targets != PAD) & (np.arange(targets.shape[1]) >= starts[:, None])
    if skip_first:
        # Of a sample without any, the first place is none already.
        counts[np.arange(len(counts)), counts.argmax(axis=1)] = False
    row, position = counts[by_sample].nonzero()
    row = by_sample[row]
    found = {
        "sample": ids[row],
        "position": position,
        "token": tokens[row, position],
        "target": targets[row, position],
    }
    for name, values in columns.items():
        found[name] = np.concatenate([values[batch.index] for batch in alike])[row, position]
    return found


def _in_order(sample: np.ndarray, position: np.ndarray) -> np.ndarray | None:
    """The order that sorts tokens by sample and then by position, ties as they are; None if they are sorted."""
    step = np.diff(sample)
    if ((step > 0) | ((step == 0) & (np.diff(position) >= 0))).all():
        return None
    return np.lexsort((position, sample))


def summarize(
    batches: Sequence[Batch], scores: Mapping[int, np.ndarray], seconds: float, skip_first: bool, whose: str
) -> Evaluation:
    """Summarize scored batches as fairseq does (``eval_lm`` in fairseq_cli/eval_lm.py).

    Args:
        scores: the log-probabilities of each batch by its index, [B, T]; the other arguments are those of :func:`token_table`.
    """
    tokens = token_table(batches, {"logprob": scores}, skip_first=skip_first, whose=whose)
    loss = float(-tokens["logprob"].to_numpy(np.float64).mean() / math.log(2))
    return Evaluation(loss, perplexity_of(loss), len(tokens), seconds, len(tokens) / seconds, tokens)


def perplexity_of(bits: float) -> float:
    """The perplexity of so many bits a token; infinity where a float64 has no number for it."""
    return math.inf if bits >= 1024 else 2**bits
