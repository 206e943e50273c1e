"""The config of a checkpoint, checked against what its files hold."""

from __future__ import annotations

from pathlib import Path

from moekit.checkpoint import options as cfg
from moekit.checkpoint.files import Files
from moekit.checkpoint.inspection import check_sum
from moekit.checkpoint.keys import NUMBER, OUTPUT_KEYS, SHARED_KEY
from moekit.checkpoint.weights import Weights
from moekit.nn.config import ModelConfig


def check_rows(files: Files, rows: int, dictionary: int | None) -> None:
    """Check that the matrices have a row for each of the ``dictionary``'s types, where they are known; else a ValueError."""
    if dictionary is not None and dictionary > rows:
        raise ValueError(
            f"{files.shared}: {SHARED_KEY} has {rows} rows, too few for a dictionary of {dictionary} types"
        )


def config_of(
    files: Files, states: dict[Path, dict], opened: dict[Path, Weights], dictionary: int | None
) -> ModelConfig:
    """The config that rank 0's file tells, checked against the sizes of the files."""
    shared = opened[files.shared]
    keys = {key: opened[path] for path in reversed(files.common) for key in opened[path]}
    if SHARED_KEY not in keys:
        raise ValueError(f"{files.shared.parent} has no shared part: no file holds {SHARED_KEY}")
    matrices = [(key, keys[key].shape(key)) for key in (SHARED_KEY, *sorted(OUTPUT_KEYS)) if key in keys]
    for key, shape in matrices:
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{keys[key].path}: {key} has shape {list(shape)}, expected a row for each type")
    rows = min(shape[0] for _, shape in matrices)
    check_rows(files, rows, dictionary)
    version = shared.get("decoder.version")
    if version is not None and version.numel() != 1:
        raise ValueError(
            f"{files.shared}: decoder.version has shape {list(version.shape)}, expected one number"
        )
    if version is not None:
        # It decides what the model is, and is read before all others are checked.
        check_sum(shared, "decoder.version")
    config = cfg.from_fairseq(
        *cfg.options_of(states[files.first], str(files.first)),
        vocab_rows=dictionary or rows,
        # files without a version, or of version 2 and less, are from before the final norm existed
        before_final_norm=version is None or float(version.real) <= 2,
        where=str(files.first),
    )
    if config.share_output and len({tuple(shape) for _, shape in matrices}) > 1:
        (one, shape), (other, wanted) = matrices[:2]
        raise ValueError(
            f"{keys[one].path}: {one} has shape {list(shape)}, expected {list(wanted)} as {other} has: cfg ties them"
        )
    # A model is not built, not even without memory, if its files cannot hold it. Each weight takes a byte or more.
    layers = 1 + max((int(NUMBER.findall(key)[0]) for key in keys if NUMBER.search(key)), default=-1)
    weights = 2 * config.dim * config.ffn_dim * config.experts * len(config.moe_layers)
    size = sum(memory.nbytes for memory in (state["model"].memory for state in states.values()))
    if config.layers > layers:
        there = f"{files.shared.name} has"
        if files.shards:
            there = f"the {len(files.common)} shards up to {files.common[-1].name} (is one missing?) have"
        raise ValueError(f"{files.first}: decoder_layers={config.layers}, but {there} {layers} layers")
    if weights > size:
        raise ValueError(
            f"{files.first}: moe_expert_count={config.experts}, decoder_embed_dim={config.dim} and "
            f"decoder_ffn_embed_dim={config.ffn_dim} make {weights:,} weights, but all files have {size:,} bytes"
        )
    return config
