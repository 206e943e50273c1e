"""One checkpoint file, opened without running anything in it: its config as plain data, its weights memory-mapped.

The file is one of ``torch.save`` or of safetensors; its content tells which.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moekit.arguments import check_regular, reading
from moekit.checkpoint import safetensors
from moekit.checkpoint.archive import START, Layout, Record, layout
from moekit.checkpoint.contents import Stored, clip, harmless, is_known, layout_of, refused, short, walk
from moekit.checkpoint.hugging.config import described, same_model
from moekit.checkpoint.objects import Call, Unreadable
from moekit.checkpoint.pickles import EACH
from moekit.checkpoint.plain_data import LONGEST, pairs, plain
from moekit.checkpoint.weights import Header, Weights
from moekit.mapped import whole_files

# What is read besides the weights: the config, and what tells one training from another. The state of the optimizer
# stays in the file.
SETTINGS = ("args", "cfg", "optimizer_history", "extra_state", "shard_metadata")
# What is told besides of a file of Hugging Face's libraries.
HUGGING = ("hugging", "buffers", "files")
# What wrappers put into the names of the tensors of what they wrap: fairscale's anywhere, torch's in front.
WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_fpw_module)\.")


def read(path: Path) -> dict[str, Any]:
    """The top level of one checkpoint file: ``model``, its :class:`Weights`, and of :data:`SETTINGS` those it has.

    A file of Hugging Face's libraries has the settings that the ``config.json`` beside it tells, and ``hugging`` besides,
    a :class:`~moekit.checkpoint.hugging.config.Described`; ``buffers`` are what names.py packed, ``files`` the number of
    files with experts that it was made of. Its tensors have the names that stand there.

    Nothing in the file is executed, and only its directory and its pickle are read.

    Raises:
        ValueError: not a checkpoint, damaged, or it asks to build what is not known as harmless.
    """
    path = Path(path)
    with _mapped(path, "checkpoint file") as (memory, storage, file):
        if safetensors.begins(memory):
            return _of_safetensors(path, memory, storage)
        return _state(path, memory, storage, _layout(path, memory, file, "checkpoint file", EACH))


def content(path: Path, what: str) -> Any:
    """All that a file of ``torch.save`` holds: dicts, lists, numbers, text, and its tensors, memory-mapped.

    Nothing in the file is executed.

    Args:
        what: it ought to be, for errors.

    Raises:
        ValueError: not a file of ``torch.save``, damaged, or it asks to build what is not known as harmless.
    """
    with _mapped(Path(path), what) as (memory, storage, file):
        # Small numbers in lists take two bytes each.
        found = _layout(Path(path), memory, file, what, each=2)
        held: dict[str, int] = {}
        total = 0

        def tensor(call: Call) -> Tensor | None:
            nonlocal total
            header = _header(call, found)
            if header is None:
                return None
            held[header.record.name] = header.record.size
            made = header.tensor(storage)
            total += made.nbytes
            if total > 2 * sum(held.values()):
                raise Unreadable(
                    "has tensors that are larger than their storages, so it is damaged or hostile"
                )
            return made

        return plain(found.pickle.value, tensor, most=LONGEST + len(memory) // 2)


@contextlib.contextmanager
def _mapped(path: Path, what: str) -> Iterator[tuple[np.ndarray, torch.UntypedStorage, BinaryIO]]:
    """A file mapped into memory, and opened in this block; what is unreadable in it becomes one sentence."""
    before, size = stamp(path), _size(path, what)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{clip(str(path))} has bytes in its path that are no UTF-8, which torch cannot open: rename it"
        ) from None
    try:
        storage = torch.UntypedStorage.from_file(str(path), False, size)
        file = open(path, "rb", buffering=0)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path} cannot be mapped into memory: {_reason(error)}") from error
    memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).numpy()
    try:
        with file, whole_files():
            # Headers come from the opened file, and numbers from the mapped one.
            if not before == stamp(path) == _stamp(os.fstat(file.fileno())):
                raise ValueError(f"{path} was replaced or written to while it was opened: load it again")
            yield memory, storage, file
    except Unreadable as error:
        advice = "; fetch it again" if re.search(r"damage|is cut short", str(error)) else ""
        raise ValueError(f"{path} is not a readable {what}: it {error}{advice}") from error


def _layout(path: Path, memory: np.ndarray, file: BinaryIO, what: str, each: int) -> Layout:
    """Where everything lies in a file of ``torch.save``, which names nothing but what is harmless."""
    kind = _kind(memory)
    if kind is not None:
        raise ValueError(f"{path} is not a readable {what} but {kind}")
    found = layout(memory, file, each)
    _refuse(path, found)
    return found


def _size(path: Path, what: str) -> int:
    """Bytes of a regular file that can be read."""
    with reading(path):
        check_regular(path, f"a {what}")
        with open(path, "rb"):
            size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is not a readable {what}: it is empty; fetch it again")
    return size


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


KINDS: list[tuple[bytes, str]] = [
    (rb"\s*version https://git-lfs", "a Git LFS pointer: run git lfs pull"),
    (rb"\s*<[!?a-zA-Z]", "a web page: fetch the file itself"),
    (rb"\x1f\x8b", "compressed with gzip: unpack it first"),
    (rb"BZh", "compressed with bzip2: unpack it first"),
    (rb"\xfd7zXZ", "compressed with xz: unpack it first"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (rb"7z\xbc\xaf", "an archive of 7-Zip: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first (if torch before version 0.2 wrote it, save it anew with a later one)"),
    (rb"\x89PNG", "a picture"),
    (rb"\x89HDF", "a file of HDF5; expected a file of torch.save"),
    (rb"\x93NUMPY", "an array of NumPy; expected a file of torch.save"),
    (rb"GGUF", "a file of llama.cpp; expected a file of torch.save"),
    (rb"PK\x05\x06", "an empty zip archive: fetch it again"),
    (rb"\0{512}", "empty where it should begin: the download was not finished; fetch it again"),
    (rb"\x80[\x00\x01]|\(dp|\(lp|c\w+\n", "a pickle of protocol 0 or 1: save it anew with torch.save"),
]  # fmt: skip


def _kind(memory: np.ndarray) -> str | None:
    """What a file that is no checkpoint is instead; None if it begins as one."""
    start = memory[:512].tobytes()
    for pattern, kind in KINDS:
        if re.match(pattern, start, re.DOTALL):
            return kind
    if start.startswith((START, b"\x80")):
        return None
    return f"something else: it begins with {short(start[:12])}; expected a file of torch.save"


def _refuse(path: Path, found: Layout) -> None:
    """Refuse a file that names what is not known as harmless, wherever it does."""
    if harmless(found.pickle):
        return
    places = ((refused(node), place) for node, place in walk(found.pickle.value))
    reason, where = next(((reason, place()) for reason, place in places if reason is not None), (None, ""))
    if reason is None:
        # What a pickle throws away again has no place.
        odd = next((name for name in found.pickle.names if not is_known(name)), None)
        reason = odd and f"asks to load the class or function {clip(odd)}"
    if reason is not None:
        raise ValueError(
            f"{path} {reason}{where and f' (at {where})'}, which moekit does not do: a checkpoint is data, and this file may "
            "be hostile"
        )


def _of_safetensors(path: Path, memory: np.ndarray, storage: torch.UntypedStorage) -> dict[str, Any]:
    entries, settings = safetensors.layout(memory)
    if settings is None or (isinstance(settings, dict) and "buffers" in settings):
        settings = _of_hugging(path, settings)
        if settings is None:
            raise Unreadable(
                f"tells no config: its metadata lack {safetensors.SETTINGS}, and no config.json beside it names a model that "
                "moekit knows; make it with python -m moekit.checkpoint convert"
            )
    if not isinstance(settings, dict):
        raise Unreadable("is damaged: its settings are no object")
    weights = Weights(path, memory, None, storage)
    for key, (dtype, shape, record) in entries.items():
        weights.hold(key, Header(record, dtype, shape, 0, None, record.size))
    return {"model": weights} | {name: settings[name] for name in (*SETTINGS, *HUGGING) if name in settings}


def _of_hugging(path: Path, written: dict[str, Any] | None) -> dict[str, Any] | None:
    """The settings of a file whose config stands beside it; those of the branch's files, unless that was changed since."""
    found = described(path.parent)
    if found is None:
        return None
    settings = written if written and same_model(written, found) else found.settings()
    kept = {name: written[name] for name in ("buffers", "files") if written and name in written}
    return settings | kept | {"hugging": found}


