"""A checkpoint's folder that appears whole: files are written one after the other, read again, compared, and kept.

The files are made in ``TARGET.part``. A run that was ended goes on there with the first file that is not whole, if the
source and the question are the same. When all files are there, the folder gets its name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moekit.checkpoint import safetensors
from moekit.checkpoint.contents import Opaque
from moekit.checkpoint.files import NAME
from moekit.checkpoint.hugging.config import BRIDGE
from moekit.checkpoint.inspection import crc32
from moekit.checkpoint.reading import read
from moekit.checkpoint.threads import pool
from moekit.mapped import whole_files
from moekit.progress import bar

JOB = "job.json"
# What turns text into ids and back goes along with a checkpoint.
BESIDE = ("dict.txt", "encoder.json", "vocab.bpe")
OTHERS = re.compile(rf"vocab\.bpe|.*\.(json|md|txt)|{re.escape(BRIDGE)}")

File = tuple[str, Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]]


def write_folder(
    source: Path,
    target: Path,
    job: Mapping[str, Any],
    files: Iterable[File],
    texts: Mapping[str, str] = MappingProxyType({}),
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
        texts: more files, by their names.
        total: bytes of all tensors, for the bar.
        force: replace ``target``, if it is a checkpoint's folder.
        show: a bar with the rate.

    Raises:
        ValueError: ``target`` is there, or cannot be replaced; a file is not what was written.
    """
    check_target(source, target, force)
    place = target.with_name(target.name + ".part")
    asked = json.dumps(job, sort_keys=True)
    try:
        if place.exists() and _text(place / JOB) != asked:
            if not (place / JOB).is_file():
                raise ValueError(f"{place} is in the way: move it away, the files are made there")
            shutil.rmtree(place)
        place.mkdir(parents=True, exist_ok=True)
        (place / JOB).write_text(asked)
        for name, text in texts.items():
            (place / name).write_text(text, "utf-8")
        with bar(target.name, total, "B", show=show) as shown:
            for name, content in files:
                size = 0
                if not (place / name).exists():
                    tensors, settings = content()
                    _write(place / name, tensors, settings)
                    size = sum(tensor.nbytes for tensor in tensors.values())
                shown.update(size or (place / name).stat().st_size)
            shown.total = shown.n
        for name in BESIDE:
            if (source / name).is_file() and name not in texts:
                shutil.copyfile(source / name, place / name)
        (place / JOB).unlink()
        _move(place, target)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror or error}") from error


def check_target(source: Path, target: Path, force: bool) -> None:
    """Whether ``target`` may be written.

    Raises:
        ValueError: it may not.
    """
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the source: name another folder")
    if not target.exists():
        return
    if not force:
        raise ValueError(f"{target} is there already: name another folder, or replace it with --force")
    if not target.is_dir():
        raise ValueError(f"{target} is not a folder: name another one")
    foreign = [p.name for p in target.iterdir() if not (NAME.fullmatch(p.name) or OTHERS.fullmatch(p.name))]
    if foreign:
        raise ValueError(
            f"{target} holds more than a checkpoint ({foreign[0]}), so --force does not replace it"
        )


def _text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _move(place: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    if target.exists():
        os.replace(target, old)
    os.replace(place, target)
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
                torch.save({"args": None} | settings | {"model": dict(tensors)}, file)
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


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bytes; torch's own comparison of bytes takes a hundred times as long."""
    one, other = (tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in (a, b))
    whole = len(one) // 8 * 8
    return len(one) == len(other) and all(
        np.array_equal(one[part].view(kind), other[part].view(kind))
        for part, kind in ((slice(whole), np.uint64), (slice(whole, None), np.uint8))
    )


def _known(value: Any) -> Any:
    """Settings without what was not read (see ``contents.Opaque``)."""
    if isinstance(value, dict):
        return {
            k: _known(v) for k, v in value.items() if not isinstance(v, Opaque) and not isinstance(k, Opaque)
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_known(one) for one in value if not isinstance(one, Opaque))
    return value
