"""The files of a Hugging Face folder: weights by moekit's names, all experts of a layer in one tensor."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.checkpoint.hugging import config as hf
from moekit.checkpoint.hugging.names import PREFIX
from moekit.checkpoint.keys import KEYS, Place
from moekit.checkpoint.threads import pool
from moekit.checkpoint.writing import File
from moekit.nn.config import ModelConfig
from moekit.nn.quantise import dtype_name

# The most bytes of a file, but for one that holds a single tensor; it is in memory as a whole while it is written.
MOST = 5_000_000_000
# fairseq's names in an expert, and moekit's.
EXPERT = {
    key.rpartition(".{}.")[2]: name.removesuffix("[expert]").rpartition(".")[2]
    for key, name in KEYS.items()
    if name and name.endswith("[expert]")
}


class Whole(NamedTuple):
    """A tensor to write: its name, its bytes, and what makes it."""

    name: str
    bytes: int
    make: Callable[[], Tensor]


def made(
    config: ModelConfig,
    shared: Iterable[tuple[Tensor, Place]],
    experts: Mapping[int, Sequence[int]],
    expert: Callable[[int, int], Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    dictionary: int | None,
) -> tuple[list[File], dict[str, str]]:
    """The files with the weights, for ``write_folder``, and the texts beside them by their names.

    Args:
        config: of the model that is written.
        shared: what is no expert's, and where it goes.
        experts: of each layer those to write.
        expert: (layer, expert) -> its tensors, as fairseq names them in an expert.
        settings: what stands in a file besides the weights.
        dictionary: types of the dictionary, if that is known.
    """
    wholes = [*_shared(shared, config), *_experts(experts, expert)]
    dtype = dtype_name(wholes[0].make().dtype)
    parts = _parts(wholes)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    beside = {hf.FILE: hf.told_of(config, dtype, dictionary), hf.GENERATION: hf.generation(config)}
    if len(parts) == 1:
        names = ["model.safetensors"]
    else:
        beside["model.safetensors.index.json"] = {
            "metadata": {"total_size": sum(whole.bytes for whole in wholes)},
            "weight_map": {
                whole.name: name for name, part in zip(names, parts, strict=True) for whole in part
            },
        }

    def content(part: list[Whole]) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        return {whole.name: whole.make() for whole in part}, settings

    files: list[File] = [
        (name, lambda part=part: content(part)) for name, part in zip(names, parts, strict=True)
    ]
    texts = {name: json.dumps(told, indent=1) + "\n" for name, told in beside.items()}
    return files, texts | {hf.BRIDGE: hf.BRIDGE_TEXT}


def _shared(shared: Iterable[tuple[Tensor, Place]], config: ModelConfig) -> Iterator[Whole]:
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for tensor, place in shared:
        found[place.name][place.part] = tensor[: config.vocab_rows] if place.part == "rows" else tensor
    for name, parts in found.items():
        # Queries, keys and values stand one below the other.
        tensors = [parts[part] for part in "qkv"] if "q" in parts else list(parts.values())
        size = sum(tensor.nbytes for tensor in tensors)
        yield Whole(
            PREFIX + name,
            size,
            lambda tensors=tensors: tensors[0] if len(tensors) == 1 else torch.cat(tensors),
        )


def _experts(
    experts: Mapping[int, Sequence[int]], expert: Callable[[int, int], Mapping[str, Tensor]]
) -> Iterator[Whole]:
    for layer, chosen in experts.items():
        for key, tensor in expert(layer, chosen[0]).items():
            yield Whole(
                f"{PREFIX}layers.{layer}.moe.experts.{EXPERT[key]}",
                len(chosen) * tensor.nbytes,
                lambda layer=layer, chosen=chosen, key=key: _stacked(
                    [expert(layer, one)[key] for one in chosen]
                ),
            )


def _stacked(tensors: list[Tensor]) -> Tensor:
    """:func:`torch.stack` by several threads: they wait for a disk most of the time."""
    made = tensors[0].new_empty((len(tensors), *tensors[0].shape))
    with pool("stacking") as executor:
        for _ in executor.map(lambda pair: pair[0].copy_(pair[1]), zip(made, tensors, strict=True)):
            pass
    return made


def _parts(wholes: list[Whole]) -> list[list[Whole]]:
    """The tensors of each file."""
    parts: list[list[Whole]] = [[]]
    size = 0
    for whole in wholes:
        if parts[-1] and size + whole.bytes > MOST:
            parts.append([])
            size = 0
        parts[-1].append(whole)
        size += whole.bytes
    return parts
