"""Checks of arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


def check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def check_fraction(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"capacity_token_fraction={value!r}: expected None or a number, as in fairseq")
    return float(value)


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


def _convert(name: str, value: Any, kind: Kind) -> Any:
    if kind.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", ""))):
        return None
    try:
        return kind.convert(value)
    except (ValueError, OverflowError):
        or_none = " or None" if kind.optional else ""
        raise ParameterError(f"{name}={value!r}: expected {kind.expected}{or_none}") from None
