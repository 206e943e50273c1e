"""Files that other tools wrote, as samples; the package's page says what each layout holds.

A reader yields a dict for each sample: ``experts`` [T, L, k], -1 for none, and what it knows of ``token``, ``position``,
``predicted`` [T], ``layers`` and ``num_experts``.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekit import checkpoint, json_text
from moekit.arguments import check_regular, shown
from moekit.routing.exchange import objects
from moekit.routing.parquet import MOST_EXPERTS, MOST_LAYERS
from moekit.routing.trace import Trace
from moekit.symbols import PAD

Layers = tuple[int, ...] | None
NONE = -1
# SGLang's mark of a prefill pass. In other passes nothing tells which request a token belongs to.
EXTEND = 1
# The most characters of a line of JSON.
LONGEST_LINE = 1 << 29
# The names of the files that are read of a folder, for each layout that may be one.
FOLDERS = {"vllm": "*.npy", "megatron": "router_trace_rank*.jsonl"}


def files_of(folder: Path, layout: str) -> list[Path]:
    """The files of a folder that are read as ``layout``, in the order of their names."""
    # Unlike glob, iterdir does not keep quiet about a folder that may not be listed.
    return sorted(file for file in folder.iterdir() if file.match(FOLDERS[layout]))


# -------------------------------------------------------------------------------------------------------- vLLM


def _read_vllm(path: Path, layers: Layers) -> Iterator[dict]:
    requests = [request for request in _requests(path) if len(request)]
    shapes = {request.shape[1:] for request in requests}
    if len(shapes) > 1:
        raise ValueError(
            f"{path}: its requests have different numbers of layers or choices: {sorted(shapes)}"
        )
    if not requests:
        return
    dense = np.all([~(request > 0).any(axis=(0, 2)) for request in requests], axis=0)
    if requests[0].shape[2] == 1 and layers is not None and len(layers) == len(dense):
        # With one choice, zeros may be choices of expert 0, and the caller says that all of these layers have experts.
        dense[:] = False
    places = np.flatnonzero(~dense)
    if not len(places):
        raise ValueError(f"{path}: expert 0 is every choice of every layer, so nothing was recorded")
    names = places if layers is None else np.array(layers)
    if len(names) == len(dense):
        names = names[places] if layers is not None else places
    elif len(names) != len(places):
        raise ValueError(
            f"layers={list(layers or ())}: the file has {len(dense)} layers, {len(places)} of them with experts; expected "
            "either number"
        )
    for request in requests:
        if request.shape[2] > 1:
            request[~(request > 0).any(axis=(1, 2))] = NONE
        yield {"experts": request[:, places], "layers": tuple(names.tolist())}


def _requests(path: Path) -> list[np.ndarray]:
    """The arrays [T, L, k] of a file, one for each request; of a folder, those of its files in the order of their names."""
    if path.is_dir():
        files = files_of(path, "vllm")
        if not files:
            raise ValueError(f"{path} holds no .npy file; expected one for each request")
        return [array for file in files for array in _requests(file)]
    check_regular(path, "a .npy or .npz file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # A small archive may unpack to more than the memory holds.
                packed = next((i.filename for i in archive.infolist() if i.compress_type), None)
            if packed is not None:
                raise ValueError(f"{path} is compressed; expected what np.savez makes")
        # An array that says it is larger than its file is refused before there is memory for it.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = [loaded] if isinstance(loaded, np.ndarray) else [loaded[name] for name in loaded.files]
    except Exception as error:
        if str(path) in str(error) and type(error) is ValueError:
            raise
        arrays = objects.read(path)
    if arrays is None:
        raise ValueError(
            f"{path} is no array of whole numbers; expected what np.save makes of a request's routed_experts, or np.savez of "
            "several"
        )
    found = []
    for array in arrays:
        if array.ndim not in (3, 4) or array.dtype.kind not in "iu":
            raise ValueError(
                f"{path} has {array.dtype} {list(array.shape)}; expected whole numbers [tokens, layers, choices]"
            )
        found += list(array) if array.ndim == 4 else [array]
    return [array.astype(np.int64) for array in found]


# ------------------------------------------------------------------------------------------------------ SGLang


def _read_sglang(path: Path, layers: Layers) -> Iterator[dict]:
    content = checkpoint.content(path, "file of SGLang's recorder")
    if not isinstance(content, dict) or "records" not in content:
        raise ValueError(f"{path} has no 'records'; expected what SGLang's recorder writes in mode per_token")
    logical = content.get("last_physical_to_logical_map")
    if logical is not None:
        logical = _whole(path, "last_physical_to_logical_map", logical, 2)
    for record in content["records"]:
        if "topk_ids_of_layer" not in record:
            raise ValueError(f"{path}: a record has no 'topk_ids_of_layer'; record in mode per_token")
        ids = _whole(path, "topk_ids_of_layer", record["topk_ids_of_layer"], 3)
        token = _whole(path, "input_ids", record["input_ids"], 1)
        position = _whole(path, "positions", record["positions"], 1)
        if position.shape != token.shape or ids.shape[1] != len(token):
            raise ValueError(
                f"{path}: a record has {len(token)} input_ids, positions of shape {list(position.shape)} and ids of shape "
                f"{list(ids.shape)}; expected [layers, tokens, choices] of the same tokens"
            )
        if not len(token):
            continue
        ids, told = _logical(path, ids, logical)
        places = np.flatnonzero((ids >= 0).any(axis=(1, 2)))
        # The recorder's buffer is wider than the model's k.
        ids = ids[places][:, :, (ids[places] >= 0).any(axis=(0, 1))]
        for a, b in itertools.pairwise(_bounds(path, record, position)):
            yield {
                "experts": ids[:, a:b].transpose(1, 0, 2),
                "token": token[a:b],
                "position": position[a:b],
                "layers": tuple(places.tolist()),
                "num_experts": told,
            }


def _logical(path: Path, ids: np.ndarray, logical: np.ndarray | None) -> tuple[np.ndarray, int | None]:
    """The model's experts [layers, T, k] in place of physical ones, and how many there are."""
    if logical is None:
        return ids, None
    if len(logical) < len(ids) or ids.max(initial=0) >= logical.shape[1]:
        raise ValueError(
            f"{path}: last_physical_to_logical_map has shape {list(logical.shape)}, which does not fit ids up to "
            f"{ids.max(initial=0)} in {len(ids)} layers"
        )
    layer = np.arange(len(ids))[:, None, None]
    return np.where(ids >= 0, logical[layer, ids], NONE), int(logical.max()) + 1


