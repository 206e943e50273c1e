"""The objects that a pickle makes where :mod:`moekit.checkpoint.pickles` reads it: records of what would be built.

Dictionaries become :class:`Pairs`, since a key may be any object, and hashing it may never end.
"""

from __future__ import annotations

from typing import Any


class Unreadable(Exception):
    """A file is damaged or refused; the message is the end of a sentence that begins with the file's name."""


class Name(str):
    """A class or a function, as ``module.name``."""

    __slots__ = ()


class Pairs(list):
    """A dictionary: its (key, value) pairs in order."""

    __slots__ = ()


class Group(list):
    """A set, frozen or not: its members."""

    __slots__ = ()


class Call:
    """``function(*arguments)``; then ``state`` was given to the result, and ``items`` were put into it."""

    __slots__ = ("arguments", "function", "items", "state")

    def __init__(self, function: Any, arguments: Any):
        self.function, self.arguments = function, arguments
        self.state: Any = None
        # Most calls have none, and an empty list for each of many thousands would take its memory.
        self.items: list[Any] | tuple[()] = ()


class Reference:
    """A reference to an object outside the pickle; ``name`` is the tuple that names it.

    ``meaning`` is what the reader makes of the name (:class:`moekit.checkpoint.contents.Stored`), once it has.
    """

    __slots__ = ("meaning", "name")

    def __init__(self, name: Any):
        self.name, self.meaning = name, None
