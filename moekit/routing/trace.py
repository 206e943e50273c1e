"""Traces: where the router sent each token, taken from the very tensors that the dispatch used.

    trace = model.trace("demo", capacity_token_fraction=0.05)
    trace.save("trace.parquet")
    trace = Trace.load("trace.parquet")       # columns are read when they are touched

A :class:`Recorder` sits in ``Pass.record`` on each rank and keeps what the MoE layers hand out; the driver merges the
ranks' parts in the order of samples and positions, so that a trace does not depend on the world size.

Shape letters: T tokens, L traced MoE layers, K choices a token, E experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.nn.record import CHOICE_COLUMNS, Options

if TYPE_CHECKING:
    import pandas as pd


TOKEN_COLUMNS = {  # [T]
    "sample": np.int32,
    "position": np.int32,
    "token": np.int32,
    "target": np.int32,
    "generated": np.bool_,
    "logprob": np.float32,
    "predicted": np.int32,
}
FORMAT = 1  # of the Parquet file


# ------------------------------------------------------------------------------------------------ what a trace is


@dataclass(frozen=True, eq=False)
class Trace:
    """What the router did to T real tokens in L MoE layers; padding is not here, but what it displaced shows.

    Attributes:
        sample, position: [T] int32, sorted by both; ``position`` counts from 0 within the sample.
        token: [T] int32, the input token (dictionary id).
        target: [T] int32, the next token, ``PAD`` if there is none.
        generated: [T] bool, False for tokens of a prompt or of data.
        logprob: [T] float32, natural logarithm, of the target; NaN if unknown.
        predicted: [T] int32, the output's most probable next token; -1 if it was not recorded.
        layers: the traced layers' numbers in the model, from 0.
        experts: [T, L, K] int16, the router's choices, best first, dropped ones included.
        probs: [T, L, K] float32, gate probability of each choice.
        weights: [T, L, K] float32, combine weights: 0 where not kept.
        kept: [T, L, K] bool, whether the choice was dispatched: False where capacity dropped it.
        entropy: [T, L] float32, of the full gate distribution, in nats.
        full: layer -> [T, E] float16, the full gate distribution of the layers that it was asked for.
        num_experts: E.
        meta: what ran: checkpoint, data, capacity, dtype, device, versions (see :func:`describe_run`).
    """

    sample: np.ndarray
    position: np.ndarray
    token: np.ndarray
    target: np.ndarray
    generated: np.ndarray
    logprob: np.ndarray
    predicted: np.ndarray
    layers: tuple[int, ...]
    experts: np.ndarray
    probs: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    entropy: np.ndarray
    full: Mapping[int, np.ndarray]
    num_experts: int
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        tokens, depth, k = len(self.sample), len(self.layers), self.experts.shape[-1]
        shapes = dict.fromkeys(TOKEN_COLUMNS, (tokens,)) | dict.fromkeys(CHOICE_COLUMNS, (tokens, depth, k))
        dtypes = TOKEN_COLUMNS | CHOICE_COLUMNS | {"entropy": np.float32}
        for name, shape in (shapes | {"entropy": (tokens, depth)}).items():
            column = getattr(self, name)
            if column.shape != shape or column.dtype != dtypes[name]:
                wanted = f"{np.dtype(dtypes[name])} {list(shape)}"
                raise ValueError(f"{name} is {column.dtype} {list(column.shape)}; expected {wanted}")
        for layer, probs in self.full.items():
            if layer not in self.layers or probs.shape != (tokens, self.num_experts):
                raise ValueError(f"full[{layer}] has shape {list(probs.shape)}; the layers are {self.layers}")

    def __len__(self) -> int:
        return len(self.sample)

    def __repr__(self) -> str:
        return (
            f"<trace of {len(self):,} tokens in {len(np.unique(self.sample)):,} samples, layers "
            f"{', '.join(map(str, self.layers))}, {self.num_experts} experts, {self.top_k} choices a token>"
        )

    @property
    def top_k(self) -> int:
        """K, choices a token."""
        return self.experts.shape[-1]

    def at(self, layer: int) -> int:
        """The place of model layer ``layer`` on the axis L."""
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not in the trace, whose layers are {list(self.layers)}")
        return self.layers.index(layer)

    def select(
        self,
        samples: int | Iterable[int] | None = None,
        layers: int | Iterable[int] | None = None,
        mask: np.ndarray | None = None,
    ) -> Trace:
        """The part of the trace with these samples, these model layers, and the tokens where ``mask`` ([T] bool) is true."""
        chosen = np.ones(len(self), dtype=bool)
        if samples is not None:
            chosen &= np.isin(self.sample, np.atleast_1d(_listed(samples)))
        if mask is not None:
            mask = np.asarray(mask)
            if mask.shape != chosen.shape or mask.dtype != bool:
                raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; expected bool [{len(self)}]")
            chosen &= mask
        wanted = self.layers if layers is None else tuple(int(n) for n in np.atleast_1d(_listed(layers)))
        places = [self.at(layer) for layer in wanted]
        columns = {name: getattr(self, name)[chosen] for name in TOKEN_COLUMNS}
        columns |= {name: getattr(self, name)[chosen][:, places] for name in (*CHOICE_COLUMNS, "entropy")}
        full = {layer: self.full[layer][chosen] for layer in wanted if layer in self.full}
        return Trace(**columns, layers=wanted, full=full, num_experts=self.num_experts, meta=self.meta)

    def to_pandas(self) -> pd.DataFrame:
        """A row a (token, layer): the token's columns, ``layer``, ``entropy``, and for each choice k ``expert_k``,
        ``prob_k``, ``weight_k`` and ``kept_k``."""
        import pandas as pd

        depth = len(self.layers)
        columns = {name: np.repeat(getattr(self, name), depth) for name in TOKEN_COLUMNS}
        columns["layer"] = np.tile(np.array(self.layers, dtype=np.int16), len(self))
        for k in range(self.top_k):
            for name, short in zip(CHOICE_COLUMNS, ("expert", "prob", "weight", "kept"), strict=True):
                columns[f"{short}_{k}"] = getattr(self, name)[:, :, k].ravel()
        columns["entropy"] = self.entropy.ravel()
        return pd.DataFrame(columns, copy=False)

    def save(self, path: str | Path) -> None:
        """Write one Parquet file, which any Parquet reader opens: a row a token.

        Columns: those of the token; for each traced layer n and choice k ``experts.n.k``, ``probs.n.k``,
        ``weights.n.k``, ``kept.n.k``; ``entropy.n``; and ``full.n``, the E float16 of the full distribution in one
        binary value. The schema's metadata holds under "moekit.routing.trace" a JSON object with ``format``, ``layers``,
        ``top_k``, ``num_experts`` and ``meta``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: pa.array(getattr(self, name)) for name in TOKEN_COLUMNS}
        for place, layer in enumerate(self.layers):
            for name in CHOICE_COLUMNS:
                for k in range(self.top_k):
                    column = np.ascontiguousarray(getattr(self, name)[:, place, k])
                    columns[f"{name}.{layer}.{k}"] = pa.array(column)
            columns[f"entropy.{layer}"] = pa.array(np.ascontiguousarray(self.entropy[:, place]))
            if layer in self.full:
                probs = np.ascontiguousarray(self.full[layer], dtype=np.float16)
                kind = pa.binary(2 * self.num_experts)
                columns[f"full.{layer}"] = pa.Array.from_buffers(kind, len(self), [None, pa.py_buffer(probs)])
        head = {
            "format": FORMAT,
            "layers": self.layers,
            "top_k": self.top_k,
            "num_experts": self.num_experts,
            "meta": self.meta,
        }
        table = pa.table(columns).replace_schema_metadata({"moekit.routing.trace": json.dumps(head)})
        part = Path(path).with_name(Path(path).name + ".part")
        floats = [name for name, column in columns.items() if pa.types.is_floating(column.type)]
        pq.write_table(
            table,
            part,
            compression="zstd",
            row_group_size=65_536,
            use_dictionary=[name for name in columns if name.startswith("experts.")],
            use_byte_stream_split=floats,
        )
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """A trace that reads each column of the file ``path`` when it is first touched.

        Raises:
            ValueError: there is no such file, or it is no trace of this format.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"there is no trace {path}")
        try:
            head = json.loads((pq.read_schema(path).metadata or {})[b"moekit.routing.trace"])
        except (KeyError, pa.ArrowInvalid):
            raise ValueError(f"{path} is not a trace that moekit saved") from None
        if head["format"] != FORMAT:
            raise ValueError(f"{path} has format {head['format']}; this moekit reads format {FORMAT}")
        columns = _Columns(path, tuple(head["layers"]), head["top_k"], head["num_experts"])
        trace = cls.__new__(cls)  # without its arrays: __getattr__ fetches them
        vars(trace).update(
            _columns=columns,
            layers=columns.layers,
            num_experts=columns.num_experts,
            meta=head["meta"],
            full=_Full(columns),
        )
        return trace

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in _ARRAYS or "_columns" not in vars(self):
            raise AttributeError(name)
        vars(self)[name] = self._columns.read(name)
        return vars(self)[name]


_ARRAYS = {f.name for f in fields(Trace)} - {"layers", "full", "num_experts", "meta"}


def _listed(numbers: int | Iterable[int]) -> int | list[int]:
    return numbers if isinstance(numbers, int | np.integer) else list(numbers)


class _Columns:
    """The columns of a saved trace, by name."""

    def __init__(self, path: Path, layers: tuple[int, ...], top_k: int, num_experts: int):
        self.path, self.layers, self.top_k, self.num_experts = path, layers, top_k, num_experts
        self.stamp = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def read(self, name: str) -> np.ndarray:
        if name in TOKEN_COLUMNS:
            return self._read([name])[0].astype(TOKEN_COLUMNS[name], copy=False)
        if name == "entropy":
            return np.stack(self._read([f"entropy.{layer}" for layer in self.layers]), axis=1)
        found = self._read([f"{name}.{layer}.{k}" for layer in self.layers for k in range(self.top_k)])
        return np.stack(found, axis=1).reshape(-1, len(self.layers), self.top_k)

    def full(self, layer: int) -> np.ndarray:
        return self._read([f"full.{layer}"])[0]

    def _read(self, names: list[str]) -> list[np.ndarray]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._stamp() != self.stamp:
            raise ValueError(f"{self.path} has changed since the trace was loaded: load it again")
        table = pq.read_table(self.path, columns=names)
        arrays = [table[name].combine_chunks() for name in names]
        return [
            np.frombuffer(a.buffers()[1], np.float16).reshape(-1, self.num_experts)[
                a.offset : a.offset + len(a)
            ]
            if pa.types.is_fixed_size_binary(a.type)
            else a.to_numpy(zero_copy_only=False)
            for a in arrays
        ]


class _Full(Mapping):
    """``Trace.full`` of a saved trace: a layer's distribution is read when it is asked for, and not kept."""

    def __init__(self, columns: _Columns):
        import pyarrow.parquet as pq

        names = set(pq.read_schema(columns.path).names)
        self.columns, self.there = columns, [n for n in columns.layers if f"full.{n}" in names]

    def __getitem__(self, layer: int) -> np.ndarray:
        if layer not in self.there:
            raise KeyError(layer)
        return self.columns.full(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.there)

    def __len__(self) -> int:
        return len(self.there)


