"""Generation: text that goes on from a prompt, token by token, on any number of ranks.

    model.generate("Once upon a time", max_new_tokens=50, temperature=0.8, top_p=0.95)[0].text
    for token in model.stream("Once upon a time"):
        print(token.text, end="", flush=True)

The ranks run forward passes and propose tokens (decode.py). This side deals them sequences, decides which go on, and
turns ids into text: a line end is ``</s>`` on the way in and a line end again on the way out.
"""

from __future__ import annotations

import collections
import itertools
import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit import trace as tracing
from moekit.data.dictionary import BOS
from moekit.nn.config import EOS, PAD
from moekit.nn.record import Options
from moekit.progress import bar as progress_bar
from moekit.worker import decoding as decode
from moekit.worker.decoding import Prompt
from moekit.worker.sampling import Candidates, Chosen, Settings

if TYPE_CHECKING:
    from tqdm import tqdm

    from moekit.data.codec import Codec
    from moekit.handle import Model
    from moekit.nn.gate import Routing

SEQUENCE_TOKENS = {"cpu": 16_384, "cuda": 131_072}  # tokens that the sequences under way on a rank may have
LOGITS = 2**26  # and logits that a step of theirs may make there, one for each type of the dictionary
# Tokens that the ranks go on by themselves before this side looks at them, and whether it pays to move the sequences
# that go on together whenever one is over: a GPU has as good as finished the step by the time it is asked for it.
BURST = {"cpu": 1, "cuda": 16}
MOVES = {"cpu": True, "cuda": False}


@dataclass(frozen=True)
class Token:
    """One new token of a stream.

    Attributes:
        sequence: number of its sequence: ``prompt * num_return_sequences + i``.
        id: dictionary id.
        text: what it adds to the text, nothing until a character is whole; None without a codec.
        logprob: natural log, under the model itself (temperature 1, no penalty).
        alternatives: the best tokens at this place, (id, logprob) each, as many as were asked for.
        finish_reason: "length" or "stop" on a sequence's last token, else None.
    """

    sequence: int
    id: int
    text: str | None
    logprob: float
    alternatives: list[tuple[int, float]]
    finish_reason: str | None


@dataclass(frozen=True)
class Generation:
    """What became of one sequence.

    Attributes:
        prompt: number of its prompt.
        text: the new text, up to the stop text that ended it; None without a codec.
        ids: all new tokens.
        logprobs: [len(ids)] float32, natural logs under the model itself: those that scoring the text gives.
        finish_reason: "length" where ``max_new_tokens`` were reached; "stop" where a stop text came or, in a beam
            search, ``</s>``.
        score: the sum of ``logprobs``; of a beam search what fairseq ranks by, the mean over prompt and new tokens.
        alternatives: for each token the best ones at its place, (id, logprob) each, as many as were asked for.
        trace: the routing of the prompt and of all new tokens but the last, which nobody read, if it was asked for.
    """

    prompt: int
    text: str | None
    ids: list[int]
    logprobs: np.ndarray
    finish_reason: str
    score: float
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list, repr=False)
    trace: tracing.Trace | None = field(default=None, repr=False)