def _bounds(path: Path, record: dict, position: np.ndarray) -> Sequence[int]:
    """Where the requests of a pass begin, and where the last one ends; what comes after that is padding."""
    tokens, lengths = len(position), record.get("extend_seq_lens")
    if lengths is not None:
        # As Python's numbers, which do not overflow.
        lengths = _whole(path, "extend_seq_lens", lengths, 1).tolist()
        bounds = [0, *itertools.accumulate(lengths)]
        if bounds[-1] > tokens or min(lengths, default=0) < 0:
            raise ValueError(
                f"{path}: extend_seq_lens adds up to {bounds[-1]} of {tokens} tokens; expected no more"
            )
        return bounds
    if record.get("forward_mode") not in (None, EXTEND):
        return range(tokens + 1)
    # A pass that does not tell its requests: one begins wherever positions do not go on.
    return [*np.flatnonzero(np.diff(position, prepend=-2) != 1).tolist(), tokens]


# ---------------------------------------------------------------------------------------------------- Megatron


def _read_megatron(path: Path, layers: Layers) -> Iterator[dict]:
    files = files_of(path, "megatron") if path.is_dir() else [path]
    passes: dict[tuple[int, int], dict[int, list]] = {}
    for file in files:
        for record in _json_lines(file):
            if record.get("block", "decoder") == "decoder":
                by_layer = passes.setdefault((record["step"], record["rank"]), {})
                by_layer.setdefault(record["layer"], []).append(record["top_indices"])
    if not passes:
        raise ValueError(
            f"{path} holds no records of a decoder; expected a folder with router_trace_rank*.jsonl, or one such file"
        )
    for (step, rank), by_layer in sorted(passes.items()):
        names = tuple(sorted(by_layer))
        if len({len(by_layer[layer]) for layer in names}) > 1:
            raise ValueError(
                f"{path}: the layers of step {step} on rank {rank} have different numbers of microbatches"
            )
        # The n-th record of each layer is of the n-th microbatch.
        for batch in zip(*(by_layer[layer] for layer in names), strict=True):
            if len({len(part) for part in batch}) > 1:
                raise ValueError(
                    f"{path}: the layers of step {step} on rank {rank} have different numbers of tokens; expected the same"
                )
            if batch[0]:
                yield {"experts": np.stack([_square(path, part) for part in batch], axis=1), "layers": names}


