"""Checkpoints made of others: without the optimizer's state, in another number of files, with fewer experts, in another format."""

from __future__ import annotations

import copy
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from moekit.arguments import Choice, Flag, Texts, Whole, Wholes, check, shown
from moekit.checked import checked
from moekit.checkpoint.belonging import written_as
from moekit.checkpoint.config import check_rows
from moekit.checkpoint.files import NAME, Files, find
from moekit.checkpoint.hugging import writing
from moekit.checkpoint.hugging.names import packed
from moekit.checkpoint.joining import joined
from moekit.checkpoint.keys import NUMBER, OUTPUT_KEYS, SHARED_KEY, places
from moekit.checkpoint.plan import survey
from moekit.checkpoint.reading import SETTINGS, Source, read, stamp
from moekit.checkpoint.shards import EXPERT
from moekit.checkpoint.writing import File, check_target, write_folder
from moekit.nn.config import DENSE, ModelConfig
from moekit.nn.dispatch import owned
from moekit.nn.gates import top_k_of

GATE = "decoder.layers.{}.moe_layer.gate.wg.weight"
OUTPUT = "decoder.output_projection.weight"
# The ends of the files' names.
FORMATS = {"fairseq": ".pt", "safetensors": ".safetensors", "hf": ".safetensors"}
FORMAT = {".pt": "fairseq", ".safetensors": "safetensors"}
HOW = {"force": Flag(), "show": Flag()}


class Types(Whole):
    """How many types a dictionary has; :func:`moekit.load` takes its path."""

    expected = "how many types the dictionary has, as len(moekit.data.dictionary.Dictionary(path)) tells"


