"""The experts' weights, stacked, and what they compute on rows sorted by expert.

Shape letters: R rows (one a dispatched choice, sorted by expert), E experts held here, D model dim, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def activation_fn(name: str) -> Callable[[Tensor], Tensor]:
    """fairseq's activation functions (``get_activation_fn`` in fairseq/utils.py)."""
    return {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_fast": gelu_tanh,
        "gelu_accurate": gelu_tanh,
        "tanh": torch.tanh,
        "linear": lambda x: x,
    }[name]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class Experts(nn.Module):
    """Feed-forward networks with biases, one for each expert held here: ``w2 act(w1 x + b1) + b2``.

    w1 [E, F, D], b1 [E, F], w2 [E, D, F], b2 [E, D].
    """

    def __init__(self, experts: int, dim: int, ffn_dim: int, activation: str):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, ffn_dim, dim))
        self.b1 = nn.Parameter(torch.empty(experts, ffn_dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, ffn_dim))
        self.b2 = nn.Parameter(torch.empty(experts, dim))
        self.activation = activation_fn(activation)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Every expert's network on its own rows, one expert after the other: slow, and plain to see that it is right.

        Args:
            rows: [R, D], sorted by expert.
            counts: [E] int64, rows of each expert; they sum to R.

        Returns:
            [R, D]
        """
        chunks = rows.split(counts.tolist())
        # Unbound, not indexed: the gradient of an index is a whole stack of zeros.
        weights = zip(self.w1.unbind(), self.b1.unbind(), self.w2.unbind(), self.b2.unbind(), strict=True)
        out = [
            F.linear(self.activation(F.linear(chunk, w1, b1)), w2, b2)
            for chunk, (w1, b1, w2, b2) in zip(chunks, weights, strict=True)
            if len(chunk)
        ]
        return torch.cat(out) if out else rows
