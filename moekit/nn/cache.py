"""The key/value cache of a batch of sequences of different lengths.

Each sequence fills its own slots from 0 on, so nothing is padded on the left. The slots behind a shorter prompt hold
keys and values of padding: no token attends to them, and the tokens that follow overwrite them.

Shape letters: L layers, B sequences, H heads, M slots, C head dim, T tokens of one forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.nn.config import ModelConfig

# Attention's kernels are fast where the number of slots is a multiple of this one.
SLOTS = 64


class Cache:
    """Keys and values [L, 2, B, H, M, C] of ``lengths`` [B] tokens each; hand it to the model in ``Pass.cache``.

    A forward pass writes its tokens behind those that are there and attends to all of them. It does not change
    ``lengths``: the caller does, by :meth:`advance`, since only the caller knows which tokens were real.
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
        """[B, T]: the slots, and so the positions from 0, of the next ``tokens`` tokens of each sequence."""
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def open(self, tokens: int) -> Tensor | None:
        """Begin a forward pass: [B, 1, T, M] bool, the slots that each of its tokens may attend to, its own included.

        None for the first pass, whose tokens attend to each other alone.
        """
        positions = self.positions(tokens)
        self._write = positions[:, None, :, None]
        if self.empty:
            return None
        return (torch.arange(self.slots, device=positions.device) <= positions[:, :, None])[:, None]

    def extend(self, layer: int, kv: Tensor) -> Tensor:
        """Write [2, B, H, T, C] behind what layer ``layer`` has, and return what its tokens attend to."""
        self.kv[layer].scatter_(3, self._write.expand_as(kv), kv)
        return kv if self.empty else self.kv[layer]

    def advance(self, tokens: Tensor | int) -> None:
        """Count ``tokens`` ([B] or a number) as read."""
        self.lengths += tokens
        self.empty = False

    def clear(self) -> None:
        """Forget all tokens, where the tensors are: a captured graph goes on reading and writing them."""
        # What is left of other sequences is masked, but a NaN among it would come through the mask.
        self.kv.zero_()
        self.lengths.zero_()
        self.empty = True

    def grow(self, slots: int) -> None:
        """Enlarge it to ``slots`` tokens a sequence."""
        self.kv = F.pad(self.kv, (0, 0, 0, slots - self.slots))

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences ``sequences`` [B'] in this order; a beam search may repeat one."""
        self.kv = self.kv[:, :, sequences]
        self.lengths = self.lengths[sequences]

    @staticmethod
    def joined(caches: list[Cache]) -> Cache:
        """All sequences of ``caches`` in one; their first passes are over."""
        first = caches[0]
        if len(caches) > 1:
            first.kv = torch.cat([cache.kv for cache in caches], dim=2)
            first.lengths = torch.cat([cache.lengths for cache in caches])
        return first
