"""What each part of a pass has to move and to compute at least, whatever computes it.

A part reads its inputs and its weights once, and writes its result once. A product and a sum are two operations, and only those
of matrix products and of attention count. Of experts, those with a row are read. Exchanges count what a rank sends and what it
receives. Experts that are fetched are not known beforehand: table.py counts the bytes that crossed the link.

Shape letters: N tokens, D model dim, F expert width, V dictionary, H dense width, K choices a token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moekit.nn.config import ModelConfig
from moekit.nn.gates import top_k_of
from moekit.profiling.naming import OUTSIDE

# Bytes of an index and of a float32.
INDEX, FLOAT = 8, 4
# What is done with the logits of a decode step.
SAMPLING = "sampling"


class Cost(NamedTuple):
    bytes: float = 0.0
    flop: float = 0.0


@dataclass(frozen=True)
class Pass:
    """One pass of one rank.

    Attributes:
        tokens: N.
        keys: how many keys all its tokens look at together, in one layer.
        cached: tokens whose keys and values are read from a cache, in one layer.
        outputs: tokens with logits.
        scored: whether the logits become log-probabilities of targets, and not next tokens.
        vocab: V.
        itemsize: bytes of a weight.
        matrices: bytes of a number of the experts' matrices; one byte has a float32 scale for each row.
        received: [L, e] rows that the e experts held here get, by MoE layer.
        sent: [L] rows of this rank's tokens that other ranks' experts get.
        taken: [L] rows of other ranks' tokens that experts held here get.
        homeward: whether the second product of the experts writes results to the ranks of their tokens, and the combine
            moves nothing.
    """

    tokens: int
    keys: float
    cached: float
    outputs: int
    scored: bool
    vocab: int
    itemsize: int
    received: np.ndarray
    sent: np.ndarray
    taken: np.ndarray
    homeward: bool = False
    matrices: int | None = None


def least(config: ModelConfig, one: Pass) -> dict[tuple[int, str], Cost]:
    """The least cost of each (layer, part), with :data:`~moekit.profiling.naming.OUTSIDE` for parts outside of the layers."""
    n, d, f, s = one.tokens, config.dim, config.ffn_dim, one.itemsize
    choices = n * top_k_of(config) if config.moe_layers else 0
    stream = n * d * s
    project = config.input_dim * d if config.input_dim != d else 0
    found: dict[tuple[int, str], Cost] = {
        (OUTSIDE, "embedding"): Cost(
            n * INDEX + n * config.input_dim * s + project * s + stream, 2 * n * project
        )
    }
    own = s if one.matrices is None else one.matrices
    # A bias for each row of a matrix, and its scale.
    row = s + (FLOAT if own == 1 else 0)
    pending = 0.0
    moe = 0
    for layer in range(config.layers):
        # Each norm reads the stream and what is added to it, and writes the sum and its norm; at first nothing is added.
        found[layer, "norm"] = Cost((3 * stream + pending if layer else 2 * stream) + 4 * stream)
        matrices = 4 * d * d
        found[layer, "attention"] = Cost(
            (matrices + 4 * d) * s + 2 * stream + 2 * one.cached * d * s, 2 * n * matrices + 4 * one.keys * d
        )
        if not config.is_moe(layer):
            width = config.dense_dim(layer)
            found[layer, "dense"] = Cost((2 * d * width + width + d) * s + 2 * stream, 4 * n * d * width)
            pending = stream
            continue
        rows, read = one.received[moe].sum(), (one.received[moe] > 0).sum()
        moved = (one.sent[moe] + one.taken[moe]) * d * s
        made = choices * (INDEX + FLOAT)
        found[layer, "gate"] = Cost(d * config.experts * s + stream + made, 2 * n * d * config.experts)
        found[layer, "plan"] = Cost(made + choices * INDEX + config.experts * INDEX)
        found[layer, "dispatch"] = Cost(moved)
        found[layer, "experts up"] = Cost(
            read * (d * f * own + f * row) + rows * (d + f) * s, 2 * rows * d * f
        )
        down = read * (d * f * own + d * row) + rows * (f + d) * s + one.homeward * one.sent[moe] * d * s
        found[layer, "experts down"] = Cost(down, 2 * rows * d * f)
        found[layer, "combine"] = Cost(0.0 if one.homeward else moved)
        pending = choices * d * s
        moe += 1
    if config.pre_norm and config.final_norm and not config.before_final_norm:
        found[OUTSIDE, "norm"] = Cost(3 * stream + pending)
    # Scoring needs no logits in memory: a kernel may make them and their sums in one.
    logits = 0.0 if one.scored else one.outputs * one.vocab * s
    project = config.output_dim * d if config.output_dim != d else 0
    found[OUTSIDE, "output"] = Cost(
        (one.vocab * config.output_dim + project) * s + one.outputs * config.output_dim * s + logits,
        2 * one.outputs * one.vocab * config.output_dim + 2 * n * project,
    )
    last = "log-probabilities" if one.scored else SAMPLING
    found[OUTSIDE, last] = Cost(logits + one.outputs * (INDEX + FLOAT))
    return found


def of_whole_step(costs: Mapping[tuple[int, str], Cost]) -> Cost:
    """The least cost of a decode step that is one kernel: of all parts but the choice of the next token."""
    return _added(cost for (_, part), cost in costs.items() if part != SAMPLING)


def of_both_products(costs: Mapping[tuple[int, str], Cost], layer: int) -> Cost:
    """The least cost of a layer's experts where one kernel computes both products. Its gate's choice counts in "gate"."""
    return _added(costs.get((layer, part), Cost()) for part in ("experts up", "experts down"))


def _added(costs: Iterable[Cost]) -> Cost:
    costs = list(costs)
    return Cost(sum(cost.bytes for cost in costs), sum(cost.flop for cost in costs))


def routed(
    counts: np.ndarray, held: list[np.ndarray], rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``received``, ``sent`` and ``taken`` of a :class:`Pass`.

    Args:
        counts: [W, L, E], choices of each rank's tokens.
        held: for each MoE layer [E], the rank that holds each expert.
    """
    layers = counts.shape[1]
    received, sent, taken = [], np.zeros(layers), np.zeros(layers)
    for layer in range(layers):
        here = held[layer] == rank
        received.append(counts[:, layer, here].sum(axis=0))
        sent[layer] = counts[rank, layer, ~here].sum()
        taken[layer] = received[-1].sum() - counts[rank, layer, here].sum()
    return np.array(received) if layers else np.zeros((0, 0)), sent, taken
