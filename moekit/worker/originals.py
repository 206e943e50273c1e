"""The experts of the checkpoint's files, in place of quantised ones, for a comparison; the weights stay in the mapped files."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moekit import checkpoint
from moekit.checkpoint.mapped import Mapped, mapped
from moekit.nn.dispatch import owned
from moekit.nn.experts import Assignment, Expert, Experts, QuantisedExperts
from moekit.nn.ffn import loop
from moekit.nn.resident import Resident
from moekit.ranks import Rank

# Key of the rank's state for the quantised experts and the dispatch of each layer, while :class:`Originals` compute.
ASIDE = "quantised"


class Originals(Experts):
    """Experts whose weights are read from the files when they compute, one expert at a time, in a plain loop.

    The quantised experts compute the same rows. The difference is added up before the weights of the gate.

    Attributes:
        difference, size: sums of squares of (quantised - original) and of original, [1] float64.
    """

    def __init__(self, quantised: QuantisedExperts | Resident, weights: list[dict[str, Mapped]]):
        nn.Module.__init__(self)
        self.held, self.width, self.activation = quantised.held, quantised.width, quantised.activation
        self.quantised, self.weights = quantised, weights
        # Only the shapes, the dtype and the device of these are used.
        self.like = quantised.slots.experts if isinstance(quantised, Resident) else quantised
        self.difference, self.size = self.like.b1.new_zeros((2, 1), dtype=torch.float64)

    def expert(self, number: int) -> Expert:
        like, own = self.like.b1, self.like.tensors
        weights = self.weights[number].items()
        return Expert(**{name: tensor.read(own[name].shape[1:]).to(like) for name, tensor in weights})

    def forward(self, x: Tensor, assignment: Assignment) -> Tensor:
        alone = replace(assignment, weights=None)
        exact, found = loop(self, x, alone), self.quantised(x, alone)
        self.difference += (found - exact).double().square().sum()
        self.size += exact.double().square().sum()
        if assignment.weights is None:
            return exact
        # The weight of a dropped choice may be NaN.
        return exact * assignment.weights.nan_to_num(0.0)[:, None]


def put(rank: Rank, plan: checkpoint.Plan) -> None:
    """Let the model compute with the experts of the files, and dispatch in a way that calls them."""
    model = rank.state["model"]
    held = owned(plan.config.experts, rank.world_size, rank.rank)
    found = mapped(plan, held)
    aside = rank.state[ASIDE] = []
    for number, layer in enumerate(model.layers):
        if layer.moe is not None:
            aside.append((layer.moe, layer.moe.experts, layer.moe.dispatch))
            layer.moe.experts = Originals(layer.moe.experts, found[number])
            # Kernels that exchange rows by themselves take quantised experts only.
            layer.moe.dispatch = getattr(layer.moe.dispatch, "otherwise", layer.moe.dispatch)


def take_away(rank: Rank) -> dict[int, tuple[float, float]]:
    """Let the model compute with its quantised experts again.

    Returns:
        For each layer :attr:`Originals.difference` and :attr:`Originals.size` of this rank.
    """
    found = {}
    for moe, experts, dispatch in rank.state.pop(ASIDE, []):
        found[moe.index] = moe.experts.difference.item(), moe.experts.size.item()
        moe.experts, moe.dispatch = experts, dispatch
    return found
