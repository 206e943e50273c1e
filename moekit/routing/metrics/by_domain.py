"""What experts are used for: domains, or any other labels of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Choice, check
from moekit.routing.metrics.registry import measured
from moekit.routing.metrics.tables import (
    block_counts,
    broadcast_table,
    chosen_experts,
    labels_of,
    layers_of,
    made,
    table_of_rows,
)
from moekit.routing.statistics import (
    SEED,
    drawn,
    effective,
    entropy_bits,
    interval,
    share_of_units,
    units,
)
from moekit.routing.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("load", "uniform")


def baseline(against: str) -> str:
    """``against``, checked.

    Raises:
        ValueError: it is neither "load" nor "uniform".
    """
    return check("against", against, Choice(BASELINES))


@measured
def domain_specialisation(
    trace: Trace,
    groups: Sequence[str] | np.ndarray,
    *,
    against: str = "load",
    choice: int | None = None,
    dispatched: bool = False,
) -> pd.DataFrame:
    """``value`` = N(e, d) / N(d): the share of a domain's tokens that have expert e among their K choices.

    OLMoE's domain specialisation (Muennighoff et al. 2024, arXiv 2409.02060, section 5.3). ``lift`` = value / chance.
    Intervals: bootstrap over units.

    Args:
        groups: [T] labels, such as :func:`moekit.routing.domains.domains_of` gives.
        against: what ``chance`` is. "load": the expert's share of all tokens, N(e) / N, which every domain has if the routing
            does not depend on domains. "uniform": K/E, which an expert that is busy in all domains exceeds.
        choice: only this one (0: first).

    Returns:
        One row per (layer, domain, expert): ``layer``, ``domain``, ``expert``, ``count``, ``value``, ``low``, ``high``,
        ``units``, ``chance``, ``lift``, ``lift_low``, ``lift_high``.
    """
    baseline(against)
    names, label = labels_of(trace, groups)
    experts, domains, found = trace.num_experts, len(names), units(trace)
    cell = found.unit * domains + label
    size = np.bincount(cell, minlength=found.number * domains).reshape(-1, domains)
    k = made(trace, choice)
    rows: dict[str, list[np.ndarray]] = {}
    for layer_index in range(len(trace.layers)):
        chosen = chosen_experts(trace, layer_index, choice, dispatched)
        count = block_counts(cell, chosen, experts, found.number * domains).reshape(-1, domains, experts)
        part = share_of_units(count, size[..., None], found)
        load = count.sum(axis=(0, 1)) / len(trace)
        chance = load if against == "load" else np.full(experts, k / experts)
        with np.errstate(invalid="ignore", divide="ignore"):
            lift = part["value"] / chance
            again = drawn(found, count) / np.maximum(drawn(found, size), 1e-30)[..., None]
            if against == "load":
                again /= (drawn(found, count).sum(axis=1) / drawn(found, size).sum(axis=1, keepdims=True))[
                    :, None
                ]
            else:
                again /= chance
        low, high = interval(np.nan_to_num(again), np.nan_to_num(lift), effective(size)[:, None])
        part |= {"chance": np.broadcast_to(chance, lift.shape), "lift": lift}
        part |= {
            "lift_low": np.maximum(low, 0),
            "lift_high": high,
            "count": count.sum(axis=0).astype(np.int64),
        }
        for name, column in part.items():
            rows.setdefault(name, []).append(column)
    columns = {name: np.stack(parts) for name, parts in rows.items()}
    frame = broadcast_table(
        {
            "layer": layers_of(trace)[:, None, None],
            "domain": names[None, :, None],
            "expert": np.arange(experts)[None, None],
            "count": columns.pop("count"),
        },
        {name: columns.pop(name) for name in ("value", "low", "high", "units")},
        chance=columns.pop("chance"),
        **columns,
    )
    frame.attrs["against"] = against
    return frame


@measured
def domain_information(trace: Trace, groups: Sequence[str] | np.ndarray, *, choice: int = 0) -> pd.DataFrame:
    """How much a token's expert tells of its domain: mutual information I(expert; domain), in bits.

    I = sum over e, d of p(e, d) log2(p(e, d) / (p(e) p(d))), between 0 and the domains' entropy. Plug-in estimates
    are too large by about (E - 1)(D - 1) / (2 T ln 2) bits (Miller 1955): ``chance`` is simulated with as many tokens.
    Interval: bootstrap over units. :func:`moekit.routing.metrics.information` corrects by shuffles.

    Args:
        choice: which of the K choices, 0 the first.

    Returns:
        One row per layer: ``layer``, ``value``, ``low``, ``high``, ``chance``, ``domain_entropy`` (bits).
    """
    names, label = labels_of(trace, groups)
    experts, domains, found = trace.num_experts, len(names), units(trace)
    rng = np.random.default_rng(SEED)

    def information(c: np.ndarray) -> np.ndarray:
        """Counts [..., D * E] -> bits [...]."""
        p = c.reshape(*c.shape[:-1], domains, experts) / c.sum(axis=-1)[..., None, None]
        return entropy_bits(p.sum(axis=-1)) + entropy_bits(p.sum(axis=-2)) - entropy_bits(p.reshape(*c.shape))

    shuffled = label * experts + rng.integers(0, experts, len(trace))
    chance = float(information(np.bincount(shuffled, minlength=domains * experts)))
    entropy = float(entropy_bits(np.bincount(label, minlength=domains) / len(trace)))
    rows = []
    for layer_index, layer in enumerate(trace.layers):
        cell = label * experts + trace.experts[:, layer_index, choice]
        cells = block_counts(found.unit, cell[:, None], domains * experts, found.number)
        value = float(information(cells.sum(axis=0)))
        low, high = interval(information(drawn(found, cells)), value, found.number)
        rows.append((layer, value, float(low), float(high), chance, entropy))
    return table_of_rows(rows, "layer value low high chance domain_entropy")
