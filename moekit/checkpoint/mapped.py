"""The experts' tensors where they lie: in the mapped files, for those who read one now and then."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moekit.checkpoint.joining import joined
from moekit.checkpoint.keys import places
from moekit.checkpoint.placement import placed
from moekit.checkpoint.plan import Plan
from moekit.nn.experts import Expert


@dataclass
class Mapped:
    """A tensor in mapped files; a training with ``--use-sharded-state`` has cut it into parts."""

    # The index of each part's first number, and the part.
    parts: list[tuple[int, Tensor]] = field(default_factory=list)

    def read(self, shape: torch.Size) -> Tensor:
        """The tensor, on the CPU, in the type of the files; a copy only if it is cut."""
        return joined(self.parts, shape)


def mapped(plan: Plan, held: range) -> dict[int, list[dict[str, Mapped]]]:
    """By layer, for each of the physical experts ``held`` its tensors by the names of :class:`moekit.nn.experts.Expert`."""
    found = {
        layer: [{name: Mapped() for name in Expert._fields} for _ in held] for layer in plan.config.moe_layers
    }
    for source in plan.needed(held):
        weights = plan.open(source)
        for key, target in places(source, weights, plan.config):
            there = placed(target, plan.physical)
            if there.where is not None and there.expert in held:
                layer, expert = there.where
                begin = weights.cut.get(key, (0,))[0]
                name = target.name.rpartition(".")[-1]
                found[layer][expert - held.start][name].parts.append((begin, weights[key]))
    return found
