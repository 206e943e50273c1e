"""A trace as explorer.js takes it: a header that JSON can hold, and little-endian typed arrays.

At 250k tokens, 6 layers and two choices this is 28 MB, sent once; a click then needs no kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moekit.notebook.pieces import pieces
from moekit.notebook.standalone import listed
from moekit.routing.trace import need_layers
from moekit.symbols import PAD

if TYPE_CHECKING:
    from moekit.data import Codec
    from moekit.routing.trace import Trace

# in place of a piece's number where the target or the prediction is unknown
NONE = 0xFFFFFFFF
# the bit of a choice that says that it was not dispatched; the other bits are the expert
UNDISPATCHED = 0x8000
# Probabilities, weights and entropy/log(E) are stored as shares of it: exact to 1e-5.
UNIT = 65_535


def pack(
    trace: Trace,
    codec: Codec | None = None,
    domains: np.ndarray | None = None,
    *,
    mask: str | None,
    cut: str | None,
) -> tuple[dict, list[np.ndarray]]:
    """Header and arrays.

    Args:
        codec: whose ``pieces(ids)`` shows tokens; None: their ids.
        domains: [T] labels; None: one domain, called "all".
        mask: why experts cannot be masked; None if they can.
        cut: what of the trace is not here; None if nothing.

    Returns:
        The header: ``T``, ``K``, ``E``, ``layers``, ``pieces``, ``domains``, ``mask``, ``cut``, the constants ``NONE``,
        ``UNDISPATCHED`` and ``UNIT``, and ``arrays`` as (name, dtype) pairs; and the arrays, one-dimensional: ``choice``,
        ``prob`` and ``weight`` are [L, T, K] and ``entropy`` is [L, T], the others [T].
    """
    tokens = len(trace)
    if tokens == 0:
        raise ValueError("the trace has no tokens to explore")
    need_layers(trace, "explore")
    if trace.num_experts >= UNDISPATCHED:
        raise ValueError(f"{trace.num_experts} experts; the explorer knows up to {UNDISPATCHED - 1}")
    if domains is None:
        domains = np.full(tokens, "all")
    labels, domain = np.unique(trace.labels_of(domains), return_inverse=True)

    known_target = trace.target != PAD
    known_prediction = trace.predicted >= 0
    ids = np.unique(
        np.concatenate([trace.token, trace.target[known_target], trace.predicted[known_prediction]])
    )

    def place(column: np.ndarray, known: np.ndarray | bool = True) -> np.ndarray:
        return np.where(known, np.searchsorted(ids, column), NONE).astype(np.uint32)

    def share(values: np.ndarray) -> np.ndarray:
        """[T, L, ...] -> [L, T, ...] in units."""
        return np.rint(np.clip(np.nan_to_num(values.swapaxes(0, 1)), 0, 1) * UNIT).astype(np.uint16)

    choice = trace.experts.astype(np.uint16) | np.where(trace.kept, 0, UNDISPATCHED).astype(np.uint16)
    arrays = {
        "sample": trace.sample.astype(np.int32),
        "position": trace.position.astype(np.int32),
        "token": place(trace.token),
        "target": place(trace.target, known_target),
        "predicted": place(trace.predicted, known_prediction),
        "logprob": trace.logprob.astype(np.float32),
        "generated": trace.generated.astype(np.uint8),
        "domain": domain.astype(np.uint16 if len(labels) <= 1 << 16 else np.uint32),
        "choice": choice.swapaxes(0, 1),
        "prob": share(trace.probs),
        "weight": share(trace.weights),
        "entropy": share(trace.entropy / np.log(max(2, trace.num_experts))),
    }
    names, flat = listed(arrays)
    header = {
        "T": tokens,
        "K": trace.top_k,
        "E": trace.num_experts,
        "layers": list(trace.layers),
        "pieces": pieces(codec, ids),
        "NONE": NONE,
        "UNDISPATCHED": UNDISPATCHED,
        "UNIT": UNIT,
        "domains": [str(label) for label in labels],
        "mask": mask,
        "cut": cut,
        "arrays": names,
    }
    return header, flat


def choose_samples(sample: np.ndarray, domains: np.ndarray | None, max_tokens: int) -> np.ndarray:
    """Whole samples that together have at most ``max_tokens`` tokens, spread evenly over domains and over the trace.

    Args:
        sample: [T] int, sorted.
        domains: [T] labels or None; a sample counts to the domain of most of its tokens.

    Returns:
        The chosen samples' numbers, sorted; at least one, whatever its length.
    """
    numbers, start, sizes = np.unique(sample, return_index=True, return_counts=True)
    if len(sample) <= max_tokens:
        return numbers
    groups: dict[str, list[int]] = {}
    for index, (first, size) in enumerate(zip(start, sizes, strict=True)):
        label = ""
        if domains is not None:
            names, counts = np.unique(domains[first : first + size], return_counts=True)
            label = str(names[counts.argmax()])
        groups.setdefault(label, []).append(index)
    turns = sorted((spread, index) for group in groups.values() for spread, index in _spread(group))
    chosen: list[int] = []
    total = 0
    for _, index in turns:
        if total + sizes[index] <= max_tokens or not chosen:
            chosen.append(index)
            total += sizes[index]
    return numbers[sorted(chosen)]


def _spread(group: Sequence[int]) -> list[tuple[int, int]]:
    """The group's members with their turn: any first few turns are spread over the whole group."""
    # The order of van der Corput's sequence: by the place's binary digits in reverse.
    order = sorted(range(len(group)), key=lambda place: int(f"{place:032b}"[::-1], 2))
    return [(turn, group[place]) for turn, place in enumerate(order)]
