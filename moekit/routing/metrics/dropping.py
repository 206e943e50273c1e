"""What a full buffer drops, and what the same capacity would drop of uniform random choices."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Choice, Whole, check
from moekit.checked import checked
from moekit.routing.metrics.registry import METRICS, measured
from moekit.routing.metrics.tables import broadcast_table, layers_of
from moekit.routing.statistics import share_of_units, units
from moekit.routing.trace import TRACE, Trace, first_alone

if TYPE_CHECKING:
    import pandas as pd

# The probability is smooth in a token's place, so it is computed at this many places and interpolated.
GRID = 1000


@measured
def drops(trace: Trace, by: str = "layer", *, bins: int = 64) -> pd.DataFrame:
    """The share of choices that the capacity dropped: ``value`` = dropped / made (:func:`made_and_dropped`).

    fairseq logs it as ``overflow_expert1`` and ``overflow_expert2`` in percent (top2gate.py). Where the gate draws second
    choices ("random") and there is a capacity, a trace does not tell whether one was not drawn, which fairseq leaves out, or
    found no place: both count as dropped.

    ``chance``: what the same capacity drops of uniform random choices; NaN where the trace's meta does not tell the
    capacity, or for K > 2. A buffer has C places and a group S tokens (padding included). First choices in place q of
    the group are dropped when Bin(q, 1/E) >= C, second ones when Bin(q, 2/E) + Bin(S - 1 - q, 1/E) >= C: all
    first choices queue before any second. With batch-prioritised routing, a padding mask or second choices that are drawn this
    is only a rough guide. Interval: bootstrap over units.

    Args:
        by: "layer", "choice", "position" (in the sample) or "expert".
        bins: the most bins, all of one width, that positions are put into; ``position`` is a bin's first.

    Returns:
        One row per (layer, ``by``): ``layer``, ``by``'s own column, ``choices``, ``dropped``, ``value``, ``low``, ``high``,
        ``units``, ``chance``.
    """
    check("by", by, Choice(("layer", "choice", "position", "expert")))
    k, experts, depth = trace.top_k, trace.num_experts, len(trace.layers)
    width = max(1, math.ceil((int(trace.position.max()) + 1) / bins))
    shape = (len(trace), k)
    if by == "layer":
        size, key = 1, np.zeros(shape, dtype=np.int64)
    elif by == "choice":
        size, key = k, np.broadcast_to(np.arange(k), shape)
    elif by == "position":
        size = int(trace.position.max()) // width + 1
        key = np.broadcast_to((trace.position // width)[:, None], shape)
    else:
        size, key = experts, None

    again, (asked, lost) = units(trace), made_and_dropped(trace)
    made = np.zeros((depth, again.number, size), dtype=np.int64)
    dropped = np.zeros((depth, again.number, size), dtype=np.int64)
    for layer_index in range(depth):
        cell = trace.experts[:, layer_index].astype(np.int64) if key is None else key
        cell = again.unit[:, None] * size + cell
        for table, which in ((made, asked), (dropped, lost)):
            some = cell[which[:, layer_index]]
            table[layer_index] = np.bincount(some, minlength=again.number * size).reshape(-1, size)
    parts = [share_of_units(*pair, again) for pair in zip(dropped, made, strict=True)]
    found = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    made, dropped = made.sum(axis=1), dropped.sum(axis=1)

    chance = drop_chance(trace)
    if chance is None:
        expected = np.full(size, np.nan)
    elif by == "choice":
        expected = chance[trace.position].mean(axis=0)
    elif by == "position":
        per_token = np.nanmean(chance, axis=1)[trace.position]
        expected = np.bincount(trace.position // width, per_token, minlength=size)
        with np.errstate(invalid="ignore"):
            expected = expected / np.bincount(trace.position // width, minlength=size)
    else:
        expected = np.full(size, np.nanmean(chance[trace.position]))
    columns = {"layer": layers_of(trace)[:, None]}
    if by != "layer":
        columns[by] = np.arange(size)[None] * (width if by == "position" else 1)
    frame = broadcast_table(columns | {"choices": made, "dropped": dropped}, found, expected)
    return frame[frame["choices"] > 0].reset_index(drop=True) if by == "position" else frame


@checked(trace=TRACE)
def made_and_dropped(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """[T, L, K] bool each: the choices that asked for a place in their expert's buffer, and those of them that found none.

    Without a capacity none is dropped: what was not dispatched was left out by the gate or an experiment, and asked for nothing.
    The new tokens of generated text are read without one. With a capacity, a trace tells of a choice that an experiment left out,
    and not of one that the gate did not draw.
    """
    made = np.ones_like(trace.kept)
    made[:, :, _first_choices(trace) :] = False
    made = np.where(_limited(trace)[:, None, None], made, trace.kept)
    return made, made & ~trace.kept


@checked(trace=TRACE)
def drops_name(trace: Trace) -> str:
    """What the choices are that :func:`made_and_dropped` gives as dropped, in words: some may be choices that were not drawn.

    Traces of before the meta had ``second_expert`` do not tell.
    """
    drawn = trace.meta.get("second_expert") == "random" and _first_choices(trace) > 1
    return "dropped, or not drawn" if drawn and _limited(trace).any() else "dropped"


def _limited(trace: Trace) -> np.ndarray:
    """[T] bool, the tokens that were read with a capacity; where the meta does not tell, all that were not generated."""
    return ~trace.generated & (trace.meta.get("capacity_token_fraction", ...) is not None)


def _first_choices(trace: Trace) -> int:
    """How many choices of a token may ask for a place: all, or the first one alone in an experiment with ``drop_second``."""
    return 1 if first_alone(trace) else trace.top_k


@checked(trace=TRACE)
def drop_chance(trace: Trace) -> np.ndarray | None:
    """The probability that a choice is dropped under uniform random routing, by position in the sample.

    The trace's routing groups may have several shapes (samples x tokens). A position's probability is the mean over all
    samples that have this position, so every shape counts with its number of samples.

    Returns:
        [P, K] float64, P the largest position of the trace plus one; NaN of second choices that an experiment leaves out. None
        where the trace's meta tells no capacity or no groups, or for K > 2.
    """
    from moekit.nn.gate import capacity

    groups, k = trace.meta.get("groups"), trace.top_k
    if not groups or "capacity_token_fraction" not in trace.meta or k > 2:
        return None
    fraction = trace.meta["capacity_token_fraction"]
    last = int(trace.position.max()) + 1
    total, weight = np.zeros((last, k)), np.zeros((last, 1))
    for samples, tokens, number in groups:
        room = capacity(samples * tokens, fraction, k, trace.num_experts)
        queue = drop_probability(samples * tokens, trace.num_experts, k, room).reshape(samples, tokens, k)
        upto = min(last, tokens)
        total[:upto] += number * queue[:, :upto].sum(axis=0)
        weight[:upto] += number * samples
    total[:, _first_choices(trace) :] = np.nan
    return total / np.maximum(weight, 1)


@checked(tokens=Whole(), experts=Whole(), k=Whole(most=2), room=Whole(0, optional=True))
def drop_probability(tokens: int, experts: int, k: int, room: int | None) -> np.ndarray:
    """The probability under uniform random routing that the choices of each token of a group are dropped.

    Args:
        tokens: S, of the routing group, padding included.
        room: C, places in an expert's buffer; None drops nothing.

    Returns:
        [S, K] float64, K 1 or 2; the formula stands at :func:`drops`.
    """
    from scipy.stats import binom

    if room is None:
        return np.zeros((tokens, k))
    grid = np.unique(np.linspace(0, tokens - 1, min(tokens, GRID)).round().astype(int))
    found = [binom.sf(room - 1, grid, 1 / experts)]
    if k > 1:
        # Choices of earlier tokens for the same expert: with ``room`` of them or more the buffer is full in any case.
        ahead = np.arange(room)
        earlier = binom.pmf(ahead, grid[:, None], min(1.0, 2 / experts))
        later = binom.sf(room - 1 - ahead, tokens - 1 - grid[:, None], 1 / experts)
        full = binom.sf(room - 1, grid, min(1.0, 2 / experts))
        found.append(full + (earlier * later).sum(axis=1))
    return np.stack([np.interp(np.arange(tokens), grid, f) for f in found], axis=1)


for _by in ("choice", "position", "expert"):
    METRICS[f"drops by {_by}"] = functools.partial(drops, by=_by)
