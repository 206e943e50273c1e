"""Arguments, checked in one place: what each may be, and the one sentence that names a bad one.

    check("batch_size", np.int64(2), Whole())     # 2
    check("batch_size", 0, Whole())               # ValueError: batch_size=0: expected a whole number of at least 1
    sequences("texts", (line for line in file))   # a list of texts, read once

A kind says what an argument may be. NumPy's numbers, arrays of one number and tensors of one number count as numbers.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import operator
import os
import pathlib
import reprlib
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

# The greatest number of the ranks' int64; the characters of a path, on Linux.
MOST, LONGEST_PATH = 2**63 - 1, 4096
# Python reads a number from each byte of these, which no argument means.
BYTES = (bytes, bytearray, memoryview)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: Any) -> str:
    """``repr(value)``, cut short: for messages."""
    try:
        text = _short.repr(value)
    except ValueError:
        # Python does not print an int of more than 4300 digits.
        return (
            f"<a number of {value.bit_length()} bits>"
            if isinstance(value, int)
            else f"a {type(value).__name__}"
        )
    # A table's text has lines.
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Turn the system's error of a file that cannot be read into a ValueError of one sentence that names it.

    Args:
        what: the path, where the error names none.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{error.filename or what} cannot be read ({error.strerror or error}); change its permissions or name another"
        ) from None


def check_regular(path: pathlib.Path, expected: str) -> None:
    """Check that ``path`` is a regular file: a pipe that nobody writes is waited for without end, and a device may have no end.

    Raises:
        ValueError: there is no such file, or it is something else; OSError: the system does not tell.
    """
    if not path.exists():
        raise ValueError(f"there is no file {path}; expected {expected}")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a device, a pipe or a socket"
        raise ValueError(f"{path} is {found}; expected {expected}")


def content(path: pathlib.Path, expected: str, most: int) -> bytes:
    """The bytes of a file that others may have written.

    Raises:
        ValueError: there is no such file, it is no regular file, or it has more than ``most`` bytes.
    """
    check_regular(path, expected)
    check_bytes(path, expected, most)
    return path.read_bytes()


def check_bytes(path: pathlib.Path, expected: str, most: int) -> None:
    """Check that a file has at most ``most`` bytes: one of holes takes no disk, and would take its size of memory.

    Raises:
        ValueError: it has more.
    """
    if (size := path.stat().st_size) > most:
        raise ValueError(f"{path} has {size:,} bytes; expected {expected}, of {most:,} bytes at most")


def first_few(numbers: Sequence[int] | Sequence[str]) -> str:
    """The first five of ``numbers``, and dots for the others: for messages."""
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def check(name: str, value: Any, kind: Kind) -> Any:
    """``value`` as ``kind`` has it.

    Raises:
        ValueError: it is something else.
    """
    if value is None and kind.optional:
        return None
    try:
        return kind.convert(value)
    except _Why as why:
        raise ValueError(f"{name}={shown(value)}: {why}") from None
    except (ValueError, OverflowError, TypeError):
        or_none = " or None" if kind.optional else ""
        raise ValueError(f"{name}={shown(value)}: expected {kind.expected}{or_none}") from None


class _Why(ValueError):
    """A reason that says more than the kind's ``expected``."""


def _plain(value: Any) -> Any:
    """The Python number of a NumPy scalar, or of an array or tensor without dimensions."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        # A tensor without data has no number.
        with contextlib.suppress(RuntimeError):
            return value.item()
    return value


def is_many(value: Any) -> bool:
    """Whether ``value`` holds others; an array or tensor without dimensions is a number, though it says to be iterable."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def listed(value: Any) -> list:
    """What any iterable holds, read once; a text, bytes, and what holds no others are one item."""
    return [value] if isinstance(value, (str, *BYTES)) or not is_many(value) else list(value)


