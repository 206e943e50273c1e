"""What one forward pass is asked to do besides computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from moekit.nn.cache import Cache
    from moekit.nn.config import ModelConfig
    from moekit.nn.gate import Edit, Routing


@dataclass
class Pass:
    """One forward pass over B samples of T tokens; each module is handed it as ``asked``.

    Attributes:
        fraction: ``capacity_token_fraction``, see :func:`moekit.nn.gate.capacity`.
        groups: G, how many routing groups the samples form; each takes B / G consecutive samples.
        padding: [B, T] bool, or None where nothing is padding.
        record: called with (layer, :class:`moekit.nn.gate.Routing`) by every MoE layer, on the very tensors it uses.
        noise: see :meth:`moekit.nn.gate.Gate.route`, with the layer in front.
        cache: what came before the tokens, see :class:`moekit.nn.cache.Cache`; without one they start a sample. With one,
            padding (right of the real tokens) needs no mask: it stands where no real token looks.
        padded: with a cache, padding behind a short sample of a long beginning may lie beyond the positions that the model has.
        edit: an experiment's changes to the gate's decision in a layer, see moekit/nn/intervene.py.
        rows_expected: the most tokens that any rank brings to this pass; the same number on every rank. With it the dispatch
            reads no number back from the device, as a CUDA graph requires. None: unknown.
    """

    fraction: float | None = None
    groups: int = 1
    padding: Tensor | None = None
    record: Callable[[int, Routing], None] | None = None
    noise: Callable[[int, str, Tensor], Tensor] | None = None
    cache: Cache | None = None
    padded: bool = False
    edit: Callable[[int, ModelConfig], Edit | None] | None = None
    rows_expected: int | None = None
