"""A cache of transformers as moekit's model takes one, and which keys a token looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache


class Keys:
    """The interface of :class:`moekit.nn.cache.Cache` to a cache of transformers, or to none.

    Args:
        at: [B or 1, T], the positions of the tokens, from 0.
        slots: the most positions of a sample.
    """

    # It tells moekit's kernels to attend to what `extend` returns, since this class has no keys and values of its own.
    empty = True

    def __init__(self, cache: Cache | None, at: Tensor, slots: int):
        self.cache, self.at, self.slots = cache, at, slots

    def positions(self, tokens: int) -> Tensor:
        """[B or 1, T], the positions of the tokens, from 0."""
        return self.at

    def extend(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [2, B, H, T, C] of layer ``layer`` -> all that there are, [B, H, M, C] each."""
        return (kv[0], kv[1]) if self.cache is None else self.cache.update(kv[0], kv[1], layer)


def visible(past: int, tokens: int, slots: int, real: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of M = ``slots`` keys each of T = ``tokens`` tokens attends to, after P = ``past`` earlier ones.

    Args:
        real: [B, P + T] bool, what is no padding; None where nothing is.

    Returns:
        [B or 1, 1, T, M] bool; None where there are as many keys as tokens, and each token attends to all up to its own.
    """
    if real is None and slots == tokens:
        return None
    keys = torch.arange(slots, device=device)
    own = torch.arange(past, past + tokens, device=device)[:, None]
    seen = (keys <= own)[None, None]
    if real is None:
        return seen
    # Slots of a cache that are not filled yet come after every token's own.
    filled = F.pad(real, (0, max(0, slots - real.shape[1])))[:, None, None, :slots]
    seen = seen & filled
    # A token that may attend to nothing, such as padding in front, attends to itself, since a softmax over nothing is NaN.
    return seen | (keys == own) & ~seen.any(dim=-1, keepdim=True)
