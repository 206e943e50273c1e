"""From features to log-probabilities, a limited number of rows of logits at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.nn.transformer import Pass, Transformer

# Rows of logits that exist at a time: never tokens x dictionary, and on the CPU what its caches hold.
LOGIT_ROWS = {"cpu": 256, "cuda": 2048}


def scored(model: Transformer, asked: Pass, vocab: int, tokens: Tensor, targets: Tensor) -> Tensor:
    """[B, T] tokens and targets -> float32 [B, T] natural log-probabilities."""
    return log_probs(model, model(tokens, asked), targets, vocab)


def predictions(model: Transformer, features: Tensor, vocab: int) -> Tensor:
    """[B, T, D] features -> [B, T] int64, the most probable next tokens of ``vocab`` types."""
    parts = [model.logits(rows, vocab).argmax(dim=-1) for rows in _pieces(features)]
    return torch.cat(parts).view(features.shape[:2])


def log_probs(model: Transformer, features: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """[B, T, D] features and [B, T] targets -> float32 [B, T] natural log-probabilities, over ``vocab`` types."""
    of = target_log_probs
    if model.backend == "triton":
        from moekit.nn.kernels.logprobs import target_log_probs as of
    parts = [
        of(model.logits(rows, vocab), wanted)
        for rows, wanted in zip(_pieces(features), _pieces(targets), strict=True)
    ]
    return torch.cat(parts).view_as(targets)


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """[B, T, ...] -> [N, ...] pieces, as many rows as there may be logits of."""
    return rows.flatten(0, 1).split(LOGIT_ROWS.get(rows.device.type, 2048))


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits and [N] targets -> [N] float32 natural log-probabilities."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")
