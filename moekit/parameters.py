"""The notebooks' parameters, checked in their first cell: a bad one ends the run there, with one sentence.

papermill passes ``-p flag true`` as the string "true", ``-p name 007`` as the number 7 and ``-p world_size 1e3`` as a
float, and only warns of a parameter that the notebook does not have. ``check`` sorts that out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


class ParameterError(ValueError):
    """A parameter of a notebook that makes no sense. Jupyter shows its one sentence instead of a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"ParameterError: {self}"]


@dataclass(frozen=True)
class Text:
    """A string; a number that papermill made of one becomes a string again."""

    optional: bool = False
    expected = "text"

    def convert(self, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]
    optional: bool = False

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(self.words)

    def convert(self, value: Any) -> str:
        if value not in self.words:
            raise ValueError
        return value


@dataclass(frozen=True)
class Whole:
    """A whole number of at least ``least``; 1e3 counts as one."""

    least: int = 1
    optional: bool = False

    @property
    def expected(self) -> str:
        return f"a whole number of at least {self.least}"

    def convert(self, value: Any) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value != int(value)
            or value < self.least
        ):
            raise ValueError
        return int(value)


@dataclass(frozen=True)
class Number:
    """A finite number, of at least ``least``, more than ``above`` and at most ``most``."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    optional: bool = False

    @property
    def expected(self) -> str:
        bounds = {"of at least": self.least, "above": self.above, "up to": self.most}
        return "a number" + "".join(f" {word} {x:g}" for word, x in bounds.items() if math.isfinite(x))

    def convert(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if not (value >= self.least and value > self.above and value <= self.most):
            raise ValueError
        return float(value)


@dataclass(frozen=True)
class Flag:
    """True or False, however papermill spells it."""

    optional: bool = False
    expected = "True or False"

    def convert(self, value: Any) -> bool:
        spelled = {"true": True, "false": False}.get(str(value).lower())
        if spelled is None:
            raise ValueError
        return spelled


@dataclass(frozen=True)
class Texts:
    """A list of strings; one string counts as a list of one."""

    optional: bool = False
    expected = "a list of texts"

    def convert(self, value: Any) -> list[str]:
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise ValueError
        return list(value)


Kind = Text | Choice | Whole | Number | Flag | Texts

MACHINE: dict[str, Kind] = {
    "checkpoint": Text(),
    "bpe": Text(optional=True),
    "world_size": Whole(optional=True),
    "device": Choice(("auto", "cuda", "cpu")),
    "dtype": Choice(("auto", "float32", "float16", "bfloat16")),
    "output_dir": Text(),
}
LOAD_SHARDS = MACHINE
RUN_INFERENCE: dict[str, Kind] = MACHINE | {
    "data": Text(),
    "subset": Text(),
    "tokens_per_sample": Whole(optional=True),
    "batch_size": Whole(),
    "capacity_token_fraction": Number(optional=True),
    "sample_break_mode": Choice(("none", "complete", "complete_doc", "eos")),
    "context_window": Whole(0),
    "max_batches": Whole(optional=True),
    "prompts": Texts(),
    "max_new_tokens": Whole(),
    "temperature": Number(least=0),
    "top_k": Whole(optional=True),
    "top_p": Number(above=0, most=1, optional=True),
    "beam_size": Whole(),
    "repetition_penalty": Number(above=0),
    "num_return_sequences": Whole(),
    "seed": Whole(0),
}

# What a kernel's globals hold before the first cell has run.
OF_IPYTHON = {"In", "Out", "exit", "quit", "open", "get_ipython"}


class Checked(SimpleNamespace):
    """Parameters that have been checked."""


def check(variables: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Checked:
    """The parameters among a notebook's variables, converted, as attributes.

    Where a kernel runs the notebook again, all of the earlier run's variables are there, too: they are no misspelt
    parameters, and its models are closed, so that the next one finds their memory free.

    Args:
        variables: ``globals()`` of the notebook, in the first cell after the parameters.
        kinds: what each parameter has to be, such as :data:`RUN_INFERENCE`.

    Raises:
        ParameterError: one is missing, makes no sense, or is none of this notebook's.
    """
    given = {
        name: value
        for name, value in variables.items()
        if not name.startswith("_")
        and name not in OF_IPYTHON
        and (value is None or isinstance(value, str | int | float | bool | list | tuple | dict))
    }
    again = any(isinstance(value, Checked) for value in variables.values())
    for name in given:
        if name not in kinds and not again:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kinds)}"
            raise ParameterError(f"{name} is not a parameter of this notebook: {hint}")
    checked = Checked()
    for name, kind in kinds.items():
        if name not in given:
            raise ParameterError(f"{name} is missing: expected {kind.expected}")
        setattr(checked, name, _convert(name, given[name], kind))
    if again:
        _close_models(variables)
    return checked


def _close_models(variables: Mapping[str, Any]) -> None:
    from moekit.handle import Model

    for value in variables.values():
        if isinstance(value, Model):
            value.close()


def _convert(name: str, value: Any, kind: Kind) -> Any:
    if kind.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", ""))):
        return None
    try:
        return kind.convert(value)
    except (ValueError, OverflowError):
        or_none = " or None" if kind.optional else ""
        raise ParameterError(f"{name}={value!r}: expected {kind.expected}{or_none}") from None
