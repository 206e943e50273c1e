"""Metrics of routing: each a function of a :class:`moekit.routing.trace.Trace`.

Tables have one row a thing measured, with ``value``, a 95 % interval ``low`` to ``high``, and ``chance``: what uniform
random routing would give, that is, every token choosing K different experts at random, each set alike likely.
Intervals of means are bootstrapped over samples (tokens of one sample are not independent); those of single counts are
Wilson's and take the tokens as independent, which makes them somewhat narrow. NaN: there is no telling.

By default a metric looks at what the router chose; ``dispatched=True`` at what capacity kept. A trace without tokens or
layers is a ValueError to all of them.

Letters: T tokens, L traced layers, K choices, E experts, N(.) a number of tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.routing import expert_caches as offload
from moekit.routing.trace import Trace, align
from moekit.symbols import PAD

if TYPE_CHECKING:
    import pandas as pd

Z = 1.959964  # of a 95 % interval
BLOCKS = 500  # at most so many samples are resampled one by one; of more, neighbours stay together
RESAMPLES = 400
SEED = 0  # of every simulation and bootstrap: the same trace gives the same figures


def measured(metric: Callable[..., Any]) -> Callable[..., Any]:
    """A metric that says so where a trace has nothing to measure."""

    @functools.wraps(metric)
    def checked(*args: Any, **options: Any) -> Any:
        for trace in (*args, *options.values()):
            if isinstance(trace, Trace) and not (len(trace) and trace.layers):
                missing = "layers" if len(trace) else "tokens"
                raise ValueError(
                    f"metrics.{metric.__name__}: the trace has no {missing}, so nothing to measure"
                )
        return metric(*args, **options)

    return checked


# ------------------------------------------------------------------------------------------------------------- load


@measured
def load(trace: Trace, *, choice: int | None = None, dispatched: bool = False) -> pd.DataFrame:
    """How many choices each expert gets.

    ``value`` = N(e) / sum over experts of N; ``chance`` = 1/E. Wilson's interval. ``choice``: only this one (0: first).

    Returns:
        A row a (layer, expert): ``layer``, ``expert``, ``count``, ``value``, ``low``, ``high``, ``chance``.
    """
    count = counts(trace, choice=choice, dispatched=dispatched)
    total = count.sum(axis=1, keepdims=True)
    return _frame(
        {"layer": _layers(trace)[:, None], "expert": np.arange(trace.num_experts)[None], "count": count},
        _share(count, total),
        chance=1 / trace.num_experts,
    )


@measured
def counts(trace: Trace, *, choice: int | None = None, dispatched: bool = False) -> np.ndarray:
    """[L, E] int64: how many choices each expert gets."""
    experts = trace.num_experts
    return np.stack(
        [
            np.bincount(_chosen(trace, place, choice, dispatched).ravel(), minlength=experts + 1)[:experts]
            for place in range(len(trace.layers))
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

    Interval: bootstrap over samples (which widens what unevenness each sample has). ``chance``: mean of a simulation.

    Returns:
        A row a (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``chance``.
    """
    resamples, block = _bootstrap(trace)
    k = trace.top_k if choice is None else 1
    chance = _spread(_random_counts(len(trace), k, trace.num_experts, draws=20))
    rows = []
    for place, layer in enumerate(trace.layers):
        chosen = _chosen(trace, place, choice, dispatched)
        cells = _block_counts(block, chosen, trace.num_experts, len(resamples[0]))
        again = _spread(resamples @ cells)
        for name, value in _spread(cells.sum(axis=0, keepdims=True)).items():
            low, high = _percentiles(again[name])
            rows.append((layer, name, value[0], low, high, chance[name].mean()))
    return _rows(rows, "layer statistic value low high chance")


def _spread(c: np.ndarray) -> dict[str, np.ndarray]:
    """Counts [..., E] -> statistics [...]."""
    experts = c.shape[-1]
    total = np.maximum(c.sum(axis=-1), 1e-30)
    ordered = np.sort(c, axis=-1)
    p = c / total[..., None]
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    rank = 2 * np.arange(1, experts + 1) - experts - 1
    top = max(1, math.ceil(0.2 * experts))
    return {
        "cv": c.std(axis=-1) * experts / total,
        "gini": (ordered * rank).sum(axis=-1) / (experts * total),
        "max_over_mean": ordered[..., -1] * experts / total,
        "effective_experts": np.exp(entropy),
        "top_20_share": ordered[..., -top:].sum(axis=-1) / total,
        "unused": (c == 0).sum(axis=-1).astype(float),
    }


