"""Scoring of batches: log-probabilities of their targets, and the routing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from moekit.batches import Batch, Share, shares
from moekit.nn import graphs
from moekit.nn.config import ModelConfig
from moekit.nn.copies import Copy, on_device
from moekit.nn.dispatch import Local
from moekit.nn.intervene import Intervention
from moekit.nn.logprobs import log_probs, predictions, scored
from moekit.nn.noise import Noise
from moekit.nn.passes import Pass
from moekit.nn.record import LoadRecorder, Options, Recorder
from moekit.nn.transformer import Transformer
from moekit.ranks import Rank
from moekit.symbols import PAD
from moekit.worker.sequences import SPARE

T = TypeVar("T")

# Key of the rank's state for a :class:`~moekit.nn.graphs.Repeated`, while one exists.
GRAPH = "repeated"


class Scored(NamedTuple):
    """What comes of the batches of a rank.

    Attributes:
        scores: pairs (batch index, float32 [B, T] log-probabilities of its targets); values at targets that are ``PAD``
            are undefined.
        parts: those of the trace, for :class:`moekit.routing.trace.Collector`. Where loads are counted, a part has
            ``batch`` [G], the batches' indices, and ``fullest`` [G], ``made`` and ``dropped`` [G, B, T] of
            :class:`moekit.nn.record.LoadRecorder`.
    """

    scores: list[tuple[int, np.ndarray]]
    parts: list[dict[str, np.ndarray]]


class Found(NamedTuple):
    """What comes of a rank's n batches in a step: their indices, and ``logprobs`` [n, B, T] and ``parts`` of a :class:`Scored`."""

    indices: list[int]
    logprobs: np.ndarray
    parts: list[dict[str, np.ndarray]]


def score(rank: Rank, steps: Iterable[Share], **how: Any) -> None:
    """As :func:`scores_of`, for steps that come while the rank works: it reports what it has found of a step, a :class:`Found`."""
    with torch.inference_mode():
        for found in collected(rank, _launched(rank, steps, **how)):
            rank.report(found)


@torch.inference_mode()
def scores_of(rank: Rank, steps: Iterable[Share], **how: Any) -> Scored:
    """Log-probabilities of the targets of this rank's share of every step; the arguments are those of :func:`_launched`."""
    all_found: list[Found] = list(collected(rank, _launched(rank, steps, **how)))
    return Scored(
        [pair for found in all_found for pair in zip(found.indices, found.logprobs, strict=True)],
        [part for found in all_found for part in found.parts],
    )


