"""Which rank reads what: a survey of all headers makes the plan, and each rank fills its model by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekit.checkpoint import copying
from moekit.checkpoint import options as cfg
from moekit.checkpoint.belonging import check_belongs, other_config
from moekit.checkpoint.collecting import no_collector
from moekit.checkpoint.config import config_of
from moekit.checkpoint.contents import clip
from moekit.checkpoint.files import Files
from moekit.checkpoint.filling import Filled, Filling, Part, Targets
from moekit.checkpoint.inspection import Inspection, NonFinite, Wanted, warn_unchecked
from moekit.checkpoint.joining import Joining
from moekit.checkpoint.keys import SHARED_KEY, Place, key_of, kinds, name_of, parts_of, places, split, unfold
from moekit.checkpoint.placement import placed, reached
from moekit.checkpoint.reading import Source, read, stamp
from moekit.checkpoint.shards import EXPERT, tensors
from moekit.checkpoint.stretch import Stretch
from moekit.checkpoint.threads import THREADS, pool
from moekit.checkpoint.weights import Weights
from moekit.mapped import whole_files
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
    # For each MoE layer, the physical number [E] of each expert (placement.py); without it, expert e has number e.
    physical: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"opened": {}}

    def open(self, source: Source) -> Weights:
        """The file's tensors, mapped; as the survey did, if it has not been written to since."""
        found = self.opened.pop(source.path, None)
        if found is None or source.stamp != stamp(source.path):
            found = tensors(read(source.path), source.path)
        return found

    def parameters(self, held: int) -> int:
        """Parameters of a rank that holds ``held`` experts a layer."""
        from moekit.nn.transformer import parameters

        return parameters(self.config, held)

    def needed(self, held: range) -> list[Source]:
        """The files a rank with the experts ``held`` opens: what is shared, and those with an expert of its own."""
        return [s for s in self.sources if s.common or reached(s.experts, held, self.physical)]


def survey(files: Files, dictionary: int | None = None) -> Plan:
    """Check every file's header against the key table and the model that its config describes; read no weight.

    Args:
        dictionary: types of the dictionary; rows of the embedding and output matrices beyond it are ignored.
            None: all rows are kept.

    Raises:
        ValueError: an unknown or missing key, a wrong shape, an expert that no file or that two files fill; it names
            the file, the key, what was found and what was expected.
    """
    states: dict[Path, dict[str, Any]] = {}
    with no_collector():
        try:
            fitted = _fitted(files, states, dictionary)
        except ValueError as error:
            if said := _blamed(files, states, dictionary, error):
                raise ValueError(said) from error
            raise
        check_belongs(fitted.files, states)
        warn_unchecked(fitted.opened)
        dtype = next(f.header(SHARED_KEY).dtype for f in fitted.opened.values() if SHARED_KEY in f)
    return Plan(fitted.config, dtype, tuple(fitted.sources), fitted.opened)


class _Fitted(NamedTuple):
    """Files whose tensors are all that the model of a config needs."""

    files: Files
    opened: dict[Path, Weights]
    config: ModelConfig
    sources: list[Source]


def _fitted(
    files: Files,
    states: dict[Path, dict[str, Any]],
    dictionary: int | None,
    other: Mapping[str, Any] | None = None,
) -> _Fitted:
    """Compare the files' tensors with the model that the config of rank 0's file describes.

    Args:
        states: what was read of the files before; what is read here is added.
        other: the ``args`` and ``cfg`` that count in place of those of rank 0's file.
    """

    def state(path: Path) -> dict[str, Any]:
        if path not in states:
            states[path] = files.read(path)
        if other is None or path != files.first:
            return states[path]
        return states[path] | other

    files, copies = _once(files, state(files.first))
    stamps = {path: stamp(path) for path in files.all}
    told = {path: state(path) for path in files.all}
    opened = {path: tensors(one, path) for path, one in told.items()}
    config = config_of(files, told, opened, dictionary)
    expected = _expected(files, config)
    sources, filled = _sources(files, opened, stamps, copies, config, expected)
    _check_filled(files, sources, filled, expected, config)
    return _Fitted(files, opened, config, sources)


def _blamed(
    files: Files, states: dict[Path, dict[str, Any]], dictionary: int | None, error: ValueError
) -> str | None:
    """An error that names rank 0's file in place of ``error``, if all fits with the config of the others; None if it does not."""
    found = other_config(files, states)
    if found is None or str(error).startswith(str(files.first)):
        return None
    said, other = found
    try:
        _fitted(files, states, dictionary, other)
    except ValueError:
        return None
    return (
        f"{files.first} has another config than all other files ({said}): fetch it again, or correct its config (with it, "
        f"{error})"
    )


