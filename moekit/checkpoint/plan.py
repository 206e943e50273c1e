"""Who reads what: a survey of all headers makes the plan, and each rank fills its model by it."""

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
from moekit.checkpoint.files import Files, find
from moekit.checkpoint.keys import NUMBER, OUTPUT_KEYS, SHARED_KEY, Place, key_of, name_of, places
from moekit.checkpoint.reading import Source, read, stamp, tensors
from moekit.nn.config import ModelConfig


@dataclass(frozen=True)
class Plan:
    """All that a rank needs to know to read its part."""

    config: ModelConfig
    dtype: torch.dtype  # of the weights in the files
    sources: tuple[Source, ...] = field(repr=False)
    # What `survey` has mapped, for who reads it in the same process: to read a header takes 14 ms. It is taken out by
    # `fill`, and does not travel to other processes.
    opened: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"opened": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def open(self, source: Source) -> dict[str, Tensor]:
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
    from moekit.nn.transformer import Transformer

    first = files.first
    stamps = {path: stamp(path) for path in files.all}
    states = {path: read(path) for path in (files.shared, first)}
    opened = {path: tensors(state, path) for path, state in states.items()}
    shared = opened[files.shared]
    options, task = cfg.options_of(states[first], str(first))
    version = shared.get("decoder.version")
    rows = min(len(shared[key]) for key in {SHARED_KEY, *OUTPUT_KEYS} & set(shared))
    if dictionary is not None and dictionary > rows:
        raise ValueError(
            f"{files.shared}: {SHARED_KEY} has {rows} rows, too few for a dictionary of {dictionary} types"
        )
    config = cfg.from_fairseq(
        options,
        task,
        vocab_rows=dictionary or rows,
        # files without a version, or of version 2 and less, are from before the final norm existed
        before_final_norm=version is None or float(version.flatten()[0]) <= 2,
    )
    with torch.device("meta"):
        model = Transformer(config)
    expected = dict(model.named_parameters())

    sources: list[Source] = []
    filled: dict[Place, str] = {}
    offset = 0
    for path in files.all:
        if path not in opened:
            opened[path] = tensors(read(path), path)
        found = opened[path]
        held = 1 + max((int(n) for key in found for n in NUMBER.findall(key)[1:]), default=-1)
        start = 0 if path == files.shared else offset
        source = Source(path, range(start, start + held), path.stat().st_size, len(found), stamps[path])
        for key, tensor, target in places(source, found, config):
            _check(path, key, tensor, target, expected, config)
            for part in _unfold(target):
                if part in filled:
                    raise ValueError(
                        f"{path}: {key} fills {name_of(part)} for the second time, after {filled[part]}"
                    )
                filled[part] = f"{path.name}: {key}"
        sources.append(source)
        offset = source.experts.stop if path != files.shared else 0

    for name, parameter in expected.items():
        for target in _parts(name, parameter):
            if target not in filled:
                key = key_of(target)
                holders = ", ".join(f"{s.path.name} ({len(s.experts)})" for s in sources if len(s.experts))
                hint = (
                    f"; experts a layer in the files: {holders or 'none'}, expected {config.experts} in all"
                )
                where = files.shared if target.part != "expert" else files.shared.parent
                raise ValueError(
                    f"{where}: no file fills {name_of(target)}: expected the key {key}"
                    + (hint if target.part == "expert" else "")
                )
    return Plan(config, shared[SHARED_KEY].dtype, tuple(sources), opened)


def _check(path: Path, key: str, tensor: Tensor, target: Place, expected: dict, config: ModelConfig) -> None:
    parameter = expected.get(target.name)
    if parameter is None:
        raise ValueError(
            f"{path}: {key} (shape {list(tensor.shape)}) has no place in the model that cfg describes"
        )
    if target.part == "expert" and target.expert >= config.experts:
        raise ValueError(
            f"{path}: {key} would be expert {target.expert} (from 0), but cfg says moe_expert_count={config.experts}: "
            "a file too many, or files of two checkpoints"
        )
    wanted, got = list(target.of(parameter).shape), list(tensor.shape)
    if target.part == "rows":
        fits = got[1:] == wanted[1:] and got[0] >= wanted[0]
    else:
        fits = got == wanted
    if not fits:
        raise ValueError(f"{path}: {key} has shape {got}, expected {wanted}")
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: {key} has dtype {tensor.dtype}, expected a floating-point one")


def _parts(name: str, parameter: Tensor) -> list[Place]:
    """Everything that has to fill ``parameter``."""
    if ".moe.experts." in name:
        return [Place(name, "expert", e) for e in range(len(parameter))]
    if ".attn.qkv." in name:
        return [Place(name, part) for part in "qkv"]
    return [Place(name, "rows" if name in ("embed.weight", "output.weight") else "")]


def _unfold(target: Place) -> list[Place]:
    """Old files fill queries, keys and values with one tensor."""
    return [Place(target.name, part) for part in target.part] if target.part == "qkv" else [target]


def fill(
    model: torch.nn.Module,
    plan: Plan,
    held: range,
    progress: Callable[[int], None] | None = None,
    threads: int = 1,
) -> dict[Place, int]:
    """Read one rank's tensors from the mapped files into the model's parameters, as copying.py does.

    Args:
        model: a :class:`moekit.nn.transformer.Transformer` with room for the experts ``held``; any device, any dtype.
        progress: called with the bytes read since the last call.
        threads: that copy at the same time.

    Returns:
        How often each place was filled: once, or an error is raised.
    """
    parameters = dict(model.named_parameters())
    filled: collections.Counter[Place] = collections.Counter()

    def pieces() -> Iterator[copying.Piece]:
        for source in plan.needed(held):
            for key, tensor, target in places(source, plan.open(source), plan.config):
                if target.part == "expert" and target.expert not in held:
                    continue
                view = target.of(parameters[target.name].data, held.start)
                if target.part == "rows":
                    tensor = tensor[: len(view)]
                yield copying.Piece(f"{source.path}: {key}", tensor, view)
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
    return dict(filled)


def describe(checkpoint: str | Path) -> list[dict[str, Any]]:
    """What lies in a checkpoint's folder, a row a file: for tables.

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
