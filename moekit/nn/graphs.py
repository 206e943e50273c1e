"""CUDA graphs of repeated work: one call launches hundreds of small kernels.

A launch from Python takes 10 to 40 us per kernel, which is longer than many kernels run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Hashable, Sequence
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.copies import Feed, on_device
from moekit.nn.gates import gate_of
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer

R = TypeVar("R")
# Runs before the capture: in the first run, libraries allocate memory and Triton compiles.
WARM_UP = 2
# Repetitions of the same work after which a capture pays off.
AFTER = 4
# The most tokens in a pass that is worth capturing. With more, the kernels take longer than their launches.
MOST_TOKENS = 16_384


def few(model: Transformer, rows: int, world_size: int) -> bool:
    """Whether passes in which each rank brings at most ``rows`` rows are worth capturing.

    An exchange that pads (dispatch.py) moves the rows of all ranks to each rank, so the rows of all ranks count there.
    """
    return rows * (1 if model.dispatch.by_expectation else world_size) <= MOST_TOKENS


def fits(model: Transformer, asked: Pass, sequences: int | None = None) -> bool:
    """Whether a pass can be captured: it runs on the device alone, with the same kernels every time.

    Where experts are fetched, the host takes part: only a decode step of some ``sequences`` is captured, in parts.

    With several ranks, the number of expected rows has to be known (:attr:`moekit.nn.passes.Pass.rows_expected`). All ranks
    capture at the same time, because a capture runs the work several times.
    """
    on_gpu = model.embed.weight.is_cuda and model.backend == "triton"
    plain = asked.record is None and asked.edit is None and asked.padding is None
    if not on_gpu or not plain:
        return False
    # A dense model's config names a gate all the same.
    gate = gate_of(model.config) if model.config.moe_layers else None
    repeats = gate is None or (gate.says("repeats") and not gate.draws)
    return repeats and (model.slots is None or _in_parts(model, sequences) is not None)


def _in_parts(model: Transformer, sequences: int | None) -> ModuleType | None:
    """The kernels of a decode step of so many sequences with experts that are fetched; None where it is not captured."""
    if sequences is None:
        return None
    # Triton is imported only if its back end is selected.
    from moekit.nn.kernels import batch_step, short_step

    return next((kernels for kernels in (short_step, batch_step) if kernels.fits(model, sequences)), None)


@functools.lru_cache
def capturing(device: int) -> torch.cuda.Stream:
    """The one stream for captures. It is reused, because libraries keep a workspace for every stream."""
    return torch.cuda.Stream(device)


class Graph:
    """A graph of ``work`` on ``inputs``, which the graph keeps; all other tensors in it must keep their addresses."""

    def __init__(self, work: Callable[..., Tensor | None], *inputs: Tensor):
        # A profiler runs the work outside of the graph, to learn which kernel belongs to which part.
        self.work = work
        self.inputs = list(inputs)
        aside = capturing(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                work(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # The libraries' workspaces belong to the stream of the warm-up. Other threads may allocate during the capture.
        with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
            self.output = work(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """Replay the graph. The next call overwrites the result."""
        _copy(self.inputs, inputs)
        self.graph.replay()
        return self.output


class InParts:
    """Graphs of work that the host interrupts: a generator that yields what the host has to do, and returns the output.

    The tensors that the host reads and writes keep their addresses, as those of a :class:`Graph` do.
    """

    def __init__(self, work: Callable[..., Generator[Callable[[], None], None, Tensor]], *inputs: Tensor):
        self.work = functools.partial(whole, work)
        self.inputs = list(inputs)
        aside = capturing(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                # Without the host's part the numbers mean nothing, and take as long.
                for _ in work(*self.inputs):
                    pass
        torch.cuda.current_stream().wait_stream(aside)
        self.parts: list[tuple[torch.cuda.CUDAGraph, Callable[[], None] | None]] = []
        memory, rest, asks = torch.cuda.graph_pool_handle(), work(*self.inputs), True
        while asks:
            graph, ask = torch.cuda.CUDAGraph(), None
            with torch.cuda.graph(graph, pool=memory, stream=aside, capture_error_mode="thread_local"):
                try:
                    ask = next(rest)
                except StopIteration as end:
                    self.output, asks = end.value, False
            self.parts.append((graph, ask))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Replay the graphs, with the host's part between them. The next call overwrites the result."""
        _copy(self.inputs, inputs)
        for graph, ask in self.parts:
            graph.replay()
            if ask is not None:
                ask()
        return self.output