class Content:
    """All tensors of a checkpoint by fairseq's names, whatever files they lie in; they are memory-mapped.

    Attributes:
        config: of the model.
        settings: what rank 0's file holds besides the weights.
        format: one of :data:`FORMATS`.
        ranks: how many files hold experts alone, 0 where all lies in one; of the format "hf", how many it was made of.
    """

    def __init__(self, files: Files):
        plan = survey(files)
        self.files, self.config = files, plan.config
        state = read(files.first)
        self.settings = {n: state[n] for n in SETTINGS if n in state and n != "shard_metadata"}
        self.format = "hf" if "hugging" in state else FORMAT[files.first.suffix]
        self.ranks = state.get("files", 1) if self.format == "hf" else len(files.ranks)
        if type(self.ranks) is not int or self.ranks < 0:
            raise ValueError(
                f"{files.first} is damaged: its metadata tell that it was made of {shown(self.ranks)} files; expected a whole number "
                "of at least 0: convert the source again"
            )
        self.bytes = 0
        self.common: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        self.by_expert: dict[tuple[int, int], dict[str, list[tuple[int, Tensor]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self.shapes: dict[tuple[int, int] | None, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for source in plan.sources:
            weights = plan.open(source)
            for key, tensor in weights.items():
                where, name, parts = None, key, self.common
                if EXPERT.search(key):
                    layer, local = map(int, NUMBER.findall(key))
                    where, name = (
                        (layer, source.experts.start + local),
                        key.partition(f".experts.{local}.")[2],
                    )
                    parts = self.by_expert[where]
                # Buffers stand in every shard.
                if key in weights.cut or name not in parts:
                    parts[name].append((weights.cut.get(key, (0, ()))[0], tensor))
                    self.shapes[where][name] = weights.shape(key)
                    self.bytes += tensor.nbytes
        alone = files.shards or self.format != "fairseq"
        self.tied = self.config.share_output and (OUTPUT in self.common or bool(alone))
        if self.tied and alone and OUTPUT_KEYS.isdisjoint(self.common):
            self.common[OUTPUT], self.shapes[None][OUTPUT] = (
                self.common[SHARED_KEY],
                self.shapes[None][SHARED_KEY],
            )

    def shared(self, twice: bool = True) -> dict[str, Tensor]:
        """What every rank holds.

        Args:
            twice: with the matrix that is embedding and output under both of its names, as fairseq writes it.
        """
        found = {name: joined(parts, self.shapes[None][name]) for name, parts in self.common.items()}
        if self.tied and OUTPUT in found and _equal(found[OUTPUT], found[SHARED_KEY]):
            found[OUTPUT] = found[SHARED_KEY]
            if not twice:
                del found[OUTPUT]
        return found

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        where = (layer, expert)
        return {
            name: joined(parts, self.shapes[where][name]) for name, parts in self.by_expert[where].items()
        }

    def rank(self, experts: Mapping[int, Sequence[int]]) -> dict[str, Tensor]:
        """What a rank's file holds: of each layer some experts, counted from 0."""
        return {
            f"decoder.layers.{layer}.moe_layer.experts.{local}.{name}": tensor
            for layer, chosen in experts.items()
            for local, expert in enumerate(chosen)
            for name, tensor in self.expert(layer, expert).items()
        }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.dtype == b.dtype and torch.equal(a, b))


def _stem(files: Files) -> str:
    return NAME.fullmatch(files.first.name)["stem"]


def _job(verb: str, files: Files, **asked: Any) -> dict[str, Any]:
    return {"verb": verb, "files": [[str(path), *stamp(path)] for path in files.all]} | asked


@checked(**HOW)
def strip(source: str | Path, target: str | Path, *, force: bool = False, show: bool = True) -> None:
    """Write the same files without the optimizer's state.

    Raises:
        ValueError: as :func:`moekit.checkpoint.find`, :func:`moekit.checkpoint.survey` and ``write_folder``.
    """
    files = find(source)
    target = check_target(files, target, force)
    survey(files)
    if "hugging" in read(files.first):
        raise ValueError(
            f"{files.shared.parent} is a Hugging Face folder, whose files hold no optimizer's state"
        )

    def content(path: Path):
        state = read(path)
        return state.pop("model"), written_as(path.name, state)

    made: list[File] = [(path.name, lambda path=path: content(path)) for path in files.all]
    total = sum(tensor.nbytes for path in files.all for tensor in read(path)["model"].values())
    write_folder(files.shared.parent, target, _job("strip", files), made, total=total, force=force, show=show)


@checked(files=Whole(), to=Choice(tuple(FORMATS)), **HOW)
def reshard(
    source: str | Path,
    target: str | Path,
    files: int,
    *,
    to: str | None = None,
    force: bool = False,
    show: bool = True,
) -> None:
    """Write the model with its experts in another number of files; a dense model in one.

    Args:
        to: one of :data:`FORMATS`; None: that of the source, and fairseq's of a Hugging Face folder.

    Raises:
        ValueError: fewer files than 1 or more than experts; and as :func:`strip`.
    """
    found = find(source)
    _write(found, target, _job("reshard", found, number=files, to=to), files, None, to, force, show)


@checked(to=Choice(tuple(FORMATS)), dictionary=Types(), **HOW)
def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    texts: Mapping[str, str] = MappingProxyType({}),
    dictionary: int | None = None,
    force: bool = False,
    show: bool = True,
) -> None:
    """Write the model in another format. fairseq's files and those of safetensors are as many as there were.

    Args:
        to: one of :data:`FORMATS`.
        texts: more files of the folder by their names, such as the tokenizer's: LICENSE, vocab.bpe, or names that end in
            .json, .md or .txt.
        dictionary: with "hf", types of the dictionary; logits of the matrices' rows beyond it are -inf there.

    Raises:
        ValueError: the matrices have fewer rows than the dictionary has types, or ``dictionary`` is given with another format
            than "hf"; a text's name is kept for weights or the folder's own files, or is none that ``texts`` may have;
            and as :func:`strip`.
    """
    _check_texts(texts)
    if dictionary is not None and to != "hf":
        raise ValueError(
            f"dictionary={dictionary}: only the format 'hf' tells it; leave it out with to={to!r}"
        )
    found = find(source)
    job = _job("convert", found, to=to, texts=sorted(texts.items()), dictionary=dictionary)
    _write(found, target, job, None, None, to, force, show, texts, dictionary)


@checked(**HOW)
def keep(
    source: str | Path,
    target: str | Path,
    experts: Mapping[int, Sequence[int]],
    *,
    force: bool = False,
    show: bool = True,
) -> None:
    """Write a smaller model, with some of the experts and their rows of the gates.

    It computes what ``route(mask=...)`` of all other experts computes, as long as no token is dropped: a capacity of
    ``2 * tokens / experts`` depends on the number of experts.

    Args:
        experts: layer -> the experts to keep; each layer with experts keeps the same number.

    Raises:
        ValueError: layers or experts that the model does not have; and as :func:`strip`.
    """
    kept = _kept(experts)
    found = find(source)
    _write(found, target, _job("keep", found, kept=list(kept.items())), None, kept, None, force, show)


def _write(
    files: Files,
    target: str | Path,
    job: dict[str, Any],
    number: int | None,
    kept: dict[int, list[int]] | None,
    to: str | None,
    force: bool,
    show: bool,
    texts: Mapping[str, str] = MappingProxyType({}),
    dictionary: int | None = None,
) -> None:
    target = check_target(files, target, force)
    content = Content(files)
    config = content.config
    check_rows(files, config.vocab_rows, dictionary)
    count = config.experts if config.moe_layers else 0
    if kept is not None:
        count = _check_kept(kept, config)
    every = kept or {layer: range(config.experts) for layer in config.moe_layers}
    if number is None:
        most = min(content.ranks, count)
        number = next((n for n in range(most, 0, -1) if count % n == 0), 0)
    elif not config.moe_layers:
        if number != 1:
            raise ValueError(f"--files {number}: {DENSE} to spread over files; expected 1")
        number = 0
    elif number > count:
        raise ValueError(f"--files {number}: expected 1 to {count}, the number of experts")
    settings = content.settings if kept is None else _with_experts(content.settings, count)
    # The number of files means nothing to Hugging Face's libraries.
    to = to or ("fairseq" if content.format == "hf" and kept is None else content.format)
    stem, end = _stem(files) if content.format != "hf" else "model", FORMATS[to]
    folder = files.shared.parent

    def shared() -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        tensors = content.shared(to == "fairseq")
        for layer, chosen in (kept or {}).items():
            key = GATE.format(layer)
            tensors[key] = tensors[key][list(chosen)]
        return tensors, settings

    def experts(held: range) -> dict[str, Tensor]:
        return content.rank({layer: chosen[held.start : held.stop] for layer, chosen in every.items()})

    def rank(index: int, name: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        return experts(owned(count, number, index)), written_as(name, settings)

    def whole() -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        return shared()[0] | experts(range(count)), settings

    def made() -> Iterable[File]:
        if not number:
            yield f"{stem}{end}", whole
            return
        yield f"{stem}-shared{end}", shared
        for index in range(number):
            name = f"{stem}-rank-{index}{end}"
            yield name, functools.partial(rank, index, name)

    parts: Iterable[File] = made()
    own: Mapping[str, str] = {}
    if to == "hf":
        config = replace(config, experts=count) if kept else config
        tensors = shared()[0]
        # The place of a tensor that is no expert's does not depend on the file.
        source = Source(files.shared, range(0), 0, 0, ())
        placed = [(tensors[key], place) for key, place in places(source, tensors, config)]
        besides = {**settings, "buffers": packed(tensors), "files": number}
        parts, own = writing.made(config, placed, every, content.expert, besides, dictionary)
    write_folder(folder, target, job, parts, texts, own, total=content.bytes, force=force, show=show)


def _check_texts(texts: Mapping[str, str]) -> None:
    """Check that ``texts`` are texts by the names of files in one folder; else a ValueError."""
    if not isinstance(texts, Mapping):
        raise ValueError(f"texts={shown(texts)}: expected texts by the names of their files")
    for name in texts:
        check("texts", [name, texts[name]], Texts())
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ValueError(f"texts names {shown(name)}: expected the name of a file in the folder to make")


def _kept(experts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """What :func:`keep` is asked for as plain numbers: the layers in order, and the experts of each."""
    if not isinstance(experts, Mapping):
        raise ValueError(
            f"experts={shown(experts)}: expected the experts to keep by layer, {{layer: [experts]}}"
        )
    found = {
        check("experts", layer, Whole(0)): sorted(set(check(f"experts[{layer}]", chosen, Wholes())))
        for layer, chosen in experts.items()
    }
    return dict(sorted(found.items()))


def _check_kept(kept: dict[int, list[int]], config: ModelConfig) -> int:
    """How many experts each layer keeps."""
    layers, experts = config.moe_layers, config.experts
    if not layers:
        raise ValueError(f"--experts: {DENSE} to choose from; expected a checkpoint with experts")
    if sorted(kept) != layers:
        raise ValueError(
            f"--experts names the layers {sorted(kept)}; expected all that have experts: {layers}"
        )
    for layer, chosen in kept.items():
        wrong = [expert for expert in chosen if not 0 <= expert < experts]
        if wrong:
            raise ValueError(f"--experts {layer}:{wrong[0]}: expected an expert from 0 to {experts - 1}")
    counts = {len(chosen) for chosen in kept.values()}
    if len(counts) != 1:
        told = ", ".join(f"{len(chosen)} in layer {layer}" for layer, chosen in kept.items())
        raise ValueError(
            f"--experts keeps {told}: expected the same number in each layer, as a config has one number"
        )
    if min(counts) < top_k_of(config):
        raise ValueError(
            f"--experts keeps {min(counts)} of each layer; expected at least {top_k_of(config)}, as many as a token goes to"
        )
    return counts.pop()


def _with_experts(settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    changed = copy.deepcopy(dict(settings))
    section = changed["args"] if changed.get("args") is not None else changed["cfg"]["model"]
    section["moe_expert_count"] = count
    return changed


def experts_of(text: str, layers: Sequence[int]) -> dict[int, list[int]]:
    """What ``--experts`` names: ``1:0,1:4-6`` or, for all layers, ``*:0-3``.

    Raises:
        ValueError: it is written otherwise.
    """
    kept: dict[int, list[int]] = defaultdict(list)
    for one in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5}|\*):(\d{1,5})(?:-(\d{1,5}))?\s*", one)
        if match is None:
            raise ValueError(
                f"--experts {shown(one)}: expected LAYER:EXPERT or LAYER:FIRST-LAST, from 0, as in 1:0,1:4-6"
            )
        first, last = int(match[2]), int(match[3] or match[2])
        if last < first:
            raise ValueError(f"--experts {shown(one)} ends before it begins: expected FIRST-LAST")
        for layer in layers if match[1] == "*" else [int(match[1])]:
            kept[layer] += range(first, last + 1)
    return dict(kept)
