"""What differs between two traces of the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import Number
from moekit.checked import checked
from moekit.routing.metrics import made_and_dropped
from moekit.routing.pairs import align, kept_by_expert
from moekit.routing.statistics import BLOCK, Paired, holm, paired, unit_of
from moekit.routing.trace import TRACE, Trace
from moekit.symbols import PAD

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same tokens.

    Attributes:
        tokens: one row per token of both: ``sample``, ``position``, ``token``, ``target``, ``logprob_before``,
            ``logprob_after``, ``delta`` (after - before, nats), ``layers_changed`` (layers where the set of chosen
            experts differs), ``first_changed`` (the first such layer, -1 if none), ``drops_before``, ``drops_after``
            (choices dropped, over all layers: :func:`moekit.routing.metrics.made_and_dropped`).
        layers: one row per layer: shares of tokens whose set of experts (``experts_changed``), first choice
            (``first_choice_changed``) or kept choices (``kept_changed``) differ, the shares of choices dropped, of those that
            asked for a place (``dropped_before``, ``dropped_after``), and the mean ``weight_change`` (half the sum over
            experts of |weight before - after|: 1 is all of it).
        delta: mean change of the log-probability, nats, over the tokens where both know it.
        units: one row per unit (a sample, or as ``by`` says): ``unit``, ``tokens``, ``delta`` (its mean, nats).
        paired: ``delta`` with its interval, test and effect over units (:class:`moekit.routing.statistics.Paired`).
    """

    tokens: pd.DataFrame
    layers: pd.DataFrame
    delta: float
    units: pd.DataFrame
    paired: Paired

    def __repr__(self) -> str:
        told = self.paired
        change = (
            f" in {told.units} units: log-probability {told.value:+.4f} nats a token ({told.between('{:+.4f}')}), p {told.p:.2g}"
            if told.tokens
            else ": no log-probability is known in both"
        )
        moved = f", {(self.tokens['layers_changed'] > 0).mean():.1%} of tokens with other experts"
        moved = moved if len(self.layers) else ""
        return f"<comparison of {len(self.tokens):,} tokens{change}{moved}>"


@checked(before=TRACE, after=TRACE)
def compare(
    before: Trace, after: Trace, *, by: str | Sequence | np.ndarray = "sample", size: int = BLOCK
) -> Comparison:
    """What differs between two traces of the same tokens: an intervention, another capacity, another checkpoint.

    Models whose experts are not alike compare as ``compare(one.without_experts(), other.without_experts())``.

    Args:
        by, size: the units of the statistics, as in :func:`moekit.routing.metrics.bootstrap`.

    Raises:
        ValueError: as :func:`moekit.routing.pairs.align`; or the layers or numbers of experts differ.
    """
    import pandas as pd

    before, after = align(before, after)
    changed = _changed(before, after)
    tokens = _tokens(before, after, changed)
    best = (before.experts[:, :, :1] != after.experts[:, :, :1]).any(axis=2)
    delta = tokens["delta"].to_numpy()
    kept = kept_by_expert(before) != kept_by_expert(after)
    layers = pd.DataFrame(
        {
            "layer": before.layers,
            "experts_changed": changed.mean(axis=0),
            "first_choice_changed": best.mean(axis=0),
            "kept_changed": kept.any(axis=2).mean(axis=0),
            "dropped_before": _dropped(before),
            "dropped_after": _dropped(after),
            "weight_change": weight_change(before, after).mean(axis=0),
        }
    )
    known = ~np.isnan(delta)
    mean = float(delta[known].mean(dtype=np.float64)) if known.any() else math.nan
    unit = unit_of(before, by, size)
    by_unit = pd.DataFrame({"unit": unit, "delta": delta.astype(np.float64)})[known]
    by_unit = by_unit.groupby("unit")["delta"].agg(["size", "mean"]).reset_index()
    by_unit.columns = ["unit", "tokens", "delta"]
    return Comparison(tokens, layers, mean, by_unit, paired(delta, unit))


def _changed(before: Trace, after: Trace) -> np.ndarray:
    """[T, L] bool, whether a token has other experts; of traces of the same tokens."""
    return (np.sort(before.experts, axis=2) != np.sort(after.experts, axis=2)).any(axis=2)


