"""A trace as other tools write it; the package's page says what each layout holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from moekit.routing.exchange.readers import EXTEND
from moekit.routing.trace import Trace


def _samples(trace: Trace) -> Iterator[slice]:
    """Each sample's rows."""
    starts = np.flatnonzero(np.diff(trace.sample, prepend=-1))
    for a, b in itertools.pairwise([*starts.tolist(), len(trace)]):
        yield slice(a, b)


def _write_vllm(trace: Trace, path: Path) -> None:
    arrays = {}
    for rows in _samples(trace):
        # vLLM has a slice for every hidden layer, all zeros for one without experts.
        array = np.zeros((rows.stop - rows.start, max(trace.layers) + 1, trace.top_k), dtype=np.int16)
        array[:, list(trace.layers)] = trace.experts[rows]
        arrays[f"sample_{int(trace.sample[rows.start]):08d}"] = array
    if path.suffix == ".npz":
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    elif path.suffix == ".npy":
        if len(arrays) > 1:
            raise ValueError(
                f"{path.name}: the trace has {len(arrays)} samples, and a .npy file holds one request; name a folder, which gets "
                "a file a sample, or a .npz file"
            )
        _save_array(path, *arrays.values())
    else:
        path.mkdir()
        for name, array in arrays.items():
            _save_array(path / f"{name}.npy", array)


def _write_sglang(trace: Trace, path: Path) -> None:
    import torch

    from moekit.checkpoint.writing import save

    records = []
    for number, rows in enumerate(_samples(trace)):
        tokens = rows.stop - rows.start
        ids = np.full((max(trace.layers) + 1, tokens, trace.top_k), -1, dtype=np.int32)
        ids[list(trace.layers)] = trace.experts[rows].transpose(1, 0, 2)
        records.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "input_ids": trace.token[rows].tolist(),
                "positions": trace.position[rows].tolist(),
                "extend_seq_lens": [tokens],
                "forward_mode": EXTEND,
                "topk_ids_of_layer": torch.from_numpy(ids),
            }
        )
    logical = torch.arange(trace.num_experts).repeat(max(trace.layers) + 1, 1)
    with open(path, "wb") as file:
        save({"records": records, "last_physical_to_logical_map": logical}, file)


def _write_megatron(trace: Trace, path: Path) -> None:
    path.mkdir()
    with open(path / "router_trace_rank0.jsonl", "w") as file:
        for step, rows in enumerate(_samples(trace)):
            for layer_index, layer in enumerate(trace.layers):
                record = {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": 0,
                    "num_tokens": rows.stop - rows.start,
                    "topk": trace.top_k,
                    "top_indices": trace.experts[rows, layer_index].tolist(),
                }
                file.write(json.dumps(record) + "\n")


def _write_olmoe(trace: Trace, path: Path) -> None:
    with open(path, "w") as file:
        for rows in _samples(trace):
            record = {
                "input_ids": trace.token[rows].tolist(),
                "predicted_token_ids": trace.predicted[rows].tolist(),
                "exp_ids": trace.experts[rows].transpose(0, 2, 1).tolist(),
            }
            file.write(json.dumps(record) + "\n")


def _write_counts(trace: Trace, path: Path) -> None:
    samples, row = np.unique(trace.sample, return_inverse=True)
    shape = (len(samples), len(trace.layers), trace.num_experts)
    cell = (row[:, None, None] * shape[1] + np.arange(shape[1])[:, None]) * shape[2] + trace.experts
    _save_array(path, np.bincount(cell.ravel(), minlength=int(np.prod(shape))).reshape(shape))


def _save_array(path: Path, array: np.ndarray) -> None:
    """``np.save`` to this very name: given a name, it would add an ending."""
    with open(path, "wb") as file:
        # To a file NumPy writes by itself, and its error does not tell that the disk is full.
        np.save(SimpleNamespace(write=file.write), array)


WRITERS: dict[str, Callable[[Trace, Path], None]] = {
    "vllm": _write_vllm,
    "sglang": _write_sglang,
    "megatron": _write_megatron,
    "olmoe": _write_olmoe,
    "moe-infinity": _write_counts,
}
