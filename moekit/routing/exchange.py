"""Traces in the layouts of other tools.

    write(trace, "trace.npy", "vllm")
    trace = read("trace.npy", "vllm", num_experts=512)

None of these layouts holds weights or drops, so what is read back has NaN for probabilities, weights and entropy, and
all choices count as kept. What a layout does not hold of the tokens is unknown too (token and predicted -1, target
``PAD``).

| layout | file | holds |
| --- | --- | --- |
| ``vllm`` | ``.npy``, int16 [T, L, k] | experts; vLLM hands out one such array a request (``routed_experts``) |
| ``sglang`` | ``.pt``, ``records`` of a forward pass each: ``topk_ids_of_layer`` int32 [model layers, T, k] (-1: no experts), ``input_ids``, ``positions`` | experts, tokens, positions; the recorder's mode "per_token" |
| ``megatron`` | folder with ``router_trace_rank{N}.jsonl``, a line a step and layer | experts |
| ``olmoe`` | ``.jsonl``, a line a sample: ``input_ids``, ``predicted_token_ids``, ``exp_ids`` [T][k][L] | experts, tokens, predictions |
| ``moe-infinity`` | ``.npy``, int64 [samples, L, E] | counts: written, not read |

T tokens, L layers, k choices, E experts. A sample is written as one request, forward pass or step.
"""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moekit.routing.trace import Trace
from moekit.symbols import PAD

LAYOUTS = ("vllm", "sglang", "megatron", "olmoe", "moe-infinity")


def write(trace: Trace, path: str | Path, layout: str) -> None:
    """Write ``trace`` in one of the ``LAYOUTS``; see the module's table for what of it each holds."""
    path = Path(path).expanduser()
    _choose(layout, WRITERS)(trace, path)


def read(
    path: str | Path, layout: str, *, num_experts: int | None = None, layers: Sequence[int] | None = None
) -> Trace:
    """Read a trace that another tool wrote.

    Args:
        num_experts: E, which no layout tells. None: one more than the largest expert in the file.
        layers: the model layers of the file's axis L, where it does not tell ("vllm", "olmoe"). None: 0, 1, ...

    Raises:
        ValueError: the file is not what ``layout`` says, or the arguments do not fit it.
    """
    path = Path(path).expanduser()
    reader = _choose(layout, READERS)
    if not path.exists():
        raise ValueError(f"there is no {path}")
    return _trace(list(reader(path)), num_experts, layers, {"path": str(path), "layout": layout})


def _choose(layout: str, table: dict):
    if layout not in table:
        raise ValueError(f"layout={layout!r}; expected one of {', '.join(table)}")
    return table[layout]


def _samples(trace: Trace) -> Iterator[slice]:
    """Each sample's rows."""
    starts = np.flatnonzero(np.diff(trace.sample, prepend=-1))
    for a, b in itertools.pairwise([*starts.tolist(), len(trace)]):
        yield slice(a, b)


# ------------------------------------------------------------------------------------------------------- writing


def _write_vllm(trace: Trace, path: Path) -> None:
    with open(path, "wb") as file:  # np.save would add an ending
        np.save(file, trace.experts)


def _write_sglang(trace: Trace, path: Path) -> None:
    import torch

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
                "forward_mode": 1,  # extend, that is prefill
                "topk_ids_of_layer": torch.from_numpy(ids),
            }
        )
    logical = torch.arange(trace.num_experts).repeat(max(trace.layers) + 1, 1)
    torch.save({"records": records, "last_physical_to_logical_map": logical}, path)


