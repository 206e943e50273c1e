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

    The graph has lengths of its own and counts on. Those of the cache stay what they were before the first step until
    :meth:`taken`, so a call that fails in between leaves nothing behind.

    Attributes:
        words: [R, B] int64, as :func:`moekit.nn.operations.feed_back` has them.
        tokens: [B] int64, what the next step reads.
    """

    def __init__(self, model: Transformer, cache: Cache, vocab: int, rows_expected: int | None):
        words = torch.zeros(ROOM, len(cache.lengths), dtype=torch.long, device=cache.lengths.device)
        # The runs before a capture may go beyond the end. They stay in the cache, and within the positions that the model has.
        config = model.config
        most = min(cache.slots, config.max_positions) if config.learned_positions else cache.slots

        # It knows nothing of ``self``: a cycle would be freed by the collector, which may come in the middle of a capture.
        @is_part("sampling")
        def feed_back(read: Tensor, lengths: Tensor, logits: Tensor) -> None:
            model.operations.feed_back(logits, read, lengths, cache.lengths, words, most)

        self.cache, self.words = cache, words
        self.graph = graphs.of_step(model, cache, vocab, rows_expected, feed_back)
        self.tokens, self.lengths = self.graph.inputs

    def __call__(self, read: Tensor) -> Tensor:
        """Make a step, at most R of them before :meth:`taken`.

        Args:
            read: [B] int64, the tokens. If they are :attr:`tokens`, the step goes on from the last one, and nothing is copied.

        Returns:
            The next tokens: :attr:`tokens`.
        """
        self.graph(read, self.lengths if read is self.tokens else self.cache.lengths)
        return self.tokens

    def taken(self, steps: int) -> Tensor:
        """[steps, B] words of the ``steps`` steps since the last ones taken, which are in the cache from now on."""
        self.cache.advance(steps)
        words = self.words[:steps]
        # A copy from the device is made before the next step writes there.
        return words if words.is_cuda else words.clone()
