"""The key/value cache of a batch of sequences of different lengths.

Each sequence fills its slots from 0 on, so nothing is padded on the left. The slots after a shorter prompt hold keys and
values of padding: no token attends to them, and later tokens overwrite them.

Shape letters: L layers, B sequences, H heads, M slots, C head dim, T tokens of one forward pass.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.nn.config import ModelConfig

# The number of slots is a multiple of this, for which the attention kernels are fast.
SLOTS = 64


def slots_for(tokens: int) -> int:
    """The slots of a cache in which a sequence of ``tokens`` tokens has room."""
    return -(-tokens // SLOTS) * SLOTS


class Cache:
    """Keys and values [L, 2, B, H, M, C] of ``lengths`` [B] tokens per sequence; the model takes it as ``Pass.cache``.

    A forward pass writes its tokens after the tokens in the cache and attends to all of them. It does not change
    ``lengths``: the caller calls :meth:`advance`, since only the caller can tell real tokens from padding.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (config.layers, 2, batch, config.heads, slots, config.dim // config.heads)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)
        self.empty = True
        self._write: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.kv.shape[4]

    def positions(self, tokens: int) -> Tensor:
        """[B, T]: the slots of the next ``tokens`` tokens of each sequence, which are also their positions from 0."""
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def open(self, tokens: int) -> Tensor | None:
        """Begin a forward pass.

        Returns:
            [B, 1, T, M] bool: the slots that each token may attend to, including the slot of the token. None for the
            first pass, whose tokens attend only to each other.
        """
        positions = self.positions(tokens)
        self._write = positions[:, None, :, None]
        if self.empty:
            return None
        return (torch.arange(self.slots, device=positions.device) <= positions[:, :, None])[:, None]

    def extend(self, layer: int, kv: Tensor) -> Tensor:
        """Write keys and values [2, B, H, T, C] of layer ``layer``, and return all that the new tokens attend to."""
        self.kv[layer].scatter_(3, self._write.expand_as(kv), kv)
        return kv if self.empty else self.kv[layer]

    def advance(self, tokens: Tensor | int) -> None:
        """Count ``tokens`` ([B] or a number) as read."""
        self.lengths += tokens
        self.empty = False

    def counting(self, lengths: Tensor) -> Cache:
        """The same keys and values, with ``lengths`` [B] of its own."""
        other = copy.copy(self)
        other.lengths = lengths
        return other

    def clear(self) -> None:
        """Remove all tokens in place: a captured graph goes on using the same tensors."""
        # Old keys and values are masked, but a NaN among them would pass through the mask.
        self.kv.zero_()
        self.lengths.zero_()
        self.empty = True

    def grow(self, slots: int) -> None:
        """Enlarge the cache to ``slots`` tokens per sequence."""
        self.kv = F.pad(self.kv, (0, 0, 0, slots - self.slots))

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences ``sequences`` [B'] in this order; a beam search may repeat one."""
        self.kv = self.kv[:, :, sequences]
        self.lengths = self.lengths[sequences]

    @staticmethod
    def joined(caches: list[Cache]) -> Cache:
        """One cache with the sequences of all ``caches``, after the first pass of each."""
        first = caches[0]
        if len(caches) > 1:
            first.kv = torch.cat([cache.kv for cache in caches], dim=2)
            first.lengths = torch.cat([cache.lengths for cache in caches])
        return first
