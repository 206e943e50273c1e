"""How far two tokens, or two runs, choose the same experts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import table_of_rows
from moekit.routing.pairs import align, kept_by_expert
from moekit.routing.statistics import mean_of, units
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


@measured
def repeats(trace: Trace) -> pd.DataFrame:
    """How often consecutive tokens of a sample go to the same expert (Mixtral, arXiv 2401.04088, section 5, table 5).

    - ``first``: the first choices are the same; chance 1/E;
    - ``either``: the two tokens share any of their K choices; chance 1 - C(E - K, K) / C(E, K).

    Interval: bootstrap over units.

    Returns:
        One row per (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``chance``.
    """
    experts, k = trace.num_experts, trace.top_k
    here = np.flatnonzero((np.diff(trace.sample) == 0) & (np.diff(trace.position) == 1))
    drawn = units(trace)
    rows = []
    for layer_index, layer in enumerate(trace.layers):
        before, after = trace.experts[here, layer_index], trace.experts[here + 1, layer_index]
        either = _shared(before, after) > 0
        for name, hit, chance in (
            ("first", before[:, 0] == after[:, 0], 1 / experts),
            ("either", either, 1 - math.comb(experts - k, k) / math.comb(experts, k)),
        ):
            rows.append((layer, name, *mean_of(hit, drawn.unit[here], drawn), chance))
    return table_of_rows(rows, "layer statistic value low high chance")


@measured
def agreement(before: Trace, after: Trace) -> pd.DataFrame:
    """How far two runs route the same tokens alike: two checkpoints, capacities, dtypes.

    - ``overlap`` = |choices of one and of the other| / K, the router saturation of OLMoE (arXiv 2409.02060, section 5.1)
      when one run is the final checkpoint; chance K/E;
    - ``first``: the same first choice; chance 1/E;
    - ``set``: the same K choices in any order; chance 1 / C(E, K);
    - ``kept``: the same experts got the token after drops; no chance value.

    Interval: bootstrap over units.

    Returns:
        One row per (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``chance``.

    Raises:
        ValueError: as :func:`moekit.routing.pairs.align`.
    """
    before, after = align(before, after)
    experts, k = before.num_experts, before.top_k
    drawn = units(before)
    same_kept = (kept_by_expert(before) == kept_by_expert(after)).all(axis=2)
    rows = []
    for layer_index, layer in enumerate(before.layers):
        one, other = before.experts[:, layer_index], after.experts[:, layer_index]
        common = _shared(one, other)
        for name, value, chance in (
            ("overlap", common / k, k / experts),
            ("first", one[:, 0] == other[:, 0], 1 / experts),
            ("set", common == k, 1 / math.comb(experts, k)),
            ("kept", same_kept[:, layer_index], math.nan),
        ):
            rows.append((layer, name, *mean_of(value, drawn.unit, drawn), chance))
    return table_of_rows(rows, "layer statistic value low high chance")


def _shared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n, K] twice -> [n], how many experts both hold."""
    return sum((one == np.roll(other, shift, axis=1)).sum(axis=1) for shift in range(one.shape[1]))
