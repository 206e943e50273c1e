"""Interventions: what an experiment changes in the gate's decisions, checked here and applied on the ranks.

    before = model.trace(texts)
    with model.route(mask={3: [7]}):
        after = model.trace(texts)
    compare(before, after).tokens

Shape letters: B samples, T tokens of a sample, G routing groups, S tokens of a group, E experts, K choices a token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moekit.nn.config import ModelConfig
from moekit.nn.gate import Edit

if TYPE_CHECKING:
    from moekit.nn.passes import Pass


@dataclass(frozen=True)
class Force:
    """Send some tokens of a sample to chosen experts.

    Attributes:
        experts: the choices, best first: one leaves the second choice to the gate (the best of the others), two fix
            both. Weights are made as ever: their own gate probabilities, normalised as the gate does.
        sample: the sample's id, as in a trace; a call that has no such sample, or none of ``positions`` in it, fails.
        positions: a position, several (a range), or None for all.
        layers: a MoE layer, several, or None for all.
    """

    experts: int | Sequence[int]
    sample: int
    positions: int | Iterable[int] | None = None
    layers: int | Iterable[int] | None = None


@dataclass(frozen=True)
class Intervention:
    """What :meth:`moekit.api.Model.route` changes; made by :func:`plan`.

    Attributes:
        mask: layer -> experts whose gate logits become -inf before the softmax: the other experts' probabilities grow
            to sum to 1, and the tokens that chose a masked expert choose the best of the others.
        force: (layer, sample, positions or None for all, experts).
        drop_second: second choices are not dispatched and take nothing of a buffer; the first one's weight is what
            the gate gives it then: 1, or its share of both with ``normalize_before_dropping``.
        capacity_token_fraction: in place of the calls' own; ``...`` leaves that alone.
    """

    mask: Mapping[int, tuple[int, ...]]
    force: tuple[tuple[int, int, tuple[int, ...] | None, tuple[int, ...]], ...]
    drop_second: bool
    capacity_token_fraction: float | EllipsisType | None

    def fraction(self, call: float | None) -> float | None:
        """The capacity fraction that holds when a call asks for ``call``."""
        return call if self.capacity_token_fraction is ... else self.capacity_token_fraction

    def apply(self, asked: Pass, samples: Tensor, positions: Tensor) -> None:
        """Put the changes into ``asked``, the pass of B samples with ids ``samples`` [B] and positions [T] or [B, T]."""
        asked.fraction = self.fraction(asked.fraction)
        asked.edit = functools.partial(self.edit, asked.groups, samples, positions)

    def check(self, lengths: Mapping[int, int]) -> None:
        """That every :class:`Force` meets a token of the samples ``lengths`` (id -> tokens).

        Raises:
            ValueError: one does not.
        """
        for sample, positions in dict.fromkeys((sample, positions) for _, sample, positions, _ in self.force):
            if sample not in lengths:
                there = f"{len(lengths)}, from {min(lengths)} to {max(lengths)}" if lengths else "none"
                raise ValueError(f"Force names sample {sample}, and the samples of this call are {there}")
            if positions is not None and not any(0 <= p < lengths[sample] for p in positions):
                named = ", ".join(map(str, positions[:5])) + (", ..." if len(positions) > 5 else "")
                raise ValueError(
                    f"Force names of sample {sample} the positions {named or 'none'}; it has 0 to {lengths[sample] - 1}"
                )

    def edit(self, groups: int, samples: Tensor, positions: Tensor, layer: int, config: ModelConfig) -> Edit:
        """The changes in one layer."""
        mask = forced = None
        if experts := self.mask.get(layer):
            mask = torch.zeros(config.experts, dtype=torch.bool, device=samples.device)
            mask[list(experts)] = True
        positions = positions.expand(len(samples), -1)
        for where, sample, chosen, experts in self.force:
            if where != layer:
                continue
            if forced is None:
                forced = positions.new_full((*positions.shape, config.top_k), -1)
            here = (samples == sample)[:, None].expand_as(positions)
            if chosen is not None:
                here = here & torch.isin(positions, positions.new_tensor(chosen))
            for k, expert in enumerate(experts):
                forced[..., k][here] = expert
        if forced is not None:
            forced = forced.view(groups, -1, config.top_k)
        return Edit(mask, forced, self.drop_second)

    def describe(self) -> dict[str, Any]:
        """For a trace's meta: JSON."""
        told: dict[str, Any] = {
            "mask": [[layer, expert] for layer, experts in self.mask.items() for expert in experts],
            "force": [[n, s, p if p is None else list(p), list(e)] for n, s, p, e in self.force],
            "drop_second": self.drop_second,
        }
        if self.capacity_token_fraction is not ...:
            told["capacity_token_fraction"] = self.capacity_token_fraction
        return told


def plan(
    config: ModelConfig,
    *,
    mask: Mapping[int, Iterable[int]] | Iterable[tuple[int, int]] = (),
    force: Force | Iterable[Force] = (),
    drop_second: bool = False,
    capacity_token_fraction: float | EllipsisType | None = ...,
) -> Intervention:
    """Check an intervention against the model; the arguments are those of :meth:`moekit.api.Model.route`.

    Raises:
        ValueError: no such layer or expert, too few experts left, or a contradiction.
    """
    pairs = [(n, e) for n, some in mask.items() for e in some] if isinstance(mask, Mapping) else list(mask)
    masked: dict[int, tuple[int, ...]] = {}
    for layer, expert in pairs:
        check(config, layer, expert)
        masked[int(layer)] = tuple(sorted({*masked.get(layer, ()), int(expert)}))
    for layer, experts in masked.items():
        if config.experts - len(experts) < config.top_k:
            raise ValueError(
                f"mask leaves {config.experts - len(experts)} of the {config.experts} experts of layer {layer}; "
                f"every token needs {config.top_k}"
            )
    forced = []
    for one in [force] if isinstance(force, Force) else force:
        experts = tuple(int(e) for e in np.atleast_1d(one.experts))
        if not 1 <= len(experts) <= config.top_k or len(set(experts)) < len(experts):
            raise ValueError(f"{one}: expected 1 to {config.top_k} different experts")
        layers = (
            config.moe_layers if one.layers is None else [int(n) for n in np.atleast_1d(_list(one.layers))]
        )
        positions = None
        if one.positions is not None:
            positions = tuple(int(p) for p in np.atleast_1d(_list(one.positions)))
        for layer in layers:
            for expert in experts:
                check(config, layer, expert)
                if expert in masked.get(layer, ()):
                    raise ValueError(f"{one}: expert {expert} of layer {layer} is masked")
            forced.append((layer, int(one.sample), positions, experts))
    if drop_second and config.top_k < 2:
        raise ValueError("drop_second: the model's gate makes one choice")
    fraction = capacity_token_fraction
    if fraction is not ... and fraction is not None and not math.isfinite(fraction):
        raise ValueError(f"capacity_token_fraction={fraction}: expected None or a number")
    return Intervention(masked, tuple(forced), bool(drop_second), fraction)


def check(config: ModelConfig, layer: int, expert: int) -> None:
    if layer not in config.moe_layers:
        raise ValueError(
            f"layer {layer} is not a mixture-of-experts layer; the model's are {config.moe_layers}"
        )
    if not 0 <= expert < config.experts:
        raise ValueError(f"layer {layer} has no expert {expert}: they are 0 to {config.experts - 1}")


def _list(numbers: int | Iterable[int]) -> int | list[int]:
    return numbers if isinstance(numbers, int | np.integer) else list(numbers)