@measured
def dead_experts(trace: Trace, *, dispatched: bool = False) -> pd.DataFrame:
    """Experts that no token of the trace chose.

    ``chance`` = E (1 - K/E)^T, the expected number. ``limit``: an expert that never showed up has a share of the
    tokens below this (Wilson, 95 %): in a short trace "dead" says little.

    Returns:
        A row a layer: ``layer``, ``value`` (how many), ``experts`` (list), ``chance``, ``limit``.
    """
    count = counts(trace, dispatched=dispatched)
    tokens, experts = len(trace), trace.num_experts
    limit = wilson(np.zeros(1), np.array([tokens]))[1][0]
    expected = experts * (1 - trace.top_k / experts) ** tokens
    rows = [
        (layer, int((c == 0).sum()), np.flatnonzero(c == 0).tolist(), expected, limit)
        for layer, c in zip(trace.layers, count, strict=True)
    ]
    return _rows(rows, "layer value experts chance limit")


# ------------------------------------------------------------------------------------------------------------- gate


@measured
def gate(trace: Trace) -> pd.DataFrame:
    """How sure the gate is, means over tokens.

    - ``entropy`` = - sum p ln p over all experts, nats (fairseq's ``entropy_gating``); chance ln E;
    - ``normalised_entropy`` = entropy / ln E; chance 1;
    - ``confidence`` = the first choice's probability; chance 1/E;
    - ``margin`` = the first's minus the second's; chance 0;
    - ``mass`` = the sum of the choices'; chance K/E.

    ``chance`` is that of a gate with equal logits. Interval: bootstrap over samples.

    Returns:
        A row a (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``chance``.
    """
    experts, k = trace.num_experts, trace.top_k
    log = math.log(experts) if experts > 1 else math.nan
    resamples, block = _bootstrap(trace)
    rows = []
    for place, layer in enumerate(trace.layers):
        probs, entropy = trace.probs[:, place], trace.entropy[:, place]
        found = [
            ("entropy", entropy, log),
            ("normalised_entropy", entropy / log, 1.0),
            ("confidence", probs[:, 0], 1 / experts),
            ("mass", probs.sum(axis=1), k / experts),
        ]
        if k > 1:
            found.append(("margin", probs[:, 0] - probs[:, 1], 0.0))
        for name, values, chance in found:
            rows.append((layer, name, *_mean(values, block, resamples), chance))
    return _rows(rows, "layer statistic value low high chance")


# ------------------------------------------------------------------------------------------------------------ drops


