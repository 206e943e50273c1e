"""What differs between two traces of the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from moekit.routing.trace import Trace


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same tokens.

    Attributes:
        tokens: one row per token of both: ``sample``, ``position``, ``token``, ``target``, ``logprob_before``,
            ``logprob_after``, ``delta`` (after - before, nats), ``layers_changed`` (layers where the set of chosen
            experts differs), ``first_changed`` (the first such layer, -1 if none), ``drops_before``, ``drops_after``
            (choices not dispatched, over all layers).
        layers: one row per layer: shares of tokens whose set of experts (``experts_changed``), first choice
            (``first_choice_changed``) or kept choices (``kept_changed``) differ, the shares of choices not dispatched
            (``dropped_before``, ``dropped_after``), and the mean ``weight_change`` (half the sum over experts of
            |weight before - after|: 1 is all of it).
        delta: mean change of the log-probability, nats, over the tokens where both know it.
    """

    tokens: pd.DataFrame
    layers: pd.DataFrame
    delta: float


def compare(before: Trace, after: Trace) -> Comparison:
    """What differs between two traces of the same tokens: an intervention, another capacity, another checkpoint.

    Raises:
        ValueError: as :func:`moekit.routing.trace.align`; or the layers or numbers of experts differ.
    """
    import pandas as pd

    from moekit.routing.trace import align, kept_by_expert

    before, after = align(before, after)
    sets = np.sort(before.experts, axis=2) != np.sort(after.experts, axis=2)
    changed = sets.any(axis=2)
    first = np.where(changed.any(axis=1), np.array(before.layers)[changed.argmax(axis=1)], -1)
    delta = after.logprob - before.logprob
    tokens = pd.DataFrame(
        {
            "sample": before.sample,
            "position": before.position,
            "token": before.token,
            "target": before.target,
            "logprob_before": before.logprob,
            "logprob_after": after.logprob,
            "delta": delta,
            "layers_changed": changed.sum(axis=1),
            "first_changed": first,
            "drops_before": (~before.kept).sum(axis=(1, 2)),
            "drops_after": (~after.kept).sum(axis=(1, 2)),
        }
    )
    kept = kept_by_expert(before) != kept_by_expert(after)
    layers = pd.DataFrame(
        {
            "layer": before.layers,
            "experts_changed": changed.mean(axis=0),
            "first_choice_changed": (before.experts[:, :, 0] != after.experts[:, :, 0]).mean(axis=0),
            "kept_changed": kept.any(axis=2).mean(axis=0),
            "dropped_before": (~before.kept).mean(axis=(0, 2)),
            "dropped_after": (~after.kept).mean(axis=(0, 2)),
            "weight_change": weight_change(before, after).mean(axis=0),
        }
    )
    known = delta[~np.isnan(delta)]
    return Comparison(tokens, layers, float(known.mean(dtype=np.float64)) if len(known) else math.nan)


def weight_change(before: Trace, after: Trace) -> np.ndarray:
    """[T, L]: half the L1 distance of the combine weights, taken over all experts."""
    # [T, L, K, K]: whether a choice before and a choice after are the same expert
    same = before.experts[..., :, None] == after.experts[..., None, :]
    met_before = (same * after.weights[..., None, :]).sum(axis=-1)
    only_after = after.weights * ~same.any(axis=-2)
    return (np.abs(before.weights - met_before).sum(axis=-1) + only_after.sum(axis=-1)) / 2
