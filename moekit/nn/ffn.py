"""What experts compute: feed-forward networks on assigned rows, in a plain loop and with a grouped product from torch.

:func:`loop` is simple and slow, and the others are checked against it; the one with Triton is in
moekit/nn/kernels/grouped.py. The table in operations.py says which one runs.

Each takes experts, rows and an assignment as :meth:`moekit.nn.experts.Experts.forward` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from moekit.nn.experts import Assignment, Experts


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


def loop(experts: Experts, x: Tensor, assignment: Assignment) -> Tensor:
    """One expert after the other."""
    choices, weights = assignment.choices, assignment.weights
    counts = assignment.counts.tolist()
    order = assignment.order[: sum(counts)]
    activation = activation_fn(experts.activation)
    weights_of = experts.unbind().__getitem__ if torch.is_grad_enabled() else experts.expert
    done = []
    for number, rows in enumerate(x[order // choices].split(counts)):
        if len(rows):
            w1, b1, w2, b2 = weights_of(number)
            done.append(F.linear(activation(F.linear(rows, w1, b1)), w2, b2))
    out = x.new_zeros(len(x) * choices, x.shape[1])
    if not done:
        return out
    done = torch.cat(done)
    done = done if weights is None else done * weights[order, None]
    # In training, autocast multiplies in another dtype than that of ``out``.
    return out.index_copy(0, order, done.to(out.dtype))


def grouped_mm(experts: Experts, x: Tensor, assignment: Assignment) -> Tensor:
    """``torch.nn.functional.grouped_mm`` and what it lacks around it: fast for bfloat16 on Hopper.

    It refuses matrices whose rows are no multiple of 16 bytes; :func:`loop` computes with these.
    """
    w1, b1, w2, b2 = experts.tensors.values()
    if any(matrix.shape[-1] * matrix.element_size() % 16 for matrix in (w1, w2)):
        return loop(experts, x, assignment)
    order, counts, choices = assignment.order, assignment.counts, assignment.choices
    ends = counts.cumsum(0)
    position = torch.arange(len(order), device=x.device)
    if len(counts) == 0:
        return x.new_zeros(len(x) * choices, x.shape[1])
    expert = torch.searchsorted(ends, position, right=True).clamp_(max=len(counts) - 1)
    ends = ends.int()
    h = F.grouped_mm(x[order // choices], w1.transpose(1, 2), offs=ends) + b1[expert]
    y = F.grouped_mm(activation_fn(experts.activation)(h), w2.transpose(1, 2), offs=ends) + b2[expert]
    if assignment.weights is not None:
        y = y * assignment.weights[order, None]
    # grouped_mm leaves anything in the rows behind the last expert's.
    y = y.masked_fill((position >= ends[-1])[:, None], 0)
    return x.new_zeros(len(x) * choices, x.shape[1]).index_copy(0, order, y)
