"""Which experts share tokens, and which follow each other from layer to layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Whole, check
from moekit.checked import checked
from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import chosen_experts, table_of_rows
from moekit.routing.statistics import SEED, mean_of, units, wilson
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Pairs:
    """How often experts come together.

    Attributes:
        between: the (layer, layer) of each matrix.
        counts: [M, E, E] int64, N(i, j).
        base: [M, E] int64, N(i).
        chance: of N(i, j) / N(i).
    """

    between: list[tuple[int, int]]
    counts: np.ndarray
    base: np.ndarray
    chance: float

    def ratio(self, layer: int) -> np.ndarray:
        """[E, E] float64, N(i, j) / N(i) of the matrix that starts at ``layer``; NaN where N(i) is 0."""
        layer, starts = check("layer", layer, Whole(0)), [pair[0] for pair in self.between]
        if layer not in starts:
            raise ValueError(f"no matrix starts at layer {layer}; expected one of {starts}")
        layer_index = starts.index(layer)
        with np.errstate(invalid="ignore"):
            return self.counts[layer_index] / self.base[layer_index][:, None]

    @checked(n=Whole(0), min_count=Whole())
    def top(self, n: int = 20, min_count: int = 10) -> pd.DataFrame:
        """The ``n`` pairs of each matrix with the largest ratio, of experts with N(i) >= ``min_count``.

        Returns:
            ``layer``, ``to_layer``, ``expert``, ``partner``, ``count``, ``value``, ``low``, ``high`` (Wilson),
            ``chance``.
        """
        rows = []
        for (layer, to), count, base in zip(self.between, self.counts, self.base, strict=True):
            ratio = np.where(base[:, None] >= min_count, count / np.maximum(base, 1)[:, None], -1)
            if layer == to:
                np.fill_diagonal(ratio, -1)
            best = np.argsort(-ratio, axis=None, kind="stable")[:n]
            best = best[ratio.ravel()[best] > 0]
            i, j = np.unravel_index(best, ratio.shape)
            low, high = wilson(count[i, j], base[i])
            rows += zip(
                [layer] * len(i), [to] * len(i), i, j, count[i, j], ratio[i, j], low, high, strict=True
            )
        frame = table_of_rows(rows, "layer to_layer expert partner count value low high")
        return frame.assign(chance=self.chance)


@measured
def coactivation(trace: Trace, *, dispatched: bool = False) -> Pairs:
    """Which experts share tokens: N(i, j) = tokens that chose both, over all pairs of their K choices.

    N(i, j) / N(i) is the co-activation of OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, section 5.2; its published
    code counts only choices of neighbouring rank). The diagonal of ``counts`` is N(i). ``chance`` = (K - 1) / (E - 1).
    """
    experts, k = trace.num_experts, trace.top_k
    found = []
    for layer_index in range(len(trace.layers)):
        chosen = chosen_experts(trace, layer_index, None, dispatched).astype(np.int64)
        cells = np.zeros((experts + 1) ** 2, dtype=np.int64)
        for a in range(k):
            for b in range(k):
                cells += np.bincount(chosen[:, a] * (experts + 1) + chosen[:, b], minlength=len(cells))
        found.append(cells.reshape(experts + 1, -1)[:experts, :experts])
    together = np.stack(found)
    chance = (k - 1) / (experts - 1) if experts > 1 else math.nan
    base = together.diagonal(axis1=1, axis2=2).copy()
    return Pairs([(layer, layer) for layer in trace.layers], together, base, chance)


@measured
def transitions(trace: Trace) -> Pairs:
    """Where a token goes next: N(i, j) = tokens whose first choice is i in one traced MoE layer and j in the next.

    After OLMoE's cross-layer counts (allenai/OLMoE scripts/run_routing_analysis.py). ``chance`` = 1/E.
    """
    experts = trace.num_experts
    first = trace.experts[:, :, 0].astype(np.int64)
    found = [
        np.bincount(
            first[:, layer_index] * experts + first[:, layer_index + 1], minlength=experts**2
        ).reshape(experts, -1)
        for layer_index in range(len(trace.layers) - 1)
    ]
    together = np.stack(found) if found else np.zeros((0, experts, experts), dtype=np.int64)
    between = list(zip(trace.layers[:-1], trace.layers[1:], strict=True))
    return Pairs(between, together, together.sum(axis=2), 1 / experts)


@measured
def predictability(trace: Trace) -> pd.DataFrame:
    """How well a token's expert tells its expert in the next MoE layer, by first choices.

    ``value`` = sum over i of max over j of N(i, j), over T: the accuracy of always guessing the most frequent follower,
    counted on the very tokens it was fitted to. So uniform random routing gives more than 1/E: ``chance`` is simulated
    with as many tokens. (NVIDIA/Megatron-LM tools/moe_routing predicts the next layer.) Interval: bootstrap over units
    of the hits.

    Returns:
        One row per pair of layers: ``layer``, ``to_layer``, ``value``, ``low``, ``high``, ``chance``.
    """
    experts = trace.num_experts
    drawn = units(trace)
    rng = np.random.default_rng(SEED)
    cells = rng.integers(0, experts**2, len(trace))
    chance = np.bincount(cells, minlength=experts**2).reshape(experts, -1).max(axis=1).sum() / len(trace)
    rows = []
    for layer_index, count in enumerate(transitions(trace).counts):
        follower = count.argmax(axis=1)
        hit = follower[trace.experts[:, layer_index, 0]] == trace.experts[:, layer_index + 1, 0]
        rows.append((*trace.layers[layer_index : layer_index + 2], *mean_of(hit, drawn.unit, drawn), chance))
    return table_of_rows(rows, "layer to_layer value low high chance")
