"""What the steps of a call choose, on its way from the device to the driver.

Shape letters: B sequences, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moekit.nn.copies import Copy
from moekit.nn.transformer import Transformer
from moekit.worker.greedy import Greedy
from moekit.worker.sampling import Chosen


class Found:
    """Successive steps that the driver has not been told of."""

    def __init__(self) -> None:
        self.steps: list[Chosen] = []
        self.graph: Greedy | None = None
        # Steps of the graph that are still on the device.
        self.made = 0
        # What is on its way: each call waits for it and gives arrays.
        self.parts: list[Callable[[], Chosen]] = []

    def add(self, chosen: Chosen) -> Tensor:
        """Take a step's choice; returns its tokens."""
        self._send_words()
        self.steps.append(chosen)
        return chosen.tokens

    def step(self, graph: Greedy, read: Tensor) -> Tensor:
        """Make a step with ``graph`` after the tokens ``read`` [B]; returns its tokens."""
        if self.made == len(graph.words):
            self._send_words()
        self.graph, self.made = graph, self.made + 1
        return graph(read)

    def told(self, model: Transformer) -> Chosen | None:
        """All steps so far as arrays [B, S], which are then left out; None where there are none. It waits for the device."""
        self._send_steps()
        self._send_words()
        parts, self.parts = self.parts, []
        model.operations.check(model)
        if not parts:
            return None
        arrays = [part() for part in parts]
        if len(arrays) == 1:
            return arrays[0]
        return Chosen(*(np.concatenate(column, axis=1) for column in zip(*arrays, strict=True)))

    def _send_steps(self) -> None:
        if self.steps:
            copies = [Copy(_stacked(column)) for column in zip(*self.steps, strict=True)]
            self.steps = []
            self.parts.append(partial(_arrays, copies))

    def _send_words(self) -> None:
        if self.made:
            self._send_steps()
            words = self.graph.taken(self.made)
            self.made = 0
            if words.numel():
                self.parts.append(partial(_split, Copy(words)))


def _stacked(column: Sequence[Tensor]) -> Tensor:
    """Tensors of successive steps as one, [B, S, ...]."""
    first = column[0]
    if first.numel():
        return torch.stack(column, dim=1)
    # Without alternatives there is nothing to stack or to copy, and hundreds of empty tensors would take as long as others.
    return torch.empty(len(first), len(column), *first.shape[1:], dtype=first.dtype)


def _arrays(copies: list[Copy]) -> Chosen:
    return Chosen(*(copy.array() for copy in copies))


def _split(words: Copy) -> Chosen:
    """The tokens and log-probabilities in words [S, B] of :func:`moekit.nn.operations.feed_back`; there are no others."""
    numbers = words.array().T
    logprobs = (numbers & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    nothing = (*numbers.shape, 0)
    return Chosen(numbers >> 32, logprobs, np.empty(nothing, np.int64), np.empty(nothing, np.float32))
