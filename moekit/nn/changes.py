"""The fields of a model's config that may change although its weights are given: ``moekit.load(config={...})``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from moekit.arguments import Choice, Flag, Whole, check, shown
from moekit.nn.config import ACTIVATIONS, SECOND_EXPERT, ModelConfig
from moekit.nn.gates import GATES

# Fields that a running model can change; the weights were made for the others.
CHANGEABLE = """max_positions activation pre_norm scale_embedding gate gate_fp32 second_expert normalize_before_dropping
    batch_prioritized mask_padding add_bos""".split()


def changed(config: ModelConfig, fields: Mapping[str, Any]) -> ModelConfig:
    """``config`` with ``fields`` in place of its own.

    Raises:
        ValueError: a field is none of :data:`CHANGEABLE`, or its value none that it can have.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"config={shown(fields)}: expected a dict of some of {', '.join(CHANGEABLE)}")
    for name in fields:
        if name not in CHANGEABLE:
            raise ValueError(
                f"config={{{name!r}: ...}} cannot be changed; expected some of {', '.join(CHANGEABLE)}"
            )
    kinds = {
        "max_positions": Whole(),
        "activation": Choice(ACTIVATIONS),
        "gate": Choice(tuple(GATES)),
        "second_expert": Choice(SECOND_EXPERT),
    }
    new = replace(
        config,
        **{
            name: check(f"config[{name!r}]", value, kinds.get(name, Flag())) for name, value in fields.items()
        },
    )
    if config.final_norm and new.pre_norm != config.pre_norm:
        raise ValueError(
            f"config['pre_norm']={new.pre_norm}: the checkpoint's weights are of a model with pre_norm={config.pre_norm}, "
            "on which the final norm depends; leave it out"
        )
    if config.learned_positions and new.max_positions != config.max_positions:
        raise ValueError(
            f"config['max_positions']={new.max_positions}: the model has learned {config.max_positions} positions; leave it out"
        )
    return new


def differences(own: ModelConfig, new: ModelConfig) -> dict[str, Any]:
    """The fields in which ``new`` differs from ``own``, as ``new`` has them."""
    return {name: value for name, value in asdict(new).items() if value != getattr(own, name)}
