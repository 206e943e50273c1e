"""Traces: where the router sent each token, taken from the very tensors that the dispatch used.

    trace = model.trace("demo", capacity_token_fraction=0.05)
    trace.save("trace.parquet")
    trace = Trace.load("trace.parquet")
    trace = trace.labelled(domain=domains_of(trace))     # a column that metrics know by its name

A :class:`moekit.nn.record.Recorder` sits in ``Pass.record`` on each rank and keeps what the MoE layers hand out. The driver
merges the ranks' parts in the order of samples and positions, so that a trace does not depend on the world size.

Shape letters: T tokens, L traced MoE layers, K choices a token, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit import arguments
from moekit.arguments import Flag, Texts, Whole, Wholes, check, is_many, shown
from moekit.checked import Instance, checked
from moekit.nn.record import CHOICE_COLUMNS, Options, nothing
from moekit.routing.statistics import array_of

if TYPE_CHECKING:
    import pandas as pd


# [T] each
TOKEN_COLUMNS = {
    "sample": np.int32,
    "position": np.int32,
    "token": np.int32,
    "target": np.int32,
    "generated": np.bool_,
    "logprob": np.float32,
    "predicted": np.int32,
    "output_entropy": np.float32,
}
# What a column of one choice is called in a table.
CHOICE_NAMES = {"experts": "expert", "probs": "prob", "weights": "weight", "kept": "kept"}


# ------------------------------------------------------------------------------------------------ what a trace is


@dataclass(frozen=True, eq=False)
class Trace:
    """What the router did to T real tokens in L MoE layers. Of a dense model, L, K and E are 0.

    Padding has no rows. It is routed as fairseq routes it, so with a capacity it takes places in the buffers, and real tokens
    that found no place because of it show as dropped.

    Attributes:
        sample, position: [T] int32, sorted by both; ``position`` counts from 0 within the sample.
        token: [T] int32, the input token (dictionary id).
        target: [T] int32, the next token, ``PAD`` behind a text's last token.
        generated: [T] bool, False for tokens of a prompt or of data.
        logprob: [T] float32, natural logarithm, of the target; NaN if unknown, and of the ``<s>`` that begins a sample of data.
        predicted: [T] int32, the output's most probable next token; -1 if it was not recorded.
        output_entropy: [T] float32, of the output's distribution of the next token, in nats; NaN if it was not recorded. None
            stands for NaN everywhere.
        layers: the traced layers' numbers in the model, from 0.
        experts: [T, L, K] int16, the router's choices, best first, dropped ones included.
        probs: [T, L, K] float32, gate probability of each choice.
        weights: [T, L, K] float32, combine weights: 0 where not kept.
        kept: [T, L, K] bool, whether the choice was dispatched: False where the capacity dropped it, or where the gate or an
            intervention left the second choice out.
        entropy: [T, L] float32, of the full gate distribution, in nats.
        full: layer -> [T, E] float16, the full gate distribution of the layers that ``full`` asked for.
        num_experts: E.
        meta: what ran: checkpoint, data, capacity, dtype, device, versions (:func:`moekit.handle.describe_run`).
        labels: name -> [T] strings, what :meth:`labelled` added; metrics take the name in place of labels.
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
    output_entropy: np.ndarray | None = None
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.output_entropy is None:
            object.__setattr__(self, "output_entropy", np.full(len(self.sample), np.nan, np.float32))
        tokens, depth, k = len(self.sample), len(self.layers), self.experts.shape[-1]
        shapes = dict.fromkeys(TOKEN_COLUMNS, (tokens,)) | dict.fromkeys(CHOICE_COLUMNS, (tokens, depth, k))
        dtypes = TOKEN_COLUMNS | CHOICE_COLUMNS | {"entropy": np.float32}
        for name, shape in (shapes | {"entropy": (tokens, depth)}).items():
            column = getattr(self, name)
            if column.shape != shape or column.dtype != dtypes[name]:
                wanted = f"{np.dtype(dtypes[name])} {list(shape)}"
                raise ValueError(f"{name} is {column.dtype} {list(column.shape)}; expected {wanted}")
        if len(set(self.layers)) < depth:
            raise ValueError(f"the layers are {list(self.layers)}; expected each once")
        if self.experts.size and not 0 <= self.experts.min() <= self.experts.max() < self.num_experts:
            raise ValueError(
                f"the experts are {self.experts.min()} to {self.experts.max()}; expected 0 to {self.num_experts - 1}"
            )
        for layer, probs in self.full.items():
            if layer not in self.layers or probs.shape != (tokens, self.num_experts):
                raise ValueError(
                    f"full[{layer}] has shape {list(probs.shape)}; expected {[tokens, self.num_experts]} and one of the layers "
                    f"{list(self.layers)}"
                )
        for name, given in self.labels.items():
            if given.shape != (tokens,) or given.dtype.kind != "U":
                raise ValueError(
                    f"labels[{name!r}] is {given.dtype} {list(given.shape)}; expected text [{tokens}]"
                )

    def __len__(self) -> int:
        return len(self.sample)

    def __repr__(self) -> str:
        if not self.layers:
            return (
                f"<trace of {len(self):,} tokens in {len(np.unique(self.sample)):,} samples, without experts>"
            )
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
        layer = check("layer", layer, Whole(0))
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not in the trace; expected one of {list(self.layers)}")
        return self.layers.index(layer)

    def labelled(self, /, **labels: Iterable[Any] | None) -> Trace:
        """The trace with columns of labels, such as ``domain=domains_of(trace)``; they are saved, selected and joined with it.

        Args:
            labels: [T] each, from any iterable, kept as text; None removes the column.

        Raises:
            ValueError: not a label for each token, or a name that is no text or that a column of the trace has.
        """
        # Half of a surrogate pair cannot be saved, in a name or in a label.
        check("labels", list(labels), Texts())
        found = dict(self.labels)
        of_choices = [f"{short}_{k}" for short in CHOICE_NAMES.values() for k in range(self.top_k)]
        for name, given in labels.items():
            if name in (*TOKEN_COLUMNS, *CHOICE_COLUMNS, *of_choices, "entropy", "layer"):
                raise ValueError(f"a trace has a column {name} of its own: give the labels another name")
            found.pop(name, None)
            if given is not None:
                found[name] = self.labels_of(given, name).astype(str)
                codes = found[name].view(np.uint32).reshape(len(self), found[name].itemsize // 4)
                halves = np.flatnonzero(((codes >= 0xD800) & (codes < 0xE000)).any(axis=1))
                check(name, found[name][halves[:1]].tolist(), Texts())
        return replace(self, labels=found)

    def labels_of(self, groups: str | Iterable[Any] | np.ndarray, name: str = "groups") -> np.ndarray:
        """[T] labels: the column of this name, or those that are given.

        Args:
            name: the argument's, for errors.

        Raises:
            ValueError: no column is called so, or it is not a label for each token.
        """
        if isinstance(groups, str):
            if groups not in self.labels:
                there = f"there are {', '.join(self.labels)}" if self.labels else "there is none"
                raise ValueError(
                    f"the trace has no column of labels called {shown(groups)}: {there}; trace.labelled(...) adds one"
                )
            return self.labels[groups]
        if not is_many(groups):
            raise ValueError(
                f"{name}={shown(groups)}: expected a label for each token, or the name of a column of labels"
            )
        found = array_of(name, groups)
        if found.shape != (len(self),):
            raise ValueError(
                f"{name} has shape {list(found.shape)}; expected a label for each of {len(self)} tokens, and of labels of samples "
                "np.array(labels)[trace.sample]"
            )
        # Labels of several types have no order.
        return found.astype(str) if found.dtype == object else found

    def select(
        self,
        samples: int | Iterable[int] | None = None,
        layers: int | Iterable[int] | None = None,
        mask: np.ndarray | None = None,
    ) -> Trace:
        """The part of the trace with these samples, these model layers, and the tokens where ``mask`` ([T] bool) is true."""
        chosen = np.ones(len(self), dtype=bool)
        if samples is not None:
            chosen &= np.isin(self.sample, check("samples", samples, Wholes()))
        if mask is not None:
            mask = array_of("mask", mask)
            if mask.shape != chosen.shape or mask.dtype != bool:
                raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; expected bool [{len(self)}]")
            chosen &= mask
        wanted = self.layers if layers is None else tuple(check("layers", layers, Wholes()))
        places = [self.at(layer) for layer in wanted]
        columns = {name: getattr(self, name)[chosen] for name in TOKEN_COLUMNS}
        columns |= {name: getattr(self, name)[chosen][:, places] for name in (*CHOICE_COLUMNS, "entropy")}
        full = {layer: self.full[layer][chosen] for layer in wanted if layer in self.full}
        labels = {name: given[chosen] for name, given in self.labels.items()}
        return replace(self, **columns, layers=wanted, full=full, labels=labels)

    def without_experts(self) -> Trace:
        """The trace as that of a dense model: to compare log-probabilities of models whose experts are not alike."""
        tokens = {name: getattr(self, name) for name in TOKEN_COLUMNS}
        return Trace(
            **tokens,
            **nothing(len(self)),
            layers=(),
            full={},
            num_experts=0,
            meta=self.meta,
            labels=self.labels,
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per (token, layer): the token's columns, its labels, ``layer``, ``entropy``, and for each choice k ``expert_k``,
        ``prob_k``, ``weight_k`` and ``kept_k``. One row per token with its columns and labels, if there are no layers."""
        import pandas as pd

        depth = len(self.layers)
        if not depth:
            own = {name: getattr(self, name) for name in TOKEN_COLUMNS}
            return pd.DataFrame(own | dict(self.labels), copy=False)
        columns = {name: np.repeat(getattr(self, name), depth) for name in TOKEN_COLUMNS}
        columns |= {name: np.repeat(given, depth) for name, given in self.labels.items()}
        columns["layer"] = np.tile(np.array(self.layers, dtype=np.int16), len(self))
        for k in range(self.top_k):
            for name, short in CHOICE_NAMES.items():
                columns[f"{short}_{k}"] = getattr(self, name)[:, :, k].ravel()
        columns["entropy"] = self.entropy.ravel()
        return pd.DataFrame(columns, copy=False)

    @checked(path=arguments.Path())
    def save(self, path: str | Path) -> None:
        """Write one Parquet file (:mod:`moekit.routing.parquet` says what is in it); ``path`` is replaced at once, at the end.

        Raises:
            moekit.results.NotWritten: (a ValueError) the folder is missing or cannot be written to, or its disk is full.
        """
        from moekit.routing import parquet

        parquet.write(self, path)

    @classmethod
    @checked(path=arguments.Path())
    def load(cls, path: str | Path) -> Trace:
        """Read the file ``path`` whole; a checksum tells whether it is what :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, it is no trace, or it is damaged.
        """
        from moekit.routing import parquet

        return parquet.read(path)


# what an argument that takes a trace may be
TRACE = Instance(Trace, "a trace, such as model.trace or Trace.load gives")
ARRAYS = {f.name for f in fields(Trace)} - {"layers", "full", "num_experts", "meta", "labels"}


def need_layers(trace: Trace, what: str) -> None:
    """Raise an error if the trace has no layers, for functions that are about experts.

    Args:
        what: what was asked for, such as the function's name; it begins the error's sentence.

    Raises:
        ValueError: the trace has no layers.
    """
    if not trace.layers:
        why = (
            "its model is dense: trace one with experts" if not trace.num_experts else "select or record more"
        )
        raise ValueError(f"{what}: the trace has no layers, expected at least one; {why}")


def need_tokens(trace: Trace, what: str) -> None:
    """Raise an error if the trace has no tokens; ``what`` as in :func:`need_layers`.

    Raises:
        ValueError: the trace has no tokens.
    """
    if not len(trace):
        raise ValueError(f"{what}: the trace has no tokens, expected at least one; select or record more")


def first_alone(trace: Trace) -> bool:
    """Whether an experiment left out all choices but the first ones (``drop_second``)."""
    return bool((trace.meta.get("intervention") or {}).get("drop_second"))


# What a trace's meta tells of its drops, see moekit/routing/metrics/dropping.py.
WHAT_DROPS = {
    # None tells that nothing is dropped.
    "capacity_token_fraction": lambda trace: trace.meta.get("capacity_token_fraction", "unknown"),
    "drop_second": first_alone,
}


# ----------------------------------------------------------------------------------------------- merging the ranks


class Collector:
    """The driver's side: takes the ranks' parts as they come, and makes the trace of them."""

    def __init__(self, options: Options):
        self.options = options
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, parts: Iterable[dict[str, np.ndarray]]) -> None:
        """Take parts of ranks: tables with the columns of tokens and those of :meth:`moekit.nn.record.Recorder.rows`."""
        self.parts.extend(parts)

    def trace(self, num_experts: int, meta: dict[str, Any]) -> Trace:
        """One trace of all parts, sorted by sample and position."""
        if not self.parts:
            raise ValueError("the data has no tokens to trace; expected at least one")
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


@checked(renumber=Flag())
def join(traces: Iterable[Trace], *, renumber: bool = False) -> Trace:
    """Traces of different samples in one, with the labels that all have: several generations, say.

    The meta is the first one's, with the routing groups of all, or none where one of them tells none.

    Args:
        renumber: number the samples of all traces anew, from 0 and in their order; else every sample keeps its number, and
            no two traces may share one.

    Raises:
        ValueError: they share a sample, are of other layers or another number of experts, or one's drops are none of another's: they
            have other capacities, or an experiment left out the second choices of some.
    """
    if not is_many(traces):
        raise ValueError(f"traces={shown(traces)}: expected traces, from any iterable")
    traces = [check(f"traces[{number}]", trace, TRACE) for number, trace in enumerate(traces)]
    if not traces:
        raise ValueError("there are no traces to join; expected at least one")
    for name in ("layers", "num_experts", "top_k"):
        found = {getattr(trace, name) for trace in traces}
        if len(found) != 1:
            raise ValueError(
                f"the traces' {name} differ: {sorted(found)}; expected traces of one model and its same layers"
            )
    first = traces[0]
    for name, read in WHAT_DROPS.items() if first.layers else ():
        found = [read(trace) for trace in traces]
        if other := [one for one in found if one != found[0]]:
            raise ValueError(
                f"the traces' {name} differs: {shown(found[0])} and {shown(other[0])}; expected traces with the same, as the meta of "
                "one tells what is a drop: measure them one by one"
            )
    if renumber:
        traces = _renumbered(traces)
    samples = [set(np.unique(trace.sample).tolist()) for trace in traces]
    if sum(map(len, samples)) > len(set().union(*samples)):
        raise ValueError(
            "two of the traces have a sample in common; expected each sample in one trace: join with renumber=True"
        )
    parts = [{name: getattr(t, name) for name in ARRAYS} for t in traces]
    full = tuple(layer for layer in first.full if all(layer in t.full for t in traces))
    for part, trace in zip(parts, traces, strict=True):
        part |= {f"full.{layer}": trace.full[layer] for layer in full}
    collector = Collector(Options(first.layers, full))
    collector.add(parts)
    order = np.lexsort(
        [np.concatenate([getattr(t, name) for t in traces]) for name in ("position", "sample")]
    )
    shared = [name for name in first.labels if all(name in t.labels for t in traces)]
    labels = {name: np.concatenate([t.labels[name] for t in traces])[order] for name in shared}
    meta = first.meta | {"groups": _groups(traces)} if len(traces) > 1 else first.meta
    return replace(collector.trace(first.num_experts, meta), labels=labels)


def _groups(traces: list[Trace]) -> list[list[int]]:
    """The routing groups of all traces, as :func:`moekit.handle.describe_run` has them; none where a trace tells none."""
    told = [trace.meta.get("groups") for trace in traces]
    number = Counter()
    for *shape, count in chain.from_iterable(told) if all(told) else ():
        number[tuple(shape)] += count
    return [[*shape, count] for shape, count in sorted(number.items())]


def _renumbered(traces: list[Trace]) -> list[Trace]:
    """The same traces with samples 0, 1, ... that no two of them share."""
    found, start = [], 0
    for trace in traces:
        numbers, sample = np.unique(trace.sample, return_inverse=True)
        found.append(replace(trace, sample=(sample + start).astype(np.int32)))
        start += len(numbers)
    return found
