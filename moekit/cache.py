"""The key/value cache: what attention remembers of a batch of sequences of different lengths.

Each sequence fills its own slots from 0 on, so nothing is padded on the left; what a shorter prompt leaves behind its
end is never looked at and gets overwritten by the tokens that follow.

Shape letters: L layers, B sequences, H heads, M slots, C head dim, T tokens of one forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.config import ModelConfig


class Cache:
    """Keys and values [L, B, H, M, C] of ``lengths`` [B] tokens each; hand it to the model in ``Pass.cache``.

    A forward pass writes its tokens behind what is there and looks back at all of it. It does not move ``lengths``:
    the caller does, by :meth:`advance`, since only the caller knows which tokens were real.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (config.layers, batch, config.heads, slots, config.dim // config.heads)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)

    def positions(self, tokens: int) -> Tensor:
        """[B, T]: the slots, and so the positions from 0, of the next ``tokens`` tokens of each sequence."""
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def visible(self, tokens: int) -> Tensor:
        """[B, 1, T, M] bool: the slots that each of the next ``tokens`` tokens may look at, its own included."""
        slots = torch.arange(self.keys.shape[3], device=self.lengths.device)
        return (slots <= self.positions(tokens)[:, :, None])[:, None]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, T, C] behind what layer ``layer`` has, and return all of its slots: two [B, H, M, C]."""
        slots = self.positions(keys.shape[2])[:, None, :, None].expand_as(keys)
        self.keys[layer].scatter_(2, slots, keys)
        self.values[layer].scatter_(2, slots, values)
        return self.keys[layer], self.values[layer]

    def advance(self, tokens: Tensor | int) -> None:
        """Count ``tokens`` ([B] or a number) as read."""
        self.lengths += tokens

    def select(self, sequences: Tensor) -> None:
        """Keep the sequences ``sequences`` [B'] in this order, repeats allowed: what a beam search chose."""
        self.keys, self.values = self.keys[:, sequences], self.values[:, sequences]
        self.lengths = self.lengths[sequences]
