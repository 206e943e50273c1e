"""How much memory a model takes, from its config alone: its weights, its experts, a pass, and keys and values.

A pass is counted at its largest moment. What lives then can be read off the modules: while a layer computes, its caller
still holds the layer's input and what is pending with it.

Shape letters: N tokens of a pass, D model dim, F width of a feed-forward network, E experts in all, K choices a token,
V types, T slots of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moekit.nn.cache import slots_for
from moekit.nn.config import ModelConfig
from moekit.nn.gates import top_k_of
from moekit.nn.logprobs import LOGIT_ROWS
from moekit.nn.resident import ROUND
from moekit.nn.slots import CHUNK
from moekit.nn.transformer import parameters

# The type of each index and of a token.
INDEX = 8
# Tokens in a forward pass that scores; more tokens do not increase the speed.
TOKENS_A_PASS = {"cpu": 4096, "cuda": 65_536}


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a model.

    Attributes:
        dtype: of what is computed, and of the weights but for those below.
        one_byte: whether the experts' matrices have numbers of one byte, with a float32 scale for each row.
    """

    config: ModelConfig
    dtype: torch.dtype
    one_byte: bool = False

    @property
    def layers(self) -> int:
        """The layers with experts."""
        return len(self.config.moe_layers)

    @property
    def shared(self) -> int:
        """All weights but those of the experts."""
        return parameters(self.config, 0) * self.dtype.itemsize

    @property
    def expert(self) -> int:
        """One expert of a layer."""
        c, rows = self.config, self.config.dim + self.config.ffn_dim
        matrices = 2 * c.dim * c.ffn_dim * (1 if self.one_byte else self.dtype.itemsize)
        return matrices + rows * self.dtype.itemsize + (4 * rows if self.one_byte else 0)

    def cache(self, sequences: int, tokens: int) -> int:
        """Keys and values of sequences of up to ``tokens`` tokens each."""
        return 2 * self.config.layers * sequences * slots_for(tokens) * self.config.dim * self.dtype.itemsize

    def workspace(self, tokens: int, vocab: int, backend: str, device: str, resident: float = 1.0) -> int:
        """The most that a scoring pass over ``tokens`` tokens has in memory beside weights.

        Args:
            vocab: V, types of the dictionary.
            device: "cpu" or "cuda".
            resident: the share of a layer's experts on the device. With less than 1, they compute in rounds
                (:mod:`moekit.nn.resident`), whose sizes are those of an even load, and a quarter more.
        """
        c, s, triton = self.config, self.dtype.itemsize, backend == "triton"
        stream = tokens * c.dim * s
        choices = tokens * top_k_of(c) if c.moe_layers else 0
        probs = tokens * c.experts * (4 if c.gate_fp32 else s)
        moments = [0]
        pending = 0
        for layer in range(c.layers):
            # The layer's input, what is pending with it, their sum, and its norm.
            held = 3 * stream + pending
            # Queries, keys and values; what attention makes of them, and its output.
            moments.append(held + 5 * stream)
            if c.is_moe(layer):
                logits = tokens * c.experts * s
                moments.append(held + logits + probs + (0 if triton else 2 * tokens * c.experts * 4))
                moments.append(held + probs + self._experts(choices, backend, resident))
                pending = choices * c.dim * s
            else:
                moments.append(held + 2 * tokens * c.dense_dim(layer) * s)
                pending = stream
        rows = min(tokens, LOGIT_ROWS[device])
        # The plain log-probabilities are made of a float32 copy of the logits, and of their softmax.
        moments.append(stream + rows * vocab * (s if triton else s + 4 * (2 if s < 4 else 1)))
        # Tokens and targets.
        return max(moments) + 2 * INDEX * tokens

    def _experts(self, choices: int, backend: str, resident: float) -> int:
        """What the experts have in memory for ``choices`` choices, their output included."""
        each = self.dtype.itemsize
        rows, hidden = self.config.dim * each, self.config.ffn_dim * each
        index = 2 * INDEX + each
        # Beside the output: the hidden layer; or rows in the order of the experts, and two copies of what they make; or,
        # before there is an output, a product, its biases and their sum.
        work = {"triton": hidden, "loop": 3 * rows}.get(backend, 3 * hidden - rows)
        if resident >= 1:
            return choices * (rows + work + index)
        share = max(resident, CHUNK / self.config.experts)
        in_round = min(choices, ROUND, int(1.25 * share * choices))
        # A round has rows and outputs of its own.
        return choices * (rows + 2 * index) + in_round * (2 * rows + work + index)
