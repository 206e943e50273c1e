"""A token as a reader sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from moekit.checked import Instance
from moekit.notebook.coloured_text import visible

UNKNOWN = "?"


@runtime_checkable
class Pieces(Protocol):
    """What is needed of a codec here."""

    def pieces(self, ids: Iterable[int]) -> list[str]: ...


# what an argument that takes a codec may be
CODEC = Instance(Pieces, "a model's codec", optional=True)


def pieces(codec: Pieces | None, ids: Iterable[int]) -> list[str]:
    """Each token's piece; its id where there is no codec; ? for -1, a token that an imported trace does not tell."""
    ids = [int(number) for number in ids]
    told = [number for number in ids if number >= 0]
    known = iter(codec.pieces(told) if codec is not None else [f" {number}" for number in told])
    return [next(known) if number >= 0 else UNKNOWN for number in ids]


def visible_pieces(codec: Pieces | None, ids: Iterable[int]) -> list[str]:
    """The same with line ends and tabs that can be seen (:func:`moekit.notebook.coloured_text.visible`)."""
    return [visible(piece) for piece in pieces(codec, ids)]
