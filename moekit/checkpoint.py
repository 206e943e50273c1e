"""A checkpoint of fairseq's ``moe`` branch: which files it has, what lies in them, who reads what.

    files = find("/data/en_moe_lm_15b")     # any spelling of the path
    plan = survey(files)                    # every file's header, checked against the key table; no weight is read
    fill(model, plan, held)                 # one rank reads the tensors it keeps, straight into place

A checkpoint is untrusted: files are opened with torch's restricted unpickler and memory-mapped, so that nothing in
them runs and nothing is read that is not kept.
"""

from __future__ import annotations

import argparse
import collections
import functools
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit import checkpoint_options as cfg
from moekit import copying
from moekit.nn.config import ModelConfig

# ---------------------------------------------------------------------------------------------- which files


@dataclass(frozen=True)
class Files:
    """``shared`` holds what every rank needs, ``ranks[i]`` is ``-rank-i`` and holds experts. Either may be all."""

    shared: Path
    ranks: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.shared, *self.ranks)


FILE = re.compile(r"(?P<stem>.+?)(?P<part>-shared|-rank-(?P<rank>\d+))?\.pt")
SHARED_KEY = "decoder.embed_tokens.weight"  # who holds it holds the shared part


def find(checkpoint: str | Path) -> Files:
    """The files of the checkpoint that ``checkpoint`` names.

    Args:
        checkpoint: its folder; ``model-shared.pt``; any ``model-rank-N.pt``; ``model.pt``, which need not exist (if it
            does and holds the shared part, it stands in for ``model-shared.pt``); ``"demo"``. Stems other than
            ``model`` work alike.

    Raises:
        ValueError: nothing there, several checkpoints in one folder, a gap in the ranks, or no shared part.
    """
    if str(checkpoint) == "demo":
        checkpoint = Path(__file__).parent / "demo" / "model"
    path = Path(checkpoint).expanduser()
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}; checkpoint={str(checkpoint)!r} must name a folder or a .pt file"
        )

    found = {p.name: match for p in sorted(folder.glob("*.pt")) if (match := FILE.fullmatch(p.name))}
    if path == folder:
        stems = sorted(
            {m["stem"] for m in found.values() if m["part"]} or {m["stem"] for m in found.values()}
        )
        if not stems:
            raise ValueError(
                f"{folder} holds no checkpoint: expected model-shared.pt and model-rank-0.pt, ..."
            )
        if len(stems) > 1 and "model" not in stems:
            raise ValueError(
                f"{folder} holds several checkpoints ({', '.join(stems)}): name one, as in {stems[0]}.pt"
            )
        stem = "model" if "model" in stems else stems[0]
    else:
        match = FILE.fullmatch(path.name)
        if match is None:
            what = "is not a .pt file or a folder" if path.exists() else "does not exist"
            raise ValueError(f'{path} {what}: name a checkpoint\'s folder, one of its .pt files, or "demo"')
        stem = match["stem"]

    ranks = {int(m["rank"]): folder / name for name, m in found.items() if m["stem"] == stem and m["rank"]}
    if path.suffix and path != folder and not path.exists() and FILE.fullmatch(path.name)["rank"]:
        raise ValueError(f"there is no file {path}; {folder} holds {len(ranks)} rank files")
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing:
        names = ", ".join(f"{stem}-rank-{r}.pt" for r in missing[:5])
        raise ValueError(
            f"{folder} holds {len(ranks)} rank files up to {stem}-rank-{max(ranks)}.pt but lacks {names}"
        )

    candidates = [folder / f"{stem}-shared.pt", folder / f"{stem}.pt"]
    if path == candidates[1]:
        candidates.reverse()
    for candidate in candidates:
        if candidate.is_file() and SHARED_KEY in tensors(read(candidate), candidate):
            return Files(candidate, tuple(ranks[r] for r in sorted(ranks)))
    there = ", ".join(name for name, m in found.items() if m["stem"] == stem) or "no such file"
    raise ValueError(
        f"{folder} has no shared part of '{stem}' ({there}): expected {stem}-shared.pt, or {stem}.pt, with {SHARED_KEY}"
    )


# ------------------------------------------------------------------------------------------ reading a file


def read(path: Path) -> dict[str, Any]:
    """The top level of one checkpoint file, its tensors memory-mapped. Nothing in the file is executed.

    Raises:
        ValueError: not a checkpoint, damaged, or it asks to build objects of a class that is not known as harmless.
    """
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are no archives, and cannot be mapped
        with torch.serialization.safe_globals(harmless()):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} is not a readable checkpoint file{_kind(path)}") from error
        raise ValueError(
            f"{path} asks to load the class or function {wanted[1]}, which moekit does not do: a checkpoint is data, and "
            "this file may be hostile"
        ) from error
    except Exception as error:  # torch reads a damaged pickle until something fails, and that may be anything
        told = isinstance(error, (RuntimeError, OSError)) and str(error)
        reason = str(error).splitlines()[0] if told else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint file{_kind(path)}: {reason}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path} has no 'model' with tensors: it is no fairseq checkpoint")
    return state


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64).lstrip()


def _kind(path: Path) -> str:
    """What a file that is no checkpoint often is instead."""
    start = _first_bytes(path) if path.is_file() else b""
    if start.startswith(b"version https://git-lfs"):
        return " but a Git LFS pointer: run git lfs pull"
    return " but a web page" if start.startswith(b"<") else ""


