"""The key table: fairseq's name of a tensor, and the place in moekit's model that it fills."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from moekit.checkpoint.contents import clip
from moekit.checkpoint.reading import Source
from moekit.nn.config import ModelConfig

# The file that holds this key holds the shared part.
SHARED_KEY = "decoder.embed_tokens.weight"


# fairseq's name -> ours. {} is a layer, then an expert's number within its file. A suffix in brackets is the part of
# our tensor that the key fills. None: dropped on purpose, moekit computes it itself or it says nothing.
KEYS: dict[str, str | None] = {
    "decoder.version": None,
    "decoder.embed_positions._float_tensor": None,
    "decoder.embed_positions.weights": None,
    "decoder.embed_tokens.weight": "embed.weight[rows]",
    "decoder.embed_positions.weight": "positions.weight",
    "decoder.project_in_dim.weight": "project_in.weight",
    "decoder.layernorm_embedding.weight": "embed_norm.weight",
    "decoder.layernorm_embedding.bias": "embed_norm.bias",
    "decoder.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.qkv.weight[q]",
    "decoder.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.qkv.weight[k]",
    "decoder.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.qkv.weight[v]",
    "decoder.layers.{}.self_attn.q_proj.bias": "layers.{}.attn.qkv.bias[q]",
    "decoder.layers.{}.self_attn.k_proj.bias": "layers.{}.attn.qkv.bias[k]",
    "decoder.layers.{}.self_attn.v_proj.bias": "layers.{}.attn.qkv.bias[v]",
    "decoder.layers.{}.self_attn.out_proj.weight": "layers.{}.attn.out.weight",
    "decoder.layers.{}.self_attn.out_proj.bias": "layers.{}.attn.out.bias",
    "decoder.layers.{}.self_attn_layer_norm.weight": "layers.{}.attn_norm.weight",
    "decoder.layers.{}.self_attn_layer_norm.bias": "layers.{}.attn_norm.bias",
    "decoder.layers.{}.fc1.weight": "layers.{}.ffn.fc1.weight",
    "decoder.layers.{}.fc1.bias": "layers.{}.ffn.fc1.bias",
    "decoder.layers.{}.fc2.weight": "layers.{}.ffn.fc2.weight",
    "decoder.layers.{}.fc2.bias": "layers.{}.ffn.fc2.bias",
    "decoder.layers.{}.moe_layer.gate.wg.weight": "layers.{}.moe.gate.weight",
    "decoder.layers.{}.moe_layer.experts.{}.fc1.weight": "layers.{}.moe.experts.w1[expert]",
    "decoder.layers.{}.moe_layer.experts.{}.fc1.bias": "layers.{}.moe.experts.b1[expert]",
    "decoder.layers.{}.moe_layer.experts.{}.fc2.weight": "layers.{}.moe.experts.w2[expert]",
    "decoder.layers.{}.moe_layer.experts.{}.fc2.bias": "layers.{}.moe.experts.b2[expert]",
    "decoder.layers.{}.final_layer_norm.weight": "layers.{}.ffn_norm.weight",
    "decoder.layers.{}.final_layer_norm.bias": "layers.{}.ffn_norm.bias",
    "decoder.layer_norm.weight": "norm.weight",
    "decoder.layer_norm.bias": "norm.bias",
    "decoder.project_out_dim.weight": "project_out.weight",
    "decoder.output_projection.weight": "output.weight[rows]",
}


# What files of earlier versions call them.
OLD_KEYS: dict[str, str] = {
    "decoder.embed_out": "output.weight[rows]",
    "decoder.layers.{}.self_attn.in_proj_weight": "layers.{}.attn.qkv.weight[qkv]",
    "decoder.layers.{}.self_attn.in_proj_bias": "layers.{}.attn.qkv.bias[qkv]",
    "decoder.layers.{}.layer_norms.0.weight": "layers.{}.attn_norm.weight",
    "decoder.layers.{}.layer_norms.0.bias": "layers.{}.attn_norm.bias",
    "decoder.layers.{}.layer_norms.2.weight": "layers.{}.ffn_norm.weight",
    "decoder.layers.{}.layer_norms.2.bias": "layers.{}.ffn_norm.bias",
}


OUTPUT_KEYS = {"decoder.output_projection.weight", "decoder.embed_out"}


_NUMBER = r"(?:0|[1-9][0-9]{0,6})(?=\.)"
_OF_LAYER = re.compile(r"(?<=^layers\.)\d+")
NUMBER = re.compile(rf"(?<=\.layers\.){_NUMBER}|(?<=\.experts\.){_NUMBER}")


class Place(NamedTuple):
    """Where a key's tensor goes: our parameter, and the part of it (see ``KEYS``); ``expert`` counts from 0 overall."""

    name: str
    part: str = ""
    expert: int = 0

    @property
    def where(self) -> tuple[int, int] | None:
        """(layer, expert), both from 0; None for what is no expert's."""
        return (_layer(self.name), self.expert) if self.part == "expert" else None

    def of(self, parameter: Tensor, first_expert: int = 0) -> Tensor:
        """The view of ``parameter`` to fill; ``first_expert`` is the first one that it holds."""
        if self.part == "expert":
            return parameter[self.expert - first_expert]
        if self.part in ("q", "k", "v"):
            return parameter.chunk(3)["qkv".index(self.part)]
        return parameter

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what belongs here of a parameter of the shape ``parameter``."""
        if self.part == "expert":
            return parameter[1:]
        return (parameter[0] // 3, *parameter[1:]) if self.part in ("q", "k", "v") else parameter

    def size(self, parameter: tuple[int, ...]) -> int:
        """How many numbers of a parameter of the shape ``parameter`` belong here."""
        return math.prod(self.shape(parameter))


@functools.lru_cache(maxsize=1024)
def _layer(name: str) -> int:
    """The layer of one of our parameters."""
    return int(name.split(".")[1])


def places(source: Source, found: Iterable[str], config: ModelConfig) -> Iterator[tuple[str, Place]]:
    """Each key of a file and where its tensor goes; without the keys that are dropped on purpose.

    Args:
        found: the keys, of which it can be asked whether one is there.

    Raises:
        ValueError: a key is not in the table.
    """
    first, shared = source.experts.start, config.share_output
    for key in found:
        place = _place(key)
        if place is None:
            if split(key)[0] in KEYS:
                continue
            raise ValueError(
                f"{source.path}: unknown key {clip(key)}; expected a key of moekit.checkpoint.KEYS"
            )
        name, part, expert = place
        if part == "expert":
            yield key, Place(name, part, first + expert)
            continue
        if shared and name == "output.weight":
            # Files hold this matrix twice, and fairseq reads this one last.
            place = Place("embed.weight", part)
        elif shared and key == SHARED_KEY and not OUTPUT_KEYS.isdisjoint(found):
            continue
        if not (config.before_final_norm and name.startswith("norm.")):
            yield key, place


# The files of a checkpoint share most keys; those of all experts of the 52B in one file are 50,000.
MOST_KEYS = 1 << 16


@functools.lru_cache(maxsize=MOST_KEYS)
def split(key: str) -> tuple[str, tuple[int, ...]]:
    """A key without its numbers, and the numbers: its layer, and its expert's number within its file."""
    # Braces of the key's own must not pass for a number.
    return NUMBER.sub("{}", key.replace("{", "{{")), tuple(int(n) for n in NUMBER.findall(key))


