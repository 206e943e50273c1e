"""Whether the files of a folder belong together: none copied over another, swapped, of another training, or with another config."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moekit.checkpoint.contents import clip, short
from moekit.checkpoint.files import Files
from moekit.checkpoint.keys import split
from moekit.checkpoint.options import READ, options_of
from moekit.checkpoint.shards import FLAT as FLAT_TENSOR
from moekit.checkpoint.weights import Weights

# torch's names of folders lack the file's end.
NUMBERED = re.compile(
    r"(?P<stem>.+?)(-shared|-rank-(?P<rank>[0-9]+))?(-shard(?P<shard>[0-9]+))?(\.pt|\.safetensors)?",
    re.DOTALL,
)
UPDATES = "optimizer_history[-1].num_updates"
# Sections of cfg that are alike on all ranks of a training, but for paths, which a copy of it may have changed.
SECTIONS = ("model", "task", "criterion", "optimizer", "lr_scheduler", "optimization")
FLAT = (
    "arch",
    "seed",
    "lr",
    "max_update",
    "total_num_update",
    "update_freq",
    "optimizer",
    "clip_norm",
    *sorted(READ),
)
# What tells the rank that wrote a file, and the section of cfg that has it.
RANK, TRAINING = "distributed_rank", "distributed_training"
# The most options that an error names; it counts the others.
NAMED = 3


def check_belongs(files: Files, states: Mapping[Path, Mapping[str, Any]]) -> None:
    """Compare what the files' headers tell; no weight is read.

    All ranks of a training save after the same update, so another number of updates is refused. Other differences, of
    the seed say, are a warning: nothing in fairseq rules them out, and who publishes a checkpoint may have written its
    headers anew. Shapes are compared where tensors meet the model. A user may change the options that the config reads in
    rank 0's file alone, which is the one that counts, as in fairseq.

    Raises:
        ValueError: two files cannot be of one checkpoint, a file is not the rank that its name says, or what ought to be
            its config is none.
    """
    for path in files.all:
        if any(states[path].get(name) is not None for name in ("args", "cfg")):
            options_of(states[path], str(path))
    for path in files.all:
        _check_name(path, states[path]["model"].folder)
    _check_order({path: _writer(states[path]) for path in files.ranks})
    _check_order({path: _writer(states[path]) for path in files.common})
    _check_copies({path: states[path]["model"] for path in files.ranks})
    _check_parts({path: states[path]["model"] for path in files.common})
    odd: dict[Path, tuple[Path, str]] = {}
    for told in _compared(files, states):
        for path in told.odd:
            said = _said(told.name, told.held[path], told.expected)
            if told.name == UPDATES:
                raise ValueError(f"{path} is of another training than {told.like.name}: {said}")
            if not told.is_option or (path != files.first and 2 * len(told.odd) < len(told.held)):
                odd.setdefault(path, (told.like, said))
    if odd:
        path, (like, said) = next(iter(odd.items()))
        more = f"; so may {len(odd) - 1} others" if len(odd) > 1 else ""
        warnings.warn(f"{path} may be of another training than {like.name}: {clip(said)}{more}", stacklevel=4)


def other_config(files: Files, states: Mapping[Path, Mapping[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """In words, the options in which rank 0's file differs from all others; and its ``args`` and ``cfg`` with what most others tell.

    An option that a file does not tell is None there. No file need tell all of these options. None where there is no such option.
    """
    compared = [told for told in _compared(files, states) if told.is_option]
    # Another form of config has other sections, of which rank 0's file may tell none.
    sections = {told.section for told in compared if set(told.held) != {files.first}}
    odd: dict[str, Any] = {}
    said: list[str] = []
    for told in compared:
        found = told.held.get(files.first)
        others = [value for path, value in told.held.items() if path != files.first]
        if told.section in sections and found not in others:
            ((odd[told.name], _),) = Counter(others or [None]).most_common(1)
            said.append(_said(told.name, found, odd[told.name]))
    if not odd:
        return None
    more = [f"and {len(said) - NAMED} more"] if len(said) > NAMED else []
    return "; ".join(said[:NAMED] + more), _changed(states[files.first], odd)


def _changed(state: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The ``args`` and ``cfg`` of a file with other ``options``, by their names with the sections.

    ``args``, which would win, are left out where the options are of ``cfg``.
    """
    config: dict[str, Any] = copy.deepcopy({name: state.get(name) for name in ("args", "cfg")})
    if not any(name.startswith("args.") for name in options):
        config["args"] = None
    for name, value in options.items():
        *sections, option = name.split(".")
        place = config
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[option] = value
    return config


