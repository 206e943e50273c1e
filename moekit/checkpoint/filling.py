"""What of a model is filled, by which tensors, and the views of a rank's parameters that they are copied to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moekit.checkpoint.inspection import NonFinite
from moekit.checkpoint.keys import Place

# The file and the key of a tensor.
Written = tuple[Path, str]


class Filling(dict[Place, list[tuple[range, Written]]]):
    """Which numbers of each place are filled, and by what."""

    def add(self, place: Place, numbers: range, by: Written) -> Written | None:
        """What has filled one of ``numbers`` before, if something has."""
        # Most places are filled by one tensor.
        others = self.setdefault(place, [])
        before = None
        if others:
            before = next((by for r, by in others if r.start < numbers.stop and numbers.start < r.stop), None)
        others.append((numbers, by))
        return before

    def missing(self, place: Place, count: int) -> int | None:
        """The first of ``count`` numbers that nothing fills."""
        found = self.get(place, [])
        if len(found) == 1 and found[0][0].start == 0:
            end = found[0][0].stop
            return end if end < count else None
        end = 0
        for numbers, _ in sorted(found, key=lambda one: one[0].start):
            if numbers.start > end:
                break
            end = max(end, numbers.stop)
        return end if end < count or place not in self else None


class Filled(dict[Place, int]):
    """How often each place was filled: once; ``nonfinite`` are the tensors with weights that are not finite."""

    nonfinite: list[NonFinite]


class Targets:
    """A rank's parameters as views to fill, and the scales of those that are quantised.

    Args:
        first_expert: the first one that the parameters hold.
    """

    def __init__(self, model: torch.nn.Module, first_expert: int):
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.first = first_expert
        self.device = next(iter(self.parameters.values())).device
        # The views of all experts of a stack are made at once.
        self.experts = {n: p.data.unbind() for n, p in self.parameters.items() if ".moe.experts." in n}
        self.scales = {
            name.removesuffix("_scale"): scales.unbind()
            for name, scales in model.named_buffers()
            if name.endswith("_scale")
        }

    def view(self, place: Place) -> Tensor:
        if place.part == "expert":
            return self.experts[place.name][place.expert - self.first]
        return place.of(self.parameters[place.name].data)

    def size(self, place: Place) -> int:
        """How many numbers ``place`` has."""
        return place.size(self.parameters[place.name].shape)

    def scale(self, place: Place) -> Tensor | None:
        """The scales [R] of the rows; None if nothing is quantised."""
        found = self.scales.get(place.name)
        return None if found is None else found[place.expert - self.first]