def _state(path: Path, memory: np.ndarray, storage: torch.UntypedStorage, found: Layout) -> dict[str, Any]:
    top = _named(path, found.pickle.value, "its top level") or {}
    beside = None
    if top and "model" not in top and all(_is_tensor(node) for node in top.values()):
        # A file of Hugging Face's libraries holds the tensors alone.
        beside = _of_hugging(path, None)
        top = {"model": found.pickle.value} if beside else top
    if pairs(top.get("model")) is None:
        raise ValueError(f"{path} has no 'model' with tensors: it is no fairseq checkpoint")
    weights = Weights(path, memory, found.folder, storage)
    held: dict[str, int] = {}
    total = 0
    nodes = _named(path, top["model"], "model")
    prefix = "module." if nodes and all(key.startswith("module.") for key in nodes) else ""
    for written, node in nodes.items():
        key = written.removeprefix(prefix)
        if "_module." in key:
            key = WRAPPERS.sub("", key)
        if key in weights:
            raise ValueError(
                f"{path}: {clip(written)} is there twice: as itself and without its wrapper's name"
            )
        made = _header(node, found) if isinstance(node, Call) else None
        if made is None:
            kind = str(node.function) if isinstance(node, Call) else type(node).__name__
            raise ValueError(f"{path}: {clip(key)} is a {clip(kind)}, expected a tensor")
        weights.hold(key, made)
        held[made.record.name] = made.record.size
        total += math.prod(made.shape) * made.dtype.itemsize
    most = sum(held.values())
    # Tied matrices are one storage under two keys.
    if total > 2 * most or most > len(memory):
        raise Unreadable(
            f"has tensors of {total:,} bytes in storages of {most:,}, so it is damaged or hostile"
        )
    return {"model": weights} | (beside or {name: plain(top[name]) for name in SETTINGS if name in top})


