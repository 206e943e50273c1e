"""Interventions: what an experiment changes in the gate's decisions, checked here and applied on the ranks.

    before = model.trace(texts)
    with model.route(mask={3: [7]}):
        after = model.trace(texts)
    compare(before, after).tokens

Shape letters: B samples, T tokens of a sample, G routing groups, S tokens of a group, E experts, K choices a token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moekit.arguments import Capacity, Flag, Whole, Wholes, check, first_few, is_many, shown
from moekit.nn.config import DENSE, ModelConfig
from moekit.nn.gate import Edit
from moekit.nn.gates import top_k_of

if TYPE_CHECKING:
    from moekit.nn.passes import Pass


@dataclass(frozen=True)
class Force:
    """Send some tokens of a sample to chosen experts. Of several for one token and layer the last one counts.

    Attributes:
        experts: the choices, best first: one leaves the second choice to the gate (the best of the others), two fix
            both. Their weights are their own gate probabilities, normalised as the gate normalises all weights.
        sample: the sample's id, as in a trace; a call that has no such sample, or none of ``positions`` in it, fails.
        positions: a position, several (a range), or None for all.
        layers: a MoE layer, several, or None for all.

    Raises:
        ValueError: one of them is no whole number or list of such.
    """

    experts: int | Sequence[int]
    sample: int
    positions: int | Iterable[int] | None = None
    layers: int | Iterable[int] | None = None

    def __post_init__(self) -> None:
        # An iterator would be used up by the first call.
        for name, kind in {
            "experts": Wholes(ordered=True),
            "positions": Wholes(optional=True),
            "layers": Wholes(optional=True),
        }.items():
            value = check(f"Force.{name}", getattr(self, name), kind)
            object.__setattr__(self, name, None if value is None else tuple(value))
        object.__setattr__(self, "sample", check("Force.sample", self.sample, Whole(0)))


@dataclass(frozen=True)
class Intervention:
    """What :meth:`moekit.api.Model.route` changes; made by :func:`plan`.

    Attributes:
        mask: layer -> experts whose gate logits become -inf before the softmax: the other experts' probabilities grow
            to sum to 1, and the tokens that chose a masked expert choose the best of the others.
        force: (layer, sample, positions or None for all, experts).
        drop_second: second choices are not dispatched and take no place in a buffer. The first choice's weight is then 1, or,
            with ``normalize_before_dropping``, its share of the two.
        capacity_token_fraction: in place of the calls' own; ``...`` keeps theirs.
    """

    mask: Mapping[int, tuple[int, ...]]
    force: tuple[tuple[int, int, tuple[int, ...] | None, tuple[int, ...]], ...]
    drop_second: bool
    capacity_token_fraction: float | EllipsisType | None

    def apply(self, asked: Pass, samples: Tensor, positions: Tensor) -> None:
        """Put the changes into ``asked``, the pass of B samples with ids ``samples`` [B] and positions [T] or [B, T].

        The capacity does not change here: ``asked.fraction`` is the intervention's already, since the driver puts it there
        (:meth:`moekit.handle.Handle.capacity`).
        """
        if self.mask or self.force or self.drop_second:
            asked.edit = functools.partial(self.edit, asked.groups, samples, positions)

    def check(self, lengths: Mapping[int, int]) -> None:
        """Check that every :class:`Force` names a token of the samples ``lengths`` (id -> tokens).

        Raises:
            ValueError: one does not.
        """
        for sample, positions in dict.fromkeys((sample, positions) for _, sample, positions, _ in self.force):
            if sample not in lengths:
                there = f"{len(lengths)}, from {min(lengths)} to {max(lengths)}" if lengths else "none"
                raise ValueError(
                    f"Force names sample {sample}; the samples of this call are {there}: name one of these"
                )
            if positions is not None and not any(0 <= p < lengths[sample] for p in positions):
                named = first_few(positions)
                raise ValueError(
                    f"Force names the positions {named or 'none'} of sample {sample}; expected at least one of its positions, "
                    f"0 to {lengths[sample] - 1}"
                )

    def edit(
        self, groups: int, samples: Tensor, positions: Tensor, layer: int, config: ModelConfig
    ) -> Edit | None:
        """The changes in one layer; None if there are none."""
        mask = forced = None
        if experts := self.mask.get(layer):
            mask = torch.zeros(config.experts, dtype=torch.bool, device=samples.device)
            mask[list(experts)] = True
        positions = positions.expand(len(samples), -1)
        for where, sample, chosen, experts in self.force:
            if where != layer:
                continue
            if forced is None:
                forced = positions.new_full((*positions.shape, top_k_of(config)), -1)
            here = (samples == sample)[:, None].expand_as(positions)
            if chosen is not None:
                here = here & torch.isin(positions, positions.new_tensor(chosen))
            # A second choice that an earlier one forced may be the expert of this one.
            forced[here] = -1
            for k, expert in enumerate(experts):
                forced[..., k][here] = expert
        if forced is not None:
            forced = forced.view(groups, -1, top_k_of(config))
        changed = mask is not None or forced is not None or self.drop_second
        return Edit(mask, forced, self.drop_second) if changed else None

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
    capacity_token_fraction: float | str | EllipsisType | None = ...,
) -> Intervention:
    """Check an intervention against the model; the arguments are those of :meth:`moekit.api.Model.route`.

    Raises:
        ValueError: no such layer or expert, too few experts left, or a contradiction.
    """
    pairs, forces = _pairs(mask), list(force) if is_many(force) else [force]
    if not config.moe_layers and (pairs or forces or check("drop_second", drop_second, Flag())):
        raise ValueError(f"route: {DENSE} whose choices could be changed; expected a model with experts")
    masked: dict[int, tuple[int, ...]] = {}
    for layer, expert in pairs:
        check_expert("mask", config, layer, expert)
        masked[layer] = tuple(sorted({*masked.get(layer, ()), expert}))
    for layer, experts in masked.items():
        if config.experts - len(experts) < top_k_of(config):
            raise ValueError(
                f"mask leaves {config.experts - len(experts)} of the {config.experts} experts of layer {layer}; "
                f"every token needs {top_k_of(config)}: mask fewer"
            )
    forced = []
    for one in forces:
        if not isinstance(one, Force):
            raise ValueError(f"force={shown(one)}: expected moekit.Force, or several")
        experts = one.experts
        if not 1 <= len(experts) <= top_k_of(config) or len(set(experts)) < len(experts):
            raise ValueError(
                f"Force.experts={shown(experts)}: expected 1 to {top_k_of(config)} different experts"
            )
        if one.layers == ():
            raise ValueError("Force.layers=(): expected at least one layer, or None for all")
        for layer in config.moe_layers if one.layers is None else one.layers:
            for expert in experts:
                check_expert("force", config, layer, expert)
                if expert in masked.get(layer, ()):
                    raise ValueError(f"Force.experts={experts}: expert {expert} of layer {layer} is masked")
            forced.append((layer, one.sample, one.positions, experts))
    drop_second = check("drop_second", drop_second, Flag())
    if drop_second and top_k_of(config) < 2:
        raise ValueError("drop_second=True: the model's gate makes one choice; leave drop_second out")
    fraction = capacity_token_fraction
    if fraction is not ...:
        fraction = check("capacity_token_fraction", fraction, Capacity())
    return Intervention(masked, tuple(forced), drop_second, fraction)


def _pairs(mask: Any) -> list[tuple[int, int]]:
    """(layer, expert) of every masked expert."""
    if isinstance(mask, Mapping):
        found = [(layer, expert) for layer, some in mask.items() for expert in check("mask", some, Wholes())]
    else:
        pairs = mask if is_many(mask) else [mask]
        found = [tuple(pair) if is_many(pair) else (pair,) for pair in pairs]
    if not all(len(pair) == 2 for pair in found):
        raise ValueError(f"mask={shown(mask)}: expected {{layer: [experts]}} or [(layer, expert), ...]")
    return [(check("mask", layer, Whole(0)), check("mask", expert, Whole(0))) for layer, expert in found]


def check_expert(name: str, config: ModelConfig, layer: int, expert: int) -> None:
    """Check that layer ``layer`` holds experts, and ``expert`` is one of them; else a ValueError that names the argument."""
    config.check_moe(name, layer)
    if not 0 <= expert < config.experts:
        raise ValueError(f"{name}: layer {layer} has no expert {expert}: they are 0 to {config.experts - 1}")