def _said(name: str, found: Any, expected: Any) -> str:
    return f"{name} is {short(found)}, expected {short(expected)}"


class _Compared(NamedTuple):
    """What several files tell under one name.

    Attributes:
        expected: what most of them tell, or else the first one.
        like: the first file that tells this, and ``odd`` those that do not.
        is_option: whether the config reads it.
    """

    name: str
    held: Mapping[Path, Any]
    expected: Any
    like: Path
    odd: list[Path]
    is_option: bool

    @property
    def section(self) -> str:
        return self.name.rpartition(".")[0]


def _compared(files: Files, states: Mapping[Path, Mapping[str, Any]]) -> Iterator[_Compared]:
    told = {
        path: _training(states[path]) for path in dict.fromkeys((files.first, *files.all)) if path in states
    }
    for name in dict.fromkeys(name for one in told.values() for name in one):
        held = {path: one[name] for path, one in told.items() if name in one}
        ((expected, _),) = Counter(held.values()).most_common(1)
        like = next(path for path, value in held.items() if value == expected)
        odd = [path for path, value in held.items() if value != expected]
        section, _, option = name.rpartition(".")
        is_option = section in ("args", "cfg.model", "cfg.task") and option in READ
        yield _Compared(name, held, expected, like, odd, is_option)


def _check_name(path: Path, folder: str | None) -> None:
    """torch names the folder in a file's archive after the file. Names without a rank or a shard say nothing."""
    written, named = (_numbers(name) for name in (folder or "", path.name))
    same_kind = list(written) == list(named) and written.get("stem") == named.get("stem")
    if same_kind and written != named:
        raise ValueError(
            f"{path} was written as {folder}: were files swapped? If it was renamed on purpose, save it anew under its name"
        )


def _check_order(writers: Mapping[Path, int | None]) -> None:
    """Each file of the branch tells the rank that wrote it. Who writes files anew may leave other ranks there.

    So files are swapped only where they tell the very ranks of the names in another order.
    """
    named = {path: _named(path.name) for path in writers}
    if set(writers.values()) != set(named.values()):
        return
    for path, writer in writers.items():
        if writer != named[path]:
            raise ValueError(f"{path} was written by rank {writer}: were files swapped? Fetch them again")


def _writer(state: Mapping[str, Any]) -> int | None:
    """The rank that wrote a file, where it tells: in ``args``, which win as they do for the model's options, or else in ``cfg``."""
    told, cfg = state.get("args"), state.get("cfg")
    if told is None and isinstance(cfg, Mapping):
        told = cfg.get(TRAINING)
    rank = told.get(RANK) if isinstance(told, Mapping) else None
    return rank if type(rank) is int else None