def _is_tensor(node: Any) -> bool:
    return isinstance(node, Call) and layout_of(node) is not None


def _header(call: Call, found: Layout) -> Header | None:
    """What ``call`` tells of a tensor that torch would rebuild; None if it rebuilds none."""
    where = layout_of(call)
    if where is None:
        return None
    stored, offset, shape, strides, dtype = where
    return Header(_record(stored, found), dtype, shape, offset, strides, stored.bytes)


def _named(path: Path, node: Any, where: str) -> dict[str, Any] | None:
    """The entries of a dictionary, whose keys have to be text; None if it is none."""
    found = pairs(node)
    if found is None:
        return None
    named: dict[str, Any] = {}
    for key, value in found:
        if type(key) is not str:
            raise ValueError(f"{path}: {where} has the key {short(key)}; expected text")
        if key in named:
            raise ValueError(f"{path}: {where} has the key {short(key)} twice")
        named[key] = value
    return named


def _record(stored: Stored, found: Layout) -> Record:
    record = found.storages.get(stored.name)
    if record is None:
        raise Unreadable(f"is damaged: its storage {short(stored.name)} is missing")
    if record.size < stored.bytes:
        raise Unreadable(
            f"is damaged: its storage {short(stored.name)} has {record.size:,} bytes, expected {stored.bytes:,}"
        )
    return record


def stamp(path: Path) -> tuple[int, ...]:
    """What changes when the file does."""
    try:
        return _stamp(path.stat())
    except OSError:
        return ()


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True)
class Source:
    """One file: the experts of each MoE layer it holds, counted overall, and what it weighs."""

    path: Path
    experts: range
    bytes: int
    tensors: int
    # See :func:`stamp`.
    stamp: tuple[int, ...] = field(repr=False)
    # Whether every rank reads it.
    common: bool = False
