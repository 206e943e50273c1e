"""What of a model is filled, by which tensors, and the views of a rank's parameters that they are copied to."""

from __future__ import annotations

from collections.abc import Sequence
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
        others = self.get(place)
        # Most places are filled by one tensor.
        if others is None:
            self[place] = [(numbers, by)]
            return None
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


class Filled(list[Place]):
    """The places that were filled; ``nonfinite`` are the tensors with weights that are not finite."""

    nonfinite: list[NonFinite]


class Part:
    """A part of a parameter, or of each of its experts: the views to fill, and how many numbers of each have been.

    Attributes:
        shape: of each view.
        size: numbers of each.
        first: the number of the first one, 0 where it is no expert's.
        counts: the numbers of each that were filled.
        scales: [R] of each; None if nothing is quantised.
    """

    def __init__(
        self, parameter: Tensor, name: str, part: str, first: int, scales: tuple[Tensor, ...] | None
    ):
        place = Place(name, part)
        self.shape = place.shape(tuple(parameter.shape))
        self.size = place.size(tuple(parameter.shape))
        self.first, self.scales = first, scales
        self.counts = [0] * (len(parameter) if part == "expert" else 1)
        self._place, self._parameter = place, parameter.data
        self._views: Sequence[Tensor] = ()

    def view(self, index: int) -> Tensor:
        """The view to fill, as [n]."""
        if not self._views:
            # Those of all experts are made at once.
            if self._place.part == "expert":
                self._views = self._parameter.view(len(self._parameter), -1).unbind()
            else:
                self._views = (self._place.of(self._parameter).view(-1),)
        return self._views[index]


class Targets:
    """A rank's parameters in the parts that are filled, and the scales of those that are quantised.

    Args:
        first_expert: the first one that the parameters hold.
    """

    def __init__(self, model: torch.nn.Module, first_expert: int):
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.first = first_expert
        self.device = next(iter(self.parameters.values())).device
        self._parts: dict[tuple[str, str], Part] = {}
        self._scales = {
            name.removesuffix("_scale"): scales.unbind()
            for name, scales in model.named_buffers()
            if name.endswith("_scale")
        }

    def part(self, name: str, part: str) -> Part:
        """Of the parameter ``name`` the part (see :class:`moekit.checkpoint.keys.Place`)."""
        found = self._parts.get((name, part))
        if found is None:
            first = self.first if part == "expert" else 0
            found = Part(self.parameters[name], name, part, first, self._scales.get(name))
            self._parts[name, part] = found
        return found
