"""The floating-point operations that a model takes for one token."""

from __future__ import annotations

from moekit.nn.config import ModelConfig
from moekit.nn.gates import top_k_of


def flop_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations per token for scoring a sample of ``length`` tokens without dropped tokens.

    Each parameter that processes the token takes two operations (a product and a sum): projections, feed-forward networks
    or K experts and their gate, and the output matrix. Each of the (length + 1) / 2 positions that the token attends to
    on average takes 4 ``dim`` operations: a dot product of queries and keys, and a sum of values. A training step takes
    three times as many, since the gradients of the inputs and those of the weights take as many again (Narayanan et al. 2021,
    arXiv 2104.04473, section 5.1).
    """
    attention = 4 * config.dim**2 + 2 * config.dim * (length + 1) / 2
    expert = top_k_of(config) * 2 * config.dim * config.ffn_dim + config.dim * config.experts
    feed_forward = sum(
        expert if config.is_moe(layer) else 2 * config.dim * config.dense_dim(layer)
        for layer in range(config.layers)
    )
    bridges = sum(
        config.dim * outer for outer in (config.input_dim, config.output_dim) if outer != config.dim
    )
    return 2 * (config.layers * attention + feed_forward + bridges + config.output_dim * config.vocab_rows)
