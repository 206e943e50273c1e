"""How many choices each expert gets, and how evenly they spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import (
    block_counts,
    broadcast_table,
    chosen_experts,
    layers_of,
    set_sizes,
    table_of_rows,
    telling,
)
from moekit.routing.statistics import (
    FEW_FOR_SPREAD,
    drawn,
    interval,
    jackknife,
    random_counts,
    share_of_units,
    units,
    wilson,
)
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

# the part of the experts whose share ``top_20_share`` is
BUSIEST = 0.2


@measured
def load(trace: Trace, *, choice: int | None = None, dispatched: bool = False) -> pd.DataFrame:
    """How many choices each expert gets.

    ``value`` = N(e) / sum over experts of N; ``chance`` = 1/E. Interval: bootstrap over units. ``choice``: only this one
    (0: first).

    Returns:
        One row per (layer, expert): ``layer``, ``expert``, ``count``, ``value``, ``low``, ``high``, ``units``, ``chance``.
    """
    count = counts(trace, choice=choice, dispatched=dispatched)
    again, parts = units(trace), []
    for layer_index in range(len(trace.layers)):
        chosen = chosen_experts(trace, layer_index, choice, dispatched)
        cells = block_counts(again.unit, chosen, trace.num_experts, again.number)
        parts.append(share_of_units(cells, cells.sum(axis=1, keepdims=True), again))
    return broadcast_table(
        {"layer": layers_of(trace)[:, None], "expert": np.arange(trace.num_experts)[None], "count": count},
        {name: np.stack([part[name] for part in parts]) for name in parts[0]},
        chance=1 / trace.num_experts,
    )


@measured
def counts(trace: Trace, *, choice: int | None = None, dispatched: bool = False) -> np.ndarray:
    """[L, E] int64: how many choices each expert gets."""
    experts = trace.num_experts
    return np.stack(
        [
            np.bincount(
                chosen_experts(trace, layer_index, choice, dispatched).ravel(), minlength=experts + 1
            )[:experts]
            for layer_index in range(len(trace.layers))
        ]
    )


@measured
def balance(trace: Trace, *, choice: int | None = None, dispatched: bool = False) -> pd.DataFrame:
    """How evenly a layer's choices spread over its experts. With c the counts and p = c / sum(c):

    - ``cv`` = std(c) / mean(c), the coefficient of variation (Shazeer et al. 2017, arXiv 1701.06538, section 4);
    - ``gini`` = sum over e, f of \\|c_e - c_f\\| / (2 E sum(c)): 0 even, 1 - 1/E all on one;
    - ``max_over_mean`` = max(c) / mean(c); minus 1 it is MaxVio (Wang et al. 2024, arXiv 2408.15664);
    - ``effective_experts`` = exp(H), H = - sum p ln p: how many even experts would be as spread (Hill number);
    - ``top_20_share``: the share of the 20 % busiest experts, as fairseq logs it (top2gate.py, SAMPLE_FRACTION);
    - ``unused`` = experts without a choice.

    Of a layer where no choice counts all but ``unused`` are NaN.

    Interval: its middle by the bootstrap over units, its width by the jackknife, from 20 units on. A short trace is uneven by
    chance, too: ``value`` includes that, and the interval is corrected for it, so that the value may lie above the interval.
    ``chance``: mean of a simulation.

    Returns:
        One row per (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``units`` (with a choice that
        counts in the layer), ``chance``.
    """
    found = units(trace)
    k = trace.top_k if choice is None else 1
    chance = _spread(random_counts(len(trace), k, trace.num_experts))
    rows = []
    for layer_index, layer in enumerate(trace.layers):
        chosen = chosen_experts(trace, layer_index, choice, dispatched)
        cells = block_counts(found.unit, chosen, trace.num_experts, found.number)
        again, without = _spread(drawn(found, cells)), _spread(cells.sum(axis=0) - cells)
        number = telling(cells)
        for name, value in _spread(cells.sum(axis=0, keepdims=True)).items():
            error = jackknife(without[name])
            low, high = interval(again[name], value[0], number, error, FEW_FOR_SPREAD)
            rows.append((layer, name, value[0], low, high, number, chance[name].mean()))
    return table_of_rows(rows, "layer statistic value low high units chance")


def _spread(c: np.ndarray) -> dict[str, np.ndarray]:
    """Counts [..., E] -> statistics [...]."""
    experts = c.shape[-1]
    total = _total(c)
    ordered = np.sort(c, axis=-1)
    p = c / total[..., None]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    rank = 2 * np.arange(1, experts + 1) - experts - 1
    top = max(1, math.ceil(BUSIEST * experts))
    return {
        "cv": c.std(axis=-1) * experts / total,
        "gini": (ordered * rank).sum(axis=-1) / (experts * total),
        "max_over_mean": ordered[..., -1] * experts / total,
        "effective_experts": np.exp(entropy),
        "top_20_share": ordered[..., -top:].sum(axis=-1) / total,
        "unused": (c == 0).sum(axis=-1).astype(float),
    }


def _total(c: np.ndarray) -> np.ndarray:
    """Counts [..., E] -> their sums [...]; NaN where nothing is counted, since that is neither even nor uneven."""
    total = c.sum(axis=-1)
    return np.where(total > 0, total, np.nan)


@measured
def dead_experts(trace: Trace, *, dispatched: bool = False) -> pd.DataFrame:
    """Experts that no token of the trace chose.

    ``chance`` = E (1 - K/E)^T, the expected number. ``limit``: an expert that never showed up has a share of the
    tokens below this (Wilson, 95 %): in a short trace "dead" says little.

    Returns:
        One row per layer: ``layer``, ``value`` (how many), ``experts`` (list), ``chance``, ``limit``.
    """
    count = counts(trace, dispatched=dispatched)
    tokens, experts = len(trace), trace.num_experts
    limit = wilson(np.zeros(1), np.array([tokens]))[1][0]
    expected = experts * (1 - trace.top_k / experts) ** tokens
    rows = [
        (layer, int((c == 0).sum()), np.flatnonzero(c == 0).tolist(), expected, limit)
        for layer, c in zip(trace.layers, count, strict=True)
    ]
    return table_of_rows(rows, "layer value experts chance limit")


@measured
def hot_set(trace: Trace, sizes: Sequence[int] | None = None, *, dispatched: bool = False) -> pd.DataFrame:
    """Coverage: the share of choices that go to the ``size`` busiest experts of a layer.

    ``value`` ranks the experts by the very choices it counts, which flatters a short trace; ``held_out`` ranks them by
    the samples with even numbers (in order) and counts the others. ``chance``: simulated, for ``value``. Interval:
    bootstrap over units, of ``value``. NaN where no choice counts. (NVIDIA/Megatron-LM tools/moe_routing.)

    Args:
        sizes: None: about E/32, E/16, ... E/2.

    Returns:
        One row per (layer, size): ``layer``, ``size``, ``value``, ``low``, ``high``, ``units`` (with a choice that counts in the
        layer), ``held_out``, ``chance``.
    """
    experts = trace.num_experts
    sizes = np.array(set_sizes(sizes, experts))
    found = units(trace)
    odd = np.searchsorted(np.unique(trace.sample), trace.sample) % 2

    def coverage(c: np.ndarray) -> np.ndarray:
        """Counts [..., E] -> shares [..., sizes]."""
        best = -np.sort(-c, axis=-1)
        return best.cumsum(axis=-1)[..., sizes - 1] / _total(c)[..., None]

    chance = coverage(random_counts(len(trace), trace.top_k, experts)).mean(axis=0)
    rows = []
    for layer_index, layer in enumerate(trace.layers):
        chosen = chosen_experts(trace, layer_index, None, dispatched)
        cells = block_counts(found.unit, chosen, experts, found.number)
        value, again = coverage(cells.sum(axis=0)), coverage(drawn(found, cells))
        without = coverage(cells.sum(axis=0) - cells)
        number = telling(cells)
        low, high = interval(again, value, number, jackknife(without), FEW_FOR_SPREAD)
        fit, test = block_counts(odd, chosen, experts, 2)
        ranked = test[np.argsort(-fit, kind="stable")].cumsum()
        held_out = ranked[sizes - 1] / test.sum() if test.sum() else np.full(len(sizes), np.nan)
        for i, size in enumerate(sizes):
            rows.append((layer, size, value[i], low[i], high[i], number, held_out[i], chance[i]))
    return table_of_rows(rows, "layer size value low high units held_out chance")