# --------------------------------------------------------------------------------------------- recording on a rank


# ----------------------------------------------------------------------------------------------- merging the ranks


class Collector:
    """The driver's side: takes the ranks' parts as they come, and makes the trace of them."""

    def __init__(self, options: Options):
        self.options = options
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, parts: Iterable[dict[str, np.ndarray]]) -> None:
        """Parts are tables with the token's columns and those of :meth:`Recorder.rows`."""
        self.parts.extend(parts)

    def trace(self, num_experts: int, meta: dict[str, Any]) -> Trace:
        """All parts in one, sorted by sample and position."""
        if not self.parts:
            raise ValueError("the data has no tokens to trace")
        key = [np.concatenate([part[name] for part in self.parts]) for name in ("position", "sample")]
        order = np.lexsort(key)
        dtypes = TOKEN_COLUMNS | CHOICE_COLUMNS | {"entropy": np.float32}
        columns = {
            name: np.concatenate([part[name] for part in self.parts])[order].astype(dtype, copy=False)
            for name, dtype in dtypes.items()
        }
        full = {
            layer: np.concatenate([part[f"full.{layer}"] for part in self.parts])[order]
            for layer in self.options.full
        }
        return Trace(**columns, layers=self.options.layers, full=full, num_experts=num_experts, meta=meta)