@functools.lru_cache(maxsize=MOST_KEYS)
def _place(key: str) -> Place | None:
    """The place of a key's tensor, with the expert's number within its file; None without one."""
    pattern, numbers = split(key)
    target = KEYS.get(pattern) or OLD_KEYS.get(pattern)
    if target is None:
        return None
    name, _, part = target.rstrip("]").partition("[")
    return Place(name.format(*numbers), part, numbers[-1] if part == "expert" else 0)


def kinds(name: str) -> tuple[str, ...]:
    """The parts that fill a parameter; "expert" stands for one of each expert."""
    if ".moe.experts." in name:
        return ("expert",)
    if ".attn.qkv." in name:
        return ("q", "k", "v")
    return ("rows" if name in ("embed.weight", "output.weight") else "",)


def parts_of(expected: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[Place, int]]:
    """Everything that has to be filled of parameters with these shapes, and how many numbers each has."""
    for name, shape in expected.items():
        for part in kinds(name):
            count = Place(name, part).size(shape)
            for expert in range(shape[0] if part == "expert" else 1):
                yield Place(name, part, expert), count


def unfold(target: Place) -> list[Place]:
    """Old files fill queries, keys and values with one tensor."""
    return [Place(target.name, part) for part in target.part] if target.part == "qkv" else [target]


def fairseq_parts(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One of our parameters as fairseq's tensors: their names, and views of ``parameter``.

    Experts count from 0, as in each of fairseq's files.

    Raises:
        ValueError: the model has no parameter of that name.
    """
    layer, pattern = _OF_LAYER.search(name), _OF_LAYER.sub("{}", name)
    keys = _keys().get(pattern)
    if keys is None:
        raise ValueError(f"{clip(name)} is no parameter of moekit's model")
    for key, part in keys:
        for expert in range(len(parameter)) if part == "expert" else [0]:
            target = Place(name, part, expert)
            yield key.format(layer and layer[0], expert), target.of(parameter)


@functools.cache
def _keys() -> dict[str, list[tuple[str, str]]]:
    """Our names without numbers, and fairseq's names of their parts."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key, target in KEYS.items():
        name, _, part = (target or "").rstrip("]").partition("[")
        if name:
            found.setdefault(name, []).append((key, part))
    return found


def key_of(target: Place) -> str:
    numbers = re.findall(r"(?<=layers\.)\d+", target.name)
    wanted = re.sub(r"(?<=layers\.)\d+", "{}", target.name) + (f"[{target.part}]" if target.part else "")
    key = next(key for key, ours in KEYS.items() if ours == wanted)
    return key.format(*numbers, "*")


def name_of(target: Place) -> str:
    number = f" {target.expert}" if target.part == "expert" else ""
    return target.name + (f" ({target.part}{number})" if target.part else "")
