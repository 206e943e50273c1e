"""Generation: text that continues a prompt, token by token, on any number of ranks.

    model.generate("Once upon a time", max_new_tokens=50, temperature=0.8, top_p=0.95)[0].text
    for token in model.stream("Once upon a time"):
        print(token.text, end="", flush=True)

The ranks run forward passes and propose tokens (worker/decoding.py). The driver assigns the sequences to ranks, decides
which sequences continue, and turns ids into text. A line end in a prompt becomes ``</s>``, and ``</s>`` becomes a line end
in the result.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moekit.arguments import first_few
from moekit.generation.beams import search
from moekit.generation.request import Generation, Request, Token
from moekit.generation.session import Session
from moekit.generation.text import Text
from moekit.generation.written import Burst, Written
from moekit.handle import describe_run
from moekit.nn.record import Options
from moekit.progress import bar as progress_bar
from moekit.routing import trace as tracing

if TYPE_CHECKING:
    from moekit.handle import Handle
    from moekit.nn.gate import Routing


# Decode steps that the ranks run per call. A GPU computes several steps in the time that the driver needs for one.
BURST = {"cpu": 1, "cuda": 16}
# Decode steps per call if the driver does not read the tokens before the end.
UNHEARD = {"cpu": 16, "cuda": 128}
# Sequences from which on the driver looks for stop texts while the ranks go on. With fewer it takes less time than the ranks
# lose if all have ended.
MANY = 128


def generate(
    model: Handle,
    prompts: str | Iterable[str] | Iterable[int] | Iterable[Iterable[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beam_size: int = 1,
    repetition_penalty: float = 1.0,
    stop: str | Iterable[str] = (),
    seed: int = 1,
    num_return_sequences: int = 1,
    *,
    alternatives: int = 0,
    capacity_token_fraction: float | str | None = None,
    record: Callable[[int, Routing], None] | None = None,
    trace: bool | Options = False,
    progress: bool = True,
) -> list[Generation]:
    """Continue each prompt; the results depend neither on the world size nor on the other sequences.

    Args:
        prompts: a text, texts, ids, or lists of ids, of any lengths. The model reads each prompt after ``</s>`` (``<s>``
            if it was trained with ``add_bos_token``), so an empty prompt starts a line.
        max_new_tokens: the most new tokens of a sequence.
        temperature: 0 always takes the best token; else tokens are drawn from ``softmax(logits / temperature)``.
        top_k: draw from only this many of the best tokens; without effect at temperature 0.
        top_p: draw from the smallest set of the best tokens that together have this probability; without effect at
            temperature 0.
        beam_size: N > 1 searches as fairseq's ``SequenceGenerator`` does by default: a hypothesis ends with ``</s>``,
            and the tokens of the prompt count in its score.
        repetition_penalty: divides the positive logits of all earlier tokens, and multiplies the negative ones.
        stop: a sequence ends when one of these texts is complete; a line end may be such a text.
        seed: a draw depends on the seed, the number of the sequence, and the step.
        num_return_sequences: the number of draws per prompt, or of the best hypotheses of its beam search.
        alternatives: the number of best tokens to return at each position.
        capacity_token_fraction: the capacity of the experts during prefill, for each prompt by itself, as in
            :meth:`moekit.api.Model.evaluate`. None drops nothing. New tokens are never dropped.
        record: called on the ranks by every MoE layer, see :class:`moekit.nn.passes.Pass`; a group is a sequence. What it raises
            ends the generation, no rank is lost, and a ValueError here tells it (a KeyboardInterrupt stays one).
        trace: also record the routing, one sample per sequence; :class:`moekit.nn.record.Options` select its columns. A
            beam search cannot be traced. The trace's ``predicted`` stays empty, because ``alternatives`` hold the best
            tokens.
        progress: show a progress bar.

    Returns:
        ``num_return_sequences`` results per prompt, prompt by prompt; those of a beam search best first.

    Raises:
        ValueError: an argument is invalid, or a prompt leaves too little room: it is raised before anything runs; or ``record``
            raised, cannot be sent to the ranks, or cannot be made there.
        moekit.ranks.RankError: a rank failed.
    """
    # The request takes all arguments by their names; it ignores ``progress``.
    request = Request.of(**locals())
    written, parts = request.written(), []
    total = len(request.prompts) * request.max_new_tokens
    with progress_bar("generating", total, " tokens", show=progress) as bar:
        if request.settings.beam_size > 1:
            best, bad = search(model, request, bar)
            _warn_not_finite("searches", bad, len(request.prompts))
            return best

        def take(burst: Burst) -> None:
            written.add(burst)
            bar.update(int(burst.lengths.sum()))

        if request.stop:
            for burst in _bursts(model, request, parts, ahead=True):
                take(burst)
                ended = burst.numbers[burst.stopped]
                bar.total -= len(ended) * request.max_new_tokens - int(written.lengths[ended].sum())
        else:
            for wave in request.waves(model):
                session = Session(model, wave, request)
                session.at_once(UNHEARD[model.device], take)
                parts += session.parts
    found = [Generation.late(written, number) for number in range(len(request.prompts))]
    _warn_not_finite("sequences", written.not_finite(), len(found))
    if request.settings.trace is None:
        return found
    whole = _trace(model, request, found, parts)
    return [replace(one, trace=whole.select(samples=number)) for number, one in enumerate(found)]


def _warn_not_finite(what: str, bad: Sequence[int], count: int) -> None:
    """Warn the caller's caller of those of ``count`` sequences or searches for which the model gave no numbers."""
    if len(bad):
        warnings.warn(
            f"log-probabilities of new tokens are not finite in {len(bad)} of {count} {what} ({first_few(bad)}): "
            "model.score of the same prompt names the layer",
            RuntimeWarning,
            stacklevel=3,
        )