def _copy(own: list[Tensor], given: Sequence[Tensor]) -> None:
    """Copy inputs to where a graph reads them, in one call: each takes the host as long as some kernels run.

    Of what stands there already nothing is copied.
    """
    assert len(own) == len(given), "a graph is given other inputs than at its capture"
    others = [pair for pair in zip(own, given, strict=True) if pair[0] is not pair[1]]
    if others:
        torch._foreach_copy_(*(list(side) for side in zip(*others, strict=True)))


def whole(work: Callable[..., Generator[Callable[[], None], None, R]], *inputs: Tensor) -> R:
    """Do all of ``work``, with the host's part of it."""
    parts = work(*inputs)
    while True:
        try:
            ask = next(parts)
        except StopIteration as end:
            return end.value
        ask()


class Repeated:
    """Runs work, and captures a graph of it when the same work has run :data:`AFTER` times in a row.

    If a graph does not fit into memory, a single rank (``alone``) goes on without a graph. With several ranks the error
    is raised, because either all ranks capture or none does.
    """

    def __init__(self, device: torch.device, alone: bool) -> None:
        self.device, self.alone = device, alone
        self.key: Hashable = None
        self.times: float = 0
        self.graph: Graph | None = None
        # The inputs of the graph.
        self.feed: Feed | None = None

    def __call__(self, key: Hashable, work: Callable[..., Tensor], *ids: np.ndarray) -> Tensor:
        """Return what ``work`` makes of ``ids`` on the device, which the next call may overwrite.

        Work with an equal ``key`` counts as the same.
        """
        if key != self.key:
            self.key, self.times, self.graph, self.feed = key, 0, None, None
        self.times += 1
        if self.times <= AFTER:
            return work(*on_device(self.device, *ids))
        if self.graph is None:
            feed = Feed(self.device, *(own.shape for own in ids))
            inputs = feed(*ids)
            try:
                self.graph, self.feed = Graph(work, *inputs), feed
            except torch.OutOfMemoryError:
                # The graph needs extra memory, so a run without it may still fit.
                if not self.alone:
                    raise
                self.times = -math.inf
                return work(*inputs)
            return self.graph(*inputs)
        return self.graph(*self.feed(*ids))


def of_step(
    model: Transformer,
    cache: Cache,
    vocab: int,
    rows_expected: int | None,
    end: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Graph | InParts:
    """A graph of a decode step: tokens [B] int64 -> logits [B, V] of the next token; ``cache`` does not advance.

    With several ranks it is a collective, also for a rank where B is 0, whose result is None. ``rows_expected`` is as in
    :class:`Pass`.

    Args:
        end: belongs to the step. It gets the tokens, the lengths [B] and the logits, where B is not 0. The lengths are an
            input of the graph then, in place of the cache's.
    """

    def of(lengths: tuple[Tensor, ...]) -> Cache:
        return cache.counting(*lengths) if lengths else cache

    def ended(read: Tensor, lengths: tuple[Tensor, ...], logits: Tensor | None) -> Tensor | None:
        if end is not None and logits is not None:
            end(read, *lengths, logits)
        return logits

    def step(read: Tensor, *lengths: Tensor) -> Tensor | None:
        # The step writes after the tokens in the cache and does not advance the cache, so a repetition changes nothing. With
        # ``end``, which may write to the inputs, repetitions go on from one another, and real steps write over what they wrote.
        asked = Pass(groups=len(read), cache=of(lengths), rows_expected=rows_expected)
        return ended(read, lengths, model.operations.read_on(model, read, asked, vocab))

    def in_parts(read: Tensor, *lengths: Tensor) -> Generator[Callable[[], None], None, Tensor]:
        logits = yield from kernels.in_parts(model, read, of(lengths), vocab, len(read))
        return ended(read, lengths, logits)

    inputs = [torch.zeros(len(cache.lengths), dtype=torch.long, device=cache.lengths.device)]
    if end is not None:
        inputs.append(cache.lengths.clone())
    if model.slots is None:
        return Graph(step, *inputs)
    kernels = _in_parts(model, len(cache.lengths))
    return InParts(in_parts, *inputs)