def has_order(value: Any) -> bool:
    """Whether what ``value`` holds has an order: a mapping, a set and a table have none, and the keys of a dict have one."""
    unordered = isinstance(value, Mapping) or hasattr(value, "columns")
    return not unordered and (not isinstance(value, Set) or isinstance(value, KeysView))


@dataclass(frozen=True)
class Text:
    """A string; a path, or a number that papermill made of one, becomes a string again."""

    optional: bool = False
    expected = "text"

    def convert(self, value: Any) -> str:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float | pathlib.PurePath):
            raise ValueError
        _whole_characters(str(value))
        return str(value)


@dataclass(frozen=True)
class Path:
    """The name of a file or folder on this machine; ``~`` is the home folder."""

    optional: bool = False
    expected = "the path of a file or folder"

    def convert(self, value: Any) -> pathlib.Path:
        if not isinstance(value, str | pathlib.PurePath) or not str(value).strip() or "\0" in str(value):
            raise ValueError
        if len(str(value)) > LONGEST_PATH:
            raise _Why(f"expected at most {LONGEST_PATH} characters")
        if "://" in str(value):
            raise _Why("an address; expected the path of a file or folder on this machine, without '://'")
        try:
            # Half of a surrogate pair has no bytes, so it is no part of a file's name.
            path = pathlib.Path(os.fsdecode(os.fsencode(value))).expanduser()
        except RuntimeError:
            raise _Why("this machine has no such home folder; write the path without '~'") from None
        try:
            path.resolve()
            path.exists()
        except RuntimeError:
            # Of Python 3.11 and 3.12; later ones take the path as it is.
            raise _Why("its links lead round in a circle; expected the path of a file or folder") from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise _Why("a name in it is too long for its file system; expected a shorter one") from None
            if error.errno == errno.ENOENT:
                raise _Why("the current folder is gone; os.chdir to one that is there") from None
        return path


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]
    optional: bool = False

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(self.words)

    def convert(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError
        return str(value)


@dataclass(frozen=True)
class Whole:
    """A whole number from ``least`` to ``most``; 1e3 counts as one."""

    least: int = 1
    optional: bool = False
    most: int = MOST

    @property
    def expected(self) -> str:
        return f"a whole number of at least {self.least}"

    def convert(self, value: Any) -> int:
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, Integral | Real) or value != int(value):
            raise ValueError
        if value < self.least:
            raise ValueError
        if value > self.most:
            raise _Why(f"expected at most {self.most}")
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
        value = _plain(value)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError
        if not (value >= self.least and value > self.above and value <= self.most):
            raise ValueError
        return float(value)


@dataclass(frozen=True)
class Capacity:
    """The share of a batch's tokens that each expert has room for; "training" is the training's own rule.

    A negative number means "training", too, as in fairseq. So does 0 there, which reads as no room at all: it is refused
    unless ``zero`` lets it in.
    """

    optional: bool = True
    zero: bool = False
    # An expert's places in a batch are an int64 on the ranks.
    most = 1e9
    expected = "a number above 0, 'training'"

    def convert(self, value: Any) -> float:
        fraction = -1.0 if isinstance(value, str) and value == "training" else Number().convert(value)
        if fraction == 0 and not self.zero:
            raise _Why(
                "expected a number above 0, 'training' for the training's rule, or None to drop nothing"
            )
        if fraction > self.most:
            raise _Why(f"expected a number up to {self.most:g}, or None to drop nothing")
        return fraction or -1.0


@dataclass(frozen=True)
class Flag:
    """True or False, however papermill spells it."""

    optional: bool = False
    expected = "True or False"

    def convert(self, value: Any) -> bool:
        value = _plain(value)
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower())
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Texts:
    """Texts in an order, from any iterable; one text counts as a list of one. With ``paths``, a path counts as its text."""

    optional: bool = False
    paths: bool = False

    @property
    def expected(self) -> str:
        return "a list of texts or paths" if self.paths else "a list of texts"

    def convert(self, value: Any) -> list[str]:
        kinds = (str, pathlib.PurePath) if self.paths else str
        texts = [value] if isinstance(value, kinds) else _items(value)
        if not all(isinstance(text, kinds) for text in texts):
            raise ValueError
        texts = [str(text) for text in texts]
        for text in texts:
            _whole_characters(text)
        return texts


