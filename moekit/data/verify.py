"""Checks of binarised data before it is read: a damaged file gives an error of one sentence that names the file.

The checks use only NumPy. The formats are fairseq's (fairseq/data/indexed_dataset.py).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moekit.arguments import first_few
from moekit.data.binarise import HEADER, MAGIC, VERSION, Binarised
from moekit.data.dictionary import SPECIAL, Dictionary, read_dictionary
from moekit.data.kept import stamp
from moekit.mapped import whole_files

LEGACY_MAGIC = b"TNTIDX\x00\x00"
# The magic, the version, the code and the bytes of an id, the number of lines, the number of sizes.
LEGACY_HEADER = struct.Struct("<8sQQQQQ")
LEGACY_CODES = {c: np.dtype(t) for c, t in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8"}.items()}
# The first bytes of the index in formats that are not supported.
OTHERS = {b"HUFFIDX": "huffman"}
# The number of ids or lines per step of a check.
AT_A_TIME = 1 << 22


def kind_of(prefix: Path) -> str:
    """The format of the data: "raw", "mmap" or "cached"; fairseq looks for them in this order.

    Raises:
        ValueError: a file is missing, or the format is not supported.
    """
    if prefix.is_file():
        return "raw"
    for name in (f"{prefix.name}.bin", f"{prefix.name}.idx"):
        if not prefix.with_name(name).is_file():
            raise _missing(prefix.parent, name)
    index = prefix.with_name(f"{prefix.name}.idx")
    with open(index, "rb") as file:
        start = file.read(len(MAGIC))
    if start.startswith(MAGIC):
        return "mmap"
    if start.startswith(LEGACY_MAGIC):
        return "cached"
    for magic, name in OTHERS.items():
        if start.startswith(magic):
            raise ValueError(f"{index} is of fairseq's '{name}' format; expected mmap, cached, lazy or raw")
    said = "is empty" if not start else "is not an index of fairseq's binarised data"
    raise ValueError(f"{index} {said}; expected what fairseq-preprocess or prepare_data.ipynb writes")


@whole_files()
def verify(folder: Path, subset: str, model: Dictionary | None = None) -> str:
    """Check ``dict.txt`` and the files of ``subset``; each file is read once until it changes.

    Args:
        model: the dictionary of the model, if it is known; the dictionary of the data has to hold the same symbols.

    Returns:
        The format, see :func:`kind_of`.

    Raises:
        ValueError: a file is missing, damaged or empty, or belongs to another dictionary; the message names it.
    """
    prefix = folder / subset
    try:
        types = dictionary(folder, model)
        kind = kind_of(prefix)
        names = [prefix] if kind == "raw" else [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        _verified(kind, prefix, len(types), *map(stamp, names))
    except OSError as error:
        raise ValueError(f"{error.filename or prefix} cannot be read: {error.strerror}") from None
    return kind


def dictionary(folder: Path, model: Dictionary | None = None) -> Dictionary:
    """The ``dict.txt`` of the data.

    Raises:
        ValueError: the file is missing, is not a dictionary, or holds other symbols than ``model``.
    """
    path = folder / "dict.txt"
    if not path.is_file():
        raise _missing(folder, "dict.txt")
    found = read_dictionary(path)
    if len(found) == len(SPECIAL):
        raise ValueError(f"{path} is empty; expected a line '<symbol> <count>' for each type")
    if model is not None and (difference := found.difference(model)):
        raise ValueError(f"the data is of another dictionary than the model: {difference}")
    return found


def _missing(folder: Path, name: str) -> ValueError:
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        return ValueError(
            f"{folder} has no {name}, it {kind}: expected a folder that prepare_data.ipynb makes"
        )
    for raw in sorted(folder.glob(f"{name.removesuffix('.bin')}.None-None*")):
        # fairseq-preprocess gives this name to raw text without a target language, and fairseq does not find it either.
        return ValueError(
            f"{folder} has no {name}, but {raw.name}, which fairseq-preprocess --dataset-impl raw wrote: rename it to "
            f"{name.removesuffix('.bin')}, the name that fairseq looks for"
        )
    subsets = sorted(path.stem for path in folder.glob("*.bin"))
    if name.endswith(".bin") and subsets:
        return ValueError(
            f"{folder} has no {name}; its subsets are {first_few(subsets)}: name one of them as subset"
        )
    names = sorted(path.name for path in folder.iterdir())
    there = f"holds {first_few(names)}" if names else "is empty"
    return ValueError(f"{folder} has no {name}, it {there}: prepare_data.ipynb makes such a folder")


def lines(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of the lines and the ids of all lines, from binarised (not raw) data that has been checked."""
    return _lines(kind_of(prefix), prefix)


