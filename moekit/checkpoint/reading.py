"""One checkpoint file, opened without running anything in it: torch's restricted unpickler, and memory-mapped tensors."""

from __future__ import annotations

import argparse
import collections
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