def _trace(
    model: Handle, request: Request, found: Sequence[Generation], parts: list[dict[str, np.ndarray]]
) -> tracing.Trace:
    """The trace from the parts of all ranks, with the columns on tokens that only the driver has."""
    collector = tracing.Collector(request.settings.trace)
    read = request.lengths
    ids = [[*prompt.tolist(), *one.ids] for prompt, one in zip(request.prompts, found, strict=True)]
    nothing = [np.full(n, np.nan) for n in read]
    logprobs = [np.append(n, one.logprobs) for n, one in zip(nothing, found, strict=True)]
    starts = np.cumsum([0, *map(len, ids)])[:-1]
    ids, logprobs = np.concatenate(ids), np.concatenate(logprobs)
    for part in parts:
        # The last token of a sequence is never an input, so it is not in the trace.
        place = starts[part["sample"]] + part["position"]
        part |= {
            "token": ids[place],
            "target": ids[place + 1],
            "generated": part["position"] >= read[part["sample"]],
            "logprob": logprobs[place + 1],
            "predicted": np.full(len(place), -1),
            "output_entropy": np.full(len(place), np.nan),
        }
    collector.add(parts)
    settings = request.settings
    meta = describe_run(model, [], settings.fraction, settings.seed)
    asked = ("temperature", "top_k", "top_p", "repetition_penalty")
    return collector.trace(model.config.experts, meta | {name: getattr(settings, name) for name in asked})


def stream(
    model: Handle,
    prompts: str | Iterable[str] | Iterable[int] | Iterable[Iterable[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Iterable[str] = (),
    seed: int = 1,
    num_return_sequences: int = 1,
    *,
    alternatives: int = 0,
    capacity_token_fraction: float | str | None = None,
    record: Callable[[int, Routing], None] | None = None,
) -> Iterator[Token]:
    """Yield the tokens of :func:`generate` as they are chosen: the first token of all sequences under way, then the second, ...

    As many sequences are under way as the ranks have room for; the next ones follow when these have ended. Closing the iterator ends the generation. A beam search cannot be streamed: its tokens are known only at its end.

    Raises:
        ValueError: an argument is invalid, or a prompt leaves too little room: it is raised before anything runs; or ``record``
            raised, cannot be sent to the ranks, or cannot be made there.
        moekit.ranks.RankError: a rank failed.
    """
    request = Request.of(**locals(), beam_size=1, trace=False)
    return _tokens(model, request)


def _tokens(model: Handle, request: Request) -> Iterator[Token]:
    """The tokens of all sequences as a stream, step by step."""
    texts = [Text(request.codec, ()) for _ in request.prompts]
    written, told = request.written(), set()
    # Not every Python lets go of what a closed generator reads from.
    with contextlib.closing(_bursts(model, request, [], ahead=False)) as bursts:
        for burst in bursts:
            written.add(burst)
            if bad := sorted(set(burst.not_finite()) - told):
                _warn_not_finite("sequences", bad, len(texts))
                told.update(bad)
            yield from _of_burst(burst, written, texts)


def _of_burst(burst: Burst, written: Written, texts: list[Text]) -> Iterator[Token]:
    """The tokens of a burst, which ``written`` has already: the first ones of all its sequences, then the second ones."""
    rows = list(zip(burst.numbers.tolist(), *(column.tolist() for column in burst.chosen), strict=True))
    lengths, over = burst.lengths.tolist(), written.over()[burst.numbers].tolist()
    for place in range(max(lengths)):
        for (number, tokens, logprobs, best, others), length, ends in zip(rows, lengths, over, strict=True):
            if place >= length:
                continue
            piece, reason = texts[number].add(tokens[place]), None
            if ends and place == length - 1:
                reason = written.finish_reason(number)
                piece = None if piece is None else piece + texts[number].rest()
            alternatives = list(zip(best[place], others[place], strict=True))
            yield Token(number, tokens[place], piece, logprobs[place], alternatives, reason)


def _bursts(
    model: Handle, request: Request, parts: list[dict[str, np.ndarray]], *, ahead: bool
) -> Iterator[Burst]:
    """Greedy or random decoding: every sequence reads the token that was chosen for it, until it is finished.

    The records of the routing are added to ``parts``.

    Args:
        ahead: whether the ranks may go on while the driver looks for stop texts. What they choose after one is left out.

    Yields:
        What came of a call, for the sequences that were not finished before it.
    """
    listens = request.settings.record is not None or request.settings.trace is not None
    longest = 1 if listens else BURST[model.device]
    for wave in request.waves(model):
        texts = {number: Text(request.codec, request.stop) for number in wave} if request.stop else {}
        with Session(model, wave, request) as session:
            numbers, found = session.begin()
            made = found.tokens.shape[1]
            while len(numbers):
                steps = min(longest, request.max_new_tokens - made)
                look = functools.partial(Burst.of, numbers, found, texts)
                read, following = found.tokens[:, -1], None
                if steps and ahead and session.keeps_rows and len(numbers) >= MANY:
                    burst, following = session.sample_while(look, numbers, read, steps)
                else:
                    burst = look()
                yield burst
                stays = ~burst.stopped
                numbers = numbers[stays] if steps else numbers[:0]
                if following is not None:
                    found = following.only(stays)
                elif len(numbers):
                    found = session.sample(numbers, read[stays], steps)
                made += steps
        parts += session.parts
