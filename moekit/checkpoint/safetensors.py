"""Files in the format of safetensors: the length of a header in eight bytes, the header as JSON, then the numbers.

Nothing in such a file can be executed. What moekit keeps beside the weights (see ``reading.SETTINGS``) and a checksum of
each tensor stand in the header's ``__metadata__``, whose values are text. The format is that of the package safetensors,
which reads these files, too.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit import json_text
from moekit.checkpoint.archive import Record
from moekit.checkpoint.contents import is_shape, short
from moekit.checkpoint.objects import Unreadable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA, SETTINGS, CHECKSUM = "__metadata__", "moekit.settings", "crc32:"
# Bytes of a header; one with 60,000 tensors has 10 MB.
MOST = 30_000_000
# How `write` spells a checksum.
_CHECKSUM = re.compile("[0-9a-f]{8}")
# The first number of a file lies at a multiple of as many bytes.
ALIGNMENT = 64
LENGTH = struct.Struct("<Q")


class Entry(NamedTuple):
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    record: Record


def begins(memory: np.ndarray) -> bool:
    """Whether a file begins as one of safetensors."""
    start = memory[:9].tobytes()
    return len(start) == 9 and start[7] == 0 and start[8:] == b"{"


def layout(memory: np.ndarray) -> tuple[dict[str, Entry], Any]:
    """The tensors of a file, mapped into ``memory`` [bytes] uint8, and the settings that moekit wrote, or None.

    Raises:
        Unreadable: it is damaged.
    """
    (length,) = LENGTH.unpack(memory[:8].tobytes())
    if length > MOST or 8 + length > len(memory):
        raise Unreadable(f"is cut short or damaged: its header should have {length:,} bytes")
    header = _read("header", memory[8 : 8 + length].tobytes())
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise Unreadable("is damaged: its metadata are no text")
    entries = {key: _entry(key, told, metadata, 8 + length, len(memory)) for key, told in header.items()}
    at = 8 + length
    for record in sorted((entry.record for entry in entries.values()), key=lambda r: (r.start, r.size)):
        if record.start != at:
            raise Unreadable(
                f"is damaged: {short(record.name)} does not begin where the tensor before it ends"
            )
        at += record.size
    if at != len(memory):
        raise Unreadable(f"is damaged: it has {len(memory):,} bytes, and its tensors end after {at:,}")
    if SETTINGS not in metadata:
        return entries, None
    return entries, _read(SETTINGS, metadata[SETTINGS])


def _read(what: str, text: bytes | str) -> Any:
    try:
        return json_text.loads(text)
    except ValueError as error:
        raise Unreadable(f"is damaged: its {what} {error}") from None


def _entry(key: str, told: Any, metadata: dict[str, str], start: int, end: int) -> Entry:
    shape = told.get("shape") if isinstance(told, dict) else None
    offsets = told.get("data_offsets") if isinstance(told, dict) else None
    if (
        not isinstance(shape, list)
        or not isinstance(offsets, list)
        or len(offsets) != 2
        or not is_shape(shape)
        or any(type(n) is not int or not 0 <= n < 2**48 for n in offsets)
    ):
        raise Unreadable(f"is damaged: its header does not describe {short(key)}")
    dtype = DTYPES.get(str(told.get("dtype")))
    if dtype is None:
        raise Unreadable(
            f"has {short(key)} of a type {short(told.get('dtype'))}; expected one of {', '.join(DTYPES)}"
        )
    size = offsets[1] - offsets[0]
    if size != math.prod(shape) * dtype.itemsize or start + offsets[1] > end:
        raise Unreadable(f"is damaged or cut short: {short(key)} has no place for shape {short(shape)}")
    spelled = metadata.get(CHECKSUM + key, "")
    checksum = int(spelled, 16) if _CHECKSUM.fullmatch(spelled) else None
    return Entry(dtype, tuple(shape), Record(key, start + offsets[0], size, checksum))


def write(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    checksums: Callable[[Iterable[memoryview]], Iterable[int]],
) -> None:
    """Write ``tensors`` one after the other, the widest numbers first, so that each lies where its type needs it.

    Args:
        checksums: the CRC32 of each of some contents.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].itemsize, key))
    metadata = {"format": "pt", SETTINGS: json.dumps(settings, default=repr)}
    found = checksums(_bytes(tensors[key]) for key in order)
    metadata |= {CHECKSUM + key: f"{number:08x}" for key, number in zip(order, found, strict=True)}
    header: dict[str, Any] = {METADATA: metadata}
    at = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in NAMES:
            raise ValueError(f"{key} has dtype {tensor.dtype}, which safetensors has not")
        offsets = [at, at + tensor.nbytes]
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(LENGTH.pack(len(text)) + text)
    for key in order:
        file.write(_bytes(tensors[key]))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