def join(traces: Iterable[Trace]) -> Trace:
    """Traces of different samples in one, with the first one's meta: those of several generations, say.

    Raises:
        ValueError: they share a sample, or are of other layers or another number of experts.
    """
    traces = list(traces)
    for name in ("layers", "num_experts", "top_k"):
        found = {getattr(trace, name) for trace in traces}
        if len(found) != 1:
            raise ValueError(f"the traces' {name} differ: {sorted(found)}")
    first = traces[0]
    samples = [set(np.unique(trace.sample).tolist()) for trace in traces]
    if sum(map(len, samples)) > len(set().union(*samples)):
        raise ValueError("two of the traces have a sample in common")
    parts = [{name: getattr(t, name) for name in _ARRAYS} for t in traces]
    full = tuple(layer for layer in first.full if all(layer in t.full for t in traces))
    for part, trace in zip(parts, traces, strict=True):
        part |= {f"full.{layer}": trace.full[layer] for layer in full}
    collector = Collector(Options(first.layers, full))
    collector.add(parts)
    return collector.trace(first.num_experts, first.meta)


def align(one: Trace, other: Trace) -> tuple[Trace, Trace]:
    """The parts of two traces that cover the same samples and positions, in the same order.

    Raises:
        ValueError: they share no token, differ in a token's id, or are of other layers or another number of experts.
    """
    for name in ("layers", "num_experts", "top_k"):
        if getattr(one, name) != getattr(other, name):
            raise ValueError(f"the traces' {name} differ: {getattr(one, name)} and {getattr(other, name)}")
    places = [t.sample.astype(np.int64) << 32 | t.position for t in (one, other)]
    if not np.array_equal(*places):
        common = np.intersect1d(*places, assume_unique=True)
        one, other = (t.select(mask=np.isin(p, common)) for t, p in zip((one, other), places, strict=True))
    if not len(one):
        raise ValueError("the traces have no sample and position in common")
    differ = int((one.token != other.token).sum())
    if differ:
        raise ValueError(f"{differ} of {len(one)} tokens differ: the traces are not of the same text")
    return one, other


# --------------------------------------------------------------------------------------------------------- domains