def _sources(
    files: Files,
    opened: Mapping[Path, Weights],
    stamps: Mapping[Path, tuple[int, ...]],
    copies: bool,
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
) -> tuple[list[Source], Filling]:
    """The files with their experts, and what their tensors fill."""
    sources: list[Source] = []
    filled = Filling()
    offset = 0
    for path, found in opened.items():
        held = 1 + max((n for key in found for n in split(key)[1][1:]), default=-1)
        common = path in files.common
        start = 0 if common else offset % config.experts if copies else offset
        source = Source(
            path, range(start, start + held), path.stat().st_size, len(found), stamps[path], common
        )
        for key, target in places(source, found, config):
            numbers = _check(path, found, key, target, expected, config)
            for part in unfold(target):
                before = filled.add(part, numbers, (path, key))
                if before is not None:
                    there = f"{before[0].name}: {before[1]}"
                    raise ValueError(
                        f"{path}: {clip(key)} fills {name_of(part)} for the second time, after {there}"
                    )
        sources.append(source)
        offset = source.experts.stop if not common else 0
    return sources, filled


def _check_filled(
    files: Files,
    sources: Sequence[Source],
    filled: Filling,
    expected: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
) -> None:
    """Raise a ValueError that names the first place that no file fills."""
    missing, count = next(
        ((part, n) for part, n in parts_of(expected) if filled.missing(part, n) is not None), (None, 0)
    )
    if missing is None:
        return
    if missing in filled:
        raise ValueError(
            f"{files.shared.parent}: of the {count:,} numbers of {name_of(missing)} no file fills those from "
            f"{filled.missing(missing, count):,}: is a shard missing?"
        )
    where, hint = files.shared, ""
    if missing.part == "expert":
        holders = ", ".join(f"{s.path.name} ({len(s.experts)})" for s in sources if len(s.experts))
        where = files.shared.parent
        hint = f"; experts a layer in the files: {holders or 'none'}, expected {config.experts} in all"
    raise ValueError(f"{where}: no file fills {name_of(missing)}: expected the key {key_of(missing)}{hint}")


def _once(files: Files, first: dict[str, Any]) -> tuple[Files, bool]:
    """Without the copies of experts that more ranks than experts have written, and whether rank r holds expert r % E."""
    experts = cfg.options_of(first, str(files.first))[0].get("moe_expert_count")
    if type(experts) is not int or experts < 1 or len(files.ranks) <= experts or len(files.ranks) % experts:
        return files, False
    if any(EXPERT.search(key) for key in tensors(first, files.first).cut):
        # Not copies, but parts.
        return files, True
    return replace(files, ranks=files.ranks[:experts]), True