def _tokens(before: Trace, after: Trace, changed: np.ndarray) -> pd.DataFrame:
    """``Comparison.tokens`` of traces of the same tokens."""
    import pandas as pd

    first = np.full(len(before), -1)
    if before.layers:
        first = np.where(changed.any(axis=1), np.array(before.layers)[changed.argmax(axis=1)], -1)
    return pd.DataFrame(
        {
            "sample": before.sample,
            "position": before.position,
            "token": np.where(before.token >= 0, before.token, after.token),
            "target": np.where(before.target != PAD, before.target, after.target),
            "logprob_before": before.logprob,
            "logprob_after": after.logprob,
            "delta": after.logprob - before.logprob,
            "layers_changed": changed.sum(axis=1),
            "first_changed": first,
            "drops_before": made_and_dropped(before)[1].sum(axis=(1, 2)),
            "drops_after": made_and_dropped(after)[1].sum(axis=(1, 2)),
        }
    )


def _dropped(trace: Trace) -> np.ndarray:
    """[L]: the share of choices dropped, of those that asked for a place."""
    made, dropped = (choices.sum(axis=(0, 2)) for choices in made_and_dropped(trace))
    return dropped / np.maximum(1, made)


@checked(before=TRACE, after=TRACE, level=Number(above=0, most=1))
def change_by_domain(
    before: Trace,
    after: Trace,
    labels: str | Iterable[str] | np.ndarray | None = None,
    *,
    by: str | Sequence | np.ndarray = "sample",
    size: int = BLOCK,
    level: float = 0.05,
) -> pd.DataFrame:
    """What an intervention or another capacity did to the log-probability, one row per domain, largest loss first.

    Args:
        labels: [T] of ``before``, or the name of its column; None: everything is one domain.
        by, size: the units of the statistics, as in :func:`moekit.routing.metrics.bootstrap`.

    Returns:
        ``domain``, ``tokens``, ``units``, ``change`` (mean of after - before, nats a token), ``low``, ``high`` (95 % over
        units), ``p`` (sign flips over units, Holm's correction over domains), ``survives`` (p <= level), ``effect`` and
        ``same_sign`` (:class:`moekit.routing.statistics.Paired`), ``perplexity_ratio`` = exp(-change) with ``ratio_low``,
        ``ratio_high``, ``worst`` (the first percentile of the change), ``rerouted`` (share of tokens whose experts changed
        anywhere), ``note`` ("too few": no interval, as so few units tell too little; "does not vary": all units change alike).

    Raises:
        ValueError: the traces are not of the same tokens.
    """
    import pandas as pd

    own, other = align(before, after)
    if len(own) != len(before):
        raise ValueError(
            f"the traces share {len(own)} of {len(before)} tokens: they are not of the same text"
        )
    labels = np.full(len(before), "all") if labels is None else before.labels_of(labels, "labels")
    unit, delta = unit_of(before, by, size), (other.logprob - own.logprob).astype(np.float64)
    moved = _changed(own, other).any(axis=1)
    rows = []
    for domain in np.unique(labels):
        here = (labels == domain) & ~np.isnan(delta)
        if not here.any():
            continue
        told = paired(delta[here], unit[here])
        rows.append(
            {
                "domain": domain,
                "tokens": told.tokens,
                "units": told.units,
                "change": told.value,
                "low": told.low,
                "high": told.high,
                "p": told.p,
                "effect": told.effect,
                "same_sign": told.same_sign,
                "perplexity_ratio": float(np.exp(-told.value)),
                "ratio_low": float(np.exp(-told.high)),
                "ratio_high": float(np.exp(-told.low)),
                "worst": float(np.quantile(delta[here], 0.01)),
                "rerouted": float(moved[here].mean()),
                "note": told.note,
            }
        )
    if not rows:
        raise ValueError("no token's log-probability is known in both traces")
    frame = pd.DataFrame(rows)
    frame["p"] = holm(frame["p"])
    frame.insert(7, "survives", frame["p"] <= level)
    return frame.sort_values("change", ignore_index=True)


@checked(before=TRACE, after=TRACE)
def weight_change(before: Trace, after: Trace) -> np.ndarray:
    """[T, L]: half the L1 distance of the combine weights, taken over all experts."""
    # [T, L, K, K]: whether a choice before and a choice after are the same expert
    same = before.experts[..., :, None] == after.experts[..., None, :]
    met_before = (same * after.weights[..., None, :]).sum(axis=-1)
    only_after = after.weights * ~same.any(axis=-2)
    return (np.abs(before.weights - met_before).sum(axis=-1) + only_after.sum(axis=-1)) / 2