def tensors(state: dict[str, Any], path: Path) -> dict[str, Tensor]:
    for key, value in state["model"].items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key} is a {type(value).__name__}, expected a tensor")
    return state["model"]


def harmless() -> list[tuple[Any, str]]:
    """The classes that fairseq's configs and training state hold, none of which does anything when it is built."""
    import omegaconf
    from omegaconf import base, nodes

    kinds = [getattr(nodes, name) for name in dir(nodes) if name.endswith("Node")]
    kinds += [omegaconf.DictConfig, omegaconf.ListConfig, base.ContainerMetadata, base.Metadata]
    kinds += [
        argparse.Namespace,
        collections.defaultdict,
        dict,
        list,
        tuple,
        set,
        int,
        float,
        str,
        bool,
        bytes,
    ]
    named = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds]
    return [*named, (Any, "typing.Any"), *_numpy()]


def _numpy() -> Iterator[tuple[Any, str]]:
    import numpy as np

    for package in ("numpy.core", "numpy._core"):
        yield np.float64(0).__reduce__()[0], f"{package}.multiarray.scalar"
    yield np.dtype, "numpy.dtype"
    for name in ("Float64DType", "Float32DType", "Int64DType"):
        yield getattr(np.dtypes, name), f"numpy.dtypes.{name}"


# ---------------------------------------------------------------------------------------- the key table

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
NUMBER = re.compile(r"(?<=\.layers\.)\d+|(?<=\.experts\.)\d+")


@dataclass(frozen=True)
class Place:
    """Where a key's tensor goes: our parameter, and the part of it (see ``KEYS``); ``expert`` counts from 0 overall."""

    name: str
    part: str = ""
    expert: int = 0

    @property
    def where(self) -> tuple[int, int] | None:
        """(layer, expert), both from 0; None for what is no expert's."""
        return (int(self.name.split(".")[1]), self.expert) if self.part == "expert" else None

    def of(self, parameter: Tensor, first_expert: int = 0) -> Tensor:
        """The view of ``parameter`` to fill; ``first_expert`` is the first one that it holds."""
        if self.part == "expert":
            return parameter[self.expert - first_expert]
        if self.part in ("q", "k", "v"):
            return parameter.chunk(3)["qkv".index(self.part)]
        return parameter


def places(
    source: Source, found: dict[str, Tensor], config: ModelConfig
) -> Iterator[tuple[str, Tensor, Place]]:
    """Each (key, tensor) of a file and where it goes; without the keys that are dropped on purpose.

    Raises:
        ValueError: a key is not in the table.
    """
    for key, tensor in found.items():
        pattern, numbers = _split(key)
        if pattern not in KEYS and pattern not in OLD_KEYS:
            raise ValueError(f"{source.path}: unknown key {key}; expected a key of moekit.checkpoint.KEYS")
        target = KEYS[pattern] if pattern in KEYS else OLD_KEYS[pattern]
        if config.share_output and target == "output.weight[rows]":
            target = "embed.weight[rows]"  # one matrix, which files hold twice; fairseq reads this one last
        elif config.share_output and key == SHARED_KEY and not OUTPUT_KEYS.isdisjoint(found):
            continue
        if target is None or (target.startswith("norm.") and config.before_final_norm):
            continue
        name, _, part = target.rstrip("]").partition("[")
        expert = source.experts.start + numbers[-1] if part == "expert" else 0
        yield key, tensor, Place(name.format(*numbers), part, expert)


@functools.lru_cache(maxsize=4096)  # files have the same keys
def _split(key: str) -> tuple[str, tuple[int, ...]]:
    """A key without its numbers, and the numbers."""
    return NUMBER.sub("{}", key), tuple(int(n) for n in NUMBER.findall(key))


# ---------------------------------------------------------------------------------- who reads what, and reading


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Source:
    """One file: the experts of each MoE layer it holds, counted overall, and what it weighs."""

    path: Path
    experts: range
    bytes: int
    tensors: int
    stamp: tuple[int, ...] = field(repr=False)  # see :func:`stamp`


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

    first = (*files.ranks, files.shared)[0]  # fairseq heeds the config of rank 0's file
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
                        f"{path}: {key} fills {_name(part)} for the second time, after {filled[part]}"
                    )
                filled[part] = f"{path.name}: {key}"
        sources.append(source)
        offset = source.experts.stop if path != files.shared else 0

    for name, parameter in expected.items():
        for target in _parts(name, parameter):
            if target not in filled:
                key = _key_of(target)
                holders = ", ".join(f"{s.path.name} ({len(s.experts)})" for s in sources if len(s.experts))
                hint = (
                    f"; experts a layer in the files: {holders or 'none'}, expected {config.experts} in all"
                )
                where = files.shared if target.part != "expert" else files.shared.parent
                raise ValueError(
                    f"{where}: no file fills {_name(target)}: expected the key {key}"
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


def _key_of(target: Place) -> str:
    numbers = re.findall(r"(?<=layers\.)\d+", target.name)
    wanted = re.sub(r"(?<=layers\.)\d+", "{}", target.name) + (f"[{target.part}]" if target.part else "")
    key = next(key for key, ours in KEYS.items() if ours == wanted)
    return key.format(*numbers, "*")


def _name(target: Place) -> str:
    number = f" {target.expert}" if target.part == "expert" else ""
    return target.name + (f" ({target.part}{number})" if target.part else "")


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
                    f"{_name(target)} was filled {filled[target]} times; did the files change meanwhile?"
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
