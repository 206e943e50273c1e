"""From features to log-probabilities, a limited number of rows of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.nn.parts import is_part
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer

# Rows of logits in memory at a time: all tokens at once would be too many, and a CPU is fast while they fit its caches.
LOGIT_ROWS = {"cpu": 256, "cuda": 2048, "meta": 2048}


def scored(model: Transformer, asked: Pass, vocab: int, tokens: Tensor, targets: Tensor) -> Tensor:
    """[B, T] tokens and targets -> float32 [B, T] natural log-probabilities."""
    return log_probs(model, model(tokens, asked), targets, vocab)


def predictions(model: Transformer, features: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """[B, T, D] features -> [B, T] int64, the most probable next tokens of ``vocab`` types, and [B, T] float32, the entropies
    of the distributions over them, in nats."""
    best, entropies = [], []
    for rows in _pieces(features):
        logits = model.logits(rows, vocab)
        best.append(logits.argmax(dim=-1))
        entropies.append(torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1))
    return torch.cat(best).view(features.shape[:2]), torch.cat(entropies).view(features.shape[:2])


@is_part("log-probabilities")
def log_probs(model: Transformer, features: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """[B, T, D] features and [B, T] targets -> float32 [B, T] natural log-probabilities, over ``vocab`` types."""
    piece = LOGIT_ROWS[features.device.type]
    found = model.operations.log_probs(model, features.flatten(0, 1), targets.flatten(), vocab, piece)
    return found.view_as(targets)


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """[B, T, ...] -> [N, ...] pieces, as many rows as there may be logits of."""
    return rows.flatten(0, 1).split(LOGIT_ROWS[rows.device.type])
