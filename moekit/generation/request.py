"""The checked arguments of a generation, and its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.arguments import Capacity, Kind, Number, Texts, Whole, check, shown
from moekit.generation.written import Written
from moekit.handle import Handle
from moekit.nn.record import Options
from moekit.routing import trace as tracing
from moekit.worker.listener import Listener
from moekit.worker.sampling import Settings

if TYPE_CHECKING:
    from moekit.data.codec import Codec, Ids


# Limits of the sequences under way on a rank: the tokens that they may have, and the logits of one step, which has one
# logit per sequence and type of the dictionary.
SEQUENCE_TOKENS = {"cpu": 16_384, "cuda": 131_072}
LOGITS = 2**26
# The most results of one prompt.
COPIES = 2**20


@dataclass(frozen=True)
class Token:
    """One new token of a stream.

    Attributes:
        sequence: number of its sequence: ``prompt * num_return_sequences + i``.
        id: dictionary id.
        text: the text that the token adds, which is empty until a character is whole; None without a codec.
        logprob: natural log, under the model without temperature and penalty.
        alternatives: the best tokens at this position, (id, logprob) each, as many as the request asks for.
        finish_reason: "length" or "stop" on a sequence's last token, else None.
    """

    sequence: int
    id: int
    text: str | None
    logprob: float
    alternatives: list[tuple[int, float]]
    finish_reason: str | None


@dataclass(frozen=True, eq=False)
class Generation:
    """The result of one sequence.

    Attributes:
        prompt: number of its prompt.
        text: the new text, up to the stop text that ended it; None without a codec.
        ids: all new tokens.
        logprobs: [len(ids)] float32, natural logs under the model without temperature and penalty, as scoring the text
            gives them.
        finish_reason: "length" after ``max_new_tokens`` tokens; "stop" after a stop text or, in a beam search, ``</s>``.
        score: the sum of ``logprobs``. For a beam search, it is the score by which fairseq ranks: the mean
            log-probability over prompt and new tokens.
        alternatives: for each token the best tokens at its position, (id, logprob) each, as many as the request asks for;
            empty if it asks for none.
        trace: the routing of the prompt and of all new tokens but the last, which is never an input; None if the request
            asks for no trace.
    """

    prompt: int
    text: str | None
    ids: list[int]
    logprobs: np.ndarray
    finish_reason: str
    score: float
    alternatives: list[list[tuple[int, float]]] = field(default_factory=list, repr=False)
    trace: tracing.Trace | None = field(default=None, repr=False)

    @classmethod
    def late(cls, written: Written, number: int) -> Generation:
        """The result of sequence ``number``, whose fields are made when somebody asks for them: there may be thousands.

        Until all of them are made, it holds the arrays of all sequences.
        """
        found = object.__new__(cls)
        found.__dict__["_late"] = written, number
        return found

    def __getattr__(self, name: str) -> Any:
        # Python asks here for what is not there yet.
        late = self.__dict__.get("_late")
        if name not in _LATE or late is None:
            raise AttributeError(f"a {type(self).__name__} has no {name!r}", name=name, obj=self)
        written, number = late
        made = self.__dict__[name] = getattr(written, name)(number)
        if self.__dict__.keys() >= _LATE:
            self.__dict__.pop("_late", None)
        return made

    def __eq__(self, other: object) -> bool:
        """Whether both have the same fields, number by number, NaN included; a trace is only equal to itself."""
        if not isinstance(other, Generation):
            return NotImplemented
        numbers = ("logprobs", "score")
        alike = (
            np.array_equal(getattr(self, name), getattr(other, name), equal_nan=True)
            if name in numbers
            else getattr(self, name) == getattr(other, name)
            for name in _FIELDS
            if name != "trace"
        )
        return all(alike) and self.trace is other.trace

    __hash__ = None

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: its fields, and nothing of other sequences."""
        return {name: getattr(self, name) for name in _FIELDS}

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_FIELDS} - {"_late"})

    def __repr__(self) -> str:
        text = "" if self.text is None else f" {shown(self.text)}"
        end = f"{self.finish_reason}, score {self.score:.2f}"
        return f"<generation of prompt {self.prompt}:{text} ({len(self.ids)} tokens, {end})>"


_FIELDS = [one.name for one in dataclasses.fields(Generation)]
_LATE = {name for name in _FIELDS if hasattr(Written, name)}


KINDS: dict[str, Kind] = {
    "max_new_tokens": Whole(),
    "temperature": Number(least=0),
    "top_k": Whole(optional=True),
    "top_p": Number(above=0, most=1, optional=True),
    "beam_size": Whole(),
    "repetition_penalty": Number(above=0),
    "stop": Texts(),
    "seed": Whole(0),
    "num_return_sequences": Whole(most=COPIES),
    "alternatives": Whole(0),
    "capacity_token_fraction": Capacity(),
}


