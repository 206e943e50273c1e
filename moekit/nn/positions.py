"""What is added to the embeddings for the places of tokens: learned rows, or sinusoids.

Shape letters: B samples, T tokens of a sample, D model dim.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.nn.config import ModelConfig
from moekit.nn.passes import Pass
from moekit.symbols import PAD


class Positions(nn.Module):
    """Positions count from ``PAD + 1`` and skip padding, which has position ``PAD`` (fairseq's ``make_positions``)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dim = config.dim
        self.weight = None
        # They stay here because a captured graph may read one again.
        self.tables: dict[tuple[int, torch.device], Tensor] = {}
        if config.learned_positions:
            self.weight = nn.Parameter(torch.empty(config.max_positions + PAD + 1, config.dim))

    def forward(self, length: int, device: torch.device, asked: Pass) -> Tensor:
        """The positions of ``length`` tokens a sample: [B, T, D], or [T, D] where all samples have the same."""
        table = self.rows(length if asked.cache is None else asked.cache.slots, device)
        if asked.cache is not None:
            position = asked.cache.positions(length) + PAD + 1
            if asked.padded:
                position = position.clamp(max=len(table) - 1)
        elif asked.padding is not None:
            real = (~asked.padding).long()
            position = real.cumsum(dim=1) * real + PAD
        else:
            # A copy, as below: hooks may write to what comes out, and all models of the width read the same table.
            return table[PAD + 1 : PAD + 1 + length].clone()
        return table[position]

    def rows(self, positions: int, device: torch.device) -> Tensor:
        """The table [rows, D] of at least so many positions; position p, counted from 0, is row p + PAD + 1."""
        return self.table(positions, device) if self.weight is None else self.weight

    def table(self, positions: int, device: torch.device) -> Tensor:
        """Sinusoids [rows, D] of so many positions or more: the number of rows is a power of two, so tables are few."""
        rows = 1 << (positions + PAD).bit_length()
        if (rows, device) not in self.tables:
            self.tables[rows, device] = sinusoids(rows, self.dim, device)
        return self.tables[rows, device]


# Models of the same width share their tables.
@functools.lru_cache(maxsize=32)
def sinusoids(rows: int, dim: int, device: torch.device) -> Tensor:
    """[rows, dim] float32: sines of geometric frequencies, then cosines; an odd last column and row ``PAD`` are zero.

    fairseq/modules/sinusoidal_positional_embedding.py, which differs slightly from Vaswani et al. 2017, section 3.5.

    Raises:
        ValueError: ``dim`` is 2 or 3, which leaves no step from one frequency to the next.
    """
    half = dim // 2
    if half == 1:
        raise ValueError(f"sinusoidal positions of dim {dim} are not defined; expected a dim of 4 or more")
    frequency = torch.exp(torch.arange(half, dtype=torch.float) * -(math.log(10000) / (half - 1)))
    angle = torch.arange(rows, dtype=torch.float)[:, None] * frequency
    table = F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, dim % 2))
    table[PAD] = 0
    return table.to(device)