@measured
def drops(trace: Trace, by: str = "layer", *, bins: int = 64) -> pd.DataFrame:
    """The share of choices that were not dispatched: ``value`` = dropped / made.

    fairseq logs it as ``overflow_expert1`` and ``overflow_expert2`` in percent (top2gate.py).

    ``chance``: what the same capacity drops of uniform random choices; NaN where the trace's meta does not tell the
    capacity, or for K > 2. A buffer has C places and a group S tokens (padding included). First choices in place q of
    the group are dropped when Bin(q, 1/E) >= C, second ones when Bin(q, 2/E) + Bin(S - 1 - q, 1/E) >= C: all
    first choices queue before any second. (With batch-prioritised routing or a padding mask it is no more than a
    landmark.) Wilson's interval.

    Args:
        by: "layer", "choice", "position" (in the sample) or "expert".
        bins: positions are put into at most so many bins of one width; ``position`` is a bin's first.

    Returns:
        A row a (layer, ``by``): ``layer``, ``by``'s own column, ``choices``, ``dropped``, ``value``, ``low``, ``high``,
        ``chance``.
    """
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
    elif by == "expert":
        size, key = experts, None
    else:
        raise ValueError(f"by={by!r}; expected layer, choice, position or expert")

    made = np.zeros((depth, size), dtype=np.int64)
    dropped = np.zeros((depth, size), dtype=np.int64)
    for place in range(depth):
        cell = (trace.experts[:, place] if key is None else key).ravel()
        made[place] = np.bincount(cell, minlength=size)
        dropped[place] = np.bincount(cell[~trace.kept[:, place].ravel()], minlength=size)

    chance = _drop_chance(trace)  # [position, K], or None
    if chance is None:
        expected = np.full(size, np.nan)
    elif by == "choice":
        expected = chance[trace.position].mean(axis=0)
    elif by == "position":
        per_token = chance[trace.position].mean(axis=1)
        expected = np.bincount(trace.position // width, per_token, minlength=size)
        with np.errstate(invalid="ignore"):
            expected = expected / np.bincount(trace.position // width, minlength=size)
    else:
        expected = np.full(size, chance[trace.position].mean())
    columns = {"layer": _layers(trace)[:, None]}
    if by != "layer":
        columns[by] = np.arange(size)[None] * (width if by == "position" else 1)
    frame = _frame(columns | {"choices": made, "dropped": dropped}, _share(dropped, made), expected)
    return frame[frame["choices"] > 0].reset_index(drop=True) if by == "position" else frame


def _drop_chance(trace: Trace) -> np.ndarray | None:
    """[P, K]: probability that a choice of a token at position p is dropped under uniform random routing."""
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
    return total / np.maximum(weight, 1)


def drop_probability(tokens: int, experts: int, k: int, room: int | None) -> np.ndarray:
    """[S, K]: probability under uniform random routing that the choices of the token in place q of S are dropped."""
    from scipy.stats import binom

    if room is None:
        return np.zeros((tokens, k))
    # Smooth in q, so in a large group a thousand places tell it.
    grid = np.unique(np.linspace(0, tokens - 1, min(tokens, 1000)).round().astype(int))
    found = [binom.sf(room - 1, grid, 1 / experts)]
    if k > 1:
        ahead = np.arange(
            room
        )  # choices of earlier tokens; at least room of them, and it is full whatever follows
        earlier = binom.pmf(ahead, grid[:, None], min(1.0, 2 / experts))
        later = binom.sf(room - 1 - ahead, tokens - 1 - grid[:, None], 1 / experts)
        full = binom.sf(room - 1, grid, min(1.0, 2 / experts))
        found.append(full + (earlier * later).sum(axis=1))
    return np.stack([np.interp(np.arange(tokens), grid, f) for f in found], axis=1)


# ----------------------------------------------------------------------------------------------- pairs of experts


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
        starts = [pair[0] for pair in self.between]
        if layer not in starts:
            raise ValueError(f"layer {layer} is not here; there are {starts}")
        place = starts.index(layer)
        with np.errstate(invalid="ignore"):
            return self.counts[place] / self.base[place][:, None]

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
        frame = _rows(rows, "layer to_layer expert partner count value low high")
        return frame.assign(chance=self.chance)


@measured
def coactivation(trace: Trace, *, dispatched: bool = False) -> Pairs:
    """Which experts share tokens: N(i, j) = tokens that chose both, over all pairs of their K choices.

    N(i, j) / N(i) is the co-activation of OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, section 5.2; its published
    code counts only choices of neighbouring rank). The diagonal of ``counts`` is N(i). ``chance`` = (K - 1) / (E - 1).
    """
    experts, k = trace.num_experts, trace.top_k
    found = []
    for place in range(len(trace.layers)):
        chosen = _chosen(trace, place, None, dispatched).astype(np.int64)
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
        np.bincount(first[:, place] * experts + first[:, place + 1], minlength=experts**2).reshape(
            experts, -1
        )
        for place in range(len(trace.layers) - 1)
    ]
    together = np.stack(found) if found else np.zeros((0, experts, experts), dtype=np.int64)
    between = list(zip(trace.layers[:-1], trace.layers[1:], strict=True))
    return Pairs(between, together, together.sum(axis=2), 1 / experts)


@measured
def predictability(trace: Trace) -> pd.DataFrame:
    """How well a token's expert tells its expert in the next MoE layer, by first choices.

    ``value`` = sum over i of max over j of N(i, j), over T: the accuracy of always guessing the most frequent follower,
    counted on the very tokens it was fitted to. So uniform random routing gives more than 1/E: ``chance`` is simulated
    with as many tokens. (NVIDIA/Megatron-LM tools/moe_routing predicts the next layer.) Interval: bootstrap over samples
    of the hits.

    Returns:
        A row a pair of layers: ``layer``, ``to_layer``, ``value``, ``low``, ``high``, ``chance``.
    """
    experts = trace.num_experts
    resamples, block = _bootstrap(trace)
    rng = np.random.default_rng(SEED)
    cells = rng.integers(0, experts**2, len(trace))
    chance = np.bincount(cells, minlength=experts**2).reshape(experts, -1).max(axis=1).sum() / len(trace)
    rows = []
    for place, count in enumerate(transitions(trace).counts):
        follower = count.argmax(axis=1)
        hit = follower[trace.experts[:, place, 0]] == trace.experts[:, place + 1, 0]
        rows.append((*trace.layers[place : place + 2], *_mean(hit, block, resamples), chance))
    return _rows(rows, "layer to_layer value low high chance")


# -------------------------------------------------------------------------------------- what experts are used for


@measured
def domain_specialisation(
    trace: Trace, groups: Sequence[str] | np.ndarray, *, dispatched: bool = False
) -> pd.DataFrame:
    """``value`` = N(e, d) / N(d): the share of a domain's tokens that expert e is among the K choices of.

    OLMoE's domain specialisation (Muennighoff et al. 2024, arXiv 2409.02060, section 5.3). ``chance`` = K/E. Wilson.

    Args:
        groups: [T] labels, such as :func:`moekit.routing.domains.domains_of` gives.

    Returns:
        A row a (layer, domain, expert): ``layer``, ``domain``, ``expert``, ``count``, ``value``, ``low``, ``high``,
        ``chance``.
    """
    names, label = _labels(trace, groups)
    experts = trace.num_experts
    count = np.stack(
        [
            _block_counts(label, _chosen(trace, place, None, dispatched), experts, len(names))
            for place in range(len(trace.layers))
        ]
    ).astype(np.int64)
    size = np.bincount(label, minlength=len(names))[None, :, None]
    return _frame(
        {
            "layer": _layers(trace)[:, None, None],
            "domain": names[None, :, None],
            "expert": np.arange(experts)[None, None],
            "count": count,
        },
        _share(count, size),
        chance=trace.top_k / experts,
    )


@measured
def domain_information(trace: Trace, groups: Sequence[str] | np.ndarray) -> pd.DataFrame:
    """How much a token's first choice tells of its domain: mutual information I(expert; domain), in bits.

    I = sum over e, d of p(e, d) log2(p(e, d) / (p(e) p(d))), between 0 and the domains' entropy. Plug-in estimates
    are too large by about (E - 1)(D - 1) / (2 T ln 2) bits (Miller 1955): ``chance`` is simulated with as many tokens.
    Interval: bootstrap over samples.

    Returns:
        A row a layer: ``layer``, ``value``, ``low``, ``high``, ``chance``, ``domain_entropy`` (bits).
    """
    names, label = _labels(trace, groups)
    experts, domains = trace.num_experts, len(names)
    resamples, block = _bootstrap(trace)
    rng = np.random.default_rng(SEED)

    def information(c: np.ndarray) -> np.ndarray:  # [..., domains * experts]
        p = c.reshape(*c.shape[:-1], domains, experts) / c.sum(axis=-1)[..., None, None]
        return _entropy(p.sum(axis=-1)) + _entropy(p.sum(axis=-2)) - _entropy(p.reshape(*c.shape))

    shuffled = label * experts + rng.integers(0, experts, len(trace))
    chance = float(information(np.bincount(shuffled, minlength=domains * experts)))
    entropy = float(_entropy(np.bincount(label, minlength=domains) / len(trace)))
    rows = []
    for place, layer in enumerate(trace.layers):
        cell = label * experts + trace.experts[:, place, 0]
        cells = _block_counts(block, cell[:, None], domains * experts, len(resamples[0]))
        again = _percentiles(information(resamples[:100] @ cells))
        rows.append((layer, float(information(cells.sum(axis=0))), *again, chance, entropy))
    return _rows(rows, "layer value low high chance domain_entropy")


@measured
def vocabulary_specialisation(
    trace: Trace, by: str = "input", *, per_expert: bool = False, min_count: int = 10
) -> pd.DataFrame:
    """How far a token's type decides its first choice.

    For a type x with N(x) >= ``min_count`` tokens, s(x) = max over e of N(x, e) / N(x). ``value`` = mean of s over types
    (OLMoE, Muennighoff et al. 2024, arXiv 2409.02060, section 5.4, counts every type, however rare: that pulls it towards
    1). With ``per_expert`` the mean is over the types that the expert is the most frequent choice of. ``chance``: the
    same types with uniform random choices, simulated. Interval: normal, over types.

    Args:
        by: the type is that of the "input", the "target" or the "predicted" token.

    Returns:
        A row a layer, or a (layer, expert) that has types: ``layer``, [``expert``,] ``types``, ``value``, ``low``,
        ``high``, ``chance``.
    """
    token, rows_of = _tokens(trace, by)
    experts = trace.num_experts
    rng = np.random.default_rng(SEED)
    _, random = _favourites(token, rng.integers(0, experts, len(token)), experts, min_count)
    chance = random.mean() if len(random) else math.nan
    rows = []
    for place, layer in enumerate(trace.layers):
        favourite, share = _favourites(token, trace.experts[rows_of, place, 0], experts, min_count)
        if per_expert:
            number = np.bincount(favourite, minlength=experts)
            total = np.bincount(favourite, share, minlength=experts)
            squares = np.bincount(favourite, share**2, minlength=experts)
            for e in np.flatnonzero(number):
                rows.append((layer, e, number[e], *_normal(number[e], total[e], squares[e]), chance))
        else:
            rows.append((layer, len(share), *_normal(len(share), share.sum(), (share**2).sum()), chance))
    return _rows(rows, f"layer {'expert ' if per_expert else ''}types value low high chance")


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
    place = trace.at(layer)
    if not 0 <= expert < trace.num_experts:
        raise ValueError(f"there is no expert {expert}: they are 0 to {trace.num_experts - 1}")
    token, rows_of = _tokens(trace, by)
    chosen = (_chosen(trace, place, choice, False)[rows_of] == expert).any(axis=1)
    size = int(token.max(initial=0)) + 1
    total, count = np.bincount(token, minlength=size), np.bincount(token[chosen], minlength=size)
    types = np.flatnonzero((total >= min_count) & (count > 0))
    value = count[types] / total[types]
    types = types[np.lexsort((types, -count[types], -value))][:n]
    k = trace.top_k if choice is None else 1
    return _frame(
        {"token": types, "count": count[types], "total": total[types]},
        _share(count[types], total[types]),
        chance=k / trace.num_experts,
    )


# ---------------------------------------------------------------------------------------------- along the text


@measured
def repeats(trace: Trace) -> pd.DataFrame:
    """How often consecutive tokens of a sample go to the same expert (Mixtral, arXiv 2401.04088, section 5, table 5).

    - ``first``: the first choices are the same; chance 1/E;
    - ``either``: the two tokens share any of their K choices; chance 1 - C(E - K, K) / C(E, K).

    Interval: bootstrap over samples.

    Returns:
        A row a (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``chance``.
    """
    experts, k = trace.num_experts, trace.top_k
    here = np.flatnonzero((np.diff(trace.sample) == 0) & (np.diff(trace.position) == 1))
    resamples, block = _bootstrap(trace)
    rows = []
    for place, layer in enumerate(trace.layers):
        before, after = trace.experts[here, place], trace.experts[here + 1, place]
        either = _shared(before, after) > 0
        for name, hit, chance in (
            ("first", before[:, 0] == after[:, 0], 1 / experts),
            ("either", either, 1 - math.comb(experts - k, k) / math.comb(experts, k)),
        ):
            rows.append((layer, name, *_mean(hit, block[here], resamples), chance))
    return _rows(rows, "layer statistic value low high chance")


@measured
def agreement(before: Trace, after: Trace) -> pd.DataFrame:
    """How far two runs route the same tokens alike: two checkpoints, capacities, dtypes.

    - ``overlap`` = |choices of one and of the other| / K, the router saturation of OLMoE (arXiv 2409.02060, section 5.1)
      when one run is the final checkpoint; chance K/E;
    - ``first``: the same first choice; chance 1/E;
    - ``set``: the same K choices in any order; chance 1 / C(E, K);
    - ``kept``: the same experts got the token after drops; no chance value.

    Interval: bootstrap over samples.

    Returns:
        A row a (layer, ``statistic``): ``layer``, ``statistic``, ``value``, ``low``, ``high``, ``chance``.

    Raises:
        ValueError: as :func:`moekit.routing.trace.align`.
    """
    before, after = align(before, after)
    experts, k = before.num_experts, before.top_k
    resamples, block = _bootstrap(before)
    rows = []
    for place, layer in enumerate(before.layers):
        one, other = before.experts[:, place], after.experts[:, place]
        got = [np.sort(np.where(t.kept[:, place], t.experts[:, place], -1), axis=1) for t in (before, after)]
        common = _shared(one, other)
        for name, value, chance in (
            ("overlap", common / k, k / experts),
            ("first", one[:, 0] == other[:, 0], 1 / experts),
            ("set", common == k, 1 / math.comb(experts, k)),
            ("kept", (got[0] == got[1]).all(axis=1), math.nan),
        ):
            rows.append((layer, name, *_mean(value, block, resamples), chance))
    return _rows(rows, "layer statistic value low high chance")


def _shared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[n, K] twice -> [n], how many experts both hold."""
    return sum((one == np.roll(other, shift, axis=1)).sum(axis=1) for shift in range(one.shape[1]))


@measured
def hot_set(trace: Trace, sizes: Sequence[int] | None = None, *, dispatched: bool = False) -> pd.DataFrame:
    """Coverage: the share of choices that go to the ``size`` busiest experts of a layer.

    ``value`` ranks the experts by the very choices it counts, which flatters a short trace; ``held_out`` ranks them by
    the samples with even numbers (in order) and counts the others. ``chance``: simulated, for ``value``. Interval:
    bootstrap over samples, of ``value``. (NVIDIA/Megatron-LM tools/moe_routing.)

    Args:
        sizes: None: about E/32, E/16, ... E/2.

    Returns:
        A row a (layer, size): ``layer``, ``size``, ``value``, ``low``, ``high``, ``held_out``, ``chance``.
    """
    experts = trace.num_experts
    sizes = np.array(_sizes(sizes, experts))
    resamples, block = _bootstrap(trace)
    odd = np.searchsorted(np.unique(trace.sample), trace.sample) % 2

    def coverage(c: np.ndarray) -> np.ndarray:  # [..., E] -> [..., sizes]
        best = -np.sort(-c, axis=-1)
        return best.cumsum(axis=-1)[..., sizes - 1] / np.maximum(c.sum(axis=-1, keepdims=True), 1e-30)

    chance = coverage(_random_counts(len(trace), trace.top_k, experts, draws=20)).mean(axis=0)
    rows = []
    for place, layer in enumerate(trace.layers):
        chosen = _chosen(trace, place, None, dispatched)
        cells = _block_counts(block, chosen, experts, len(resamples[0]))
        value, again = coverage(cells.sum(axis=0)), coverage(resamples @ cells)
        fit, test = _block_counts(odd, chosen, experts, 2)
        ranked = test[np.argsort(-fit, kind="stable")].cumsum()
        held_out = ranked[sizes - 1] / test.sum() if test.sum() else np.full(len(sizes), np.nan)
        for i, size in enumerate(sizes):
            rows.append((layer, size, value[i], *_percentiles(again[:, i]), held_out[i], chance[i]))
    return _rows(rows, "layer size value low high held_out chance")


# ----------------------------------------------------------------------------------------------------- caches


@measured
def cache_hits(trace: Trace, sizes: Sequence[int] | None = None, *, dispatched: bool = True) -> pd.DataFrame:
    """Hit rates of a cache of experts, a cache a layer, for those who offload the others.

    Requests are the choices in the order of the trace, a token's first before its second; at the start the cache is
    empty. ``policy``:

    - ``lru``: keeps the experts requested last (Mattson et al. 1970: one pass gives every size);
    - ``lfu``: keeps those requested most often so far, of equals those requested last (counts are never forgotten);
    - ``oracle``: Belady 1966: keeps those that are needed again soonest, the most hits that any policy can have; of
      long traces in pieces (:func:`moekit.routing.expert_caches.oracle_hits`).

    ``chance``: lru the mean over choices k = 0, ... of (size - k) / (E - k), lfu size / E, oracle simulated. Wilson's
    interval. After ljcleo/moe-lrc (arXiv 2505.16056).

    Args:
        sizes: experts that the cache holds. None: about E/32, E/16, ... E/2.
        dispatched: only choices that were kept need their expert.

    Returns:
        A row a (layer, policy, size): ``layer``, ``policy``, ``size``, ``requests``, ``value``, ``low``, ``high``,
        ``chance``.
    """
    experts, k = trace.num_experts, trace.top_k
    sizes = np.array(_sizes(sizes, experts))
    streams = []
    for place in range(len(trace.layers)):
        flat = _chosen(trace, place, None, dispatched).ravel()
        streams.append(flat[flat < experts])
    random = _random_choices(np.random.default_rng(SEED), 50_000 // k, k, experts).ravel()
    with ThreadPoolExecutor(2) as pool:  # NumPy lets go of the interpreter's lock
        oracle = pool.submit(offload.oracle_hits, [*streams, random], experts, sizes)
        lru = list(pool.map(lambda stream: offload.hits(offload.lru_distance(stream), sizes), streams))
        lfu = list(pool.map(lambda stream: offload.hits(offload.lfu_rank(stream), sizes), streams))
    *best, oracle_chance = oracle.result()
    chance = {
        "lru": np.mean([np.maximum(sizes - i, 0) / (experts - i) for i in range(min(k, experts))], axis=0),
        "lfu": sizes / experts,
        "oracle": oracle_chance / len(random),
    }
    rows = []
    for place, (layer, stream) in enumerate(zip(trace.layers, streams, strict=True)):
        for policy, hits in (("lru", lru[place]), ("lfu", lfu[place]), ("oracle", best[place])):
            low, high = wilson(hits, np.full(len(sizes), len(stream)))
            for i, size in enumerate(sizes):
                value = hits[i] / len(stream) if len(stream) else math.nan
                rows.append((layer, policy, size, len(stream), value, low[i], high[i], chance[policy][i]))
    return _rows(rows, "layer policy size requests value low high chance")


def _sizes(sizes: Sequence[int] | None, experts: int) -> list[int]:
    if sizes is None:
        return sorted({max(1, experts // part) for part in (32, 16, 8, 4, 2)})
    sizes = sorted({int(size) for size in sizes})
    if not sizes or sizes[0] < 1 or sizes[-1] > experts:
        raise ValueError(f"sizes={sizes}: expected numbers from 1 to {experts}")
    return sizes


# --------------------------------------------------------------------------------------------- shared by several


def wilson(successes: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a proportion (Wilson 1927); NaN where there was no trial."""
    successes, trials = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = successes / trials
        centre = p + Z**2 / (2 * trials)
        half = Z * np.sqrt(p * (1 - p) / trials + Z**2 / (4 * trials**2))
        return (centre - half) / (1 + Z**2 / trials), (centre + half) / (1 + Z**2 / trials)


def _share(count: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
    low, high = wilson(count, total)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"value": count / total, "low": low, "high": high}


def _normal(n: float, total: float, squares: float) -> tuple[float, float, float]:
    """The mean of n values with this sum and sum of squares, and its normal interval."""
    if n < 1:
        return math.nan, math.nan, math.nan
    mean = total / n
    half = Z * math.sqrt(max(0.0, squares / n - mean**2) / (n - 1)) if n > 1 else math.nan
    return mean, mean - half, mean + half


def _bootstrap(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Weights [RESAMPLES, blocks] of blocks drawn anew, and each token's block [T]: its sample, or some neighbours."""
    samples, block = np.unique(trace.sample, return_inverse=True)
    n = min(len(samples), BLOCKS)
    block = block * n // max(1, len(samples))
    rng = np.random.default_rng(SEED)
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float), block


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    if np.ptp(values) == 0:  # one block, or no variation: resampling has nothing to say
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _mean(values: np.ndarray, block: np.ndarray, resamples: np.ndarray) -> tuple[float, float, float]:
    """The mean over tokens, with its bootstrap interval over blocks."""
    blocks = resamples.shape[1]
    total = np.bincount(block, values, minlength=blocks)
    number = np.bincount(block, minlength=blocks)
    if not number.sum():
        return math.nan, math.nan, math.nan
    if blocks == 1:
        return float(total.sum() / number.sum()), math.nan, math.nan
    again = (resamples @ total) / np.maximum(resamples @ number, 1)
    low, high = np.percentile(again, [2.5, 97.5])
    return float(total.sum() / number.sum()), float(low), float(high)


def _chosen(trace: Trace, place: int, choice: int | None, dispatched: bool) -> np.ndarray:
    """[T, K] experts of the ``place``-th traced layer (or [T, 1] of one choice); E where not dispatched, if that counts."""
    chosen = trace.experts[:, place]
    if dispatched:
        chosen = np.where(trace.kept[:, place], chosen, np.int16(trace.num_experts))
    return chosen if choice is None else chosen[:, choice : choice + 1]


def _block_counts(block: np.ndarray, chosen: np.ndarray, experts: int, blocks: int) -> np.ndarray:
    """[blocks, experts] float64: choices [T, K] counted by their token's block [T]; those beyond ``experts`` do not."""
    cell = block[:, None] * (experts + 1) + chosen
    return np.bincount(cell.ravel(), minlength=blocks * (experts + 1)).reshape(blocks, -1)[:, :experts] * 1.0


def _random_choices(rng: np.random.Generator, tokens: int, k: int, experts: int) -> np.ndarray:
    """[tokens, k] int64, different experts in each row, uniform."""
    chosen = np.empty((tokens, k), dtype=np.int64)
    for i in range(k):
        draw = rng.integers(0, experts - i, tokens)
        for taken in np.sort(chosen[:, :i], axis=1).T:  # in ascending order: count past what is taken
            draw += draw >= taken
        chosen[:, i] = draw
    return chosen


def _random_counts(tokens: int, k: int, experts: int, draws: int) -> np.ndarray:
    """[draws, experts] float64 counts of uniform random routing."""
    rng = np.random.default_rng(SEED)
    return np.stack(
        [
            np.bincount(_random_choices(rng, tokens, k, experts).ravel(), minlength=experts)
            for _ in range(draws)
        ]
    ).astype(float)


def _entropy(p: np.ndarray) -> np.ndarray:
    """Bits, over the last axis."""
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1)


