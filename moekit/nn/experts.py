"""The experts' weights, stacked, and which of them compute which rows; ffn.py computes.

Shape letters: N rows, K choices a row, P choices, E experts held here, D model dim, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moekit.nn.operations import PLAIN
from moekit.nn.parts import is_part


@dataclass(frozen=True)
class Assignment:
    """Which expert computes which row: the N rows' K choices, sorted by expert. Choice p is one of row p // K.

    Attributes:
        order: [P] int64, numbers of the choices sorted by expert; those behind the first ``counts.sum()`` are no
            expert's. P = N K.
        counts: [E] int64, how many choices are of each expert.
        choices: K.
        weights: [N K], what each choice's output is multiplied with; None for ones.
    """

    order: Tensor
    counts: Tensor
    choices: int = 1
    weights: Tensor | None = None


class Expert(NamedTuple):
    """The weights of one expert, ``w2 act(w1 x + b1) + b2``: w1 [F, D], b1 [F], w2 [D, F], b2 [D]."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


# Tensors of one expert.
TENSORS = len(Expert._fields)


class Experts(nn.Module):
    """The experts held here, stacked: an :class:`Expert` with E in front of each shape.

    Kernels and files take the stacks from :attr:`tensors`; :meth:`expert` has one expert's weights, ready to compute
    with. Weights of another type are another class with these two.
    """

    operations = PLAIN

    def __init__(self, experts: int, dim: int, ffn_dim: int, activation: str):
        super().__init__()
        self.held, self.width, self.activation = experts, ffn_dim, activation
        self.w1 = nn.Parameter(torch.empty(experts, ffn_dim, dim))
        self.b1 = nn.Parameter(torch.empty(experts, ffn_dim))
        self.w2 = nn.Parameter(torch.empty(experts, dim, ffn_dim))
        self.b2 = nn.Parameter(torch.empty(experts, dim))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stacked tensors, by the names of :class:`Expert`, in that order."""
        return {name: getattr(self, name) for name in Expert._fields}

    def expert(self, number: int) -> Expert:
        """The weights of expert ``number``, counted from 0 among those held here."""
        return Expert(*(stack[number] for stack in self.tensors.values()))

    def unbind(self) -> list[Expert]:
        """Every expert's weights. Unlike those of :meth:`expert`, their gradients are no whole stacks of zeros."""
        stacks = (stack.unbind() for stack in self.tensors.values())
        return [Expert(*weights) for weights in zip(*stacks, strict=True)]

    @is_part("experts")
    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        """What each choice's expert makes of its row, times the choice's weight.

        Args:
            x: [N, D].

        Returns:
            [N K, D], zero for the choices that are no expert's.
        """
        return self.operations.experts_ffn(self, x, assignment)