@functools.lru_cache(maxsize=64)
def _verified(kind: str, prefix: Path, types: int, *stamps: tuple) -> None:
    if kind == "raw":
        return _verify_raw(prefix)
    sizes, ids = _lines(kind, prefix)
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if not len(sizes):
        raise ValueError(f"{index} holds no lines: there is nothing to score")
    for start, some in _pieces(sizes):
        if some.min() < 1:
            line = start + int(np.flatnonzero(some < 1)[0]) + 1
            raise ValueError(
                f"{index}: line {line} has {some[line - start - 1]} ids; expected at least 1, </s>"
            )
    # The cached format counts from 1.
    first = 1 if kind == "cached" else 0
    for start, some in _pieces(ids):
        if some.min() < first or some.max() >= types + first:
            place = int(np.flatnonzero((some < first) | (some >= types + first))[0])
            raise ValueError(
                f"{data}: id {int(some[place]) - first} at place {start + place:,} is outside dict.txt beside it, whose "
                f"ids are 0 to {types - 1}; binarise the text with that dict.txt"
            )


def _pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), AT_A_TIME):
        yield start, array[start : start + AT_A_TIME]


def _lines(kind: str, prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    return (_mmap if kind == "mmap" else _legacy)(prefix)


def _mmap(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    index = Path(f"{prefix}.idx")
    found = Binarised(prefix)
    with open(index, "rb") as file:
        version = HEADER.unpack(file.read(HEADER.size))[1]
    if version != VERSION:
        raise ValueError(f"{index} is of version {version}; expected {VERSION}")
    if len(found):
        offsets = np.memmap(index, "<i8", "r", HEADER.size + 4 * len(found), (len(found),))
        end = 0
        for start, sizes in _pieces(found.sizes):
            ends = end + np.cumsum(sizes, dtype=np.int64) * found.ids.dtype.itemsize
            begins = np.concatenate([[end], ends[:-1]])
            wrong = np.flatnonzero(offsets[start : start + len(sizes)] != begins)
            if len(wrong):
                raise ValueError(
                    f"{index}: line {start + int(wrong[0]) + 1} does not begin where the lines before it end; the file "
                    "is damaged, binarise the text again"
                )
            end = int(ends[-1])
    return found.sizes, found.ids


def _legacy(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the ``cached`` and ``lazy`` format, in which ids are larger by one."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    size = index.stat().st_size
    if size < LEGACY_HEADER.size:
        raise ValueError(
            f"{index} is cut short: it has {size} bytes, expected at least {LEGACY_HEADER.size}; binarise the text again"
        )
    with open(index, "rb") as file:
        _, version, code, width, count, dims = LEGACY_HEADER.unpack(file.read(LEGACY_HEADER.size))
    dtype = LEGACY_CODES.get(code)
    if version != 1 or dtype is None or width != dtype.itemsize:
        raise ValueError(f"{index}: version {version}, type code {code} of {width} bytes; expected integers")
    if dims != count or size != LEGACY_HEADER.size + 8 * (2 * (count + 1) + dims):
        raise ValueError(
            f"{index} has {size} bytes, which is not the size of an index of {count} lines; binarise the text again"
        )
    table = np.fromfile(index, "<i8", offset=LEGACY_HEADER.size)
    dimensions, offsets, sizes = np.split(table, [count + 1, 2 * (count + 1)])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    if not np.array_equal(dimensions, np.arange(count + 1)) or not np.array_equal(offsets, ends):
        raise ValueError(
            f"{index}: its lines do not follow one another; the file is damaged, binarise the text again"
        )
    if data.stat().st_size != int(ends[-1]) * width:
        raise ValueError(
            f"{data} has {data.stat().st_size} bytes, but its index counts {ends[-1]} tokens of {width} bytes; binarise the text "
            "again, or copy both files again"
        )
    return sizes, np.zeros(0, dtype) if not ends[-1] else np.memmap(data, dtype, "r")


def _verify_raw(path: Path) -> None:
    if not path.stat().st_size:
        raise ValueError(f"{path} holds no lines: there is nothing to score")
    try:
        with open(path, encoding="utf-8") as file:
            for _ in file:
                pass
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