def written_as(name: str, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """``state`` as the rank in ``name`` writes it, so that files that are swapped are refused.

    It is unchanged where no rank is in ``name``, or where it has no config.
    """
    rank, args, cfg = _named(name), state.get("args"), state.get("cfg")
    if rank is None or (args is None and cfg is None):
        return state
    if args is not None:
        return {**state, "args": {**args, RANK: rank}}
    training = cfg.get(TRAINING)
    told = training if isinstance(training, Mapping) else {}
    return {**state, "cfg": {**cfg, TRAINING: {**told, RANK: rank}}}


def _named(name: str) -> int | None:
    """The rank that writes a file of this name."""
    told = _numbers(name)
    return told.get("rank", told.get("shard"))


def _numbers(name: str) -> dict[str, str | int]:
    """The stem of a file's name, and the numbers of its rank and shard, where it has them."""
    match = NUMBERED.fullmatch(name)
    told = match.groupdict() if match else {}
    return {
        part: value if part == "stem" else int(value) for part, value in told.items() if value is not None
    }


def _check_copies(opened: dict[Path, Weights]) -> None:
    """Files that hold the same experts. Where all experts are the same, as before a training, that says nothing."""
    experts: dict[Path, dict[tuple[int, ...], list]] = {}
    for path, weights in opened.items():
        experts[path] = defaultdict(list)
        for key, record in weights.records.items():
            pattern, numbers = split(key)
            if len(numbers) == 2 and record.checksum is not None:
                experts[path][numbers].append((pattern, tuple(weights.header(key).shape), record.checksum))
    layers: dict[int, set[tuple]] = defaultdict(set)
    seen: dict[tuple, Path] = {}
    for found in experts.values():
        for (layer, _), tensors in found.items():
            tensors.sort()
            layers[layer].add(tuple(tensors))
    if all(len(kinds) < 2 for kinds in layers.values()):
        return
    for path, found in experts.items():
        told = tuple((numbers, *found[numbers]) for numbers in sorted(found))
        if found and told in seen:
            raise ValueError(
                f"{path} holds the same experts as {seen[told].name}: one was copied over the other; fetch both again"
            )
        seen[told] = path


def _check_parts(opened: dict[Path, Weights]) -> None:
    """Shards with the same part of what every rank needs; no two parts of a trained model are alike."""
    seen: dict[str, Path] = {}
    for path, weights in opened.items():
        told = sorted((key, weights.records[key].checksum) for key in weights if FLAT_TENSOR.fullmatch(key))
        if not told or any(checksum is None for _, checksum in told):
            continue
        if repr(told) in seen:
            raise ValueError(
                f"{path} holds the same part as {seen[repr(told)].name}: one was copied over the other; fetch both again"
            )
        seen[repr(told)] = path


def _training(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same in all files of one training, by its name."""
    told: dict[str, Any] = {}
    history = state.get("optimizer_history")
    if isinstance(history, list) and history and isinstance(history[-1], Mapping):
        told[UPDATES] = history[-1].get("num_updates")
    extra = state.get("extra_state")
    if isinstance(extra, Mapping):
        told["extra_state.epoch"] = extra.get("epoch")
        iterator = extra.get("train_iterator")
        for name in ("epoch", "iterations_in_epoch") if isinstance(iterator, Mapping) else ():
            told[f"extra_state.train_iterator.{name}"] = iterator.get(name)
    # A tensor that is missing was left out when the files were made smaller.
    told = {name: value for name, value in told.items() if value is not None}
    for section, options in _sections(state).items():
        told |= {f"{section}{name}": value for name, value in options.items()}
    # Numbers and words tell trainings apart; NaN equals NaN as text. Paths change as files move.
    plain = {n: v for n, v in told.items() if isinstance(v, (str, int, float)) and "/" not in str(v)}
    return {n: repr(v) if isinstance(v, float) and v != v else v for n, v in plain.items()}


def _sections(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    args = state.get("args")
    if isinstance(args, Mapping):
        return {"args.": {name: args[name] for name in FLAT if name in args}}
    cfg = state.get("cfg")
    if not isinstance(cfg, Mapping):
        return {}
    found = {f"cfg.{name}.": cfg[name] for name in SECTIONS if isinstance(cfg.get(name), Mapping)}
    common = cfg.get("common")
    if isinstance(common, Mapping) and "seed" in common:
        found["cfg.common."] = {"seed": common["seed"]}
    return found
