"""What is asked of a generation, checked, and what comes of it."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.data.dictionary import BOS
from moekit.nn.config import EOS, PAD
from moekit.nn.record import Options
from moekit.routing import trace as tracing
from moekit.worker.decoding import Prompt
from moekit.worker.sampling import Settings

if TYPE_CHECKING:
    from moekit.data.codec import Codec
    from moekit.handle import Handle
    from moekit.nn.gate import Routing


SEQUENCE_TOKENS = {"cpu": 16_384, "cuda": 131_072}  # tokens that the sequences under way on a rank may have


LOGITS = 2**26  # and logits that a step of theirs may make there, one for each type of the dictionary


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


@dataclass(frozen=True)
class Request:
    """A generation whose arguments have been checked; ``prompts`` has one for each sequence."""

    prompts: list[Prompt]
    settings: Settings
    max_new_tokens: int
    stop: tuple[str, ...]
    copies: int
    codec: Codec | None

    def waves(self, model: Handle) -> Iterator[list[Prompt]]:
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
    model: Handle,
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
    from moekit.arguments import check_fraction

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


def _codec(model: Handle, needed: bool) -> Codec | None:
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
