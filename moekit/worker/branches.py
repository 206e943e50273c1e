"""Scoring of texts that share their beginnings: a rank reads a shared beginning once, and then what follows it.

Shape letters: P beginnings, S tokens of the longest one, B texts, T tokens of the longest rest, N scored tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit.nn.cache import Cache, slots_for
from moekit.nn.copies import Copy, on_device
from moekit.nn.gates import interacts
from moekit.nn.intervene import Intervention
from moekit.nn.logprobs import LOGIT_ROWS
from moekit.nn.noise import Noise
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer
from moekit.ranks import Rank
from moekit.symbols import PAD
from moekit.worker.scoring import GRAPH, collected
from moekit.worker.sequences import SPARE


@dataclass(frozen=True)
class Branches:
    """The texts of one rank in a step.

    Attributes:
        samples: [B], the numbers of the texts.
        tokens: [B, T] int32, what is read after the beginning, padded on the right with ``PAD``.
        targets: [B, T] int32, the tokens to score, each where it is predicted; ``PAD`` elsewhere.
        beginnings: [P, S] int32, padded on the right; None where no text shares one.
        lengths: [P], the tokens of each beginning.
        parents: [B], the beginning of each text.
    """

    samples: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    beginnings: np.ndarray | None = None
    lengths: np.ndarray | None = None
    parents: np.ndarray | None = None


@dataclass(frozen=True)
class Part:
    """What a rank is sent of a step: its own texts, and what the ranks have to agree on.

    Attributes:
        mine: None for a rank without texts.
        beginnings, rows: the most tokens that any rank has in the pass over the beginnings and in the pass over the rest;
            ``beginnings`` is 0 where no text of the step shares one.
    """

    mine: Branches | None
    beginnings: int
    rows: int


class Found(NamedTuple):
    """The scores of a rank's texts in a step.

    Attributes:
        samples: [B] int64, the numbers of the texts.
        logprobs: [N] float32 log-probabilities of their targets, text by text.
        best: [N] bool, whether the target is the most probable token.
    """

    samples: np.ndarray
    logprobs: np.ndarray
    best: np.ndarray


def parts_of(step: Sequence[Branches | None]) -> list[Part]:
    """The parts of a step, one for each rank."""
    there = [branches for branches in step if branches is not None]
    beginnings = max(0 if one.beginnings is None else one.beginnings.size for one in there)
    rows = max(one.tokens.size for one in there)
    return [Part(mine, beginnings, rows) for mine in step]


@torch.inference_mode()
def score_branches(rank: Rank, steps: Iterable[Part], **how: Any) -> None:
    """Log-probabilities of the targets of this rank's part of every step; it reports a :class:`Found` for each of them.

    Args:
        how: the arguments of :func:`_launched`.
    """
    for found in collected(rank, _launched(rank, steps, **how)):
        rank.report(found)


def _launched(
    rank: Rank,
    steps: Iterable[Part],
    *,
    fraction: float | None,
    vocab: int,
    seed: int,
    intervention: Intervention | None,
) -> Iterator[Callable[[], Found]]:
    """Launches this rank's part of each step, and gives what collects it.

    Args:
        steps: this rank's parts, which arrive while it works; every rank has the same number of them.
        fraction: the capacity. Each text is a routing group, so with a capacity the texts of a step have one length and
            share no beginning.
    """
    model: Transformer = rank.state["model"]
    # These large passes may need the memory of a graph.
    for key in (GRAPH, SPARE):
        rank.state.pop(key, None)
    alone = interacts(model.config, fraction)
    expects = model.dispatch.by_expectation
    for step in steps:
        mine, cache = step.mine, None
        if step.beginnings:
            rows = step.beginnings if expects else None
            if mine is None:
                model.serve(rows)
            else:
                cache = read_beginnings(model, mine, rows, intervention, rank.device)
        rows = step.rows if expects else None
        if mine is None:
            model.serve(rows)
            continue
        tokens, targets = on_device(rank.device, mine.tokens, mine.targets)
        asked = Pass(fraction, cache=cache, padded=True, rows_expected=rows)
        if alone:
            asked.groups, asked.noise = len(tokens), Noise(seed, mine.samples.tolist())
        _edit(asked, intervention, mine.samples, cache, tokens)
        features = model(tokens, asked)
        real = targets != PAD
        logprobs, best = _scores(model, features[real], targets[real], vocab)
        yield functools.partial(_on_host, mine.samples, Copy(logprobs), Copy(best))


def _on_host(samples: np.ndarray, logprobs: Copy, best: Copy) -> Found:
    return Found(samples, logprobs.array(), best.array())


def read_beginnings(
    model: Transformer,
    part: Branches,
    rows_expected: int | None,
    intervention: Intervention | None,
    device: torch.device,
) -> Cache:
    """A cache [B, ...] in which each text has read its beginning."""
    count, longest = part.beginnings.shape
    slots = slots_for(longest + part.tokens.shape[1])
    cache = Cache(model.config, count, slots, device, model.embed.weight.dtype)
    tokens, lengths, parents = on_device(device, part.beginnings, part.lengths, part.parents)
    asked = Pass(cache=cache, rows_expected=rows_expected)
    _edit(asked, intervention, np.full(count, -1), cache, tokens)
    model(tokens, asked)
    cache.advance(lengths)
    cache.select(parents)
    return cache


def _edit(
    asked: Pass, intervention: Intervention | None, samples: np.ndarray, cache: Cache | None, tokens: Tensor
) -> None:
    if intervention is not None:
        length = tokens.shape[1]
        positions = (
            torch.arange(length, device=tokens.device) if cache is None else cache.positions(length).clone()
        )
        intervention.apply(asked, torch.from_numpy(samples).to(tokens.device), positions)


def _scores(model: Transformer, features: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """[N, D] features and [N] targets -> [N] log-probabilities, and whether each target is the most probable token."""
    logprobs, best = [], []
    size = LOGIT_ROWS[features.device.type]
    for rows, wanted in zip(features.split(size), targets.split(size), strict=True):
        logits = model.logits(rows, vocab)
        logprobs.append(model.operations.target_log_probs(logits, wanted))
        # Generation never chooses padding.
        logits[:, PAD] = -torch.inf
        best.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(logprobs), torch.cat(best)
