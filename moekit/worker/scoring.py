"""Score batches: log-probabilities of their targets, and what the router did."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moekit.batches import Batch
from moekit.nn import graphs as graph
from moekit.nn.config import PAD
from moekit.nn.dispatch import Local
from moekit.nn.intervene import Intervention
from moekit.nn.logprobs import log_probs, predictions, scored
from moekit.nn.noise import Noise
from moekit.nn.record import Options, Recorder
from moekit.nn.transformer import Pass, Transformer
from moekit.ranks import Rank


@torch.inference_mode()
def score(
    rank: Rank,
    steps: Sequence[Sequence[Batch]],
    *,
    fraction: float | None,
    vocab: int,
    seed: int,
    trace: Options | None = None,
    intervention: Intervention | None = None,
) -> tuple[list[tuple[int, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Log-probabilities of the targets of this rank's share of every step's batches.

    Args:
        steps: batches of one shape a step; rank r takes every W-th from r on, in one forward pass. A step with fewer
            batches than ranks leaves some with nothing but others' tokens to serve.
        vocab: types of the dictionary; the distribution is over these.
        seed: of the noise that some gates draw, together with the batch's index: alike at any world size.
        trace: what to record of the routing, if anything.
        intervention: what to change in the routing, if anything.

    Returns:
        (batch index, float32 [B, T]) pairs; what stands where a target is ``PAD`` means nothing. And the parts of
        the trace, for :class:`moekit.routing.trace.Collector`.
    """
    model: Transformer = rank.state["model"]
    scores: list[tuple[int, np.ndarray]] = []
    parts: list[dict[str, np.ndarray]] = []

    def collect(mine: Sequence[Batch], found: Tensor) -> None:
        found = found.cpu().numpy().reshape(len(mine), -1, found.shape[1])
        scores.extend(zip([b.index for b in mine], found, strict=True))
        rank.report(sum(int((b.targets != PAD).sum()) for b in mine))

    under_way = None  # a GPU works on a step while the host asks for the next
    for step in steps:
        mine = step[rank.rank :: rank.world_size]
        if not mine:
            rank.state.pop("repeated", None)  # as on the others
            model.serve()
            continue
        tokens = torch.from_numpy(np.concatenate([b.tokens for b in mine])).to(rank.device).long()
        targets = torch.from_numpy(np.concatenate([b.targets for b in mine])).to(rank.device).long()
        asked = Pass(
            fraction=fraction,
            groups=len(mine),
            noise=Noise(seed, [b.index for b in mine]),
            record=None if trace is None else Recorder(trace),
        )
        samples = np.concatenate([b.ids for b in mine])
        if intervention is not None:
            positions = torch.arange(tokens.shape[1], device=rank.device)
            intervention.apply(asked, torch.from_numpy(samples).to(rank.device), positions)
        if padding_matters(mine, asked.fraction):
            asked.padding = tokens == PAD
        # What follows has to be the same on every rank, so it depends on the whole step alone.
        most = -(-len(step) // rank.world_size) * mine[0].tokens.size
        few = most * rank.world_size <= graph.MOST_TOKENS and len(step) >= rank.world_size
        if few and graph.fits(model, asked) and not padding_matters(step, asked.fraction):
            key = tuple(mine[0].tokens.shape), len(step), asked.fraction, vocab
            repeated = rank.state.setdefault("repeated", graph.Repeated(isinstance(model.dispatch, Local)))
            with model.dispatch.expecting(most):
                found = repeated(key, functools.partial(scored, model, asked, vocab), tokens, targets)
        else:
            rank.state.pop("repeated", None)  # a large pass may need its memory
            features = model(tokens, asked)
            found = log_probs(model, features, targets, vocab)
        if under_way is not None:
            collect(*under_way)
        under_way = mine, found
        if trace is not None:
            predicted = predictions(model, features, vocab) if trace.predicted else None
            parts.append(trace_rows(asked.record, samples, tokens, targets, found, predicted))
    if under_way is not None:
        collect(*under_way)
    return scores, parts


def padding_matters(batches: Sequence[Batch], fraction: float | None) -> bool:
    """Whether a pass over ``batches``, all padded or none, has to be told which tokens are padding.

    Padding behind the text is what no token looks at, and where nobody is dropped it takes no one's place.
    """
    if not batches[0].padded():
        return False
    padding = np.concatenate([b.tokens for b in batches]) == PAD
    trailing = bool((np.diff(padding.astype(np.int8)) >= 0).all())
    return fraction is not None or not trailing


def trace_rows(
    recorder: Recorder,
    samples: np.ndarray,
    tokens: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    predicted: Tensor | None,
) -> dict[str, np.ndarray]:
    """What was recorded of one forward pass, with what is known of its tokens: a part of a trace without padding.

    Args:
        samples: [B] ids.
        tokens, targets, logprobs, predicted: [B, T] each.
    """
    real = tokens != PAD
    row, position = (index.cpu().numpy() for index in real.nonzero(as_tuple=True))
    target, logprob = targets[real], logprobs[real]
    return recorder.rows(real) | {
        "sample": samples[row],
        "position": position,
        "token": tokens[real].cpu().numpy(),
        "target": target.cpu().numpy(),
        "generated": np.zeros(len(row), dtype=bool),
        "logprob": logprob.masked_fill(target == PAD, float("nan")).cpu().numpy(),
        "predicted": np.full(len(row), -1) if predicted is None else predicted[real].cpu().numpy(),
    }