def _square(path: Path, rows: list) -> np.ndarray:
    try:
        array = np.array(rows)
    except ValueError:
        array = np.empty(0)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: top_indices is no table of whole numbers; expected [tokens][choices]")
    return array


# ------------------------------------------------------------------------------------------------------- OLMoE


def _read_olmoe(path: Path, layers: Layers) -> Iterator[dict]:
    for record in _json_lines(path):
        try:
            experts = np.array(record["exp_ids"])
        except ValueError:
            experts = np.empty(0)
        if not len(record["input_ids"]):
            continue
        if experts.ndim != 3 or experts.dtype.kind not in "iu" or len(experts) != len(record["input_ids"]):
            raise ValueError(
                f"{path}: exp_ids has shape {list(experts.shape)} for {len(record['input_ids'])} tokens; expected whole "
                "numbers [tokens, choices, layers]"
            )
        predicted = record.get("predicted_token_ids", [-1] * len(experts))
        yield {
            "experts": experts.transpose(0, 2, 1),
            "token": _whole(path, "input_ids", record["input_ids"], 1),
            "predicted": _whole(path, "predicted_token_ids", predicted, 1),
        }


READERS: dict[str, Callable[[Path, Layers], Iterator[dict]]] = {
    "vllm": _read_vllm,
    "sglang": _read_sglang,
    "megatron": _read_megatron,
    "olmoe": _read_olmoe,
}


def _whole(path: Path, name: str, values: Any, axes: int) -> np.ndarray:
    """``values`` as int64 of so many axes.

    Raises:
        ValueError: they are something else.
    """
    try:
        # A copy of a tensor of torch is deprecated in NumPy.
        array = np.asarray(values)
        if array.size == 0:
            array = array.astype(np.int64)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        array = np.empty(0)
    if array.ndim != axes or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: {name} is {shown(values)}; expected an array of whole numbers with {axes} axes"
        )
    return array.astype(np.int64)


def _json_lines(path: Path) -> Iterator[dict]:
    check_regular(path, "lines of JSON objects")
    with open(path, encoding="utf-8") as file:
        pieces = iter(lambda: file.readline(LONGEST_LINE + 1), "")
        for number, line in enumerate(pieces, 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(
                    f"{path}, line {number} has more than {LONGEST_LINE:,} characters; expected a JSON object"
                )
            try:
                record = json_text.loads(line, json_text.MANY_VALUES)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} {error}; expected a JSON object") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is {shown(record)}; expected a JSON object")
            yield record


# --------------------------------------------------------------------------------------------------- the trace


