"""The tensors of a Hugging Face folder by fairseq's names: views of what lies in its files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moekit.checkpoint.archive import Record
from moekit.checkpoint.contents import DTYPES, clip, short
from moekit.checkpoint.hugging.config import LIGHT, Described
from moekit.checkpoint.keys import KEYS, SHARED_KEY, fairseq_parts
from moekit.checkpoint.weights import Weights
from moekit.nn.config import ModelConfig
from moekit.nn.quantise import dtype_name

# What stands before our names of parameters.
PREFIX = "model.decoder."
VERSION = "decoder.version"
# light-fairseq's names -> fairseq's.
RENAMED = [
    (re.compile(r"^lm_head\."), "decoder.output_projection."),
    (re.compile(r"\.ffn\.router\.classifier\.weight$"), ".moe_layer.gate.wg.weight"),
    (re.compile(r"\.ffn\.experts\.expert_(\d+)\."), r".moe_layer.experts.\1."),
    (re.compile(r"\.ffn\.fc"), ".fc"),
]
# Numbers of a tensor that moekit does not compute with, and that travels in a file's metadata.
MOST = 8


def by_fairseqs_names(weights: Weights, found: Described, buffers: Any) -> Weights:
    """The tensors of one file; those that moekit stacks are taken apart.

    Args:
        buffers: what :func:`packed` made of those that moekit does not compute with, or None.

    Raises:
        ValueError: the file holds a tensor that has no name in fairseq.
    """
    made = Weights(weights.path, weights.memory, weights.folder)
    for written, tensor in weights.items():
        for key, part in (
            _light(written, tensor)
            if found.layout == LIGHT
            else _ours(written, tensor, weights, found.config)
        ):
            if key in made:
                raise ValueError(f"{weights.path}: {clip(key)} is there twice")
            made[key], made.records[key] = part, weights.records[written]
    if SHARED_KEY in made:
        stated = {} if found.config.before_final_norm else {VERSION: torch.tensor([3.0])}
        for key, tensor in (_unpacked(buffers, weights) if buffers else stated).items():
            made[key], made.records[key] = tensor, Record(key, 0, 0, None)
    return made


def _light(written: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for pattern, name in RENAMED:
        written = pattern.sub(name, written)
    yield written, tensor


def _ours(
    written: str, tensor: Tensor, weights: Weights, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    if not written.startswith(PREFIX):
        raise ValueError(
            f"{weights.path}: unknown key {clip(written)}; expected one that begins with {PREFIX}"
        )
    if tensor.ndim == 0:
        raise ValueError(f"{weights.path}: {clip(written)} has no dimension, expected one or more")
    if ".experts." in written and len(tensor) != config.experts:
        raise ValueError(
            f"{weights.path}: {clip(written)} has shape {short(list(tensor.shape))}, expected {config.experts} experts"
        )
    try:
        yield from fairseq_parts(written.removeprefix(PREFIX), tensor)
    except ValueError as error:
        raise ValueError(f"{weights.path}: {error}") from None


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of ``tensors`` those that moekit does not compute with, as JSON."""
    return {
        key: {"dtype": dtype_name(tensor.dtype), "bytes": _bytes(tensor).hex()}
        for key, tensor in tensors.items()
        if KEYS.get(key, key) is None and tensor.ndim == 1 and len(tensor) <= MOST
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _unpacked(told: Any, weights: Weights) -> dict[str, Tensor]:
    found = {}
    try:
        for key, one in told.items():
            dtype = DTYPES[one["dtype"]]
            found[key] = torch.frombuffer(bytearray.fromhex(one["bytes"]), dtype=dtype)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{weights.path} is damaged: its buffers are {short(told)}; fetch it again"
        ) from error
    odd = next((key for key in found if KEYS.get(key, key) is not None), None)
    if odd is not None:
        raise ValueError(f"{weights.path} is damaged: {clip(odd)} is no buffer; fetch it again")
    return found
