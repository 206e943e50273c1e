"""Two traces of one text, token by token."""

from __future__ import annotations

import numpy as np

from moekit.checked import checked
from moekit.routing.trace import TRACE, Trace


@checked(one=TRACE, other=TRACE)
def align(one: Trace, other: Trace) -> tuple[Trace, Trace]:
    """The parts of two traces that cover the same samples and positions, in the same order.

    A token that one of them does not know (-1, as in files of tools that record only experts) is unknown and not different.

    Raises:
        ValueError: they share no token, differ in a token's id, or are of other layers or another number of experts.
    """
    for name in ("layers", "num_experts", "top_k"):
        if getattr(one, name) != getattr(other, name):
            raise ValueError(
                f"the traces' {name} differ: {getattr(one, name)} and {getattr(other, name)}; select(layers=...) what both "
                "have, or compare log-probabilities alone by without_experts() of both"
            )
    places = [_places(one), _places(other)]
    if not np.array_equal(*places):
        common = np.intersect1d(*places, assume_unique=True)
        one, other = (t.select(mask=np.isin(p, common)) for t, p in zip((one, other), places, strict=True))
    if not len(one):
        raise ValueError(
            "the traces have no sample and position in common; expected traces of the same text: "
            "join([trace], renumber=True) numbers samples from 0"
        )
    if differ := _differing(one.token, other.token):
        raise ValueError(f"{differ} of {len(one)} tokens differ: the traces are not of the same text")
    return one, other


def units_in(other: Trace, one: Trace, unit: np.ndarray) -> np.ndarray | None:
    """The units of the tokens of ``other``, whose samples may have more or fewer tokens than those of ``one``.

    Args:
        unit: [T] the units of the tokens of ``one``.

    Returns:
        For each token of ``other`` the unit of the token of ``one`` at its place, else of the last one before it in its sample,
        else of the sample's first; -1 in samples that ``one`` lacks. None where they share no sample, or a token differs.
    """
    wanted, places = _places(one), _places(other)
    order = np.argsort(wanted, kind="stable")
    after = np.searchsorted(wanted, places, side="right", sorter=order)
    before = order[np.maximum(after - 1, 0)]
    same = wanted[before] == places
    nearest = np.where(one.sample[before] == other.sample, before, order[np.minimum(after, len(wanted) - 1)])
    shared = one.sample[nearest] == other.sample
    if not shared.any() or _differing(one.token[before[same]], other.token[same]):
        return None
    return np.where(shared, unit[nearest], -1)


def _places(trace: Trace) -> np.ndarray:
    """[T] int64, each token's sample and position."""
    return trace.sample.astype(np.int64) << 32 | trace.position


def _differing(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens of the same places differ."""
    known = (one >= 0) & (other >= 0)
    return int((one != other)[known].sum())


def kept_by_expert(trace: Trace) -> np.ndarray:
    """[T, L, K] int16: the experts that got the token in ascending order, -1 for each choice not dispatched."""
    return np.sort(np.where(trace.kept, trace.experts, np.int16(-1)), axis=2)
