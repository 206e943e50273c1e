"""Which rank reads what: a survey of all headers makes the plan, and each rank fills its model by it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.checkpoint import copying
from moekit.checkpoint import options as cfg
from moekit.checkpoint.belonging import check_belongs
from moekit.checkpoint.contents import clip
from moekit.checkpoint.files import Files, find
from moekit.checkpoint.inspection import Inspection, NonFinite, Wanted, warn_unchecked
from moekit.checkpoint.keys import NUMBER, OUTPUT_KEYS, SHARED_KEY, Place, key_of, name_of, places
from moekit.checkpoint.reading import Source, Weights, read, stamp, tensors
from moekit.nn.config import ModelConfig


@dataclass(frozen=True)
class Plan:
    """All that a rank needs to know to read its part."""

    config: ModelConfig
    # The type of the weights in the files.
    dtype: torch.dtype
    sources: tuple[Source, ...] = field(repr=False)
    # Files that `survey` has mapped already, so that `fill` in the same process need not parse them again (a few ms
    # each). `fill` takes them out. They are not pickled.
    opened: dict[Path, Weights] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"opened": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def open(self, source: Source) -> Weights:
        """The file's tensors, mapped; as the survey did, if it has not been written to since."""
        found = self.opened.pop(source.path, None)
        if found is None or source.stamp != stamp(source.path):
            found = tensors(read(source.path), source.path)
        return found

    def parameters(self, held: int) -> int:
        """Parameters of a rank that holds ``held`` experts a layer."""
        from moekit.nn.transformer import Transformer

        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(self.config, held).parameters())

    def needed(self, held: range) -> list[Source]:
        """The files a rank with the experts ``held`` opens: the shared one and those with an expert of its own."""
        shared, *rest = self.sources
        return [shared, *(s for s in rest if any(expert in s.experts for expert in held))]


def survey(files: Files, dictionary: int | None = None) -> Plan:
    """Check every file's header against the key table and the model that its config describes; read no weight.

    Args:
        dictionary: types of the dictionary; rows of the embedding and output matrices beyond it are ignored.
            None: all rows are kept.

    Raises:
        ValueError: an unknown or missing key, a wrong shape, an expert that no file or that two files fill; it names
            the file, the key, what was found and what was expected.
    """
    stamps = {path: stamp(path) for path in files.all}
    states = {path: read(path) for path in files.all}
    opened = {path: tensors(state, path) for path, state in states.items()}
    shared = opened[files.shared]
    config = _config(files, states, shared, dictionary)
    expected = _expected(files, config, shared)

    sources: list[Source] = []
    filled: dict[Place, str] = {}
    offset = 0
    for path, found in opened.items():
        held = 1 + max((int(n) for key in found for n in NUMBER.findall(key)[1:]), default=-1)
        start = 0 if path == files.shared else offset
        source = Source(path, range(start, start + held), path.stat().st_size, len(found), stamps[path])
        for key, tensor, target in places(source, found, config):
            _check(path, key, tensor, target, expected, config)
            for part in _unfold(target):
                if part in filled:
                    raise ValueError(
                        f"{path}: {clip(key)} fills {name_of(part)} for the second time, after {filled[part]}"
                    )
                filled[part] = f"{path.name}: {key}"
        sources.append(source)
        offset = source.experts.stop if path != files.shared else 0

    missing = next((t for n, p in expected.items() for t in _parts(n, p) if t not in filled), None)
    if missing is not None:
        where, hint = files.shared, ""
        if missing.part == "expert":
            holders = ", ".join(f"{s.path.name} ({len(s.experts)})" for s in sources if len(s.experts))
            where = files.shared.parent
            hint = f"; experts a layer in the files: {holders or 'none'}, expected {config.experts} in all"
        raise ValueError(
            f"{where}: no file fills {name_of(missing)}: expected the key {key_of(missing)}{hint}"
        )
    check_belongs(files, states)
    warn_unchecked(opened)
    return Plan(config, shared[SHARED_KEY].dtype, tuple(sources), opened)


def _config(files: Files, states: dict[Path, dict], shared: Weights, dictionary: int | None) -> ModelConfig:
    """The config that rank 0's file tells, checked against the sizes of the files."""
    matrices = [key for key in (SHARED_KEY, *sorted(OUTPUT_KEYS)) if key in shared]
    for key in matrices:
        if shared[key].ndim != 2 or not shared[key].numel():
            raise ValueError(
                f"{files.shared}: {key} has shape {list(shared[key].shape)}, expected a row for each type"
            )
    rows = min(len(shared[key]) for key in matrices)
    if dictionary is not None and dictionary > rows:
        raise ValueError(
            f"{files.shared}: {SHARED_KEY} has {rows} rows, too few for a dictionary of {dictionary} types"
        )
    version = shared.get("decoder.version")
    if version is not None and version.numel() != 1:
        raise ValueError(
            f"{files.shared}: decoder.version has shape {list(version.shape)}, expected one number"
        )
    config = cfg.from_fairseq(
        *cfg.options_of(states[files.first], str(files.first)),
        vocab_rows=dictionary or rows,
        # files without a version, or of version 2 and less, are from before the final norm existed
        before_final_norm=version is None or float(version.real) <= 2,
        where=str(files.first),
    )
    # A model is not built, not even without memory, if its files cannot hold it. Each weight takes a byte or more.
    layers = 1 + max((int(NUMBER.findall(key)[0]) for key in shared if NUMBER.search(key)), default=-1)
    weights = 2 * config.dim * config.ffn_dim * config.experts * len(config.moe_layers)
    size = sum(memory.nbytes for memory in (state["model"].memory for state in states.values()))
    if config.layers > layers:
        raise ValueError(
            f"{files.first}: decoder_layers={config.layers}, but {files.shared.name} has {layers} layers"
        )
    if weights > size:
        raise ValueError(
            f"{files.first}: moe_expert_count={config.experts}, decoder_embed_dim={config.dim} and "
            f"decoder_ffn_embed_dim={config.ffn_dim} make {weights:,} weights, but all files have {size:,} bytes"
        )
    return config


