"""The choice of the next token from logits: the best token, a random draw, or the candidates of a beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit.nn.intervene import Intervention
from moekit.nn.noise import uniform
from moekit.nn.record import Options
from moekit.symbols import EOS, PAD
from moekit.worker.listener import Listener

# A lower temperature chooses as this one does, and over it several logits would be infinite alike.
COLDEST = 1e-250


@dataclass(frozen=True)
class Settings:
    """The settings of the choice; :func:`moekit.generation.run.generate` explains each of them.

    Attributes:
        vocab: types of the dictionary; only ids below this number are chosen.
        intervention: the change of the routing by :meth:`moekit.api.Model.route`; its samples are the sequences' numbers.
        record: passed to every forward pass (:class:`moekit.nn.passes.Pass`). Its routing groups are the sequences.
        trace: the options of the trace whose parts :func:`moekit.worker.decoding.end` returns.
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
    record: Listener | None = None
    trace: Options | None = None

    @property
    def greedy(self) -> bool:
        """Whether each token is the best one by the model's probabilities, and no other setting matters."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.alternatives == 0


class Chosen(NamedTuple):
    """The next tokens of each sequence: tensors [B] of one step on a rank's device, or arrays [B, S] of S steps on the host.

    ``tokens`` are int64. ``logprobs`` are float32, under the model without temperature and penalty. ``best`` are the
    ``alternatives`` best tokens at each position, with one more dimension, and ``best_logprobs`` their log-probabilities.
    """

    tokens: Tensor | np.ndarray
    logprobs: Tensor | np.ndarray
    best: Tensor | np.ndarray
    best_logprobs: Tensor | np.ndarray

    def only(self, rows: np.ndarray) -> Chosen:
        """Some of the rows."""
        return Chosen(*(column[rows] for column in self))


class Candidates(NamedTuple):
    """The best candidates to continue the beams of each prompt, best first.

    ``scores`` [P, 2 N] float32 are sums over the whole sequence. ``tokens`` are [P, 2 N]. ``beams`` [P, 2 N] tells which
    beam of the prompt a candidate continues. ``logprobs`` [P, 2 N] are those of the token alone. ``finite`` [P] tells whether
    the model gave numbers for all beams of the prompt.
    """

    scores: np.ndarray
    tokens: np.ndarray
    beams: np.ndarray
    logprobs: np.ndarray
    finite: np.ndarray


def choose(
    logits: Tensor, settings: Settings, keys: Sequence[tuple[int, int, int]], seen: Tensor | None = None
) -> Tensor:
    """The next token of each sequence: the best one, or one drawn at random. Padding is never chosen.

    Args:
        logits: [B, V] float32.
        keys: (seed, sequence, step) of each row; the random numbers depend only on these.
        seen: [B, V] bool, the tokens to which the repetition penalty applies.

    Returns:
        [B] int64, the chosen tokens.
    """
    logits = logits.double() if settings.temperature > 0 else logits.clone()
    logits[:, PAD] = -torch.inf
    if seen is not None:
        # The penalty is from CTRL (arXiv 1909.05858, section 4.1), with transformers' rule for negative logits.
        punished = torch.where(
            logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty
        )
        logits = torch.where(seen, punished, logits)
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / max(settings.temperature, COLDEST)
    if settings.top_k is not None or settings.top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        out = torch.zeros_like(ordered, dtype=torch.bool)
        if settings.top_k is not None:
            out[:, settings.top_k :] = True
            ordered = ordered.masked_fill(out, -torch.inf)
        if settings.top_p is not None:
            # The nucleus (arXiv 1904.09751) is the smallest set of tokens with a probability of at least top_p.
            probs = ordered.softmax(dim=-1)
            out |= probs.cumsum(dim=-1) - probs >= settings.top_p
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    # The token with the largest sum of logit and Gumbel noise is a sample of the softmax. Unlike a draw from cumulative
    # probabilities, it changes only if two sums of logit and noise are within the rounding error of one another.
    noise = uniform(keys, logits.shape[1], logits.device)
    return (logits - torch.log(-torch.log(noise))).argmax(dim=-1)


def candidates(
    logprobs: Tensor, scores: Tensor, beams: int, count: int, no_end: list[bool] | None, only_end: bool
) -> Candidates:
    """The best ``count`` candidates to continue the beams of each prompt.

    Args:
        logprobs: [B, V], with the ``beams`` beams of each prompt in successive rows.
        scores: [B], the scores of the beams so far.
        no_end: [B], whether ``</s>`` is excluded here; fairseq excludes it after an empty prompt.
        only_end: whether only ``</s>`` may follow.
    """
    vocab = logprobs.shape[1]
    total = logprobs + scores[:, None]
    finite = total.isfinite().view(-1, beams * vocab).all(dim=1)
    total[:, PAD] = -torch.inf
    if no_end is not None:
        total[torch.tensor(no_end, device=total.device), EOS] = -torch.inf
    if only_end:
        total[:, :EOS] = -torch.inf
        total[:, EOS + 1 :] = -torch.inf
    total = total.view(-1, beams * vocab)
    if bool(finite.all()):
        indices = total.topk(count, dim=1).indices
    else:
        # As in fairseq, what is not a number comes after all numbers; what is excluded comes last. Equals keep their order.
        rank = total.masked_fill(total.isnan(), torch.finfo(total.dtype).min)
        indices = rank.sort(dim=1, descending=True, stable=True).indices[:, :count]
    own = logprobs.view(-1, beams * vocab).gather(1, indices)
    found = (total.gather(1, indices), indices % vocab, indices // vocab, own, finite)
    return Candidates(*(tensor.cpu().numpy() for tensor in found))
