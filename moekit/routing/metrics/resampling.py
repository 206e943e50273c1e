"""Intervals of any metric over whole units, and tests of labels by permuting them over units."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.arguments import Choice, Whole, check, shown
from moekit.routing import statistics
from moekit.routing.metrics.registry import METRICS, lasting, measured, names_of, of_tokens
from moekit.routing.metrics.tables import block_counts, broadcast_table, chosen_experts, labels_of, layers_of
from moekit.routing.pairs import units_in
from moekit.routing.statistics import BLOCK, FEW, SEED, entropy_bits
from moekit.routing.trace import ARRAYS, Trace

if TYPE_CHECKING:
    import pandas as pd

By = str | Sequence | np.ndarray
# the columns that name a table's rows; any other one holds what was measured
KEYS = "layer to_layer expert partner domain group statistic of policy size choice position token".split()
STATISTICS = ("lift", "difference", "information")
# how often a test may mark something where nothing is there
LEVEL = 0.05
# A test that marks less than this part of what its level promises has too few units: 4 % of 5 %.
ATTAINED = 0.8
# numbers of an array that the permutations make at once
CHUNK = 4_000_000


@measured
def bootstrap(
    trace: Trace,
    metric: str | Callable[..., pd.DataFrame],
    *args: Any,
    by: By = "sample",
    size: int = BLOCK,
    resamples: int = 1000,
    seed: int = SEED,
    **options: Any,
) -> pd.DataFrame:
    """A metric's table with 95 % bootstrap intervals over units that are drawn whole.

        metrics.bootstrap(trace, "balance")
        metrics.bootstrap(trace, metrics.domain_specialisation, labels, by="block", size=4)

    Args:
        metric: one of the metrics, its name, or a function of a trace that returns a table with ``value``.
        args, options: the metric's own. What has an item for each token is drawn with the tokens, in lists and dicts, too. Other
            traces of the same text are drawn sample by sample, as ``sample`` numbers them: they may have more tokens, or
            fewer. Their samples that the first trace lacks stay, and so do traces of other text.
        by: "sample"; "block": ``size`` neighbouring samples, for documents that lie across samples; or [T] units.
        resamples: of the units. Metrics that count draw counts, 1,000 resamples in seconds; others are computed for each
            resample again.

    Returns:
        The metric's table, with ``low``, ``high`` (:func:`moekit.routing.statistics.interval`), ``units`` and ``note``, where
        ``low`` and ``high`` are NaN: "too few" where fewer units tell something than the statistic needs (``FEW`` and
        ``FEW_FOR_SPREAD`` of :mod:`moekit.routing.statistics`), "does not vary" where all resamples give the value itself.

    Raises:
        ValueError: no such metric, it returns no table with ``value``, or a resample holds no token of another trace.
    """
    chosen = METRICS.get(metric) if isinstance(metric, str) else metric
    if not callable(chosen):
        raise ValueError(f"metric={shown(metric)}: expected a function or one of {', '.join(METRICS)}")
    by, args, options = lasting(by), lasting(args), lasting(options)
    plan = statistics.Plan(by, size, resamples, seed)
    with statistics.resampling(plan):
        frame = chosen(trace, *args, **options)
        if not hasattr(frame, "columns") or "value" not in frame:
            raise ValueError(f"{getattr(chosen, '__name__', chosen)} returns no table with the column value")
        # A function of the user's may keep the value of a metric and drop its interval.
        counted = plan.used and {"low", "high"} <= set(frame.columns)
        found = None if counted else statistics.units(trace)
    thin = plan.thin
    if found is not None:
        frame, known = _redrawn_interval(trace, chosen, args, options, frame, found)
        thin = ~known
    elif "units" in frame:
        thin = frame["units"] < plan.few
    if "units" not in frame:
        unit = statistics.unit_of(trace, by, size)
        frame = frame.assign(units=float(min(int(unit.max()) + 1, statistics.BLOCKS)))
    few = (frame["units"] < FEW) | (frame["low"].isna() & (thin | frame["value"].isna()))
    return frame.assign(note=np.where(few, "too few", np.where(frame["low"].isna(), "does not vary", "")))


def _redrawn_interval(
    trace: Trace,
    metric: Callable[..., pd.DataFrame],
    args: tuple,
    options: dict[str, Any],
    frame: pd.DataFrame,
    found: statistics.Units,
) -> tuple[pd.DataFrame, np.ndarray]:
    """The interval of a metric that is computed for each resample again, and the rows that all resamples have."""
    keys = [name for name in KEYS if name in frame.columns]
    index = frame.set_index(keys).index if keys else frame.index
    if index.has_duplicates:
        raise ValueError(
            f"the metric's rows are not told apart by {keys}; expected columns among {', '.join(KEYS)}"
        )
    again, names = np.full((len(found.draws), len(frame)), np.nan), names_of(metric, args)
    rows_of = functools.cache(functools.partial(_rows_of_units, one=trace, found=found))
    for number, draw in enumerate(found.draws.astype(int)):
        units = np.repeat(np.arange(found.number), draw)
        rows, copies = _copies(trace, rows_of(trace), units)
        samples = np.unique(copies)

        def drawn(other: Trace, units: np.ndarray = units, samples: np.ndarray = samples) -> Trace:
            if (pieces := rows_of(other)) is None:
                return other
            own, copies = _copies(other, pieces, units)
            # A metric that reads all of the other trace would have another value without these.
            rest = pieces[-1]
            if not len(own):
                raise ValueError(
                    f"a resample holds no token of a trace with tokens in {sum(len(piece) > 0 for piece in pieces[:-1])} of "
                    f"{found.number} units; expected tokens in more of them: select(samples=...) of the first trace what both have"
                )
            sample = np.searchsorted(samples, copies)
            added = len(samples) + np.unique(other.sample[rest], return_inverse=True)[1]
            return _at(other, np.concatenate([own, rest]), np.concatenate([sample, added]).astype(np.int32))

        own_args = [
            of_tokens(name, value, rows, len(trace), drawn) for name, value in zip(names, args, strict=True)
        ]
        own = {name: of_tokens(name, value, rows, len(trace), drawn) for name, value in options.items()}
        one = metric(drawn(trace), *own_args, **own)
        again[number] = one.set_index(keys)["value"].reindex(index) if keys else one["value"]
    value = frame["value"].to_numpy(float)
    known = ~np.isnan(again).any(axis=0)
    low, high = statistics.interval(np.nan_to_num(again), np.nan_to_num(value), found.number)
    return frame.assign(low=np.where(known, low, np.nan), high=np.where(known, high, np.nan)), known


def _rows_of_units(other: Trace, one: Trace, found: statistics.Units) -> list[np.ndarray] | None:
    """The rows of each unit of ``one`` in ``other``, and, at the end, those of no unit; None for a trace of other text."""
    unit = found.unit if other is one else units_in(other, one, found.unit)
    if unit is None:
        return None
    unit = np.where(unit < 0, found.number, unit)
    ends = np.cumsum(np.bincount(unit, minlength=found.number + 1))
    return np.split(np.argsort(unit, kind="stable"), ends[:-1])


def _copies(trace: Trace, rows_of: list[np.ndarray], units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of these ``units``, and a number for each copy of a sample, as each is a sample of its own."""
    pieces = [rows_of[unit] for unit in units]
    rows = np.concatenate(pieces)
    copy = np.repeat(np.arange(len(units)), [len(piece) for piece in pieces])
    return rows, copy << 32 | trace.sample[rows]