def _expected(files: Files, config: ModelConfig, shared: Weights) -> dict[str, Tensor]:
    """The parameters to fill, by their names; on no device."""
    from moekit.nn.transformer import Transformer

    try:
        with torch.device("meta"):
            return dict(Transformer(config).named_parameters())
    except RuntimeError as error:
        raise ValueError(f"{files.first}: its cfg describes a model that cannot be built") from error


def _check(path: Path, key: str, tensor: Tensor, target: Place, expected: dict, config: ModelConfig) -> None:
    parameter = expected.get(target.name)
    if parameter is None:
        raise ValueError(
            f"{path}: {clip(key)} (shape {list(tensor.shape)}) has no place in the model that cfg describes"
        )
    if target.part == "expert" and target.expert >= config.experts:
        raise ValueError(
            f"{path}: {clip(key)} would be expert {target.expert} (from 0), but cfg says moe_expert_count={config.experts}: "
            "a file too many, or files of two checkpoints"
        )
    wanted, got = list(target.of(parameter).shape), list(tensor.shape)
    if target.part == "rows":
        fits = got[1:] == wanted[1:] and got[0] >= wanted[0]
    else:
        fits = got == wanted
    if not fits:
        raise ValueError(f"{path}: {clip(key)} has shape {got}, expected {wanted}")
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: {clip(key)} has dtype {tensor.dtype}, expected a floating-point one")


def _parts(name: str, parameter: Tensor) -> Iterator[Place]:
    """Everything that has to fill ``parameter``."""
    if ".moe.experts." in name:
        yield from (Place(name, "expert", e) for e in range(len(parameter)))
    elif ".attn.qkv." in name:
        yield from (Place(name, part) for part in "qkv")
    else:
        yield Place(name, "rows" if name in ("embed.weight", "output.weight") else "")


def _unfold(target: Place) -> list[Place]:
    """Old files fill queries, keys and values with one tensor."""
    return [Place(target.name, part) for part in target.part] if target.part == "qkv" else [target]


class Filled(dict[Place, int]):
    """How often each place was filled: once.

    Attributes:
        nonfinite: tensors with weights that are not finite.
    """

    nonfinite: list[NonFinite]


def fill(
    model: torch.nn.Module,
    plan: Plan,
    held: range,
    progress: Callable[[int], None] | None = None,
    threads: int = 1,
    verify: bool = True,
) -> Filled:
    """Read one rank's tensors from the mapped files into the model's parameters, as copying.py does.

    Args:
        model: a :class:`moekit.nn.transformer.Transformer` with room for the experts ``held``; any device, any dtype.
        progress: called with the bytes read since the last call.
        threads: that copy at the same time.
        verify: compare checksums and look for numbers that are not finite, as inspection.py does.

    Raises:
        ValueError: a tensor is damaged, or a file has changed since the survey.
    """
    parameters = dict(model.named_parameters())
    filled: collections.Counter[Place] = collections.Counter()
    inspections: list[Inspection] = []

    def wanted(source: Source, weights: Weights) -> Iterator[Wanted]:
        for key, tensor, target in places(source, weights, plan.config):
            if target.part == "rows":
                yield key, tensor[: len(parameters[target.name])], target
            elif target.part != "expert" or target.expert in held:
                yield key, tensor, target

    def pieces() -> Iterator[copying.Piece]:
        for source in plan.needed(held):
            weights = plan.open(source)
            parts = list(wanted(source, weights))
            inspection = Inspection(source, weights, parts) if verify else None
            inspections.extend([inspection] if inspection else [])
            for part in parts:
                key, tensor, target = part
                view = target.of(parameters[target.name].data, held.start)
                check = inspection.check(part) if inspection else None
                yield copying.Piece(f"{source.path}: {key}", tensor, view, check)
                filled.update(_unfold(target))

    copying.copy(pieces(), next(iter(parameters.values())).device, threads, progress)
    for name, parameter in parameters.items():
        for target in _parts(name, parameter):
            if target.part == "expert":
                target = Place(name, "expert", held.start + target.expert)
            if filled[target] != 1:
                raise ValueError(
                    f"{name_of(target)} was filled {filled[target]} times; did the files change meanwhile?"
                )
    for inspection in inspections:
        inspection.remember()
    result = Filled(filled)
    result.nonfinite = [found for inspection in inspections for found in inspection.nonfinite]
    return result


def describe(checkpoint: str | Path) -> list[dict[str, Any]]:
    """The contents of a checkpoint's folder, one row per file, for tables.

    Returns:
        Rows with ``file``, ``bytes``, ``kind`` ("shared" or "rank"), ``rank`` (None for the shared one), ``experts``
        (a MoE layer), ``moe_layers``, ``dtype`` and ``tensors``.

    Raises:
        ValueError: as :func:`find` and :func:`read`.
    """
    files = find(checkpoint)
    rows = []
    for i, path in enumerate(files.all):
        found = tensors(read(path), path)
        numbers = [n for key in found if len(n := NUMBER.findall(key)) == 2]
        rows.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "kind": "shared" if i == 0 else "rank",
                "rank": None if i == 0 else i - 1,
                "experts": len({n[1] for n in numbers}),
                "moe_layers": len({n[0] for n in numbers}),
                "dtype": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in found.values()})),
                "tensors": len(found),
            }
        )
    return rows