@dataclass(frozen=True)
class Wholes:
    """Whole numbers of at least 0, from any iterable; one number counts as a list of one.

    A set, which has no order, is sorted; it is refused where the order counts (``ordered``).
    """

    optional: bool = False
    ordered: bool = False

    @property
    def expected(self) -> str:
        return "a list of whole numbers" + (" in an order, which a set does not have" if self.ordered else "")

    def convert(self, value: Any) -> list[int]:
        value = _plain(value)
        if isinstance(value, Set) and not self.ordered:
            value = sorted(value)
        return [Whole(0).convert(n) for n in ([value] if isinstance(value, Real) else _items(value))]


Kind = Text | Path | Choice | Whole | Number | Capacity | Flag | Texts | Wholes


def _items(value: Any) -> list:
    """What an iterable with an order holds, read once; a text is one item.

    Raises:
        ValueError: it is none: bytes, a mapping, a set, a table, a path or a number.
    """
    value = _plain(value)
    if isinstance(value, str):
        return [value]
    # A memoryview has "tolist", too: it is refused before that is asked.
    if isinstance(value, BYTES):
        raise ValueError
    if hasattr(value, "tolist"):
        try:
            value = value.tolist()
        except RuntimeError:
            # A sparse tensor, or one without data.
            raise ValueError from None
    if not has_order(value) or not is_many(value):
        raise ValueError
    return list(value)


def sequences(name: str, value: Any) -> list[str | list[int]]:
    """One text or many, ids or lists of ids, from any iterables, each read once: a text or its ids an item.

    Args:
        name: of the argument, such as "texts".

    Raises:
        ValueError: it is something else, or empty.
    """
    try:
        parts = _items(value)
    except ValueError:
        raise ValueError(
            f"{name}={shown(value)}: found {type(value).__name__}, expected a text, texts, ids or lists of ids"
        ) from None
    one = one_of(name)
    if not parts:
        raise ValueError(f'there are no {one}s; for an empty one give ""')
    if all(map(_is_id, parts)):
        return [[operator.index(part) for part in parts]]
    lists = all(type(part) is list for part in parts)
    if lists and set(map(type, itertools.chain.from_iterable(parts))) <= {int}:
        # Lists of ints take no call for each of thousands.
        return [part.copy() for part in parts]
    return [_sequence(one, number, part) for number, part in enumerate(parts)]


def one_of(name: str) -> str:
    """What an argument has several of: "text" for "texts" and for "data_or_texts"."""
    return name.rpartition("_")[2].removesuffix("s")


def _sequence(one: str, number: int, value: Any) -> str | list[int]:
    if isinstance(value, str):
        try:
            _whole_characters(value)
        except _Why as why:
            raise ValueError(f"{one} {number} is {shown(value)}: {why}") from None
        return str(value)
    ids = None
    with contextlib.suppress(ValueError):
        ids = _items(value)
    if ids is not None and set(map(type, ids)) == {int}:
        # The usual case takes no call for each id.
        return ids
    if ids is None or not all(_is_id(part) for part in ids):
        said = shown(value if ids is None else ids)
        raise ValueError(f"{one} {number} is {said}; expected a text or ids, which are whole numbers")
    return [operator.index(part) for part in ids]


def _is_id(value: Any) -> bool:
    if type(value) is int:
        return True
    value = _plain(value)
    return isinstance(value, Integral) and not isinstance(value, bool)


def _whole_characters(text: str) -> None:
    """UTF-16 in halves, as a wrongly decoded file leaves it, has no bytes that a BPE could read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Why(
            f"its character {error.start} is half of a surrogate pair; decode the text anew, for instance as UTF-8"
        ) from None
