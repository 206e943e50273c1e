"""The Parquet file of a trace, which any Parquet reader opens: one row for each token.

Columns: those of the token; for each traced layer n and choice k ``experts.n.k``, ``probs.n.k``, ``weights.n.k``,
``kept.n.k``; ``entropy.n``; ``full.n``, the E float16 of the full distribution in one binary value; and ``labels.name``, text.
The schema's metadata holds under "moekit.trace" a JSON object with ``format``, ``layers``, ``top_k``, ``num_experts``, ``meta``
and ``labels``, the different texts of each column, and under "moekit.crc32" the CRC32 of that object followed by the columns'
values, labels as numbers (int32) of their texts. Format 1 had no checksum, format 2 no ``output_entropy``, and format 3 no
labels. A trace without layers, of a dense model, has the columns of the tokens only.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moekit import json_text, results
from moekit.arguments import reading, shown
from moekit.headlines import first_line, headline
from moekit.nn.record import CHOICE_COLUMNS
from moekit.routing.trace import TOKEN_COLUMNS, Trace

FORMAT = 4
FORMATS = (1, 2, 3, 4)
# Columns of a token that earlier formats did not have, and the first that has them.
NEW_IN = {"output_entropy": 3}
HEAD, CHECKSUM = b"moekit.trace", b"moekit.crc32"
ROWS = 65_536
# bounds of what a head may say, so that a damaged one allocates nothing absurd
MOST_LAYERS, MOST_CHOICES, MOST_EXPERTS = 10_000, 64, np.iinfo(np.int16).max
# The rows of a file of n bytes take at most ANY + EACH * n bytes of memory. What moekit writes lies within, however alike its rows
# are: a column of a row group takes LEAST bytes of the file or more, and EACH * LEAST bytes of memory or less.
ANY, EACH, LEAST = 128 << 20, 2048, 128


@dataclass(frozen=True)
class Head:
    """What a file says of its trace beside the columns."""

    layers: tuple[int, ...]
    top_k: int
    num_experts: int
    meta: dict[str, Any]
    labels: dict[str, list[str]]

    def columns(self, full: tuple[int, ...], version: int) -> Iterator[tuple[str, str, np.dtype]]:
        """Name in the file, name in the trace and dtype of each column, in the order that the checksum takes them."""
        for name, dtype in TOKEN_COLUMNS.items():
            if version >= NEW_IN.get(name, 1):
                yield name, name, np.dtype(dtype)
        for layer in self.layers:
            for name, dtype in CHOICE_COLUMNS.items():
                for k in range(self.top_k):
                    yield f"{name}.{layer}.{k}", name, np.dtype(dtype)
            yield f"entropy.{layer}", "entropy", np.dtype(np.float32)
            if layer in full:
                yield f"full.{layer}", "full", np.dtype(np.float16)
        for name in self.labels:
            yield f"labels.{name}", "labels", np.dtype(np.int32)

    def bytes_a_row(self, full: tuple[int, ...], version: int) -> int:
        """What a token takes of the memory, with its labels as texts of one length."""
        wide = {"full": self.num_experts}
        numbers = sum(dtype.itemsize * wide.get(name, 1) for _, name, dtype in self.columns(full, version))
        longest = sum(max(map(len, texts), default=0) for texts in self.labels.values())
        return numbers + np.dtype("U1").itemsize * longest

    def rows_a_group(self, full: tuple[int, ...]) -> int:
        """The rows of a row group of a file that is written."""
        columns = sum(1 for _ in self.columns(full, FORMAT))
        return min(ROWS, max(1, EACH * LEAST * columns // self.bytes_a_row(full, FORMAT)))


def write(trace: Trace, path: str | Path) -> None:
    """Write ``trace`` to ``path``; see :meth:`moekit.routing.trace.Trace.save`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {name: np.unique(given, return_inverse=True) for name, given in trace.labels.items()}
    named = {name: different.tolist() for name, (different, _) in texts.items()}
    head = Head(trace.layers, trace.top_k, trace.num_experts, trace.meta, named)
    text = _text_of(head)
    checksum, columns, full = zlib.crc32(text), {}, tuple(trace.full)
    for column, name, dtype in head.columns(full, FORMAT):
        if name == "labels":
            values = texts[column.removeprefix("labels.")][1].astype(dtype)
        else:
            values = _of_trace(trace, column, name).astype(dtype, copy=False)
        checksum = zlib.crc32(_bytes(values), checksum)
        if name == "full":
            kind = pa.binary(values.itemsize * trace.num_experts)
            columns[column] = pa.Array.from_buffers(kind, len(trace), [None, pa.py_buffer(values)])
        elif name == "labels":
            # An array of NumPy's text would end each label at its first NUL, and one array holds 2 GiB of text at most.
            different = pa.array(named[column.removeprefix("labels.")], pa.string())
            starts = range(0, len(values), ROWS)
            parts = [different.take(pa.array(values[at : at + ROWS])) for at in starts]
            columns[column] = pa.chunked_array(parts, pa.string())
        else:
            columns[column] = pa.array(values)
    table = pa.table(columns).replace_schema_metadata({HEAD: text, CHECKSUM: str(checksum)})
    with results.whole(path) as part:
        pq.write_table(
            table,
            part,
            compression="zstd",
            row_group_size=head.rows_a_group(full),
            use_dictionary=[column for column in columns if column.startswith(("experts.", "labels."))],
            use_byte_stream_split=[name for name, c in columns.items() if pa.types.is_floating(c.type)],
            write_page_checksum=True,
        )


