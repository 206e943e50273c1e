"""What experts are used for: types of tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import (
    broadcast_table,
    chosen_experts,
    made,
    table_of_rows,
    tokens_by,
)
from moekit.routing.statistics import SEED, normal, share
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


@measured
def vocabulary_specialisation(
    trace: Trace, by: str = "input", *, choice: int = 0, per_expert: bool = False, min_count: int = 10
) -> pd.DataFrame:
    """How far a token's type decides its expert.

    For a type x with N(x) >= ``min_count`` tokens, s(x) = max over e of N(x, e) / N(x). ``value`` = mean of s over types
    (OLMoE, Muennighoff et al. 2024, arXiv 2409.02060, section 5.4, counts every type, however rare: that pulls it towards
    1). With ``per_expert`` the mean is over the types that the expert is the most frequent choice of. ``chance``: the
    same types with uniform random choices, simulated. Interval: normal, over types.

    Args:
        by: the type is that of the "input", the "target" or the "predicted" token.
        choice: which of the K choices, 0 the first.

    Returns:
        One row per layer, or a (layer, expert) that has types: ``layer``, [``expert``,] ``types``, ``value``, ``low``,
        ``high``, ``chance``.
    """
    token, rows_of = tokens_by(trace, by)
    experts = trace.num_experts
    rng = np.random.default_rng(SEED)
    _, random = _favourites(token, rng.integers(0, experts, len(token)), experts, min_count)
    chance = random.mean() if len(random) else math.nan
    rows = []
    for layer_index, layer in enumerate(trace.layers):
        favourite, share = _favourites(token, trace.experts[rows_of, layer_index, choice], experts, min_count)
        if per_expert:
            number = np.bincount(favourite, minlength=experts)
            total = np.bincount(favourite, share, minlength=experts)
            squares = np.bincount(favourite, share**2, minlength=experts)
            for e in np.flatnonzero(number):
                rows.append((layer, e, number[e], *normal(number[e], total[e], squares[e]), chance))
        else:
            rows.append((layer, len(share), *normal(len(share), share.sum(), (share**2).sum()), chance))
    return table_of_rows(rows, f"layer {'expert ' if per_expert else ''}types value low high chance")


def _favourites(
    token: np.ndarray, chosen: np.ndarray, experts: int, min_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """For every type with enough tokens: the expert chosen most (the lowest of several) and its share."""
    pair, count = np.unique(token * experts + chosen, return_counts=True)
    if not len(pair):
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    starts = np.flatnonzero(np.diff(pair // experts, prepend=-1))
    total = np.add.reduceat(count, starts)
    best = np.maximum.reduceat(count, starts)
    run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(pair)))
    hits = np.flatnonzero(count == best[run])
    favourite = pair[hits[np.unique(run[hits], return_index=True)[1]]] % experts
    enough = total >= min_count
    return favourite[enough], (best / total)[enough]


@measured
def top_tokens(
    trace: Trace,
    layer: int,
    expert: int,
    n: int = 20,
    by: str = "input",
    *,
    choice: int | None = None,
    min_count: int = 5,
) -> pd.DataFrame:
    """The types that go to an expert most exclusively: by ``value`` = N(x, e) / N(x), then by N(x, e).

    After OLMoE's tables of top tokens (arXiv 2409.02060, section 5.4). ``chance`` = K/E, or 1/E for one ``choice``.
    Wilson's interval.

    Args:
        by: "input", "target" or "predicted" token.
        min_count: types with fewer tokens in the trace do not count.

    Returns:
        At most ``n`` rows: ``token``, ``count`` (N(x, e)), ``total`` (N(x)), ``value``, ``low``, ``high``, ``chance``.
    """
    layer_index = trace.at(layer)
    if expert >= trace.num_experts:
        raise ValueError(f"there is no expert {expert}; expected one from 0 to {trace.num_experts - 1}")
    token, rows_of = tokens_by(trace, by)
    chosen = (chosen_experts(trace, layer_index, choice, False)[rows_of] == expert).any(axis=1)
    size = int(token.max(initial=0)) + 1
    total, count = np.bincount(token, minlength=size), np.bincount(token[chosen], minlength=size)
    types = np.flatnonzero((total >= min_count) & (count > 0))
    value = count[types] / total[types]
    types = types[np.lexsort((types, -count[types], -value))][:n]
    return broadcast_table(
        {"token": types, "count": count[types], "total": total[types]},
        share(count[types], total[types]),
        chance=made(trace, choice) / trace.num_experts,
    )
