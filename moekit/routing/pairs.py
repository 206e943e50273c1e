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
    if differ := _differing(one, other):
        raise ValueError(f"{differ} of {len(one)} tokens differ: the traces are not of the same text")
    return one, other


def same_tokens(one: Trace, other: Trace) -> bool:
    """Whether row by row two traces are of the same tokens, as :func:`align` gives them."""
    return one is other or (np.array_equal(_places(one), _places(other)) and not _differing(one, other))


def _places(trace: Trace) -> np.ndarray:
    """[T] int64, each token's sample and position."""
    return trace.sample.astype(np.int64) << 32 | trace.position


def _differing(one: Trace, other: Trace) -> int:
    """How many tokens of traces with the same places differ."""
    known = (one.token >= 0) & (other.token >= 0)
    return int((one.token != other.token)[known].sum())


def kept_by_expert(trace: Trace) -> np.ndarray:
    """[T, L, K] int16: the experts that got the token in ascending order, -1 for each choice not dispatched."""
    return np.sort(np.where(trace.kept, trace.experts, np.int16(-1)), axis=2)