def generate(
    model: Model,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beam_size: int = 1,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 1,
    num_return_sequences: int = 1,
    *,
    alternatives: int = 0,
    capacity_token_fraction: float | None = None,
    record: Callable[[int, Routing], None] | None = None,
    trace: bool | Options = False,
    progress: bool = True,
) -> list[Generation]:
    """Go on from each prompt; the results depend neither on the world size nor on what is generated beside them.

    Args:
        prompts: a text, texts, ids, or lists of ids, of any lengths. Each is read after ``</s>`` (``<s>`` where the
            model was trained with ``add_bos_token``), so an empty one starts a line.
        max_new_tokens: at most so many a sequence.
        temperature: 0 always takes the best token; else tokens are drawn from ``softmax(logits / temperature)``.
        top_k: draw from the best so many only.
        top_p: draw from the fewest, of these, that together have this probability.
        beam_size: N > 1 searches as fairseq's ``SequenceGenerator`` does by default: a hypothesis ends with ``</s>``,
            and the prompt's own tokens count in its score.
        repetition_penalty: divides the positive logits of all tokens that came before, and multiplies the negative ones.
        stop: a sequence ends where one of these texts is complete; a line end is such a text.
        seed: what is drawn depends on it, on the number of the sequence, and on the step.
        num_return_sequences: so many draws for each prompt, or the best so many of its beam search.
        alternatives: tell so many of the best tokens at each place.
        capacity_token_fraction: of the experts while they read a prompt, each prompt by itself, as in
            :meth:`moekit.handle.Model.evaluate`. None drops nothing. New tokens are never dropped.
        record: called on the ranks by every MoE layer, see :class:`moekit.nn.transformer.Pass`; a group is a sequence.
        trace: also record the routing, a sample a sequence; :class:`moekit.nn.record.Options` say what of it. Not of a
            beam search, nor what the output predicted besides (``alternatives`` tell that).
        progress: show a bar.

    Returns:
        ``num_return_sequences`` for each prompt, prompt by prompt; those of a beam search best first.

    Raises:
        ValueError: an argument makes no sense, or a prompt leaves too little room. Nothing has run yet.
        moekit.ranks.RankError: a rank failed.
    """
    request = ask(
        model, prompts, max_new_tokens, temperature, top_k, top_p, beam_size, repetition_penalty, stop, seed,
        num_return_sequences, alternatives, capacity_token_fraction, record, trace,
    )  # fmt: skip
    parts: list[dict[str, np.ndarray]] = []
    total = len(request.prompts) * max_new_tokens
    with progress_bar("generating", total, " tokens", show=progress) as bar:
        if beam_size > 1:
            return list(_search(model, request, bar))
        tokens = collections.defaultdict(list)
        for token in _sample(model, request, parts):
            tokens[token.sequence].append(token)
            bar.update()
            if token.finish_reason is not None:
                bar.total -= max_new_tokens - len(tokens[token.sequence])
    found = [request.generation(tokens[prompt.number]) for prompt in request.prompts]
    if request.settings.trace is None:
        return found
    whole = _trace(model, request, found, parts)
    return [replace(one, trace=whole.select(samples=number)) for number, one in enumerate(found)]


