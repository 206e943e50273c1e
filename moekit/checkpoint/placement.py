"""Where the experts of each layer go: ``load(placement=...)``, checked and as physical numbers.

As in DeepSeek's EPLB, a physical expert is a place for one: rank r holds consecutive physical experts, those that
:func:`moekit.nn.dispatch.owned` deals to it, and a placement says which of the model's experts, the logical ones, is in which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moekit.arguments import Wholes, check, shown
from moekit.checkpoint.keys import Place
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import owned


def physical_of(
    placement: Mapping[int, Sequence[int]] | None, config: ModelConfig, world_size: int
) -> dict[int, tuple[int, ...]]:
    """The physical number of each expert, by layer.

    Args:
        placement: for each MoE layer, the rank of each expert; layers that it does not name keep their order. None: all do.

    Raises:
        ValueError: a layer has no experts, or a rank would not get as many experts as it has room for.
    """
    if placement is None:
        return {}
    if not isinstance(placement, Mapping):
        raise ValueError(
            f"placement={shown(placement)}: expected ranks by layer, such as {{5: [0, 1, 1, 0]}}"
        )
    there, found = config.moe_layers, {}
    for layer in placement:
        if layer not in there:
            raise ValueError(f"placement: layer {shown(layer)} holds no experts; those that do are {there}")
    for layer in there:
        ranks = check(
            f"placement[{layer}]", placement.get(layer, _in_order(config, world_size)), Wholes(ordered=True)
        )
        found[layer] = _numbers(layer, ranks, config.experts, world_size)
    return found


def placed(target: Place, physical: Mapping[int, Sequence[int]]) -> Place:
    """``target`` with the physical number of its expert; without ``physical`` numbers it is the same."""
    if not physical or target.where is None:
        return target
    layer, expert = target.where
    return target._replace(expert=physical[layer][expert])


def reached(experts: range, held: range, physical: Mapping[int, Sequence[int]]) -> bool:
    """Whether a rank with the physical experts ``held`` holds one of ``experts`` in any layer."""
    if not physical:
        return any(expert in experts for expert in held)
    return any(own[expert] in held for own in physical.values() for expert in experts)


def _in_order(config: ModelConfig, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) for _ in owned(config.experts, world_size, rank)]


def _numbers(layer: int, ranks: list[int], experts: int, world_size: int) -> tuple[int, ...]:
    if len(ranks) != experts:
        raise ValueError(f"placement[{layer}] names a rank for {len(ranks)} experts; expected {experts}")
    numbers: list[Any] = [None] * experts
    for rank in range(world_size):
        own = [expert for expert, of in enumerate(ranks) if of == rank]
        room = owned(experts, world_size, rank)
        if len(own) != len(room):
            raise ValueError(
                f"placement[{layer}] gives rank {rank} {len(own)} experts; expected {len(room)} of {experts}, as rank {rank} of "
                f"{world_size} has without it"
            )
        for number, expert in zip(room, own, strict=True):
            numbers[expert] = number
    return tuple(numbers)
