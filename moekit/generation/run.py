"""Generation: text that goes on from a prompt, token by token, on any number of ranks.

    model.generate("Once upon a time", max_new_tokens=50, temperature=0.8, top_p=0.95)[0].text
    for token in model.stream("Once upon a time"):
        print(token.text, end="", flush=True)

The ranks run forward passes and propose tokens (worker/decoding.py). The driver deals them sequences, decides which
continue, and turns ids into text: a line end is ``</s>`` on the way in and a line end again on the way out.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moekit.generation.beams import search
from moekit.generation.request import Burst, Generation, Request, Token
from moekit.generation.session import Session
from moekit.generation.text import Text
from moekit.handle import describe_run
from moekit.nn.record import Options
from moekit.progress import bar as progress_bar
from moekit.routing import trace as tracing
from moekit.worker.sampling import Chosen

if TYPE_CHECKING:
    from moekit.handle import Handle
    from moekit.nn.gate import Routing


# Decode steps that the ranks run per call. A GPU computes several while the driver would look at one.
BURST = {"cpu": 1, "cuda": 16}
# The same where no token is looked at before the end.
UNHEARD = {"cpu": 16, "cuda": 128}


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
    """Go on from each prompt; the results depend neither on the world size nor on what is generated beside them.

    Args:
        prompts: a text, texts, ids, or lists of ids, of any lengths. Each is read after ``</s>`` (``<s>`` where the
            model was trained with ``add_bos_token``), so an empty one starts a line.
        max_new_tokens: new tokens a sequence may have.
        temperature: 0 always takes the best token; else tokens are drawn from ``softmax(logits / temperature)``.
        top_k: draw from this many of the best tokens only; without effect at temperature 0.
        top_p: draw from the fewest, of these, that together have this probability; without effect at temperature 0.
        beam_size: N > 1 searches as fairseq's ``SequenceGenerator`` does by default: a hypothesis ends with ``</s>``,
            and the prompt's own tokens count in its score.
        repetition_penalty: divides the positive logits of all tokens that came before, and multiplies the negative ones.
        stop: a sequence ends where one of these texts is complete; a line end is such a text.
        seed: what is drawn depends on it, on the number of the sequence, and on the step.
        num_return_sequences: draws for each prompt, or best hypotheses of its beam search.
        alternatives: tell this many of the best tokens at each place.
        capacity_token_fraction: of the experts while they read a prompt, each prompt by itself, as in
            :meth:`moekit.api.Model.evaluate`. None drops nothing. New tokens are never dropped.
        record: called on the ranks by every MoE layer, see :class:`moekit.nn.passes.Pass`; a group is a sequence.
        trace: also record the routing, one sample per sequence; :class:`moekit.nn.record.Options` say what of it. A beam
            search cannot be traced. The trace's ``predicted`` stays empty, because ``alternatives`` tell the best tokens.
        progress: show a bar.

    Returns:
        ``num_return_sequences`` for each prompt, prompt by prompt; those of a beam search best first.

    Raises:
        ValueError: an argument makes no sense, or a prompt leaves too little room. Nothing has run yet.
        moekit.ranks.RankError: a rank failed.
    """
    # All arguments by their names; ``progress`` has no meaning there.
    request = Request.of(**locals())
    parts: list[dict[str, np.ndarray]] = []
    total = len(request.prompts) * request.max_new_tokens
    with progress_bar("generating", total, " tokens", show=progress) as bar:
        if request.settings.beam_size > 1:
            return list(search(model, request, bar))
        made = collections.defaultdict(list)
        longest = BURST[model.device] if request.stop else UNHEARD[model.device]
        for bursts in _bursts(model, request, parts, longest):
            for burst in bursts:
                made[burst.sequence].append(burst)
                bar.update(len(burst.tokens))
                if burst.finish_reason == "stop":
                    bar.total -= request.max_new_tokens - sum(len(b.tokens) for b in made[burst.sequence])
    found = [request.generation(made[prompt.number]) for prompt in request.prompts]
    if bad := [n for n, one in enumerate(found) if not np.isfinite(one.logprobs).all()]:
        named = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        warnings.warn(
            f"log-probabilities of new tokens are not finite in {len(bad)} of {len(found)} sequences ({named}): "
            "model.score of the same prompt names the layer",
            RuntimeWarning,
            stacklevel=2,
        )
    if request.settings.trace is None:
        return found
    whole = _trace(model, request, found, parts)
    return [replace(one, trace=whole.select(samples=number)) for number, one in enumerate(found)]


def _trace(
    model: Handle, request: Request, found: Sequence[Generation], parts: list[dict[str, np.ndarray]]
) -> tracing.Trace:
    """The ranks' parts in one, with what only this side knows of the tokens."""
    collector = tracing.Collector(request.settings.trace)
    read = [len(prompt.ids) for prompt in request.prompts]
    ids = [[*prompt.ids, *one.ids] for prompt, one in zip(request.prompts, found, strict=True)]
    nothing = [np.full(n, np.nan) for n in read]
    logprobs = [np.append(n, one.logprobs) for n, one in zip(nothing, found, strict=True)]
    starts = np.cumsum([0, *map(len, ids)])[:-1]
    ids, logprobs, read = np.concatenate(ids), np.concatenate(logprobs), np.array(read)
    for part in parts:
        # Never a sequence's last token, which is never an input.
        place = starts[part["sample"]] + part["position"]
        part |= {
            "token": ids[place],
            "target": ids[place + 1],
            "generated": part["position"] >= read[part["sample"]],
            "logprob": logprobs[place + 1],
            "predicted": np.full(len(place), -1),
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
    """The tokens that :func:`generate` finds with the same arguments, as they come: all sequences' first, and so on.

    Closing the iterator ends the generation. A beam search cannot be streamed: it has no token until its end.
    """
    request = Request.of(**locals(), beam_size=1, trace=False)
    return _tokens(model, request)


def _tokens(model: Handle, request: Request) -> Iterator[Token]:
    """The tokens of all sequences as a stream, step by step."""
    texts = {prompt.number: Text(request.codec, ()) for prompt in request.prompts}
    for bursts in _bursts(model, request, [], BURST[model.device]):
        columns = [(burst, burst.alternatives) for burst in bursts]
        for place in range(max(len(burst.tokens) for burst in bursts)):
            for burst, alternatives in columns:
                if place >= len(burst.tokens):
                    continue
                text = texts[burst.sequence]
                token, reason = int(burst.tokens[place]), None
                piece = text.add(token)
                if place == len(burst.tokens) - 1 and (reason := burst.finish_reason) and piece is not None:
                    piece += text.rest()
                logprob = float(burst.logprobs[place])
                yield Token(burst.sequence, token, piece, logprob, alternatives[place], reason)


def _bursts(
    model: Handle, request: Request, parts: list[dict[str, np.ndarray]], longest: int
) -> Iterator[list[Burst]]:
    """Greedy or drawn: every sequence reads the token that was chosen for it, until it is finished.

    Adds what was recorded of the routing to ``parts``.

    Args:
        longest: decode steps of a call at most.

    Yields:
        What a call found for each sequence that is not finished yet.
    """
    if request.settings.record is not None or request.settings.trace is not None:
        longest = 1
    for wave in request.waves(model):
        texts = {prompt.number: Text(request.codec, request.stop) for prompt in wave} if request.stop else {}
        with Session(model, wave, request) as session:
            found, made = session.begin(), 0
            while found:
                made += len(next(iter(found.values())).tokens)
                last = made == request.max_new_tokens
                bursts = [_burst(number, row, texts.get(number), last) for number, row in found.items()]
                yield bursts
                tokens = {b.sequence: int(b.tokens[-1]) for b in bursts if b.finish_reason is None}
                steps = min(longest, request.max_new_tokens - made)
                found = session.sample(tokens, steps) if tokens else {}
        parts += session.parts


def _burst(sequence: int, row: Chosen, text: Text | None, last: bool) -> Burst:
    """A sequence's new tokens up to the one that completes a stop text, which ``text`` finds."""
    if text is not None:
        for place, token in enumerate(row.tokens.tolist(), start=1):
            text.add(token)
            if text.stopped:
                return Burst(sequence, *(column[:place] for column in row), "stop")
    return Burst(sequence, *row, "length" if last else None)