def _trace(
    model: Model, request: Request, found: Sequence[Generation], parts: list[dict[str, np.ndarray]]
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
        place = starts[part["sample"]] + part["position"]  # never a sequence's last: nobody read it
        part |= {
            "token": ids[place],
            "target": ids[place + 1],
            "generated": part["position"] >= read[part["sample"]],
            "logprob": logprobs[place + 1],
            "predicted": np.full(len(place), -1),
        }
    collector.add(parts)
    settings = request.settings
    meta = tracing.describe_run(model, [], settings.fraction, settings.seed)
    asked = ("temperature", "top_k", "top_p", "repetition_penalty")
    return collector.trace(model.config.experts, meta | {name: getattr(settings, name) for name in asked})


def stream(
    model: Model,
    prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 1,
    num_return_sequences: int = 1,
    *,
    alternatives: int = 0,
    capacity_token_fraction: float | None = None,
    record: Callable[[int, Routing], None] | None = None,
) -> Iterator[Token]:
    """The tokens that :func:`generate` finds with the same arguments, as they come: all sequences' first, and so on.

    Closing the iterator ends the generation. A beam search cannot be streamed: it has no token until its end.
    """
    request = ask(
        model, prompts, max_new_tokens, temperature, top_k, top_p, 1, repetition_penalty, stop, seed,
        num_return_sequences, alternatives, capacity_token_fraction, record, False,
    )  # fmt: skip
    return _sample(model, request, [])


# ------------------------------------------------------------------------------------------- what was asked for


@dataclass(frozen=True)
class Request:
    """A generation whose arguments have been checked; ``prompts`` has one for each sequence."""

    prompts: list[Prompt]
    settings: Settings
    max_new_tokens: int
    stop: tuple[str, ...]
    copies: int
    codec: Codec | None

    def waves(self, model: Model) -> Iterator[list[Prompt]]:
        """The prompts in order, as many at a time as the ranks should hold."""
        longest = max(len(prompt.ids) for prompt in self.prompts) + self.max_new_tokens
        beams = min(SEQUENCE_TOKENS[model.device] // longest, LOGITS // self.settings.vocab)
        rows = max(1, beams // self.settings.beam_size)
        for start in range(0, len(self.prompts), rows * model.world_size):
            yield self.prompts[start : start + rows * model.world_size]

    def generation(self, tokens: Sequence[Token]) -> Generation:
        """What the tokens of a sequence come to."""
        text = None
        if self.codec is not None:
            text = "".join(token.text for token in tokens)
            text = text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)]
        logprobs = np.array([token.logprob for token in tokens], np.float32)
        return Generation(
            prompt=tokens[0].sequence // self.copies,
            text=text,
            ids=[token.id for token in tokens],
            logprobs=logprobs,
            finish_reason=tokens[-1].finish_reason,
            score=float(logprobs.sum(dtype=np.float64)),
            alternatives=[token.alternatives for token in tokens],
        )


def ask(
    model: Model,
    prompts: Any,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    beam_size: int,
    repetition_penalty: float,
    stop: str | Sequence[str],
    seed: int,
    num_return_sequences: int,
    alternatives: int,
    capacity_token_fraction: float | None,
    record: Callable[[int, Routing], None] | None,
    trace: bool | Options,
) -> Request:
    """Check the arguments of :func:`generate` and turn texts into ids.

    Raises:
        ValueError: see :func:`generate`.
    """
    from moekit.handle import check_fraction

    _check("max_new_tokens", max_new_tokens, int, lambda n: n >= 1, "a whole number of at least 1")
    _check("temperature", temperature, float, lambda t: t >= 0, "0 for the best token, or more")
    _check("top_k", top_k, int, lambda k: k >= 1, "None or a whole number of at least 1")
    _check("top_p", top_p, float, lambda p: 0 < p <= 1, "None or more than 0 and at most 1")
    _check("beam_size", beam_size, int, lambda n: n >= 1, "a whole number of at least 1")
    _check("repetition_penalty", repetition_penalty, float, lambda p: p > 0, "more than 0, 1 being none")
    _check("seed", seed, int, lambda n: n >= 0, "a whole number of at least 0")
    _check(
        "num_return_sequences", num_return_sequences, int, lambda n: n >= 1, "a whole number of at least 1"
    )
    _check("alternatives", alternatives, int, lambda n: n >= 0, "a whole number of at least 0")
    stop = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop={list(stop)}: expected texts, none of them empty")

    drawing = {"top_k": top_k is not None, "top_p": top_p is not None}
    if beam_size > 1:
        other = drawing | {"temperature": temperature > 0, "repetition_penalty": repetition_penalty != 1}
        other |= {"stop": bool(stop), "alternatives": alternatives > 0, "trace": bool(trace)}
        if named := [name for name, given in other.items() if given]:
            raise ValueError(f"beam_size={beam_size} searches and ends at </s>: leave out {', '.join(named)}")
        if max_new_tokens < 2:
            raise ValueError("max_new_tokens=1 leaves a beam search nothing but </s>: expected at least 2")
        if num_return_sequences > beam_size:
            raise ValueError(
                f"num_return_sequences={num_return_sequences} is more than beam_size={beam_size} can find"
            )
    elif temperature == 0:
        if named := [name for name, given in drawing.items() if given]:
            raise ValueError(
                f"{' and '.join(named)}: for draws alone; give a temperature above 0, such as 1.0"
            )
        if num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences={num_return_sequences} would be so many times the same at temperature 0: "
                "give a temperature, or a beam_size"
            )

    texts = _listed(prompts)
    codec = _codec(model, needed=bool(stop) or any(isinstance(text, str) for text in texts))
    vocab = model.config.vocab_rows if codec is None else len(codec)
    if max(alternatives, 2 * beam_size + 2) > vocab:
        raise ValueError(
            f"alternatives={alternatives} or beam_size={beam_size} is too many for {vocab} types"
        )
    first = BOS if model.config.add_bos else EOS
    read = [[first, *prompt_ids(text, number, codec, vocab)] for number, text in enumerate(texts)]
    for number, ids in enumerate(read):
        room = model.config.max_positions - len(ids) + 1  # the last new token is not read
        if max_new_tokens > room:
            raise ValueError(
                f"prompt {number} takes {len(ids)} of the model's {model.config.max_positions} positions, "
                f"its leading symbol included, so {max(room, 0)} new tokens fit; max_new_tokens={max_new_tokens}"
            )
    copies = 1 if beam_size > 1 else num_return_sequences
    sequences = [Prompt(number, ids) for number, ids in enumerate(ids for ids in read for _ in range(copies))]
    fraction = check_fraction(capacity_token_fraction)
    if model.intervention is not None:
        fraction = model.intervention.fraction(fraction)
        model.intervention.check({s.number: len(s.ids) + max_new_tokens - 1 for s in sequences})
    options = None
    if trace:
        options = (Options() if trace is True else trace).of(model.config)
    settings = Settings(
        vocab=vocab,
        temperature=float(temperature),
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=float(repetition_penalty),
        beam_size=beam_size,
        seed=seed,
        alternatives=alternatives,
        fraction=fraction,
        intervention=model.intervention,
        record=record,
        trace=options,
    )
    return Request(sequences, settings, max_new_tokens, stop, num_return_sequences, codec)