def _write_megatron(trace: Trace, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "router_trace_rank0.jsonl", "w") as file:
        for step, rows in enumerate(_samples(trace)):
            for place, layer in enumerate(trace.layers):
                record = {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer,
                    "rank": 0,
                    "num_tokens": rows.stop - rows.start,
                    "topk": trace.top_k,
                    "top_indices": trace.experts[rows, place].tolist(),
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
    with open(path, "wb") as file:
        np.save(file, np.bincount(cell.ravel(), minlength=int(np.prod(shape))).reshape(shape))


WRITERS = {
    "vllm": _write_vllm,
    "sglang": _write_sglang,
    "megatron": _write_megatron,
    "olmoe": _write_olmoe,
    "moe-infinity": _write_counts,
}


# ------------------------------------------------------------------------------------------------------- reading
# A reader yields a dict a sample: experts [T, L, k], and what it knows of token, position, predicted [T] and layers.


def _read_vllm(path: Path) -> Iterator[dict]:
    array = np.load(path, allow_pickle=False)
    if array.ndim != 3:
        raise ValueError(f"{path} has shape {list(array.shape)}; expected [tokens, layers, choices]")
    yield {"experts": array}


def _read_sglang(path: Path) -> Iterator[dict]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        content = None
    if not isinstance(content, dict) or "records" not in content:
        raise ValueError(f"{path} has no 'records'; expected what SGLang's recorder writes in mode per_token")
    for record in content["records"]:
        if "topk_ids_of_layer" not in record:
            raise ValueError(f"{path}: a record has no 'topk_ids_of_layer'; record in mode per_token")
        ids = record[
            "topk_ids_of_layer"
        ].numpy()  # [layers, T, k]; wider than the model's k where it is not used
        layers = np.flatnonzero((ids >= 0).any(axis=(1, 2)))
        ids = ids[layers][:, :, (ids[layers] >= 0).any(axis=(0, 1))]
        token, position = np.array(record["input_ids"]), np.array(record["positions"])
        starts = np.flatnonzero(np.diff(position, prepend=-2) != 1)  # a pass may hold several sequences
        for a, b in itertools.pairwise([*starts, len(position)]):
            yield {
                "experts": ids[:, a:b].transpose(1, 0, 2),
                "token": token[a:b],
                "position": position[a:b],
                "layers": tuple(layers.tolist()),
            }


def _read_megatron(path: Path) -> Iterator[dict]:
    files = sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path]
    steps: dict[tuple[int, int], dict[int, list]] = {}
    for file in files:
        for record in _json_lines(file):
            if record.get("block", "decoder") == "decoder":
                step = steps.setdefault((record["step"], record["rank"]), {})
                step[record["layer"]] = record["top_indices"]
    if not steps:
        raise ValueError(f"{path} holds no router_trace_rank*.jsonl with a decoder's records")
    for _, step in sorted(steps.items()):
        layers = tuple(sorted(step))
        if len({len(step[layer]) for layer in layers}) > 1:
            raise ValueError(f"{path}: the layers of a step have different numbers of tokens")
        yield {"experts": np.stack([np.array(step[layer]) for layer in layers], axis=1), "layers": layers}


def _read_olmoe(path: Path) -> Iterator[dict]:
    for record in _json_lines(path):
        experts = np.array(record["exp_ids"])
        if experts.ndim != 3 or len(experts) != len(record["input_ids"]):
            raise ValueError(
                f"{path}: exp_ids has shape {list(experts.shape)}; expected [tokens, choices, layers]"
            )
        predicted = record.get("predicted_token_ids", [-1] * len(experts))
        yield {
            "experts": experts.transpose(0, 2, 1),
            "token": np.array(record["input_ids"]),
            "predicted": np.array(predicted),
        }


READERS = {"vllm": _read_vllm, "sglang": _read_sglang, "megatron": _read_megatron, "olmoe": _read_olmoe}


def _json_lines(path: Path) -> Iterator[dict]:
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                raise ValueError(f"{path}, line {number}: expected a JSON object") from None


def _trace(
    samples: list[dict], num_experts: int | None, layers: Sequence[int] | None, source: dict[str, str]
) -> Trace:
    if not samples:
        raise ValueError(f"{source['path']} holds no token")
    shapes = {(s["experts"].shape[1:], s.get("layers")) for s in samples}
    if len(shapes) > 1:
        raise ValueError(f"{source['path']}: samples differ in layers or choices: {sorted(map(str, shapes))}")
    (depth, _), told = shapes.pop()
    layers = tuple(range(depth)) if layers is None and told is None else told or tuple(layers)
    if len(layers) != depth:
        raise ValueError(f"layers={layers}: the file has {depth}")
    experts = np.concatenate([s["experts"] for s in samples])
    highest = int(experts.max())
    if experts.min() < 0 or highest >= (num_experts or highest + 1):
        raise ValueError(f"{source['path']} has experts {experts.min()} to {highest}; {num_experts=}")

    lengths = [len(s["experts"]) for s in samples]
    token = [s.get("token", np.full(n, -1)) for s, n in zip(samples, lengths, strict=True)]
    follows = [np.append(t[1:], PAD) if t[0] >= 0 else np.full(len(t), PAD) for t in token]
    unknown = np.full(experts.shape, np.nan, dtype=np.float32)

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int32)

    return Trace(
        sample=np.repeat(np.arange(len(samples), dtype=np.int32), lengths),
        position=joined([s.get("position", np.arange(n)) for s, n in zip(samples, lengths, strict=True)]),
        token=joined(token),
        target=joined(follows),
        generated=np.zeros(len(experts), dtype=bool),
        logprob=np.full(len(experts), np.nan, dtype=np.float32),
        predicted=joined([s.get("predicted", np.full(n, -1)) for s, n in zip(samples, lengths, strict=True)]),
        layers=layers,
        experts=experts.astype(np.int16),
        probs=unknown,
        weights=unknown,
        kept=np.ones(experts.shape, dtype=bool),
        entropy=unknown[:, :, 0],
        full={},
        num_experts=num_experts or highest + 1,
        meta={"imported": source},
    )