def as_trace(
    samples: list[dict[str, Any]], num_experts: int | None, layers: Layers, source: dict[str, str]
) -> Trace:
    """The samples that a reader found, as a trace; ``source`` becomes its meta.

    Raises:
        ValueError: they do not fit each other or the arguments.
    """
    path = source["path"]
    samples = [part for part in (_without_padding(sample, path) for sample in samples) if part is not None]
    if not samples:
        raise ValueError(f"{path} holds no token; expected at least one with experts")
    shapes = {(s["experts"].shape[1:], s.get("layers")) for s in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"{path}: samples differ in layers or choices: {shown(sorted(map(str, shapes)))}; expected the same in all"
        )
    (depth, _), told = shapes.pop()
    layers = told if told is not None else tuple(range(depth)) if layers is None else layers
    if len(layers) != depth:
        raise ValueError(f"layers={shown(list(layers))}: expected {depth} layers, as many as {path} has")
    if len(set(layers)) < depth:
        raise ValueError(f"{path} has the layers {shown(list(layers))}; expected each once")
    experts = np.concatenate([s["experts"] for s in samples])
    highest = int(experts.max())
    known = num_experts or max((s.get("num_experts") or 0 for s in samples), default=0) or highest + 1
    if experts.min() < 0 or highest >= known:
        raise ValueError(
            f"{path} has experts {experts.min()} to {highest}; expected 0 to {known - 1} with num_experts={known}"
        )
    if known > MOST_EXPERTS:
        raise ValueError(f"{path} has {known:,} experts; expected {MOST_EXPERTS:,} at most")
    odd = next((layer for layer in layers if type(layer) is not int or not 0 <= layer < MOST_LAYERS), None)
    if odd is not None:
        raise ValueError(
            f"{path} has the layer {shown(odd)}; expected whole numbers from 0 to {MOST_LAYERS - 1}"
        )

    lengths = [len(s["experts"]) for s in samples]
    token = [s.get("token", np.full(n, -1)) for s, n in zip(samples, lengths, strict=True)]
    follows = [_following(t, s["position"]) for t, s in zip(token, samples, strict=True)]
    unknown = np.full(experts.shape, np.nan, dtype=np.float32)

    def joined(name: str, parts: list[np.ndarray]) -> np.ndarray:
        values = np.concatenate(parts)
        if len(values) and not -1 <= values.min() <= values.max() < 2**31:
            raise ValueError(
                f"{path} has {name} from {values.min()} to {values.max()}; expected -1 to {2**31 - 1}"
            )
        return values.astype(np.int32)

    return Trace(
        sample=np.repeat(np.arange(len(samples), dtype=np.int32), lengths),
        position=joined("positions", [s["position"] for s in samples]),
        token=joined("tokens", token),
        target=joined("tokens", follows),
        generated=np.zeros(len(experts), dtype=bool),
        logprob=np.full(len(experts), np.nan, dtype=np.float32),
        predicted=joined(
            "predictions", [s.get("predicted", np.full(n, -1)) for s, n in zip(samples, lengths, strict=True)]
        ),
        layers=layers,
        experts=experts.astype(np.int16),
        probs=unknown,
        weights=unknown,
        kept=np.ones(experts.shape, dtype=bool),
        entropy=unknown[:, :, 0],
        full={},
        num_experts=known,
        meta={"imported": source},
    )


def _following(token: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The token behind each one of a sample; ``PAD`` where it is not known, such as before a token without experts."""
    known = (np.diff(position) == 1) & (token[1:] >= 0)
    return np.append(np.where(known, token[1:], PAD), PAD)


def _without_padding(sample: dict[str, Any], path: str) -> dict[str, Any] | None:
    """The tokens that have experts, with their positions; None where none has."""
    experts = sample["experts"]
    sample = {"position": np.arange(len(experts))} | sample
    real = ~(experts == NONE).all(axis=(1, 2))
    if not real.any():
        return None
    if (experts[real] == NONE).any():
        raise ValueError(
            f"{path}: a token has fewer choices than others, or none in some layers; expected alike for all"
        )
    for name in ("experts", "position", "token", "predicted"):
        if name in sample:
            if len(sample[name]) != len(real):
                raise ValueError(f"{path}: a sample has {len(sample[name])} {name} for {len(real)} tokens")
            sample[name] = sample[name][real]
    return sample