def _labels(trace: Trace, groups: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    groups = np.asarray(groups)
    if groups.shape != (len(trace),):
        raise ValueError(
            f"groups has shape {list(groups.shape)}; expected a label for each of {len(trace)} tokens"
        )
    return np.unique(groups, return_inverse=True)


def _tokens(trace: Trace, by: str) -> tuple[np.ndarray, np.ndarray]:
    """The types of the tokens that have one, and their rows."""
    if by not in ("input", "target", "predicted"):
        raise ValueError(f"by={by!r}; expected input, target or predicted")
    token = {"input": "token"}.get(by, by)
    token = getattr(trace, token).astype(np.int64)
    rows = np.flatnonzero(token != PAD) if by == "target" else np.flatnonzero(token >= 0)
    if by == "predicted" and not len(rows):
        raise ValueError("the trace holds no predicted tokens: record it with predicted=True")
    return token[rows], rows


def _layers(trace: Trace) -> np.ndarray:
    return np.array(trace.layers)


def _frame(
    columns: dict[str, np.ndarray], share: dict[str, np.ndarray], chance: float | np.ndarray
) -> pd.DataFrame:
    """A table of arrays that broadcast against each other, a row a cell."""
    import pandas as pd

    columns = columns | share | {"chance": chance}
    arrays = np.broadcast_arrays(*columns.values())
    return pd.DataFrame({name: a.ravel() for name, a in zip(columns, arrays, strict=True)})


def _rows(rows: list[tuple], columns: str) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=columns.split())


METRICS: dict[str, Callable[[Trace], object]] = {
    "load": load,
    "balance": balance,
    "dead_experts": dead_experts,
    "gate": gate,
    "drops by choice": lambda trace: drops(trace, "choice"),
    "drops by position": lambda trace: drops(trace, "position"),
    "drops by expert": lambda trace: drops(trace, "expert"),
    "coactivation": coactivation,
    "transitions": transitions,
    "predictability": predictability,
    "vocabulary_specialisation": vocabulary_specialisation,
    "repeats": repeats,
    "hot_set": hot_set,
    "cache_hits": cache_hits,
}