def read(path: Path) -> Trace:
    """The trace in the file ``path``; see :meth:`moekit.routing.trace.Trace.load`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path):
        path = path.resolve()
        there = path.is_file()
        if there:
            # pyarrow's own message of a file that may not be read says that it is damaged.
            open(path, "rb").close()
            results.settle(path.parent)
    if not there:
        raise ValueError(f"there is no trace {path}; expected a file that Trace.save wrote")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            found = file.schema_arrow.metadata or {}
            if HEAD not in found:
                raise ValueError(
                    f"{path} is not a trace that moekit saved; expected a file that Trace.save wrote"
                )
            head, version = _head(found[HEAD], path)
            layers = tuple(layer for layer in head.layers if f"full.{layer}" in file.schema_arrow.names)
            columns = list(head.columns(layers, version))
            missing = {column for column, *_ in columns} - set(file.schema_arrow.names)
            if missing:
                raise _damaged(path, f"it lacks the column {min(missing)}")
            taken, size = file.metadata.num_rows * head.bytes_a_row(layers, version), path.stat().st_size
            if taken > ANY + EACH * size:
                raise _damaged(path, f"its {size:,} bytes hold rows of {taken:,} bytes")
        # A text that many rows have is in the memory once.
        texts = [column for column, name, _ in columns if name == "labels"]
        with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=texts) as file:
            table = file.read([column for column, *_ in columns])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, pa.ArrowInvalid) and "magic bytes" in str(error):
            raise ValueError(
                f"{path} is not a trace that moekit saved; expected a file that Trace.save wrote"
            ) from None
        raise _damaged(path, first_line(error)) from None

    arrays, checksum = {}, zlib.crc32(found[HEAD])
    for column, name, dtype in columns:
        if name == "labels":
            values = _numbers_of(table[column], head.labels[column.removeprefix("labels.")])
        else:
            values = _of_table(table[column], name, dtype, head.num_experts)
        if values is None:
            raise _damaged(path, f"the column {column} holds {table[column].type}")
        arrays[column] = values
        checksum = zlib.crc32(_bytes(values), checksum)
    if version > 1 and found.get(CHECKSUM) != str(checksum).encode():
        raise _damaged(path, "its checksum differs from its content")
    try:
        return _trace(head, arrays, layers)
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _of_trace(trace: Trace, column: str, name: str) -> np.ndarray:
    """The values of one column of the file, contiguous: [T], or [T, E] of ``full``."""
    if name in TOKEN_COLUMNS:
        return np.ascontiguousarray(getattr(trace, name))
    layer, *k = (int(number) for number in column.split(".")[1:])
    if name == "full":
        return np.ascontiguousarray(trace.full[layer])
    return np.ascontiguousarray(getattr(trace, name)[:, trace.at(layer), *k])


def _numbers_of(column: Any, texts: list[str]) -> np.ndarray | None:
    """[T] int32, the number of each label among ``texts``; None where it is none of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.type != pa.dictionary(pa.int32(), pa.string()) or column.null_count:
        return None
    known = pa.array(texts, pa.string())
    parts = [pc.index_in(part.dictionary, known).take(part.indices) for part in column.chunks]
    found = pa.chunked_array(parts, pa.int32()).combine_chunks()
    return None if found.null_count else np.ascontiguousarray(found.to_numpy(zero_copy_only=False))


