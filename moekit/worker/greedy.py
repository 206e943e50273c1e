"""Greedy decode steps that are one graph each: a step ends with the choice of the token that the next step reads.

The host launches graphs and nothing else. What they choose stays on the device until the host asks for it.

Shape letters: B sequences, R steps that have room, V dictionary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.nn import graphs
from moekit.nn.cache import Cache
from moekit.nn.parts import is_part
from moekit.nn.transformer import Transformer

# Steps whose choices have room on the device.
ROOM = 128


class Greedy:
    """A graph of a step, on ``cache``.

    The graph counts the tokens in the cache by itself. The cache's own lengths stay what they were before the first step until
    :meth:`taken`, so a call that fails in between leaves nothing behind.

    Attributes:
        words: [R, B] int64, as :func:`moekit.nn.operations.feed_back` has them.
    """

    def __init__(self, model: Transformer, cache: Cache, vocab: int, rows_expected: int | None):
        self.cache = cache
        own = cache.counting(cache.lengths.clone())
        words = torch.zeros(ROOM, len(own.lengths), dtype=torch.long, device=own.lengths.device)
        self.lengths, self.words = own.lengths, words

        # It knows nothing of ``self``: a cycle would be freed by the collector, which may come in the middle of a capture.
        @is_part("sampling")
        def feed_back(read: Tensor, logits: Tensor) -> None:
            model.operations.feed_back(logits, read, own.lengths, cache.lengths, words, own.slots)

        self.graph = graphs.of_step(model, own, vocab, rows_expected, feed_back)

    def __call__(self, read: Tensor, first: bool) -> Tensor:
        """Make a step, at most R of them before :meth:`taken`.

        Args:
            read: [B] int64, the tokens.
            first: whether the cache has changed since the last step.

        Returns:
            [B] int64, the next tokens; the next step overwrites them, and takes them over without a copy.
        """
        if first:
            self.lengths.copy_(self.cache.lengths)
        self.graph(read)
        return self.graph.inputs[0]

    def taken(self, steps: int) -> Tensor:
        """[steps, B] words of the ``steps`` steps since the first one, which are in the cache from now on."""
        self.cache.advance(steps)
        words = self.words[:steps]
        # A copy from the device is made before the next step writes there.
        return words if words.is_cuda else words.clone()