def _at(trace: Trace, rows: np.ndarray, sample: np.ndarray) -> Trace:
    """The tokens of these ``rows``, in samples with other numbers."""
    some = {name: getattr(trace, name)[rows] for name in ARRAYS} | {"sample": sample}
    full = {layer: probs[rows] for layer, probs in trace.full.items()}
    labels = {name: given[rows] for name, given in trace.labels.items()}
    return dataclasses.replace(trace, **some, full=full, labels=labels)


@measured
def permutation(
    trace: Trace,
    groups: Sequence[str] | np.ndarray,
    *,
    statistic: str = "lift",
    choice: int | None = None,
    dispatched: bool = False,
    by: By = "sample",
    size: int = BLOCK,
    draws: int = 2000,
    seed: int = SEED,
    level: float = LEVEL,
) -> pd.DataFrame:
    """Which (expert, domain) pairs are more than chance: a permutation test of the labels over whole units.

    If labels told nothing of the routing, they could be exchanged between units. ``draws`` times they are, and the largest
    statistic of all pairs of a layer is noted. ``p`` = (1 + how many of these reach the pair's own) / (1 + draws): the
    probability that any pair of the layer comes so far by chance (Westfall and Young 1993, single-step maxT; Phipson and
    Smyth 2010 for the 1). So at most ``level`` of all layers without any structure mark a pair.

    Units have to be exchangeable. Where a document lies across samples, ``by`` has to keep it whole.

    Args:
        groups: [T] labels. A unit with several is as many units, each with its own label.
        statistic: "lift": N(e, d) / N(d) over the expert's share of all tokens; "difference": minus it, which weighs busy
            experts more; "information": I(expert; domain) of the layer, one row a layer.
        choice: only this one (0: first).

    Returns:
        One row per (layer, domain, expert), or per layer: ``layer``, [``domain``, ``expert``,] ``value`` (the statistic), ``p``,
        ``survives`` (p <= level), ``units`` (with this label), ``note``: "too few" where the units are so few that arrangements
        tie and the test would mark less than four fifths of what ``level`` promises, and ``survives`` is False. Whether they
        are depends on all arrangements alike, not on the one that was found, so it does not change the level of the others.

    Raises:
        ValueError: no p could come down to ``level`` with so few ``draws``, or an argument is something else.
    """
    check("statistic", statistic, Choice(STATISTICS))
    draws = check("draws", draws, Whole(least_draws(level)))
    names, label = labels_of(trace, groups)
    domains, experts = len(names), trace.num_experts
    piece, cell = np.unique(statistics.unit_of(trace, by, size) * domains + label, return_inverse=True)
    label = piece % domains
    weight = np.bincount(cell).astype(float)
    cells = np.concatenate(
        [
            block_counts(cell, chosen_experts(trace, layer_index, choice, dispatched), experts, len(piece))
            for layer_index in range(len(trace.layers))
        ],
        axis=1,
    )
    shape = (domains, len(trace.layers), experts)
    whole = cells.sum(axis=0).reshape(shape[1:])

    def measure(labels: np.ndarray) -> np.ndarray:
        """Labels [R, P] of the pieces -> [R, D, L, E], or [R, L] of "information"."""
        one_hot = (labels[:, None] == np.arange(domains)[:, None]).astype(float)
        count = (one_hot.reshape(-1, len(piece)) @ cells).reshape(len(labels), *shape)
        if statistic == "information":
            p = np.moveaxis(count, 2, 1) / whole.sum(axis=1)[:, None, None]
            flat = p.reshape(*p.shape[:2], -1)
            return entropy_bits(p.sum(axis=3)) + entropy_bits(p.sum(axis=2)) - entropy_bits(flat)
        share = count / np.maximum(one_hot @ weight, 1e-30)[..., None, None]
        load = whole / weight.sum()
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num(share / load) if statistic == "lift" else share - load

    def largest_of(values: np.ndarray) -> np.ndarray:
        """The largest statistic of each layer: [R, D, L, E], or [R, L] of "information" -> [R, L]."""
        return values if statistic == "information" else values.max(axis=(1, 3))

    value = measure(label[None])[0]
    # What was found is one of the arrangements.
    largest = [largest_of(value[None])]
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // max(cells.shape[1] * domains, len(piece) * domains))
    for start in range(0, draws, step):
        labels = np.stack([rng.permutation(label) for _ in range(min(step, draws - start))])
        largest.append(largest_of(measure(labels)))
    largest = np.concatenate(largest)
    without_ties = np.arange(1.0 + draws)[:, None]
    few = _attained(largest, level) < ATTAINED * _attained(without_ties, level)
    if statistic == "information":
        p = np.array([_p(own, one) for own, one in zip(largest.T, value, strict=True)])
        columns, units = {"layer": layers_of(trace)}, np.array(len(piece))
    else:
        value = value.swapaxes(0, 1)
        p = np.stack([_p(own, pairs) for own, pairs in zip(largest.T, value, strict=True)])
        columns = {
            "layer": layers_of(trace)[:, None, None],
            "domain": names[None, :, None],
            "expert": np.arange(experts)[None, None],
        }
        few, units = few[:, None, None], np.bincount(label, minlength=domains)[None, :, None]
    return broadcast_table(
        columns,
        {"value": value, "p": p, "survives": (p <= level) & ~few},
        units=units,
        note=np.where(few, "too few", ""),
    )


def least_draws(level: float = LEVEL) -> int:
    """The fewest permutations with which a test can mark something: no p is below 1 / (1 + draws)."""
    return math.ceil(1 / level) - 1


def _p(largest: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Values [...] -> the share of the arrangements' largest statistics [R] that reach each; equal sums in another order may
    differ in the last digit."""
    reached = len(largest) - np.searchsorted(np.sort(largest), value - 1e-9 * np.abs(value))
    return reached / len(largest)


def _attained(largest: np.ndarray, level: float) -> np.ndarray:
    """[R, L] -> [L]: how often a test at ``level`` marks something in a layer without structure.

    There each arrangement is as likely as the next to be the one that was found, so this is the share of arrangements whose
    p is at most ``level``. Where arrangements tie, it is less than ``level``.
    """
    return np.array([(_p(own, own) <= level).mean() for own in largest.T])
