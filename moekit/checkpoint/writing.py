"""A checkpoint's folder that appears whole: files are written one after the other, read again, compared, and kept.

The files are made in ``TARGET.part``. A run that was ended goes on there with the first file that is not whole, if the
source and the question are the same. When all files are there, the folder gets its name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from moekit import arguments, json_text, locks
from moekit.arguments import check, first_few, shown
from moekit.checkpoint import safetensors
from moekit.checkpoint.contents import clip
from moekit.checkpoint.files import NAME, Files
from moekit.checkpoint.hugging.config import BRIDGE
from moekit.checkpoint.hugging.config import FILE as CONFIG
from moekit.checkpoint.inspection import crc32
from moekit.checkpoint.plain_data import Opaque
from moekit.checkpoint.reading import read
from moekit.checkpoint.threads import pool
from moekit.mapped import whole_files
from moekit.progress import bar

JOB = "job.json"
# What turns text into ids and back goes along with a checkpoint.
BESIDE = ("dict.txt", "encoder.json", "vocab.bpe")
# What a checkpoint's folder may hold besides weights: the texts that a run writes have such names, and --force removes them.
OTHERS = re.compile(rf"vocab\.bpe|LICENSE|.*\.(json|md|txt)|{re.escape(BRIDGE)}")
# Beside a config.json, it says which files have the weights.
INDEX = re.compile(r".*\.index\.json")
# What an unfinished run has made, besides the texts that its note names.
MADE = re.compile(rf"({NAME.pattern})(\.part)?|.*\.json|{'|'.join(map(re.escape, (*BESIDE, BRIDGE)))}")
# The bytes that are read of a note whose job is another one.
MOST_NOTED = 1 << 26
# Marks a folder that is replaced, so that no other is removed.
REPLACED = ".moekit-replaced"

File = tuple[str, Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]]


def write_folder(
    source: Path,
    target: Path,
    job: Mapping[str, Any],
    files: Iterable[File],
    texts: Mapping[str, str] = MappingProxyType({}),
    own: Mapping[str, str] = MappingProxyType({}),
    *,
    total: int,
    force: bool,
    show: bool,
) -> None:
    """Write ``files`` into ``target``, one in memory at a time.

    Args:
        source: the folder that they are made of.
        job: what tells this question from another, as JSON.
        files: their names, and functions that give a file's tensors and settings.
        texts: more files that the user asked for, by their names.
        own: texts that the format has, by their names.
        total: bytes of all tensors, for the bar.
        target: as :func:`check_target` gives it.
        force: replace ``target``.
        show: a bar with the rate.

    Raises:
        ValueError: ``target`` cannot be written or is there by now, another run makes it, a text has a name of weights, of
            what is written anyway or of what no checkpoint's folder holds, or a file is not what was written.
    """
    files = list(files)
    _check_names(texts, [*own, *(name for name, _ in files)])
    texts = {**texts, **own}
    place = _part(target)
    try:
        with _job_of(place, json.dumps(job, sort_keys=True)):
            for name, text in texts.items():
                (place / name).write_text(text, "utf-8")
            with bar(target.name, total, "B", show=show) as done:
                for name, content in files:
                    size = 0
                    if not (place / name).exists():
                        tensors, settings = content()
                        _write(place / name, tensors, settings)
                        size = sum(tensor.nbytes for tensor in tensors.values())
                    done.update(size or (place / name).stat().st_size)
                done.total = done.n
            for name in BESIDE:
                if (source / name).is_file() and name not in texts:
                    shutil.copyfile(source / name, place / name)
            _move(place, target, force)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror or error}") from error


def _check_names(texts: Iterable[str], own: Sequence[str]) -> None:
    """Check that no text takes the place of a file in ``own``, of weights, or of a note that is gone at the end, and that the
    folder can be replaced with them."""
    # Some file systems take no notice of case.
    kept = {name.lower() for name in (*own, JOB, REPLACED, CONFIG)}
    for name in texts:
        if (
            name.lower() in kept
            or NAME.fullmatch(name.removesuffix(".part"))
            or INDEX.fullmatch(name.lower())
        ):
            written = first_few(sorted(own))
            raise ValueError(
                f"texts names {shown(name)}, which is kept for weights and for what the folder has anyway ({written}): leave it "
                "out, or give it another name"
            )
        if not OTHERS.fullmatch(name):
            raise ValueError(
                f"texts names {shown(name)}: expected LICENSE, vocab.bpe, or a name that ends in .json, .md or .txt"
            )


@contextlib.contextmanager
def _job_of(place: Path, asked: str) -> Iterator[None]:
    """Make ``place``, or go on there if the same was asked for; its note of the job keeps other runs out meanwhile.

    Raises:
        ValueError: what lies there is no unfinished run, or a run that is going on.
    """
    note = place / JOB
    if os.path.lexists(place) and not note.is_file():
        raise ValueError(f"{place} is in the way: move it away, the files are made there")
    place.mkdir(parents=True, exist_ok=True)
    with open(note, "a+", encoding="utf-8", errors="replace") as file:
        if locks.take(file) is False:
            raise ValueError(f"another run makes files in {place}: wait for its end, or name another folder")
        file.seek(0)
        # A note from elsewhere may have a terabyte of holes.
        if (noted := file.read(max(MOST_NOTED, len(asked)) + 1)) != asked:
            made, texts = [path for path in place.iterdir() if path != note], _texts_of(noted)
            foreign = [
                path.name
                for path in made
                if path.is_dir() or not (MADE.fullmatch(path.name) or path.name in texts)
            ]
            if foreign:
                raise ValueError(
                    f"{place} is in the way: it holds {clip(foreign[0])}; move it away, the files are made there"
                )
            for path in made:
                path.unlink()
            file.truncate(0)
            file.write(asked)
            file.flush()
        yield


def _texts_of(note: str) -> set[str]:
    """The names of the texts of the job that ``note`` tells; none if it tells no job."""
    try:
        return {name for name, _ in json_text.loads(note, json_text.MANY_VALUES)["texts"]}
    except (KeyError, TypeError, ValueError):
        return set()


def check_target(source: Files, target: str | Path, force: bool) -> Path:
    """The folder to make, its links followed.

    Raises:
        ValueError: it may not be written.
    """
    target = check("target", target, arguments.Path())
    try:
        target = target.resolve()
        there = target.exists()
    except OSError as error:
        raise ValueError(f"{clip(str(target))} cannot be written: {error.strerror}") from None
    if not target.name:
        raise ValueError(f"{target} is the root of the file system: name a folder below it")
    if source.shared.parent.resolve() == target:
        raise ValueError(f"{target} is the source: name another folder")
    for beside in (_old(target), _part(target)):
        if any(path.resolve().is_relative_to(beside) for path in source.all):
            raise ValueError(
                f"{beside} holds the source's files, and is made or removed on the way: name another folder than {target.name}"
            )
    if not there:
        return target
    if not force:
        raise ValueError(f"{target} is there already: name another folder, or replace it with --force")
    if not target.is_dir():
        raise ValueError(f"{target} is not a folder: name another one")
    if any(path.resolve().is_relative_to(target) for path in source.all):
        raise ValueError(f"{target} holds the source's files, as links or folders in it: name another folder")
    held = {path.name: path.is_dir() for path in sorted(target.iterdir())}
    foreign = [
        name
        for name, deep in held.items()
        if deep or not (NAME.fullmatch(name) or OTHERS.fullmatch(name) or name == REPLACED)
    ]
    if held and not any(map(NAME.fullmatch, held)):
        foreign = list(held)
    if foreign:
        raise ValueError(
            f"{target} holds more than a checkpoint ({foreign[0]}), so --force does not replace it"
        )
    old = _old(target)
    if os.path.lexists(old):
        raise ValueError(
            f"{old} is in the way: move it away, {target.name} gets that name while it is replaced"
        )
    return target


def _old(target: Path) -> Path:
    return target.with_name(target.name + ".old")


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _move(place: Path, target: Path, force: bool) -> None:
    """Give the folder its name. Its note goes last, so that a run that ends in between can be continued."""
    old = _old(target)
    if target.exists():
        if not force:
            raise ValueError(f"{target} is there by now: move it away, {place} has what was made")
        if os.path.lexists(old):
            raise ValueError(f"{old} is in the way by now: move it away, {place} has what was made")
        (target / REPLACED).touch()
        os.replace(target, old)
    os.replace(place, target)
    (target / JOB).unlink()
    if (old / REPLACED).is_file():
        shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    settings = {name: _known(value) for name, value in settings.items()}
    part = path.with_name(path.name + ".part")
    with whole_files():
        with open(part, "wb") as file:
            if path.suffix == ".safetensors":
                with pool("checksums") as executor:
                    safetensors.write(file, tensors, settings, lambda contents: executor.map(crc32, contents))
            else:
                if settings.get("args") is not None:
                    settings["args"] = argparse.Namespace(**settings["args"])
                save({"args": None} | settings | {"model": _for_torch(tensors)}, file)
            file.flush()
            os.fsync(file.fileno())
        written = read(part)["model"]

        def same(key: str) -> bool:
            found, tensor = written.get(key), tensors[key]
            return found is not None and found.dtype == tensor.dtype and _equal(found, tensor)

        # NumPy compares without Python's lock.
        with pool("comparing") as executor:
            for key, equal in zip(tensors, executor.map(same, tensors), strict=True):
                if not equal:
                    raise ValueError(f"{part}: {key} is not what was written: is the disk sound?")
    os.replace(part, path)


def _for_torch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` as ``torch.save`` writes them once and alone: it writes a storage whole, for each object that stands for it.

    What shares memory becomes parts of one storage, and what lies in a storage with others' numbers is copied out of it.
    """

    def of(tensor: Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()

    storages: dict[tuple[int, int], torch.UntypedStorage] = {}
    parts: defaultdict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for tensor in tensors.values():
        storages.setdefault(of(tensor), tensor.untyped_storage())
        parts[of(tensor)][tensor.data_ptr()] = tensor.nbytes
    whole = {one for one, sizes in parts.items() if sum(sizes.values()) >= one[1]}
    made: dict[tuple, Tensor] = {}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if place not in made:
            alone = tensor.new_empty(0)
            made[place] = (
                alone.set_(storages[of(tensor)], tensor.storage_offset(), tensor.shape, tensor.stride())
                if of(tensor) in whole
                else tensor.clone()
            )
        found[key] = made[place]
    return found


def save(state: Mapping[str, Any], file: IO[bytes]) -> None:
    """``torch.save`` whose error is the system's: torch ends a file that could not be written with one of its own."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes; torch's own comparison of bytes takes a hundred times as long."""
    one, other = (tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in (a, b))
    whole = len(one) // 8 * 8
    return len(one) == len(other) and all(
        np.array_equal(one[part].view(kind), other[part].view(kind))
        for part, kind in ((slice(whole), np.uint64), (slice(whole, None), np.uint8))
    )


def _known(value: Any) -> Any:
    """Settings without what was not read (see ``plain_data.Opaque``)."""
    if isinstance(value, dict):
        return {
            k: _known(v) for k, v in value.items() if not isinstance(v, Opaque) and not isinstance(k, Opaque)
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_known(one) for one in value if not isinstance(one, Opaque))
    return value