def _of_table(column: Any, name: str, dtype: np.dtype, experts: int) -> np.ndarray | None:
    """The values of a column that was read, contiguous; None where it is not of its dtype."""
    import pyarrow as pa

    kind = pa.binary(dtype.itemsize * experts) if name == "full" else pa.from_numpy_dtype(dtype)
    if column.type != kind or column.null_count:
        return None
    array = column.combine_chunks()
    if name != "full":
        return np.ascontiguousarray(array.to_numpy(zero_copy_only=False))
    if not len(array):
        return np.empty((0, experts), dtype)
    rows = np.frombuffer(array.buffers()[1], dtype).reshape(-1, experts)
    return rows[array.offset : array.offset + len(array)]


def _trace(head: Head, arrays: dict[str, np.ndarray], full: tuple[int, ...]) -> Trace:
    tokens, shape = len(arrays["sample"]), (len(head.layers), head.top_k)

    def stacked(name: str) -> np.ndarray:
        parts = [arrays[f"{name}.{layer}.{k}"] for layer in head.layers for k in range(head.top_k)]
        columns = np.stack(parts, axis=1) if parts else np.empty((tokens, 0), CHOICE_COLUMNS[name])
        return columns.reshape(tokens, *shape)

    entropy = [arrays[f"entropy.{layer}"] for layer in head.layers]
    return Trace(
        **{name: arrays[name] for name in TOKEN_COLUMNS if name in arrays},
        **{name: stacked(name) for name in CHOICE_COLUMNS},
        entropy=np.stack(entropy, axis=1) if entropy else np.empty((tokens, 0), np.float32),
        layers=head.layers,
        full={layer: arrays[f"full.{layer}"] for layer in full},
        num_experts=head.num_experts,
        meta=head.meta,
        labels={name: np.array(texts, str)[arrays[f"labels.{name}"]] for name, texts in head.labels.items()},
    )


def _text_of(head: Head) -> bytes:
    """The head as it is written; a ValueError names what of ``meta`` is no JSON."""
    try:
        return json.dumps({"format": FORMAT} | vars(head)).encode()
    except (TypeError, ValueError):
        for name, value in head.meta.items():
            try:
                json.dumps({name: value})
            except (TypeError, ValueError):
                raise ValueError(
                    f"meta[{name!r}]={shown(value)} cannot be saved; expected what JSON has: texts, Python's numbers, lists, dicts"
                ) from None
        raise


def _head(text: bytes, path: Path) -> tuple[Head, int]:
    """The head and the format of a file."""
    try:
        said = json_text.loads(text, json_text.MANY_VALUES)
    except ValueError as error:
        raise _damaged(path, f"its head {error}") from None
    try:
        version = said["format"]
        labels = said.get("labels", {})
        head = Head(tuple(said["layers"]), said["top_k"], said["num_experts"], said["meta"], labels)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its head cannot be read ({headline(error, 100)})") from None
    if version not in FORMATS:
        raise ValueError(
            f"{path} has format {str(version)[:20]}; this moekit reads the formats 1 to {FORMAT}"
        )
    if not isinstance(labels, dict) or not all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in labels.values()
    ):
        raise _damaged(path, "its head names labels that are no text")
    numbers = (*head.layers, head.top_k, head.num_experts)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not whole or not isinstance(head.meta, dict):
        raise _damaged(path, "its head names layers, choices or experts that are no whole numbers")
    different = len(set(head.layers)) == len(head.layers) <= MOST_LAYERS and min(head.layers, default=0) >= 0
    least = 1 if head.layers else 0
    if not (different and least <= head.top_k <= MOST_CHOICES and least <= head.num_experts <= MOST_EXPERTS):
        raise _damaged(path, "its head names an absurd number of layers, choices or experts")
    return head, version


def _bytes(values: np.ndarray) -> memoryview:
    return memoryview(values.view(np.uint8).reshape(-1))


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {why[:200]}; expected what Trace.save wrote, so record or copy it again"
    )