def rules(asked: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments of :func:`moekit.generation.run.generate`, alone and against one another.

    Args:
        asked: all arguments of :data:`KINDS`; other arguments stay unchanged.

    Returns:
        ``asked`` with each argument converted; without top_k and top_p if the best token is taken.

    Raises:
        ValueError: an argument is invalid, or two arguments contradict each other.
    """
    found = asked | {name: check(name, asked[name], kind) for name, kind in KINDS.items()}
    found["trace"] = Options.asked(asked.get("trace", False))
    record = asked.get("record")
    if record is not None and not callable(record):
        raise ValueError(f"record={shown(record)}: expected a function that the ranks call, or None")
    found["record"] = None if record is None else Listener(record)
    if "" in found["stop"]:
        raise ValueError(f"stop={found['stop']}: expected texts, none of them empty")
    beam_size, copies = found["beam_size"], found["num_return_sequences"]
    if beam_size > 1:
        without = {"temperature": 0, "repetition_penalty": 1, "stop": [], "alternatives": 0, "trace": None}
        if named := [name for name, off in without.items() if found.get(name, off) != off]:
            raise ValueError(f"beam_size={beam_size} searches and ends at </s>: leave out {', '.join(named)}")
        if found["max_new_tokens"] < 2:
            raise ValueError("max_new_tokens=1 leaves a beam search nothing but </s>: expected at least 2")
        if copies > beam_size:
            raise ValueError(f"num_return_sequences={copies}: expected at most beam_size={beam_size}")
    elif found["temperature"] == 0 and copies > 1:
        raise ValueError(
            f"num_return_sequences={copies}: at temperature 0 all would be the same; give a temperature, or a beam_size"
        )
    if found["temperature"] == 0:
        found |= {"top_k": None, "top_p": None}
    return found


@dataclass(frozen=True)
class Request:
    """The checked arguments of a generation.

    Attributes:
        prompts: for each sequence the ids of its prompt, the leading symbol included.
        lengths: [n] int64, how many ids each of them has.
        copies: the results of each prompt.
    """

    prompts: list[np.ndarray]
    lengths: np.ndarray
    settings: Settings
    max_new_tokens: int
    stop: tuple[str, ...]
    copies: int
    codec: Codec | Ids

    @classmethod
    def of(cls, model: Handle, prompts: Any, **asked: Any) -> Request:
        """Check the arguments of :func:`moekit.generation.run.generate` and turn texts into ids.

        Raises:
            ValueError: an argument is invalid, or a prompt leaves too little room for new tokens.
        """
        asked = rules(asked)
        if asked["stop"] and not model.reads_text:
            # This call raises an error that explains why text needs a codec.
            model.codec.encode("")
        # Each step of a search looks at twice as many tokens as it has beams, and two more.
        for name, most in (("alternatives", model.vocab), ("beam_size", max(1, model.vocab // 2 - 1))):
            if asked[name] > most:
                raise ValueError(
                    f"{name}={asked[name]}: expected at most {most}, as the dictionary has {model.vocab} types"
                )
        read = model.ids("prompts", prompts, first=model.first)
        lengths = np.fromiter(map(len, read), np.int64, len(read))
        check_room(lengths, asked["max_new_tokens"], model.config.max_positions)
        copies = asked["num_return_sequences"]
        # A beam search finds several hypotheses of one prompt, so the prompt is not repeated.
        each = 1 if asked["beam_size"] > 1 else copies
        sequences, lengths = [ids for ids in read for _ in range(each)], lengths.repeat(each)
        if model.intervention is not None:
            in_all = lengths + asked["max_new_tokens"] - 1
            model.intervention.check(dict(enumerate(in_all.tolist())))
        own = {f.name for f in dataclasses.fields(Settings)} & asked.keys()
        trace = asked["trace"]
        settings = Settings(
            **{name: asked[name] for name in own - {"trace"}},
            vocab=model.vocab,
            fraction=model.capacity(asked["capacity_token_fraction"]),
            intervention=model.intervention,
            trace=None if trace is None else trace.of(model.config),
        )
        stop = tuple(asked["stop"])
        return cls(sequences, lengths, settings, asked["max_new_tokens"], stop, copies, model.codec)

    def slots(self, wave: range) -> int:
        """The tokens that the longest of these sequences will have in its cache; its last new token is not read."""
        return int(self.lengths[wave.start : wave.stop].max()) + self.max_new_tokens - 1

    def waves(self, model: Handle) -> Iterator[range]:
        """The numbers of the sequences in order, as many at a time as the ranks have room for."""
        longest = int(self.lengths.max()) + self.max_new_tokens
        beams = min(SEQUENCE_TOKENS[model.device] // longest, LOGITS // self.settings.vocab)
        rows = max(1, beams // self.settings.beam_size) * model.world_size
        for start in range(0, len(self.prompts), rows):
            yield range(start, min(start + rows, len(self.prompts)))

    def written(self) -> Written:
        """Room for all that the request asks for."""
        alternatives = self.settings.alternatives
        return Written(
            len(self.prompts), self.max_new_tokens, alternatives, self.copies, self.stop, self.codec
        )


def check_room(lengths: np.ndarray, max_new_tokens: int, max_positions: int) -> None:
    """Check that the new tokens fit after each prompt, of [n] ``lengths`` which include the leading symbol."""
    # The last new token is not read.
    room = max_positions - lengths + 1
    for number in np.flatnonzero(max_new_tokens > room)[:1].tolist():
        raise ValueError(
            f"prompt {number} takes {lengths[number]} of the model's {max_positions} positions, its leading symbol included, "
            f"so {max(int(room[number]), 0)} new tokens fit; max_new_tokens={max_new_tokens}"
        )
