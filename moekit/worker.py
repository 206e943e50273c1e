"""What runs on a rank: put the model there, score batches with it. Nothing here knows of notebooks or of fairseq.

Each function takes the :class:`moekit.ranks.Rank` it runs on first and is called through ``Ranks.call``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit import checkpoint
from moekit.batches import Batch
from moekit.config import PAD
from moekit.dispatch import AllToAll, owned
from moekit.intervene import Intervention
from moekit.model import Pass, Transformer
from moekit.ranks import Rank, usable_cores
from moekit.trace import Options, Recorder

LOGIT_ROWS = 2048  # rows of logits that exist at a time: never tokens x dictionary


def load(rank: Rank, plan: checkpoint.Plan, dtype: torch.dtype, kernel: str) -> dict:
    """Read this rank's part of the checkpoint into ``rank.state["model"]``; reports bytes as they are read.

    Returns:
        ``files`` and ``experts`` (a range) read; ``filled``, which counts the tensors copied by (layer, expert), and
        under None those of no expert; ``parameters`` and their ``bytes``; ``seconds``.
    """
    start = time.perf_counter()
    held = owned(plan.config.experts, rank.world_size, rank.rank)
    dispatch = AllToAll(plan.config.experts) if rank.world_size > 1 and plan.config.moe_layers else None
    with torch.device("meta"):
        model = Transformer(plan.config, len(held), dispatch)
    model = model.to(dtype).to_empty(device=rank.device).requires_grad_(False).eval().use(kernel)
    filled = checkpoint.fill(model, plan, held, rank.report, max(1, usable_cores() // rank.world_size))
    rank.state["model"] = model
    parameters = list(model.parameters())
    return {
        "rank": rank.rank,
        "device": str(rank.device),
        "kernel": model.kernel,
        "files": [s.path.name for s in plan.needed(held)],
        "experts": held,
        "filled": Counter(place.where for place, times in filled.items() for _ in range(times)),
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.nbytes for p in parameters),
        "seconds": time.perf_counter() - start,
    }


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
        the trace, for :class:`moekit.trace.Collector`.
    """
    model: Transformer = rank.state["model"]
    scores, parts = [], []
    for step in steps:
        mine = step[rank.rank :: rank.world_size]
        if not mine:
            model.serve()
            continue
        tokens = torch.from_numpy(np.concatenate([b.tokens for b in mine])).to(rank.device).long()
        targets = torch.from_numpy(np.concatenate([b.targets for b in mine])).to(rank.device).long()
        how = Pass(
            fraction=fraction,
            groups=len(mine),
            padding=tokens == PAD if mine[0].padded() else None,
            noise=Noise(seed, [b.index for b in mine]),
            record=None if trace is None else Recorder(trace),
        )
        samples = np.concatenate([b.ids for b in mine])
        if intervention is not None:
            positions = torch.arange(tokens.shape[1], device=rank.device)
            intervention.apply(how, torch.from_numpy(samples).to(rank.device), positions)
        features = model(tokens, how)
        found = log_probs(model, features, targets, vocab)
        scores += zip(
            [b.index for b in mine], found.cpu().numpy().reshape(len(mine), -1, tokens.shape[1]), strict=True
        )
        if trace is not None:
            predicted = predictions(model, features, vocab) if trace.predicted else None
            parts.append(trace_rows(how.record, samples, tokens, targets, found, predicted))
        rank.report(sum(int((b.targets != PAD).sum()) for b in mine))
    return scores, parts


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


def predictions(model: Transformer, features: Tensor, vocab: int) -> Tensor:
    """[B, T, D] features -> [B, T] int64, the most probable next tokens of ``vocab`` types."""
    rows = features.flatten(0, 1)
    parts = [
        model.logits(rows[i : i + LOGIT_ROWS], vocab).argmax(dim=-1) for i in range(0, len(rows), LOGIT_ROWS)
    ]
    return torch.cat(parts).view(features.shape[:2])


def log_probs(model: Transformer, features: Tensor, targets: Tensor, vocab: int) -> Tensor:
    """[B, T, D] features and [B, T] targets -> float32 [B, T] natural log-probabilities, over ``vocab`` types."""
    rows, wanted = features.flatten(0, 1), targets.flatten()
    of = target_log_probs
    if model.kernel == "triton":
        from moekit.kernels.logprobs import target_log_probs as of
    parts = [
        of(model.logits(rows[i : i + LOGIT_ROWS], vocab), wanted[i : i + LOGIT_ROWS])
        for i in range(0, len(rows), LOGIT_ROWS)
    ]
    return torch.cat(parts).view_as(targets)


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits and [N] targets -> [N] float32 natural log-probabilities."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


class Noise:
    """The randomness of the second expert, by seed, batch and layer: the same on any device and at any world size."""

    def __init__(self, seed: int, batches: Sequence[int]):
        self.seed, self.batches = seed, batches

    def __call__(self, layer: int, kind: str, like: Tensor) -> Tensor:
        """``kind`` "uniform" in [0, 1) or "gumbel": float32 of the shape [G, ...] and on the device of ``like``."""
        drawn = torch.empty(like.shape)
        for group, batch in zip(drawn, self.batches, strict=True):
            mixed = np.random.SeedSequence([self.seed, batch, layer]).generate_state(1, np.uint64)[0]
            group.uniform_(generator=torch.Generator().manual_seed(int(mixed >> np.uint64(1))))
        if kind == "gumbel":
            drawn = -torch.log(-torch.log(drawn.clamp(min=torch.finfo(drawn.dtype).tiny)))
        return drawn.to(like.device)
