"""Generation on a rank: it keeps sequences and their caches, runs decode steps, and proposes next tokens.

Every function runs the same number of forward passes on every rank, because a pass contains collectives. A rank without
sequences still runs its experts for the other ranks. The driver (moekit/generation) decides which sequences continue, and
with which tokens. A rank decides only on values that are the same on all ranks, such as when to capture a graph, so
these decisions need no communication.

Shape letters: B sequences of this rank, T tokens of the longest prompt, V dictionary, N beam size, P prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.nn import graphs
from moekit.nn.cache import Cache, slots_for
from moekit.nn.copies import on_device
from moekit.nn.logprobs import log_probs
from moekit.nn.noise import Noise
from moekit.nn.parts import is_part, part
from moekit.nn.passes import Pass
from moekit.nn.record import Recorder
from moekit.nn.transformer import Transformer
from moekit.ranks import Rank
from moekit.worker.found import Found
from moekit.worker.greedy import Greedy
from moekit.worker.prompts import Prompts, most_tokens
from moekit.worker.sampling import Candidates, Chosen, Settings, candidates, choose
from moekit.worker.sequences import SPARE, Sequences, Spare, take_spare

# Prompts are read with a graph up to half of the tokens that other passes with a graph may have: its memory is kept while
# sequences grow, and with more tokens launches take a small part of the time.
READ = 2


@torch.inference_mode()
def generate(
    rank: Rank,
    key: int,
    prompts: Prompts,
    settings: Settings,
    slots: int,
    new: int,
    bursts: Iterable[int],
    abandoned: Sequence[int] = (),
) -> tuple[Chosen | None, list[dict[str, np.ndarray]]]:
    """Generate ``new`` tokens of each sequence in one call, in which no sequence ends before the others.

    The other arguments are those of :func:`begin`. ``bursts`` are the numbers of tokens, from 1 on, that a sequence has after
    each burst, ``new`` being the last; where they end sooner, so does the generation. The rank reports the tokens of each burst
    but the last.

    Returns:
        The tokens of the last burst, None if it is not reached, and what :func:`end` returns.
    """
    model: Transformer = rank.state["model"]
    found = Found()
    try:
        chosen = _begin(rank, key, prompts, settings, slots, abandoned)
        read = torch.empty(0, dtype=torch.long, device=rank.device) if chosen is None else found.add(chosen)
        made = 1
        for goal in bursts:
            while made < goal:
                read = _step(model, rank.state[key], read, new - made, found)
                made += 1
            if goal < new and (told := found.told(model)) is not None:
                rank.report(told)
        last = found.told(model)
    finally:
        parts = end(rank, key)
    return last, parts


@torch.inference_mode()
def begin(
    rank: Rank, key: int, prompts: Prompts, settings: Settings, slots: int, abandoned: Sequence[int] = ()
) -> Chosen | Candidates | None:
    """Prefill the prompts and propose the next tokens; a rank without prompts returns None.

    Args:
        key: the key of this generation; several generations may be under way.
        slots: the number of tokens that the longest sequence will have.
        abandoned: keys of finished generations that could not be ended because the ranks were busy.

    With a capacity, each prompt has a separate forward pass, so that neither other tokens nor padding fill the buffers
    of its experts.
    """
    found = _begin(rank, key, prompts, settings, slots, abandoned)
    model: Transformer = rank.state["model"]
    if isinstance(found, Chosen):
        first = Found()
        first.add(found)
        return first.told(model)
    model.operations.check(model)
    return found


def _begin(
    rank: Rank, key: int, prompts: Prompts, settings: Settings, slots: int, abandoned: Sequence[int]
) -> Chosen | Candidates | None:
    """As :func:`begin`, with the next tokens still on the device."""
    for old in abandoned:
        end(rank, old)
    if settings.record is not None:
        settings.record.rank = rank
    model: Transformer = rank.state["model"]
    alone = settings.fraction is not None
    shapes = prompts.shapes(alone)
    on_ranks = list(map(len, prompts.on_ranks))
    alike = (tuple(on_ranks), slots_for(slots), settings.vocab)
    plain = settings.beam_size == 1 and not alone
    # What cannot be taken over is dropped: the memory is needed.
    spare = take_spare(rank, alike if plain else None)
    expected, kept = most_tokens(shapes), None
    if plain and _worth_capturing(model, settings, on_ranks, max(expected)):
        kept = functools.partial(spare.prefill, tuple(shape for [shape] in shapes))
    elif not model.dispatch.by_expectation:
        expected = [None] * len(expected)
    cache = spare.cache
    if cache is not None and kept is None:
        cache.clear()
    read = [
        _read(model, part, settings, slots, rows, cache, kept)
        for part, rows in zip(prompts.passes(alone), expected, strict=False)
    ]
    for rows in expected[len(read) :]:
        model.serve(rows)
    if not read:
        cache = _cache(model, 0, slots) if cache is None else cache
        rank.state[key] = Sequences(settings, [], on_ranks, cache, None, alike, spare)
        return None

    features = torch.cat([last for _, last, _, _ in read])
    scores = torch.cat([score for _, _, score, _ in read])
    seen = None
    if settings.repetition_penalty != 1:
        # Padding is never chosen, so nothing follows from having seen it.
        seen = torch.zeros(len(prompts), settings.vocab, dtype=torch.bool, device=rank.device)
        seen.scatter_(1, *on_device(rank.device, prompts.tokens), True)
    joined = Cache.joined([cache for cache, *_ in read])
    sequences = Sequences(settings, list(prompts.numbers), on_ranks, joined, seen, alike, spare)
    sequences.parts += [part for *_, parts in read for part in parts]
    rank.state[key] = sequences
    logits = model.logits(features, settings.vocab)
    if settings.beam_size == 1:
        return _choose_next(model, sequences, logits)
    empty = (prompts.lengths == 1).tolist()
    logprobs = F.log_softmax(logits.float(), dim=-1)
    return candidates(logprobs, scores, 1, 2 * settings.beam_size, empty, only_end=False)


@torch.inference_mode()
def run(
    rank: Rank,
    key: int,
    rows: Sequence[list[int]],
    tokens: Sequence[list[int]],
    steps: int,
    tells: bool = False,
) -> Chosen | None:
    """Generate ``steps`` more tokens of each sequence that continues; each sequence reads the tokens chosen for it.

    Args:
        rows: for each rank, the sequences that continue, by their rows in the previous call.
        tokens: the first token that each of them reads.
        tells: whether to report, with None, that all steps are launched.

    Returns:
        ``steps`` choices per sequence; None from a rank without sequences.
    """
    model: Transformer = rank.state["model"]
    sequences: Sequences = rank.state[key]
    sequences.select(rows, rank.rank)
    read = torch.tensor(tokens[rank.rank], device=rank.device, dtype=torch.long)
    found = Found()
    for step in range(steps):
        with part(f"step {step}"):
            read = _step(model, sequences, read, steps - step, found)
    if tells:
        rank.report(None)
    return found.told(model)


def _step(model: Transformer, sequences: Sequences, read: Tensor, ahead: int, found: Found) -> Tensor:
    """Choose the tokens after ``read`` [B] int64, for ``found``; returns them, on the device.

    ``ahead`` is the number of steps that are known to follow, including this one.
    """
    asked, graph = _next_step(model, sequences, ahead)
    if isinstance(graph, Greedy):
        return found.step(graph, read)
    logits = _read_on(model, sequences, read, asked, graph)
    return read if logits is None else found.add(_choose_next(model, sequences, logits))


@torch.inference_mode()
def grow(
    rank: Rank,
    key: int,
    rows: Sequence[list[int]],
    tokens: Sequence[list[int]],
    scores: Sequence[list[float]],
    last: bool,
) -> Candidates | None:
    """Run one decode step of each beam that continues.

    Args:
        rows: for each rank, the beams that continue, by their rows in the previous call; a row may occur twice.
        tokens: the token that each beam reads.
        scores: the score of each beam so far.
        last: whether only ``</s>`` may follow.
    """
    model: Transformer = rank.state["model"]
    sequences: Sequences = rank.state[key]
    sequences.select(rows, rank.rank)
    read = torch.tensor(tokens[rank.rank], device=rank.device, dtype=torch.long)
    logits = _read_on(model, sequences, read, *_next_step(model, sequences, 1))
    model.operations.check(model)
    if logits is None:
        return None
    scores = torch.tensor(scores[rank.rank], device=rank.device)
    logprobs = F.log_softmax(logits.float(), dim=-1)
    beams = sequences.settings.beam_size
    return candidates(logprobs, scores, beams, 2 * beams, None, only_end=last)


def end(rank: Rank, key: int) -> list[dict[str, np.ndarray]]:
    """Remove the sequences of ``key``.

    Returns:
        The parts of their trace: tables with ``sample`` (the sequence's number), ``position`` and the columns of
        :meth:`moekit.nn.record.Recorder.rows`.
    """
    sequences = rank.state.pop(key, None)
    if sequences is None:
        return []
    spare = Spare(sequences.alike, sequences.prefill, sequences.cache, sequences.graph)
    # A short generation has no graph of a step, and its prompts count all the same.
    if spare.alike is not None and (spare.graph is not None or spare.prefill.times > 0):
        rank.state[SPARE] = spare
    return sequences.parts


def _worth_capturing(model: Transformer, settings: Settings, on_ranks: list[int], rows: int) -> bool:
    """Whether the ranks, with at most ``rows`` tokens each, read prompts with a graph once enough had one shape."""
    told = (settings.record, settings.trace, settings.intervention)
    few = graphs.few(model, READ * rows, len(on_ranks))
    return all(on_ranks) and few and told == (None, None, None) and graphs.fits(model, Pass())


def _read(
    model: Transformer,
    prompts: Prompts,
    settings: Settings,
    slots: int,
    rows_expected: int | None,
    cache: Cache | None,
    kept: Callable[..., Tensor] | None,
) -> tuple[Cache, Tensor, Tensor, list[dict[str, np.ndarray]]]:
    """Prefill ``prompts``: a cache, the features [B, D] of the last tokens, the log-probabilities [B], and the trace.

    ``kept`` runs the forward pass, which clears ``cache``; None runs it as it is, on a cache that is clear.
    """
    device, longest = model.embed.weight.device, prompts.tokens.shape[1]
    cache = _cache(model, len(prompts), slots) if cache is None else cache
    numbers = prompts.numbers
    asked = _asked(settings, numbers, 0, cache, longest)
    asked.rows_expected = rows_expected

    def cleared(read: Tensor) -> Tensor:
        # The graph clears the cache of an earlier generation, too: a call of its own would take longer than the clearing.
        cache.clear()
        return model(read, asked)

    if kept is None:
        lengths, tokens = on_device(device, prompts.lengths, prompts.tokens)
        features = model(tokens, asked)
    else:
        features = kept(cleared, prompts.tokens)
        [lengths] = on_device(device, prompts.lengths)
    real = None
    if isinstance(asked.record, Recorder):
        real = torch.arange(longest, device=device) < lengths[:, None]
    parts = _traced(asked, numbers, real)
    cache.advance(lengths)
    last = features[torch.arange(len(prompts), device=device), lengths - 1]
    scores = torch.zeros(len(prompts), device=device)
    if settings.beam_size > 1 and longest > 1:
        # fairseq includes the prompt in the score, and adds one token after the other.
        found = log_probs(model, features[:, :-1], tokens[:, 1:], settings.vocab)
        for position in range(found.shape[1]):
            scores = torch.where(position + 1 < lengths, scores + found[:, position], scores)
    return cache, last, scores, parts


def _next_step(
    model: Transformer, sequences: Sequences, ahead: int
) -> tuple[Pass, graphs.Graph | graphs.InParts | Greedy | None]:
    """Count a step: what its pass is asked for, and its graph, if it has one. ``ahead`` is as in :func:`_step`."""
    settings, cache = sequences.settings, sequences.cache
    sequences.steps += 1
    sequences.unchanged += 1
    asked = _asked(settings, sequences.numbers, sequences.steps, cache, 1)
    rows = max(sequences.on_ranks)
    few = graphs.few(model, rows, len(sequences.on_ranks))
    asked.rows_expected = rows if few or model.dispatch.by_expectation else None
    many = sequences.unchanged > graphs.AFTER or ahead > 2 * graphs.AFTER
    known = sequences.graph is not None or many
    repeats = settings.beam_size == 1 and known
    if not (few and repeats and graphs.fits(model, asked, rows)):
        return asked, None
    if sequences.graph is None:
        made = Greedy if settings.greedy else graphs.of_step
        sequences.graph = made(model, cache, settings.vocab, rows)
    return asked, sequences.graph


def _read_on(
    model: Transformer,
    sequences: Sequences,
    read: Tensor,
    asked: Pass,
    graph: graphs.Graph | graphs.InParts | None,
) -> Tensor | None:
    """Run one token of each sequence, [B] int64; returns the logits [B, V] of the next token, or None if B is 0."""
    settings, logits = sequences.settings, None
    if sequences.seen is not None:
        sequences.seen.scatter_(1, read[:, None], True)
    if graph is not None:
        logits = graph(read)
    elif len(read):
        logits = model.logits(model(read[:, None], asked)[:, 0], settings.vocab)
        real = torch.ones_like(read[:, None], dtype=torch.bool)
        sequences.parts += _traced(asked, sequences.numbers, real)
    else:
        model.serve(asked.rows_expected)
    sequences.cache.advance(1)
    return logits


def _asked(settings: Settings, numbers: Sequence[int], step: int, cache: Cache, tokens: int) -> Pass:
    """A pass in which each sequence is a routing group with separate noise, so that sequences are independent."""
    noise = Noise(settings.seed, [number << 32 | step for number in numbers])
    record = settings.record if settings.trace is None else Recorder(settings.trace, settings.record)
    # The buffers have room for all choices of a group of one token, for any fraction.
    fraction = settings.fraction if tokens > 1 else None
    asked = Pass(fraction, groups=len(numbers), record=record, noise=noise, cache=cache)
    if settings.intervention is not None:
        samples = torch.tensor(numbers, device=cache.lengths.device)
        settings.intervention.apply(asked, samples, cache.positions(tokens))
    return asked


def _traced(asked: Pass, numbers: Sequence[int], real: Tensor | None) -> list[dict[str, np.ndarray]]:
    """The records of a pass, if any, for the tokens where ``real`` [B, T] is true; called before the cache advances."""
    if not isinstance(asked.record, Recorder):
        return []
    row, column = real.nonzero(as_tuple=True)
    position = asked.cache.positions(real.shape[1])[row, column].cpu().numpy()
    return [asked.record.rows(real) | {"sample": np.array(numbers)[row.cpu().numpy()], "position": position}]


def _cache(model: Transformer, batch: int, slots: int) -> Cache:
    return Cache(model.config, batch, slots_for(slots), model.embed.weight.device, model.embed.weight.dtype)


# ------------------------------------------------------------------------------------------ the next tokens


@is_part("sampling")
def _choose_next(model: Transformer, sequences: Sequences, logits: Tensor) -> Chosen:
    """Logits [B, V] -> the next token of each sequence, on the device."""
    settings = sequences.settings
    if settings.greedy:
        tokens, logprobs = model.operations.best(logits)
        return Chosen(tokens, logprobs, tokens.new_empty(len(tokens), 0), logprobs.new_empty(len(tokens), 0))
    logits = logits.float()
    logprobs = F.log_softmax(logits, dim=-1)
    keys = [(settings.seed, number, sequences.steps) for number in sequences.numbers]
    tokens = choose(logits, settings, keys, sequences.seen)
    best = logprobs.topk(settings.alternatives, dim=-1)
    return Chosen(tokens, logprobs.gather(1, tokens[:, None])[:, 0], best.indices, best.values)
