"""The experts' weights, stacked, and what they compute, with a plain loop and a grouped product from torch.

``Experts.backend`` names how: "loop" is slow and plain to see that it is right, and the others are checked against it;
"triton" is moekit/nn/kernels/grouped.py.

Shape letters: N rows, K choices a row, P places (a place p is choice p % K of row p // K), E experts held here,
D model dim, F expert width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("loop", "grouped_mm", "triton")


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """``Experts.backend`` for inference there: ``backend``, or for "auto" what is fastest.

    Raises:
        ValueError: there is no such backend, or not there.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r}; expected auto, {', '.join(BACKENDS)}")
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    runs = runs and importlib.util.find_spec("triton") is not None
    if backend == "triton" and not runs:
        raise ValueError(f"backend='triton' needs the package triton and a GPU, and this is a {device.type}")
    if backend != "auto":
        return backend
    if device.type != "cuda":
        return "loop"
    if runs:
        return "triton"
    return "grouped_mm" if dtype == torch.bfloat16 else "loop"


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
        self.activation = activation
        self.backend = "loop"

    def forward(
        self, x: Tensor, order: Tensor, counts: Tensor, choices: int = 1, weights: Tensor | None = None
    ) -> Tensor:
        """What each place's expert makes of its row, times the place's weight.

        Args:
            x: [N, D].
            order: [P] int64, places sorted by expert; those behind the first ``counts.sum()`` are no expert's.
            counts: [E] int64, places of each expert.
            choices: K.
            weights: [N K], or None for ones.

        Returns:
            [N K, D], zero at the places that are no expert's.
        """
        if self.backend == "triton":
            from moekit.nn.kernels.grouped import grouped_ffn

            return grouped_ffn(self, x, order, counts, choices, weights)
        return {"loop": loop, "grouped_mm": grouped_mm}[self.backend](
            self, x, order, counts, choices, weights
        )


def loop(
    experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor | None
) -> Tensor:
    """One expert after the other."""
    counts = counts.tolist()
    order = order[: sum(counts)]
    activation = activation_fn(experts.activation)
    stacks = experts.w1, experts.b1, experts.w2, experts.b2
    if torch.is_grad_enabled():  # the gradient of an index is a whole stack of zeros
        stacks = tuple(stack.unbind() for stack in stacks)
    done = []
    for expert, rows in enumerate(x[order // choices].split(counts)):
        if len(rows):
            w1, b1, w2, b2 = (stack[expert] for stack in stacks)
            done.append(F.linear(activation(F.linear(rows, w1, b1)), w2, b2))
    out = x.new_zeros(len(x) * choices, x.shape[1])
    if not done:
        return out
    done = torch.cat(done)
    done = done if weights is None else done * weights[order, None]
    return out.index_copy(0, order, done.to(out.dtype))  # in training, autocast multiplies in another type


def grouped_mm(
    experts: Experts, x: Tensor, order: Tensor, counts: Tensor, choices: int, weights: Tensor | None
) -> Tensor:
    """``torch.nn.functional.grouped_mm`` and what it lacks around it: fast for bfloat16 on Hopper."""
    ends = counts.cumsum(0)
    place = torch.arange(len(order), device=x.device)
    if len(counts) == 0:
        return x.new_zeros(len(x) * choices, x.shape[1])
    expert = torch.searchsorted(ends, place, right=True).clamp_(max=len(counts) - 1)
    ends = ends.int()
    h = F.grouped_mm(x[order // choices], experts.w1.transpose(1, 2), offs=ends) + experts.b1[expert]
    y = F.grouped_mm(activation_fn(experts.activation)(h), experts.w2.transpose(1, 2), offs=ends)
    y = y + experts.b2[expert]
    if weights is not None:
        y = y * weights[order, None]
    # What grouped_mm leaves in the rows behind the last expert's is no number to rely on.
    y = y.masked_fill((place >= ends[-1])[:, None], 0)
    return x.new_zeros(len(x) * choices, x.shape[1]).index_copy(0, order, y)
