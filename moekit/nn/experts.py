"""The experts' weights, stacked, and which of them compute which rows; ffn.py computes.

Shape letters: N rows, K choices a row, P choices, E experts held here, D model dim, F expert width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moekit.nn.operations import PLAIN
from moekit.nn.parts import is_part, part
from moekit.nn.quantise import dequantise, quantise


@dataclass(frozen=True)
class Assignment:
    """Which expert computes which row: the N rows' K choices, sorted by expert. Choice p is one of row p // K.

    Attributes:
        order: [P] int64, numbers of the choices sorted by expert; those behind the first ``counts.sum()`` are no
            expert's. P = N K.
        counts: [E] int64, how many choices are of each expert.
        choices: K.
        weights: [N K], what each choice's output is multiplied with; None for ones.
        whole: the choices and the experts of a larger assignment that this one is a part of, or None. Kernels choose
            their blocks by it, so that parts give the same bits as the whole.
    """

    order: Tensor
    counts: Tensor
    choices: int = 1
    weights: Tensor | None = None
    whole: tuple[int, int] | None = None


def expert_of(assignment: Assignment) -> Tensor:
    """[P] int64, the expert of each choice; E for those that are no expert's."""
    order, counts = assignment.order, assignment.counts
    places = torch.arange(len(order), device=order.device)
    expert = torch.searchsorted(counts.cumsum(0), places, right=True)
    return torch.empty_like(order).scatter(0, order, expert)


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

    Attributes:
        scales: of the rows of ``w1`` and ``w2``, [E, F] and [E, D] float32, where the weights are multiples of them.
    """

    operations = PLAIN
    scales: tuple[Tensor | None, Tensor | None] = (None, None)

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

    def stacks(self) -> dict[str, Tensor]:
        """All tensors whose first axis is the experts, by name; a subclass may have more than :attr:`tensors`."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def over(self, stacks: dict[str, Tensor]) -> Experts:
        """Experts of the same kind with other tensors, which have the names of :meth:`stacks`."""
        other = copy.copy(self)
        other._parameters, other._buffers = {}, {}
        for name, stack in stacks.items():
            other.register_buffer(name, stack)
        return other

    def expert(self, number: int) -> Expert:
        """The weights of expert ``number``, counted from 0 among those held here."""
        return Expert(*(stack[number] for stack in self.tensors.values()))

    def unbind(self) -> list[Expert]:
        """The weights of all experts. With :meth:`expert`, the gradient of each would be a whole stack, zero elsewhere."""
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


class QuantisedExperts(Experts):
    """Experts whose matrices have numbers of one byte, and a scale for each row (:mod:`moekit.nn.quantise`).

    The biases keep their type, which is that of the computation. These experts do not learn.

    Args:
        like: experts of this size and type on this device; the memory of the new ones is uninitialised.
        kind: int8 or float8_e4m3fn.
    """

    def __init__(self, like: Experts, kind: torch.dtype):
        nn.Module.__init__(self)
        self.held, self.width, self.activation = like.held, like.width, like.activation
        self.operations = like.operations
        for name, stack in like.tensors.items():
            of = kind if stack.dim() == 3 else stack.dtype
            # A tensor like one on the meta device would import torch's compiler.
            own = torch.empty(stack.shape, dtype=of, device=stack.device)
            setattr(self, name, nn.Parameter(own, requires_grad=False))
            if stack.dim() == 3:
                scale = torch.empty(stack.shape[:2], dtype=torch.float32, device=stack.device)
                self.register_buffer(f"{name}_scale", scale)

    @classmethod
    def of(cls, experts: Experts, kind: torch.dtype) -> QuantisedExperts:
        """The same experts with numbers of one byte."""
        found = cls(experts, kind)
        for number in range(experts.held):
            for name, weights in experts.expert(number)._asdict().items():
                found.fill(name, number, weights)
        return found

    def fill(self, name: str, number: int, weights: Tensor) -> None:
        """Write the tensor ``name`` of :class:`Expert` of expert ``number``."""
        own = getattr(self, name).data[number]
        if weights.dim() == 2:
            quantise(weights, own, getattr(self, f"{name}_scale")[number])
        else:
            own.copy_(weights)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        return self.w1_scale, self.w2_scale

    def expert(self, number: int) -> Expert:
        w1, b1, w2, b2 = (stack[number] for stack in self.tensors.values())
        scale1, scale2 = (scale[number] for scale in self.scales)
        with part("experts up"):
            w1 = dequantise(w1, scale1, b1.dtype)
        with part("experts down"):
            w2 = dequantise(w2, scale2, b2.dtype)
        return Expert(w1, b1, w2, b2)

    def unbind(self) -> list[Expert]:
        return [self.expert(number) for number in range(self.held)]
