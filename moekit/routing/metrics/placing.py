"""How evenly the ranks would be loaded if the experts were placed otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Number, Whole, check, shown
from moekit.routing import placement as placing
from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import block_counts, chosen_experts, table_of_rows, telling
from moekit.routing.statistics import SEED, drawn, interval, random_counts, units
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

# Shuffled placements whose mean counts.
SHUFFLED = 200


@measured
def placement(
    trace: Trace,
    ranks: int,
    *,
    redundant: int | None = None,
    share: Mapping[int, float] | None = None,
    dispatched: bool = True,
) -> pd.DataFrame:
    """How much busier the busiest rank is than the mean, for four ways to place a layer's experts on ranks.

    ``value`` = max over ranks of rows / mean over ranks of rows. It is measured on the samples with odd numbers, counted in
    order, and placements are fitted to the others; a single sample is cut into halves. ``placement``:

    - "contiguous": rank after rank in the order of the experts, as moekit loads them;
    - "shuffled": the mean of random placements;
    - "fitted": the experts with the most rows first, each to the rank with the fewest rows so far
      (:func:`moekit.routing.placement.packed`);
    - "replicated": the same, with copies of the heaviest experts (:func:`moekit.routing.placement.replicated`).

    Interval: bootstrap over the units that are measured on. ``chance``: the value of contiguous placement under uniform random
    routing of as many tokens. All measured tokens count together; a step of fewer tokens is less even.

    Args:
        ranks: W, up to the number of experts.
        redundant: more physical experts in "replicated", for copies, a layer; None: one a rank.
        share: for each layer, the share of a step in which the busiest rank's experts compute
            (:meth:`moekit.profiling.Profile.busiest`, of a model that was loaded without ``placement``, since ``saved`` is measured
            from the contiguous one). Then ``saved`` is the share of the step that the placement would save if
            the time is proportional to the rows: ``share * (1 - value / value of contiguous)``. Without it, NaN.

    Returns:
        One row per (layer, placement): ``layer``, ``placement``, ``value``, ``low``, ``high``, ``units`` (measured
        on, with a choice that counts in the layer), ``chance``, ``saved``.

    Raises:
        ValueError: there are more ranks than experts, or a layer has no share.
    """
    ranks = _ranks(trace, ranks)
    redundant = ranks if redundant is None else check("redundant", redundant, Whole(0))
    shares = dict.fromkeys(trace.layers, float("nan")) if share is None else _shares(trace, share)
    experts = trace.num_experts
    fit, judge = _halves(trace)
    found = units(trace, judge)
    rng = np.random.default_rng(SEED)
    none = placing.contiguous(experts, ranks)
    every = np.arange(experts)
    shuffles = [rng.permutation(none) for _ in range(SHUFFLED)]
    chance = placing.imbalance(
        placing.loads(random_counts(int(judge.sum()), trace.top_k, experts), every, none, ranks)
    ).mean()
    rows = []
    for layer_index, layer in enumerate(trace.layers):
        chosen = chosen_experts(trace, layer_index, None, dispatched)
        known = np.bincount(chosen[fit].ravel(), minlength=experts + 1)[:experts]
        cells = block_counts(found.unit, chosen[judge], experts, found.number)
        number = telling(cells)
        copies = placing.replicated(known, redundant)
        each = known[copies] / np.bincount(copies)[copies]
        ways = {
            "contiguous": [(every, none)],
            "shuffled": [(every, shuffle) for shuffle in shuffles],
            "fitted": [(every, placing.packed(known, ranks))],
            "replicated": [(copies, placing.packed(each, ranks))],
        }
        own = float("nan")
        for name, placements in ways.items():

            def value(counts: np.ndarray, placements=placements) -> np.ndarray:
                of_ranks = (placing.loads(counts, of, rank, ranks) for of, rank in placements)
                return np.mean([placing.imbalance(one) for one in of_ranks], axis=0)

            here = float(value(cells.sum(axis=0)))
            # No rank is busier than the busiest, so no value is below 1.
            low, high = np.maximum(interval(value(drawn(found, cells)), here, number), 1)
            own = here if name == "contiguous" else own
            saved = shares[layer] * (1 - here / own)
            rows.append((layer, name, here, low, high, number, chance, saved))
    return table_of_rows(rows, "layer placement value low high units chance saved")


@measured
def fitted_placement(trace: Trace, ranks: int, *, dispatched: bool = True) -> dict[int, list[int]]:
    """The rank of each expert, by layer, as :func:`moekit.load` takes it: "fitted" of :func:`placement`, on all tokens.

    Raises:
        ValueError: there are more ranks than experts.
    """
    ranks, experts = _ranks(trace, ranks), trace.num_experts
    found = {}
    for layer_index, layer in enumerate(trace.layers):
        chosen = chosen_experts(trace, layer_index, None, dispatched)
        count = np.bincount(chosen.ravel(), minlength=experts + 1)[:experts]
        found[layer] = placing.packed(count, ranks).tolist()
    return found


def _ranks(trace: Trace, ranks: int) -> int:
    ranks = check("ranks", ranks, Whole())
    if ranks > trace.num_experts:
        raise ValueError(f"ranks={ranks}: expected at most {trace.num_experts}, the experts of a layer")
    return ranks


def _shares(trace: Trace, share: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(share, Mapping) or not set(trace.layers) <= set(share):
        raise ValueError(
            f"share={shown(share)}: expected a number for each of the layers {list(trace.layers)}, as Profile.busiest has them"
        )
    return {layer: check(f"share[{layer}]", share[layer], Number(0)) for layer in trace.layers}


def _halves(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """[T] bool each: the tokens to fit to, and those to judge on."""
    numbers, number = np.unique(trace.sample, return_inverse=True)
    odd = number % 2 == 1 if len(numbers) > 1 else np.arange(len(trace)) >= len(trace) // 2
    return ~odd, odd
