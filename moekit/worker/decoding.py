"""Generation on a rank: it keeps sequences and their caches, runs decode steps, and proposes next tokens.

Every function runs the same number of forward passes on every rank, because a pass contains collectives. A rank without
sequences still runs its experts for the other ranks. The driver (moekit/generation) decides which sequences continue, and
with which tokens. A rank decides only on values that are the same on all ranks, such as when to capture a graph, so
these decisions need no communication.

Shape letters: B sequences of this rank, T tokens of the longest prompt, V dictionary, N beam size, P prompts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.nn import graphs
from moekit.nn.cache import Cache, slots_for
from moekit.nn.dispatch import Local
from moekit.nn.logprobs import log_probs
from moekit.nn.noise import Noise
from moekit.nn.parts import is_part, part
from moekit.nn.passes import Pass
from moekit.nn.record import Recorder
from moekit.nn.transformer import Transformer
from moekit.ranks import Rank
from moekit.symbols import PAD
from moekit.worker.sampling import Candidates, Chosen, Settings, candidates, choose, on_host


@dataclass(frozen=True)
class Prompt:
    """The start of a sequence: its number among all sequences, and its ids [n], including the leading ``</s>``."""

    number: int
    ids: Sequence[int] | np.ndarray


# Key of the rank's state for the :class:`Spare` of the last finished generation.
SPARE = "spare step"
# Prompts are read with a graph up to half of the tokens that other passes with a graph may have: its memory is kept while
# sequences grow, and with more tokens launches take a small part of the time.
READ = 2


class Sequences:
    """The sequences of this rank, row by row: their cache, and the state that the choice of the next token needs.

    ``on_ranks`` counts the sequences of every rank, since joint decisions must depend on values that all ranks have.
    """

    def __init__(
        self,
        settings: Settings,
        numbers: list[int],
        on_ranks: list[int],
        cache: Cache,
        seen: Tensor | None,
        alike: Hashable,
        spare: Spare,
    ):
        self.settings, self.numbers, self.on_ranks = settings, numbers, on_ranks
        self.cache, self.seen = cache, seen
        # Tokens that each sequence has read after its prompt; the number is the same for all sequences.
        self.steps = 0
        # The parts of a trace.
        self.parts: list[dict[str, np.ndarray]] = []
        # The graph of a step with the current rows, and the steps since the rows of any rank changed.
        self.graph, self.prefill = spare.graph, spare.prefill
        self.unchanged = 0
        self.alike: Hashable = alike

    def select(self, rows: Sequence[list[int]], rank: int) -> None:
        """Keep the rows ``rows`` of each rank, in this order; a row may repeat."""
        same = [kept == list(range(count)) for kept, count in zip(rows, self.on_ranks, strict=True)]
        if all(same):
            return
        self.on_ranks = [len(kept) for kept in rows]
        self.graph = self.prefill = self.alike = None
        self.unchanged = 0
        if same[rank]:
            return
        index = torch.tensor(rows[rank], device=self.cache.lengths.device, dtype=torch.long)
        self.cache.select(index)
        self.seen = None if self.seen is None else self.seen[index]
        self.numbers = [self.numbers[row] for row in rows[rank]]


@torch.inference_mode()
def begin(
    rank: Rank,
    key: int,
    prompts: Sequence[Sequence[Prompt]],
    settings: Settings,
    slots: int,
    abandoned: Sequence[int] = (),
) -> Chosen | Candidates | None:
    """Prefill the prompts and propose the next tokens; a rank without prompts returns None.

    Args:
        key: the key of this generation; several generations may be under way.
        prompts: the prompts of each rank.
        slots: the number of tokens that the longest sequence will have.
        abandoned: keys of finished generations that could not be ended because the ranks were busy.

    With a capacity, each prompt has a separate forward pass, so that neither other tokens nor padding fill the buffers
    of its experts.
    """
    for old in abandoned:
        end(rank, old)
    model: Transformer = rank.state["model"]
    passes = [_passes(part, settings) for part in prompts]
    mine = passes[rank.rank]
    numbers = [prompt.number for prompt in prompts[rank.rank]]
    on_ranks = [len(part) for part in prompts]
    alike = (tuple(on_ranks), slots_for(slots), settings.vocab)
    plain = settings.beam_size == 1 and settings.fraction is None
    # What cannot be taken over is dropped: the memory is needed.
    spare = _take_spare(rank, alike if plain else None)
    expected, kept = _expected(passes), None
    if plain and _worth_capturing(model, settings, prompts, max(expected)):
        kept = functools.partial(spare.prefill, tuple(map(_shape, prompts)))
    elif not model.dispatch.by_expectation:
        expected = [None] * len(expected)
    cache = spare.cache
    read = [
        _read(model, part, settings, slots, rows, cache, kept)
        for part, rows in zip(mine, expected, strict=False)
    ]
    for rows in expected[len(mine) :]:
        model.serve(rows)
    model.dispatch.check()
    if not read:
        cache = _cache(model, 0, slots) if cache is None else cache
        rank.state[key] = Sequences(settings, [], on_ranks, cache, None, alike, spare)
        return None

    features = torch.cat([last for _, last, _, _ in read])
    scores = torch.cat([score for _, _, score, _ in read])
    seen = None
    if settings.repetition_penalty != 1:
        seen = torch.zeros(len(numbers), settings.vocab, dtype=torch.bool, device=rank.device)
        for row, prompt in enumerate(prompts[rank.rank]):
            seen[row, torch.tensor(prompt.ids, device=rank.device, dtype=torch.long)] = True
    joined = Cache.joined([cache for cache, *_ in read])
    sequences = Sequences(settings, numbers, on_ranks, joined, seen, alike, spare)
    sequences.parts += [part for *_, parts in read for part in parts]
    rank.state[key] = sequences
    logits = model.logits(features, settings.vocab)
    if settings.beam_size == 1:
        return on_host([_choose_next(model, sequences, logits)])
    empty = [len(prompt.ids) == 1 for prompt in prompts[rank.rank]]
    logprobs = F.log_softmax(logits.float(), dim=-1)
    return candidates(logprobs, scores, 1, 2 * settings.beam_size, empty, only_end=False)


@torch.inference_mode()
def run(
    rank: Rank, key: int, rows: Sequence[list[int]], tokens: Sequence[list[int]], steps: int
) -> Chosen | None:
    """Generate ``steps`` more tokens of each sequence that continues; each sequence reads the tokens chosen for it.

    Args:
        rows: for each rank, the sequences that continue, by their rows in the previous call.
        tokens: the first token that each of them reads.

    Returns:
        ``steps`` choices per sequence; None from a rank without sequences.
    """
    model: Transformer = rank.state["model"]
    sequences: Sequences = rank.state[key]
    sequences.select(rows, rank.rank)
    read = torch.tensor(tokens[rank.rank], device=rank.device, dtype=torch.long)
    found = []
    for step in range(steps):
        with part(f"step {step}"):
            logits = _read_on(model, sequences, read, steps - step)
            if logits is not None:
                found.append(_choose_next(model, sequences, logits))
                read = found[-1].tokens
    chosen = on_host(found) if found else None
    model.operations.check(model)
    return chosen


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
    logits = _read_on(model, sequences, read, 1)
    model.dispatch.check()
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


class Spare(NamedTuple):
    """What a finished generation leaves for one with an equal ``alike``, which all ranks share.

    ``prefill`` runs the pass over the prompts on ``cache``, with a graph after enough of one shape. ``graph`` is of a decode
    step on it. Both are None where nothing is left.
    """

    alike: Hashable
    prefill: graphs.Repeated
    cache: Cache | None = None
    graph: graphs.Graph | graphs.InParts | None = None


def _take_spare(rank: Rank, alike: Hashable) -> Spare:
    """The spare, with its cache cleared, if its ``alike`` is equal; otherwise it is dropped, and the result is empty."""
    spare: Spare | None = rank.state.pop(SPARE, None)
    if spare is None or spare.alike != alike:
        return Spare(alike, graphs.Repeated(isinstance(rank.state["model"].dispatch, Local)))
    spare.cache.clear()
    return spare


def _worth_capturing(
    model: Transformer, settings: Settings, prompts: Sequence[Sequence[Prompt]], rows: int
) -> bool:
    """Whether the ranks, with at most ``rows`` tokens each, read prompts with a graph once enough had one shape."""
    told = (settings.record, settings.trace, settings.intervention)
    few = graphs.few(model, READ * rows, len(prompts))
    return all(prompts) and few and told == (None, None, None) and graphs.fits(model, Pass())


def _passes(prompts: Sequence[Prompt], settings: Settings) -> list[Sequence[Prompt]]:
    """The prompts of each forward pass."""
    if settings.fraction is not None:
        return [[prompt] for prompt in prompts]
    return [prompts] if prompts else []


def _shape(prompts: Sequence[Prompt]) -> tuple[int, int]:
    """(B, T) of prompts that are read together."""
    return len(prompts), max(len(prompt.ids) for prompt in prompts)


def _expected(passes: Sequence[Sequence[Sequence[Prompt]]]) -> list[int]:
    """The most tokens, including padding, that any rank brings to each pass; ``passes`` holds the passes of each rank."""
    together = zip_longest(*passes, fillvalue=())
    return [max(math.prod(_shape(part)) for part in ranks if part) for ranks in together]


def _read(
    model: Transformer,
    prompts: Sequence[Prompt],
    settings: Settings,
    slots: int,
    rows_expected: int | None,
    cache: Cache | None,
    kept: Callable[..., Tensor] | None,
) -> tuple[Cache, Tensor, Tensor, list[dict[str, np.ndarray]]]:
    """Prefill ``prompts``: a cache, the features [B, D] of the last tokens, the log-probabilities [B], and the trace.

    ``kept`` runs the forward pass; None runs it as it is.
    """
    device = model.embed.weight.device
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
    tokens = torch.full((len(prompts), int(lengths.max())), PAD)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.ids)] = torch.as_tensor(prompt.ids)
    lengths, tokens = lengths.to(device), tokens.to(device)
    cache = _cache(model, len(prompts), slots) if cache is None else cache
    numbers = [prompt.number for prompt in prompts]
    asked = _asked(settings, numbers, 0, cache, tokens.shape[1])
    asked.rows_expected = rows_expected
    features = model(tokens, asked) if kept is None else kept(lambda read: model(read, asked), tokens)
    parts = _traced(asked, numbers, torch.arange(tokens.shape[1], device=device) < lengths[:, None])
    cache.advance(lengths)
    last = features[torch.arange(len(prompts), device=device), lengths - 1]
    scores = torch.zeros(len(prompts), device=device)
    if settings.beam_size > 1 and tokens.shape[1] > 1:
        # fairseq includes the prompt in the score, and adds one token after the other.
        found = log_probs(model, features[:, :-1], tokens[:, 1:], settings.vocab)
        for position in range(found.shape[1]):
            scores = torch.where(position + 1 < lengths, scores + found[:, position], scores)
    return cache, last, scores, parts


def _read_on(model: Transformer, sequences: Sequences, read: Tensor, ahead: int) -> Tensor | None:
    """Run one token of each sequence, [B] int64; returns the logits [B, V] of the next token, or None if B is 0.

    ``ahead`` is the number of steps that are known to follow, including this one.
    """
    settings, cache = sequences.settings, sequences.cache
    sequences.steps += 1
    sequences.unchanged += 1
    if sequences.seen is not None:
        sequences.seen.scatter_(1, read[:, None], True)
    asked = _asked(settings, sequences.numbers, sequences.steps, cache, 1)
    rows = max(sequences.on_ranks)
    few = graphs.few(model, rows, len(sequences.on_ranks))
    asked.rows_expected = rows if few or model.dispatch.by_expectation else None
    many = sequences.unchanged > graphs.AFTER or ahead > 2 * graphs.AFTER
    known = sequences.graph is not None or many
    repeats = settings.beam_size == 1 and known
    logits = None
    if few and repeats and graphs.fits(model, asked, rows):
        if sequences.graph is None:
            sequences.graph = graphs.of_step(model, cache, settings.vocab, rows)
        logits = sequences.graph(read)
    elif len(read):
        logits = model.logits(model(read[:, None], asked)[:, 0], settings.vocab)
        real = torch.ones_like(read[:, None], dtype=torch.bool)
        sequences.parts += _traced(asked, sequences.numbers, real)
    else:
        model.serve(asked.rows_expected)
    cache.advance(1)
    return logits


def _asked(settings: Settings, numbers: Sequence[int], step: int, cache: Cache, tokens: int) -> Pass:
    """A pass in which each sequence is a routing group with separate noise, so that sequences are independent."""
    noise = Noise(settings.seed, [number << 32 | step for number in numbers])
    record = settings.record if settings.trace is None else Recorder(settings.trace)
    # The buffers have room for all choices of a group of one token, for any fraction.
    fraction = settings.fraction if tokens > 1 else None
    asked = Pass(fraction, groups=len(numbers), record=record, noise=noise, cache=cache)
    if settings.intervention is not None:
        samples = torch.tensor(numbers, device=cache.lengths.device)
        settings.intervention.apply(asked, samples, cache.positions(tokens))
    return asked


def _traced(asked: Pass, numbers: Sequence[int], real: Tensor) -> list[dict[str, np.ndarray]]:
    """The records of a pass for the tokens where ``real`` [B, T] is true; called before the cache advances."""
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
