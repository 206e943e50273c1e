"""Binarising: lines of symbols become fairseq's binarised data, the same ``.bin`` and ``.idx`` as ``fairseq-preprocess``.

``.bin`` holds the ids of all lines one after the other, each ended by ``</s>``. ``.idx`` holds a header, every line's
length (int32) and every line's offset in ``.bin`` (int64, bytes). All numbers are little-endian.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moekit.data.dictionary import read_dictionary
from moekit.data.lines import Block, blocks, in_order
from moekit.data.progress import bar
from moekit.symbols import EOS, UNK

# The magic, the version, the code of the ids' type, the number of lines.
HEADER = struct.Struct("<9sQBQ")
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
CODES = {8: np.dtype("<u2"), 9: np.dtype("<u4"), 4: np.dtype("<i4"), 5: np.dtype("<i8")}
_MISSING = -1


@dataclass(frozen=True)
class Summary:
    """Counts of binarised data.

    Attributes:
        tokens: of all lines, each with its ``</s>``.
        unknown: tokens that the dictionary does not have.
        unknown_types: how many different ones these are.
    """

    lines: int
    tokens: int
    unknown: int
    unknown_types: int

    @property
    def unknown_percent(self) -> float:
        return 100 * self.unknown / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        return f"{self.lines:,} lines, {self.tokens:,} tokens, {self.unknown:,} unknown ({self.unknown_percent:.3g} %)"


def binarise(source: str | Path, prefix: str | Path, dict_txt: str | Path, workers: int = 1) -> Summary:
    """Write ``prefix.bin`` and ``prefix.idx`` from the lines of symbols in ``source``.

    The bytes are those of ``fairseq-preprocess --only-source --srcdict dict_txt``. Both files appear under their names
    only when they are whole. Memory does not grow with ``source``, except by the distinct symbols that are unknown.

    Raises:
        ValueError: ``source`` is missing or not UTF-8, or ``dict_txt`` is not a dictionary.
    """
    source, prefix = Path(source), Path(prefix)
    if not source.is_file():
        raise ValueError(f"there is no file {source} to binarise")
    dtype = id_type(len(read_dictionary(dict_txt)))
    work = functools.partial(_binarise_block, Path(dict_txt), dtype)
    names = [prefix.with_name(prefix.name + end) for end in (".bin", ".idx")]
    parts = [name.with_name(name.name + ".part") for name in names]
    lines = tokens = 0
    unknown: Counter[str] = Counter()
    with (
        open(parts[0], "wb") as data,
        open(parts[1], "w+b") as index,
        bar(f"binarise {prefix.name}", source.stat().st_size) as progress,
    ):
        index.seek(HEADER.size)
        for block, (ids, sizes, missing) in in_order(work, blocks(source), workers):
            data.write(ids)
            index.write(sizes)
            lines += len(sizes)
            tokens += len(ids)
            unknown.update(missing)
            progress.update(block.end - block.start)
        _finish_index(index, lines, dtype)
    for part, name in zip(parts, names, strict=True):
        part.replace(name)
    return Summary(lines, tokens, unknown.total(), len(unknown))


def id_type(types: int) -> np.dtype:
    """The dtype in which fairseq stores the ids of a dictionary of ``types`` types."""
    return np.dtype("<u2") if types < 65_500 else np.dtype("<u4")


def _binarise_block(
    dict_txt: Path, dtype: np.dtype, block: Block
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """The ids of a block's lines, each line's length with its ``</s>`` (int32), and the unknown symbols."""
    lines = [line.split() for line in block.read()]
    lengths = np.fromiter(map(len, lines), np.int32, len(lines))
    index = read_dictionary(dict_txt).index
    symbols = itertools.chain.from_iterable(lines)
    ids = np.fromiter(
        (index.get(symbol, _MISSING) for symbol in symbols), np.int64, lengths.sum(dtype=np.int64)
    )
    missing: Counter[str] = Counter()
    if (ids == _MISSING).any():
        missing.update(symbol for line in lines for symbol in line if symbol not in index)
        ids[ids == _MISSING] = UNK
    ids = np.insert(ids, np.cumsum(lengths, dtype=np.int64), EOS)
    return ids.astype(dtype), lengths + np.int32(1), missing


def _finish_index(index: BinaryIO, lines: int, dtype: np.dtype, step: int = 1 << 20) -> None:
    """Write the header, and after the lengths the offsets that follow from them."""
    index.seek(0)
    code = next(code for code, known in CODES.items() if known == dtype)
    index.write(HEADER.pack(MAGIC, VERSION, code, lines))
    offset = 0
    for first in range(0, lines, step):
        index.seek(HEADER.size + 4 * first)
        sizes = (
            np.frombuffer(index.read(4 * min(step, lines - first)), "<i4").astype(np.int64) * dtype.itemsize
        )
        ends = offset + np.cumsum(sizes)
        index.seek(HEADER.size + 4 * lines + 8 * first)
        index.write((ends - sizes).astype("<i8").tobytes())
        offset = int(ends[-1])


class Binarised:
    """Binarised data on disk, mapped into memory.

    Attributes:
        ids: [tokens], the ids of all lines one after the other.
        sizes: [lines] int32, the length of each line, including ``</s>``.

    Raises:
        ValueError: the data is missing, or the two files do not fit each other.
    """

    def __init__(self, prefix: str | Path) -> None:
        data, index = (Path(f"{prefix}{end}") for end in (".bin", ".idx"))
        for path in (data, index):
            if not path.is_file():
                raise ValueError(f"there is no binarised data {prefix}: {path.name} is missing")
        with open(index, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(
                f"{index} is not an index of fairseq's 'mmap' data; expected it to begin with {MAGIC[:7]}"
            )
        _, _, code, lines = HEADER.unpack(header)
        if code not in CODES:
            raise ValueError(
                f"{index} gives {code} as the code of the ids' type; expected one of {sorted(CODES)}"
            )
        if index.stat().st_size != HEADER.size + 12 * lines:
            raise ValueError(
                f"{index} has {index.stat().st_size} bytes; expected {HEADER.size + 12 * lines} for its {lines} lines"
            )
        self.sizes = np.zeros(0, "<i4") if not lines else np.memmap(index, "<i4", "r", HEADER.size, (lines,))
        tokens = int(self.sizes.sum(dtype=np.int64))
        if data.stat().st_size != tokens * CODES[code].itemsize:
            raise ValueError(
                f"{data} has {data.stat().st_size} bytes, but its index {index.name} counts {tokens} tokens of "
                f"{CODES[code].itemsize} bytes; binarise the text again, or copy both files again"
            )
        self.ids = np.zeros(0, CODES[code]) if not tokens else np.memmap(data, CODES[code], "r")

    def __len__(self) -> int:
        return len(self.sizes)
