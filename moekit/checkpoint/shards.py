"""Tensors that a training with ``--use-sharded-state`` has cut over several files.

fairscale's FullyShardedDataParallel lays the parameters of each module that it wraps behind one another, as
``flat_param_0`` [numbers]. It cuts that into as many parts of equal length as there are ranks, the last ones padded, and
each rank writes its own. An expert's module is cut over those ranks alone that hold the same expert. ``shard_metadata``
tells the names and shapes of what was laid together. (``FullyShardedDataParallel.local_metadata_dict``, fairscale 0.4.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit.checkpoint.contents import clip, short
from moekit.checkpoint.hugging.names import by_fairseqs_names
from moekit.checkpoint.options import options_of
from moekit.checkpoint.weights import Weights

FLAT = re.compile(r"(.*\.)?flat_param(_\d+)?")
NUMBERED = re.compile(r".+?(-rank-(?P<rank>\d+)|-shared)?-shard(?P<shard>\d+)\.pt", re.DOTALL)
EXPERT = re.compile(r"\.experts\.\d+\.")


def tensors(state: dict[str, Any], path: Path) -> Weights:
    """The tensors of what :func:`~moekit.checkpoint.read` found in ``path`` by fairseq's names, those that are cut as
    their parts.

    Raises:
        ValueError: the file is a shard that does not tell what lies in it, or whose name does not tell which it is.
    """
    weights: Weights = state["model"]
    if "hugging" in state:
        return by_fairseqs_names(weights, state["hugging"], state.get("buffers"))
    if not any("flat_param" in key and FLAT.fullmatch(key) for key in weights):
        return weights
    name = NUMBERED.fullmatch(path.name)
    if name is None:
        raise ValueError(
            f"{path} is a shard of a training with --use-sharded-state, but its name does not tell which: expected a name as "
            "in NAME-shared-shard0.pt"
        )
    found = Weights(path, weights.memory, weights.folder)
    for key, tensor in weights.items():
        if not FLAT.fullmatch(key):
            found[key], found.records[key] = tensor, weights.records[key]
    for key, prefix, names, shapes, padding in _described(state.get("shard_metadata"), weights, path):
        flat = weights[key]
        number = int(name["shard"])
        if EXPERT.search(key):
            experts = options_of(state, str(path))[0].get("moe_expert_count")
            if type(experts) is not int or experts < 1:
                raise ValueError(f"{path}: its cfg has moe_expert_count={short(experts)}; expected 1 or more")
            number = int(name["rank"] or number) // experts
        total = sum(map(math.prod, shapes))
        begin, end = min(number * len(flat), total), min((number + 1) * len(flat), total)
        if end - begin != len(flat) - padding:
            raise ValueError(
                f"{path}: {clip(key)} has {len(flat):,} numbers with {padding:,} of padding, which is not part {number} of "
                f"{total:,}: was the file renamed, or is it of another training?"
            )
        at = 0
        for part, shape in zip(names, shapes, strict=True):
            start, stop = max(at, begin), min(at + math.prod(shape), end)
            if start < stop:
                piece = flat[start - begin : stop - begin]
                whole = stop - start == math.prod(shape)
                if prefix + part in found:
                    raise ValueError(f"{path}: {clip(prefix + part)} is there twice")
                found[prefix + part] = piece.view(shape) if whole else piece
                found.records[prefix + part] = weights.records[key]
                if not whole:
                    found.cut[prefix + part] = (start - at, shape)
            at += math.prod(shape)
    return found


def _described(
    metadata: Any, weights: Weights, path: Path
) -> Iterator[tuple[str, str, list[str], list[tuple[int, ...]], int]]:
    """(key of a flat tensor, prefix of its parts' names, their names, their shapes, numbers of padding)."""
    modules = metadata.get("param_metadata") if isinstance(metadata, Mapping) else None
    told: set[str] = set()
    for module in modules if isinstance(modules, list) else []:
        if not isinstance(module, Mapping) or not isinstance(module.get("params"), Mapping):
            continue
        prefix = f"{module['fsdp_path']}." if module.get("fsdp_path") else ""
        for name, one in module["params"].items():
            key = f"{prefix}{name}"
            # A rank tells of shared modules and experts in each of its files.
            if key not in weights or key in told:
                continue
            told.add(key)
            shapes = one.get("shapes") if isinstance(one, Mapping) else None
            names = one.get("names") if isinstance(one, Mapping) else None
            padding = one.get("padding") if isinstance(one, Mapping) else None
            if (
                not isinstance(names, (list, tuple))
                or not all(type(part) is str for part in names)
                or not isinstance(shapes, (list, tuple))
                or len(shapes) != len(names)
                or not all(isinstance(s, (list, tuple)) and len(s) <= 8 for s in shapes)
                or not all(type(n) is int and 0 <= n < 2**40 for s in shapes for n in s)
                or type(padding) is not int
                or weights[key].ndim != 1
            ):
                raise ValueError(
                    f"{path}: its shard_metadata does not describe {clip(key)}; expected names and shapes"
                )
            yield key, prefix, list(names), [tuple(shape) for shape in shapes], padding
    missing = next((key for key in weights if FLAT.fullmatch(key) and key not in told), None)
    if missing is not None:
        raise ValueError(
            f"{path}: {clip(missing)} is a part of several tensors, of a training with --use-sharded-state, and no "
            "shard_metadata tells which: save without --use-sharded-state, or consolidate the shards with the branch's "
            "consolidate_fsdp_shards"
        )