def _check(name: str, value: Any, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
    if value is None and expected.startswith("None"):
        return
    kind = Real if kind is float else Integral  # NumPy's too
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or not fits(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")


def _listed(prompts: Any) -> list:
    """One prompt or many, texts or ids, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"prompts are of type {type(prompts).__name__}; expected a text, texts, ids or lists of ids"
        )
    prompts = list(prompts)
    if not prompts:
        raise ValueError('there are no prompts; for an empty one give ""')
    return [prompts] if all(isinstance(part, (int, np.integer)) for part in prompts) else prompts


def _codec(model: Model, needed: bool) -> Codec | None:
    """The model's codec; None where there is none and ids will do."""
    try:
        return model.codec
    except ValueError:
        if needed:
            raise
        return None


def prompt_ids(prompt: Any, number: int, codec: Codec | None, vocab: int) -> list[int]:
    """A prompt, text or ids, as ids."""
    if isinstance(prompt, str):
        return codec.encode(prompt)
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    try:
        ids = None if isinstance(prompt, bytes) else [operator.index(token) for token in prompt]
    except TypeError:
        ids = None
    if ids is None:
        raise ValueError(
            f"prompt {number} is {reprlib.repr(prompt)}; expected a text or ids, which are whole numbers"
        )
    for token in ids:
        if not 0 <= token < vocab or token == PAD:
            raise ValueError(
                f"prompt {number} has the id {token}; expected 0 to {vocab - 1}, without {PAD}, the padding"
            )
    return ids


# ------------------------------------------------------------------------------------------- driving the ranks


class Session:
    """Sequences that live on the ranks while they are generated."""

    keys = itertools.count()

    def __init__(self, model: Model, prompts: Sequence[Prompt], settings: Settings, slots: int):
        self.model, self.settings, self.slots = model, settings, slots
        self.key = next(self.keys)
        self.dealt = [prompts[rank :: model.world_size] for rank in range(model.world_size)]
        self.there = [[prompt.number for prompt in part] for part in self.dealt]  # in the order of the rows
        self.beams = 1  # rows a sequence
        self.parts: list[dict[str, np.ndarray]] = []  # of the trace, once it is over

    def begin(self) -> dict[int, Chosen | Candidates]:
        """Read the prompts. Returns, for each sequence's number, its row of what the ranks propose."""
        abandoned = tuple(self.model.abandoned)
        found = self.model.ranks.call(
            decode.begin, self.key, self.dealt, self.settings, self.slots, abandoned
        )
        del self.model.abandoned[: len(abandoned)]
        return self._by_number(found)

    def run(self, going: Mapping[int, int], steps: int) -> dict[int, Chosen]:
        """``steps`` tokens on; sequences that are not in ``going`` are over.

        Args:
            going: the token that each sequence reads first.
        """
        keep = set(going)
        if not MOVES[self.model.device] and 2 * len(going) > sum(map(len, self.there)):
            keep = {n for numbers in self.there for n in numbers}  # the dead read padding, and nobody listens
        rows = [[place for place, n in enumerate(numbers) if n in keep] for numbers in self.there]
        self.there = [[n for n in numbers if n in keep] for numbers in self.there]
        tokens = [[going.get(n, PAD) for n in numbers] for numbers in self.there]
        found = self._by_number(self.model.ranks.call(decode.run, self.key, rows, tokens, steps))
        return {number: row for number, row in found.items() if number in going}

    def grow(
        self, going: Mapping[int, Sequence[tuple[int, int, float]]], last: bool
    ) -> dict[int, Candidates]:
        """One token on in a beam search; sequences that are not in ``going`` are over.

        Args:
            going: for each sequence its beams: (the beam it goes on from, the token it reads, its score so far).
            last: nothing but ``</s>`` may follow.
        """
        rows, tokens, scores = [], [], []
        for numbers in self.there:
            beams = [(place, beam) for place, n in enumerate(numbers) for beam in going.get(n, ())]
            rows.append([place * self.beams + beam for place, (beam, _, _) in beams])
            tokens.append([token for _, (_, token, _) in beams])
            scores.append([score for _, (_, _, score) in beams])
        self.there = [[n for n in numbers if n in going] for numbers in self.there]
        self.beams = self.settings.beam_size
        return self._by_number(self.model.ranks.call(decode.grow, self.key, rows, tokens, scores, last))

    def _by_number(self, found: Sequence[Chosen | Candidates | None]) -> dict[int, Chosen | Candidates]:
        rows = {}
        for numbers, part in zip(self.there, found, strict=True):
            if part is not None:
                rows |= {n: part._make(row) for n, row in zip(numbers, zip(*part, strict=True), strict=True)}
        return dict(sorted(rows.items()))

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.parts = [part for parts in self.model.ranks.call(decode.end, self.key) for part in parts]
        except RuntimeError:  # the ranks are busy with another call, or gone, and the sequences with them
            self.model.abandoned.append(self.key)


def _sample(model: Model, request: Request, parts: list[dict[str, np.ndarray]]) -> Iterator[Token]:
    """Greedy or drawn: every sequence reads the token that was chosen for it, until it is over.

    Adds what was recorded of the routing to ``parts``.
    """
    listening = request.settings.record is not None or request.settings.trace is not None
    burst = 1 if listening else BURST[model.device]
    for wave in request.waves(model):
        texts = {prompt.number: Text(request.codec, request.stop) for prompt in wave}
        with Session(model, wave, request.settings, _slots(wave, request)) as session:
            found, step = session.begin(), 0
            while found:
                going = dict.fromkeys(found, PAD)
                for place in range(len(next(iter(found.values())).tokens)):
                    step += 1
                    for number in list(going):
                        token, logprob, best, best_logprobs = (column[place] for column in found[number])
                        text = texts[number]
                        piece = text.add(int(token))
                        reason = (
                            "stop" if text.stopped else "length" if step == request.max_new_tokens else None
                        )
                        if reason is None:
                            going[number] = int(token)
                        else:
                            del going[number]
                            piece = None if piece is None else piece + text.rest()
                        alternatives = list(zip(best.tolist(), best_logprobs.tolist(), strict=True))
                        yield Token(number, int(token), piece, float(logprob), alternatives, reason)
                steps = min(burst, request.max_new_tokens - step)
                found = session.run(going, steps) if going else {}
        parts += session.parts


def _slots(wave: Sequence[Prompt], request: Request) -> int:
    return max(len(prompt.ids) for prompt in wave) + request.max_new_tokens - 1


class Text:
    """The text of a sequence as its tokens come: a character may need several tokens."""

    def __init__(self, codec: Codec | None, stop: Sequence[str]):
        self.codec, self.stop = codec, stop
        self.pending: list[int] = []
        self.tail = ""  # as much of the text as a stop text may begin in
        self.stopped = False

    def add(self, token: int) -> str | None:
        """What ``token`` adds to the text."""
        if self.codec is None:
            return None
        self.pending.append(token)
        piece = self.codec.decode(self.pending)
        if piece.endswith("\ufffd") and len(self.pending) < 4:  # UTF-8 has at most four bytes a character
            return ""
        self.pending = []
        self.tail += piece
        self.stopped = any(stop in self.tail for stop in self.stop)
        self.tail = self.tail[-max(map(len, self.stop), default=1) :]
        return piece

    def rest(self) -> str:
        """What is left of a character that never became whole."""
        rest, self.pending = self.codec.decode(self.pending), []
        return rest


# -------------------------------------------------------------------------------------------------- beam search


@dataclass(frozen=True)
class Hypothesis:
    """A beam: its new tokens and their log-probabilities; ``score`` is the sum over these and the prompt's."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0
    parent: int = 0  # the beam that it went on from


class Beams:
    """The beam search of one prompt, by the rules of ``SequenceGenerator`` (fairseq/sequence_generator.py).

    Of the 2 N best candidates, those with ``</s>`` among the first N are finished hypotheses, and the first N others
    go on. It is over when N are finished. They rank by the mean log-probability of all their tokens.
    """

    def __init__(self, prompt: Prompt, size: int):
        self.prompt, self.size = prompt, size
        self.alive = [Hypothesis()]
        self.finished: list[tuple[float, str, Hypothesis]] = []

    def grow(self, candidates: Candidates, last: bool) -> None:
        alive = []
        for place, (score, token, beam, logprob) in enumerate(zip(*candidates, strict=True)):
            before = self.alive[beam]
            ids, logprobs = (*before.ids, int(token)), (*before.logprobs, float(logprob))
            hypothesis = Hypothesis(ids, logprobs, float(score), int(beam))
            if token != EOS:
                alive.append(hypothesis)
            elif place < self.size and len(self.finished) < self.size:
                mean = float(np.float32(score) / np.float32(len(self.prompt.ids) - 1 + len(ids)))
                self.finished.append((mean, "length" if last else "stop", hypothesis))
        self.alive = [] if last or len(self.finished) == self.size else alive[: self.size]

    def best(self, count: int, codec: Codec | None) -> list[Generation]:
        """The ``count`` best finished hypotheses, best first; ``</s>`` at their end is no text."""
        ranked = sorted(self.finished, key=lambda found: -found[0])[:count]
        return [
            Generation(
                prompt=self.prompt.number,
                text=None if codec is None else codec.decode(hypothesis.ids[:-1]),
                ids=list(hypothesis.ids),
                logprobs=np.array(hypothesis.logprobs, np.float32),
                finish_reason=reason,
                score=mean,
            )
            for mean, reason, hypothesis in ranked
        ]


def _search(model: Model, request: Request, bar: tqdm) -> Iterator[Generation]:
    for wave in request.waves(model):
        searches = {prompt.number: Beams(prompt, request.settings.beam_size) for prompt in wave}
        with Session(model, wave, request.settings, _slots(wave, request)) as session:
            found = session.begin()
            for step in range(1, request.max_new_tokens + 1):
                for number, candidates in found.items():
                    searches[number].grow(candidates, last=step == request.max_new_tokens)
                    bar.update()
                going = {
                    number: [(beam.parent, beam.ids[-1], beam.score) for beam in search.alive]
                    for number, search in searches.items()
                    if search.alive
                }
                if not going:
                    break
                found = session.grow(going, last=step + 1 == request.max_new_tokens)
        for search in searches.values():
            yield from search.best(request.copies, request.codec)