def _expected(files: Files, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters to fill, by their names."""
    from moekit.nn.transformer import Transformer

    try:
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    except RuntimeError as error:
        raise ValueError(f"{files.first}: its cfg describes a model that cannot be built") from error


def _check(
    path: Path,
    found: Weights,
    key: str,
    target: Place,
    expected: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
) -> range:
    """Compare a tensor with the parameter that it fills; returns the numbers of its place that it holds."""
    header, got, parameter = found.header(key), found.shape(key), expected.get(target.name)
    if parameter is None:
        raise ValueError(
            f"{path}: {clip(key)} (shape {list(got)}) has no place in the model that cfg describes"
        )
    if target.part == "expert" and target.expert >= config.experts:
        raise ValueError(
            f"{path}: {clip(key)} would be expert {target.expert} (from 0), but cfg says moe_expert_count={config.experts}: "
            "a file too many, or files of two checkpoints"
        )
    wanted = target.shape(parameter)
    if target.part == "rows":
        fits = got[1:] == wanted[1:] and got[0] >= wanted[0]
    else:
        fits = got == wanted and not (target.part == "qkv" and key in found.cut)
    if not fits:
        raise ValueError(f"{path}: {clip(key)} has shape {list(got)}, expected {list(wanted)}")
    if not header.dtype.is_floating_point:
        raise ValueError(f"{path}: {clip(key)} has dtype {header.dtype}, expected a floating-point one")
    begin = found.cut[key][0] if key in found.cut else 0
    count = math.prod(header.shape)
    if target.part == "qkv":
        return range(count // 3)
    return range(begin, min(begin + count, math.prod(wanted)))


@whole_files()
@no_collector()
def fill(
    model: torch.nn.Module,
    plan: Plan,
    held: range,
    progress: Callable[[int], None] | None = None,
    threads: int = 1,
    verify: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Filled:
    """Read one rank's tensors from the mapped files into the model's parameters, as copying.py does.

    Experts with scales (:class:`moekit.nn.experts.QuantisedExperts`) are quantised tensor by tensor.

    Args:
        model: a :class:`moekit.nn.transformer.Transformer` with room for the experts ``held``; any device, any dtype.
        progress: called with the bytes read since the last call.
        threads: that copy at the same time.
        verify: compare checksums and look for numbers that are not finite, as inspection.py does.
        share: (i, n), where n ranks read the shared file: this one verifies every n-th of its tensors, from i on.

    Raises:
        ValueError: a tensor is damaged, or a file has changed since the survey.
    """
    targets = Targets(model, held.start)
    filled = Filled()
    inspections: list[Inspection] = []

    def wanted(source: Source, weights: Weights) -> Iterator[tuple[Wanted, Part, int]]:
        """What is read of each tensor, and where it goes on this rank: the part, and which of its views."""
        for key, target in places(source, weights, plan.config):
            name, part, expert = placed(target, plan.physical)
            if part == "expert" and expert not in held:
                continue
            to = targets.part(name, part)
            size, numbers = to.size, weights.numbers(key)
            if key in weights.cut:
                size = min(len(numbers), max(0, size - weights.cut[key][0]))
                numbers = numbers[:size]
            elif part == "rows":
                rows = to.shape[0]
                numbers = numbers.rows(rows) if isinstance(numbers, Stretch) else numbers[:rows]
            if part == "qkv":
                filled.extend(unfold(target))
                for one in part:
                    targets.part(name, one).counts[0] += size // 3
            else:
                filled.append(target)
                to.counts[expert - to.first] += size
            yield (key, numbers, target), to, expert - to.first

    def pieces() -> Iterator[copying.Piece]:
        joining = Joining()
        for source in plan.needed(held):
            weights = plan.open(source)
            parts = list(wanted(source, weights))
            # Of what every rank reads, each verifies a share: whatever another rank finds ends the load, too.
            first, step = share if source.common else (0, 1)
            own = [part for part, _, _ in parts if part[2].part == "expert"]
            mine = own + [part for part, _, _ in parts if part[2].part != "expert"][first::step]
            checks: dict[str, Callable[[], None] | None] = {}
            if verify:
                inspection = Inspection(source, weights, mine)
                inspections.append(inspection)
                checks = {part[0]: inspection.check(part) for part in mine}
            # Neighbours in the file are copied as one.
            records, cut, named = weights.records, weights.cut, f"{source.path}: "
            parts.sort(key=lambda part: records[part[0][0]].start)
            for (key, numbers, _), to, index in parts:
                view, shape, begin = to.view(index), to.shape, 0
                if key in cut:
                    begin = cut[key][0]
                    view = view[begin : begin + len(numbers)]
                    shape = view.shape
                if to.scales is None:
                    yield copying.Piece(named + key, numbers, view, checks.get(key), None, shape)
                else:
                    matrix = to.view(index).view(to.shape)
                    piece = copying.Piece(named + key, numbers, view.view(shape), checks.get(key))
                    yield from joining.joined(piece, begin, matrix, to.scales[index])
        # The last loads are copied meanwhile.
        _check_whole(targets)

    copying.copy(pieces(), targets.device, threads, progress, kernels=model.backend == "triton")
    for inspection in inspections:
        inspection.remember()
    filled.nonfinite = [found for inspection in inspections for found in inspection.nonfinite]
    return filled


def _check_whole(targets: Targets) -> None:
    """Raise a ValueError that names the first place of which another count of numbers was filled than it has."""
    for name in targets.parameters:
        for kind in kinds(name):
            part = targets.part(name, kind)
            index = next((index for index, count in enumerate(part.counts) if count != part.size), None)
            if index is not None:
                place = Place(name, kind, part.first + index)
                raise ValueError(
                    f"{part.counts[index]:,} of {part.size:,} numbers of {name_of(place)} were filled; did the files change "
                    "meanwhile?"
                )


def inspect(plan: Plan, threads: int = THREADS) -> list[NonFinite]:
    """Compare the checksum of every tensor that a model has a place for, and look for numbers that are not finite.

    Returns:
        The tensors with such numbers.

    Raises:
        ValueError: a tensor is damaged.
    """
    found: list[NonFinite] = []
    with pool("inspecting", threads) as executor:
        for source in plan.sources:
            weights = plan.open(source)
            parts: list[Wanted] = [
                (key, weights[key], target) for key, target in places(source, weights, plan.config)
            ]
            inspection = Inspection(source, weights, parts)
            checks = [check for part in parts if (check := inspection.check(part)) is not None]
            for _ in executor.map(lambda check: check(), checks):
                pass
            inspection.remember()
            found += inspection.nonfinite
    return found
