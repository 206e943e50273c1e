"""How the next token is chosen from logits: the best, a draw, or the candidates of a beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit.nn.gate import Routing
from moekit.nn.intervene import Intervention
from moekit.nn.noise import uniform
from moekit.nn.record import Options
from moekit.symbols import EOS, PAD


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen; the meaning of each is told by :func:`moekit.generation.run.generate`.

    Attributes:
        vocab: types of the dictionary; nothing beyond it is chosen.
        intervention: what :meth:`moekit.api.Model.route` changes; its samples are the sequences' numbers.
        record: handed to every forward pass, see :class:`moekit.nn.passes.Pass`. Its routing groups are the sequences.
        trace: what :func:`end` returns of the routing, in place of ``record``.
    """

    vocab: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    beam_size: int = 1
    seed: int = 1
    alternatives: int = 0
    fraction: float | None = None
    intervention: Intervention | None = None
    record: Callable[[int, Routing], None] | None = None
    trace: Options | None = None

    @property
    def greedy(self) -> bool:
        """The best token by the model's own probabilities, and nothing else is asked for."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.alternatives == 0


class Chosen(NamedTuple):
    """The next tokens of each sequence: tensors [B] of one step on a rank's device, or arrays [B, S] of S on the host.

    tokens int64; logprobs float32, under the model itself, whatever temperature and penalty; best, the
    ``alternatives`` best tokens at each position, with one dimension more; and their best_logprobs.
    """

    tokens: Tensor | np.ndarray
    logprobs: Tensor | np.ndarray
    best: Tensor | np.ndarray
    best_logprobs: Tensor | np.ndarray


class Candidates(NamedTuple):
    """What each prompt's beams may go on with, best first.

    scores [P, 2 N] float32, summed over the whole sequence; tokens [P, 2 N]; beams [P, 2 N], which of the prompt's
    beams it goes on from; logprobs [P, 2 N], of the token alone.
    """

    scores: np.ndarray
    tokens: np.ndarray
    beams: np.ndarray
    logprobs: np.ndarray


def on_host(steps: Sequence[Chosen]) -> Chosen:
    """Steps on the device, one after the other, as one on the host."""
    return Chosen(*(torch.stack(column, dim=1).cpu().numpy() for column in zip(*steps, strict=True)))


def choose(
    logits: Tensor, settings: Settings, keys: Sequence[tuple[int, int, int]], seen: Tensor | None = None
) -> Tensor:
    """The next token of each sequence: the best, or one drawn at random. Padding is never chosen.

    Args:
        logits: [B, V] float32.
        keys: (seed, sequence, step) of each row: its randomness depends on nothing else.
        seen: [B, V] bool, what the repetition penalty is for.

    Returns:
        [B] int64.
    """
    logits = logits.double() if settings.temperature > 0 else logits.clone()
    logits[:, PAD] = -torch.inf
    if seen is not None:
        # CTRL, arXiv 1909.05858, section 4.1, as transformers does it for negative logits.
        punished = torch.where(
            logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty
        )
        logits = torch.where(seen, punished, logits)
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if settings.top_k is not None or settings.top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        out = torch.zeros_like(ordered, dtype=torch.bool)
        if settings.top_k is not None:
            out[:, settings.top_k :] = True
            ordered = ordered.masked_fill(out, -torch.inf)
        if settings.top_p is not None:
            # The smallest set that has top_p (nucleus, arXiv 1904.09751).
            probs = ordered.softmax(dim=-1)
            out |= probs.cumsum(dim=-1) - probs >= settings.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    # The largest of logits plus Gumbel noise is a sample of their softmax. Unlike a walk along the summed
    # probabilities, it changes only if two sums of logit and noise are within the rounding error of one another.
    noise = uniform(keys, logits.shape[1], logits.device)
    return (logits - torch.log(-torch.log(noise))).argmax(dim=-1)


def candidates(
    logprobs: Tensor, scores: Tensor, beams: int, count: int, no_end: list[bool] | None, only_end: bool
) -> Candidates:
    """The best ``count`` ways for each prompt's beams to go on.

    Args:
        logprobs: [B, V], the ``beams`` beams of each prompt one below the other.
        scores: [B], of the beams so far.
        no_end: [B], whether the sequence may not end here: an empty prompt does not, in fairseq.
        only_end: nothing but ``</s>`` may follow.
    """
    logprobs = logprobs.clone()
    logprobs[:, PAD] = -torch.inf
    if no_end is not None:
        logprobs[torch.tensor(no_end, device=logprobs.device), EOS] = -torch.inf
    if only_end:
        logprobs[:, :EOS] = -torch.inf
        logprobs[:, EOS + 1 :] = -torch.inf
    vocab = logprobs.shape[1]
    best = (logprobs + scores[:, None]).view(-1, beams * vocab).topk(count, dim=1)
    own = logprobs.view(-1, beams * vocab).gather(1, best.indices)
    found = (best.values, best.indices % vocab, best.indices // vocab, own)
    return Candidates(*(tensor.cpu().numpy() for tensor in found))