def collected(rank: Rank, launched: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What the steps of a rank give, in their order. A GPU runs one step while the host launches the next one.

    Args:
        launched: launches a step when it is asked for one, and gives what waits for it and copies what it gives to the host.
    """
    under_way: Callable[[], T] | None = None
    for collect in launched:
        if under_way is not None:
            yield under_way()
        under_way = collect
    if under_way is not None:
        yield under_way()
    rank.state["model"].operations.check(rank.state["model"])


def _launched(
    rank: Rank,
    steps: Iterable[Share],
    *,
    fraction: float | None,
    vocab: int,
    seed: int,
    trace: Options | None = None,
    intervention: Intervention | None = None,
    loads: bool = False,
) -> Iterator[Callable[[], Found]]:
    """Launches this rank's share of each step, step by step, and gives what collects it.

    Args:
        steps: this rank's share of each step, which it runs in one forward pass. A rank without batches only runs its
            experts for the others.
        vocab: types of the dictionary; the distribution is over these.
        seed: the seed, combined with the batch's index, of the noise that some gates draw; it gives the same noise at
            any world size.
        trace: the options of a trace of the routing; None records nothing.
        intervention: a change of the routing; None changes nothing.
        loads: count what asks for a place, what finds none, and how full experts get; without ``trace``.
    """
    model: Transformer = rank.state["model"]
    plain = trace is None and intervention is None and not loads
    for step in steps:
        mine = step.batches
        captured = plain and worth_capturing(model, fraction, step, rank.world_size)
        if not captured:
            # A large pass may need the memory of the graph. The other ranks drop their graphs in the same step.
            rank.state.pop(GRAPH, None)
            rank.state.pop(SPARE, None)
        by_expectation = captured or model.dispatch.by_expectation
        rows_expected = step.rows(rank.world_size) if by_expectation else None
        if not mine:
            model.serve(rows_expected)
            continue
        if captured:
            found = repeated(rank, step, Pass(fraction, len(mine), rows_expected=rows_expected), vocab)
        else:
            inputs = Inputs.of(step.joined(), rank.device)
            asked = ask(model.config, step, inputs, fraction, seed, trace, intervention)
            asked.rows_expected = rows_expected
            if loads:
                asked.record = LoadRecorder()
            features = model(inputs.tokens, asked)
            found = log_probs(model, features, inputs.targets, vocab)
        parts: list[dict[str, np.ndarray]] = []
        # The lines below run when the next step is asked for; the step before this one is collected by then, and this one after them.
        yield functools.partial(_on_host, mine, Copy(found), parts)
        if trace is not None:
            told = predictions(model, features, vocab) if trace.predicted else None
            parts.append(trace_rows(asked.record, inputs, found, told))
        if loads:
            fullest, made, dropped = asked.record.counts(len(mine), mine[0].tokens.size)
            parts.append(
                {
                    "batch": np.array([batch.index for batch in mine]),
                    "fullest": fullest,
                    "made": made.reshape(len(mine), *mine[0].tokens.shape),
                    "dropped": dropped.reshape(len(mine), *mine[0].tokens.shape),
                }
            )


@torch.inference_mode()
def first_not_finite(
    rank: Rank,
    batch: Batch,
    *,
    fraction: float | None,
    vocab: int,
    seed: int,
    intervention: Intervention | None,
) -> str | None:
    """Run ``batch`` again, on rank 0, and name the first module whose output has NaN or infinity; None without any."""
    model: Transformer = rank.state["model"]
    if rank.rank > 0:
        return model.serve()
    names: list[str] = []

    def looks(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, _: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(bool(t.isfinite().all()) for t in tensors if t is not None):
                names.append(name)

        return hook

    hooks = [module.register_forward_hook(looks(name)) for name, module in _parts(model).items()]
    try:
        [share] = shares([batch], 1)
        inputs = Inputs.of(share.joined(), rank.device)
        asked = ask(model.config, share, inputs, fraction, seed, None, intervention)
        logits = model.logits(model(inputs.tokens, asked), vocab)
        if not names and not bool(logits.isfinite().all()):
            names.append("output matrix")
    finally:
        for hook in hooks:
            hook.remove()
    return names[0] if names else None


def weights_not_finite(rank: Rank, name: str) -> bool:
    """Whether this rank's weights of the module that :func:`first_not_finite` named have NaN or infinity."""
    module = _parts(rank.state["model"]).get(name)
    held = () if module is None else itertools.chain(module.parameters(), module.buffers())
    # A row of numbers of one byte that is not finite has such a scale.
    return any(not bool(t.isfinite().all()) for t in held if t.element_size() > 1)


def _parts(model: Transformer) -> dict[str, torch.nn.Module]:
    """The modules that :func:`first_not_finite` tells apart, by the names that a user reads."""
    kinds = {"attn": "attention", "ffn": "feed-forward network", "moe": "experts"}
    found = {
        f"{kind} of layer {number}": getattr(layer, name)
        for number, layer in enumerate(model.layers)
        for name, kind in kinds.items()
    }
    return {"embedding": model.embed} | {name: one for name, one in found.items() if one is not None}


class Inputs(NamedTuple):
    """Batches of one shape, one after the other: ids of the samples [B], tokens and targets [B, T] int64 on a device."""

    samples: np.ndarray
    tokens: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Inputs:
        return cls(batch.ids, *on_device(device, batch.tokens, batch.targets))


def ask(
    config: ModelConfig,
    step: Share,
    inputs: Inputs,
    fraction: float | None,
    seed: int,
    trace: Options | None,
    intervention: Intervention | None,
) -> Pass:
    """A pass over this rank's batches of ``step``, in which each batch is a routing group."""
    asked = Pass(
        fraction=fraction,
        groups=len(step.batches),
        noise=Noise(seed, [b.index for b in step.batches]),
        record=None if trace is None else Recorder(trace),
    )
    if intervention is not None:
        positions = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
        intervention.apply(asked, torch.from_numpy(inputs.samples).to(positions.device), positions)
    if step.padding_matters(config, asked.fraction):
        asked.padding = inputs.tokens == PAD
    return asked


def worth_capturing(model: Transformer, fraction: float | None, step: Share, world_size: int) -> bool:
    """Whether the ranks run passes like ``step``, from which nothing but scores is wanted, as a graph.

    The result has to be the same on all ranks, so it depends only on the whole step and on arguments that all ranks have.
    If a rank has no batches, the first condition is false on every rank.
    """
    return (
        step.count >= world_size
        and graphs.few(model, step.rows(world_size), world_size)
        and graphs.fits(model, Pass())
        and not step.padding_matters(model.config, fraction)
    )


def repeated(rank: Rank, step: Share, asked: Pass, vocab: int) -> Tensor:
    """Log-probabilities [B, T] of this rank's share of ``step``, with a graph after enough equal steps."""
    model: Transformer = rank.state["model"]
    kept = rank.state.setdefault(GRAPH, graphs.Repeated(rank.device, isinstance(model.dispatch, Local)))
    key = step.shape, step.count, asked.fraction, vocab
    whole = step.joined()
    return kept(key, functools.partial(scored, model, asked, vocab), whole.tokens, whole.targets)


def _on_host(batches: Sequence[Batch], found: Copy, parts: list[dict[str, np.ndarray]]) -> Found:
    """The batches' log-probabilities ``found``, of a tensor [B, T]."""
    logprobs = found.array()
    shaped = logprobs.reshape(len(batches), -1, logprobs.shape[1])
    return Found([batch.index for batch in batches], shaped, parts)


def trace_rows(
    recorder: Recorder, inputs: Inputs, logprobs: Tensor, told: tuple[Tensor, Tensor] | None
) -> dict[str, np.ndarray]:
    """The records of one forward pass, with columns on its tokens: a part of a trace, without padding.

    Args:
        logprobs: [B, T], the log-probabilities of the targets.
        told: what :func:`moekit.nn.logprobs.predictions` gives; None if it was not asked for.
    """
    real = inputs.tokens != PAD
    row, position = (index.cpu().numpy() for index in real.nonzero(as_tuple=True))
    target, logprob = inputs.targets[real], logprobs[real]
    return recorder.rows(real) | {
        "sample": inputs.samples[row],
        "position": position,
        "token": inputs.tokens[real].cpu().numpy(),
        "target": target.cpu().numpy(),
        "generated": np.zeros(len(row), dtype=bool),
        "logprob": logprob.masked_fill(target == PAD, float("nan")).cpu().numpy(),
        "predicted": np.full(len(row), -1) if told is None else told[0][real].cpu().numpy(),
        "output_entropy": np.full(len(row), np.nan) if told is None else told[1][real].cpu().numpy(),
    }
