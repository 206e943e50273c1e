"""CUDA graphs of work that is repeated: hundreds of small kernels, launched with one call.

Launching them one by one takes Python some 10 to 40 us each, which is longer than many of them run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.gates import gate_of
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer

# Runs before the capture: at the first one libraries allocate and Triton compiles.
WARM_UP = 2
# Times that the same work is done before a capture pays off.
AFTER = 4
# Tokens in a pass worth capturing. With more, the kernels take longer than their launches.
MOST_TOKENS = 16_384


def few(model: Transformer, rows: int, world_size: int) -> bool:
    """Whether passes in which each rank brings ``rows`` rows at most are worth capturing.

    An exchange that pads (dispatch.py) moves the rows of all ranks to each of them, so they count together there.
    """
    return rows * (1 if model.dispatch.by_expectation else world_size) <= MOST_TOKENS


def fits(model: Transformer, asked: Pass) -> bool:
    """Whether a pass runs on the device alone, with the same kernels every time, so that it can be captured.

    With several ranks it needs to know how many rows to expect, see :attr:`moekit.nn.passes.Pass.rows_expected`, and all ranks
    capture at the same time: a capture runs the work several times.
    """
    draws = gate_of(model.config).draws
    on_gpu = model.embed.weight.is_cuda and model.backend == "triton"
    plain = asked.record is None and asked.edit is None and asked.padding is None
    return on_gpu and plain and not draws


@functools.lru_cache
def capturing(device: int) -> torch.cuda.Stream:
    """The one stream for captures: libraries keep a workspace for every stream that they have seen, for good."""
    return torch.cuda.Stream(device)


class Graph:
    """``work`` on tensors of the shapes of ``inputs``; all other tensors that it uses must stay where they are."""

    def __init__(self, work: Callable[..., Tensor | None], *inputs: Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]
        aside = capturing(torch.cuda.current_device())
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                work(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Libraries have their workspaces on the stream of the warm-up; other threads may go on allocating.
        with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
            self.output = work(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """What ``work`` returns, which the next call overwrites."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output


class Repeated:
    """Work as it comes, and a graph of it once the same has come :data:`AFTER` times in a row.

    If a graph does not fit into memory, a single rank (``alone``) carries on without one; with several ranks the error
    is raised, because all must capture or none.
    """

    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.key: Hashable = None
        self.times: float = 0
        self.graph: Graph | None = None

    def __call__(self, key: Hashable, work: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``work(*inputs)``; ``key`` tells everything that makes one work another."""
        if key != self.key:
            self.key, self.times, self.graph = key, 0, None
        self.times += 1
        if self.times <= AFTER:
            return work(*inputs)
        if self.graph is None:
            try:
                self.graph = Graph(work, *inputs)
            except torch.OutOfMemoryError:
                # A graph has memory of its own.
                if not self.alone:
                    raise
                self.times = -math.inf
                return work(*inputs)
        return self.graph(*inputs).clone()


def of_step(model: Transformer, cache: Cache, vocab: int, rows_expected: int | None) -> Graph:
    """Each of B sequences reads a token, [B] int64: logits [B, V] of what follows, while ``cache`` stays as it is.

    With several ranks a collective, also where B is 0, which gives None; ``rows_expected`` as in :class:`Pass`.
    """

    def step(read: Tensor) -> Tensor | None:
        # It writes to the cache behind what is there and counts nothing as read, so that repeating it does no harm.
        asked = Pass(groups=len(read), cache=cache, rows_expected=rows_expected)
        return model.operations.read_on(model, read, asked, vocab)

    return Graph(step, torch.zeros(len(cache.lengths), dtype=torch.long, device=cache.lengths.device))
