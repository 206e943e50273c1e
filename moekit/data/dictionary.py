"""fairseq's ``dict.txt``: the id of each symbol."""

from __future__ import annotations

import itertools
from pathlib import Path

from moekit.arguments import check_regular
from moekit.data.kept import kept

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# The most bytes of a dictionary; one with GPT-2's 50,257 types has 0.6 MB, one with 800,000 words 11 MB.
MOST_BYTES = 16 << 20


class Dictionary:
    """The symbols of a ``dict.txt``, in fairseq's numbering: the four special symbols, then one symbol per line.

    Counts may be negative, since fairseq accepts them; they have no effect here.

    Attributes:
        path: the path of the file.
        symbols: symbol by id.
        index: id by symbol.

    Raises:
        ValueError: a line is not ``<symbol> <count>``, or names a symbol for the second time without the flag
            ``#fairseq:overwrite``.
    """

    def __init__(self, dict_txt: str | Path) -> None:
        self.path = path = Path(dict_txt)
        self.symbols = list(SPECIAL)
        self.index = {symbol: number for number, symbol in enumerate(self.symbols)}
        lines = text_of(path, "a dict.txt").split("\n")
        if lines[-1] == "":
            lines.pop()
        for number, line in enumerate(lines, start=1):
            row = line.rstrip()
            overwrite = row.endswith(" #fairseq:overwrite")
            symbol, _, count = row.removesuffix(" #fairseq:overwrite").rpartition(" ")
            if not symbol or not _is_count(count):
                raise ValueError(f"{path}, line {number}: expected '<symbol> <count>', found {line[:80]!r}")
            if symbol in self.index and not overwrite:
                raise ValueError(
                    f"{path}, line {number}: {symbol[:80]!r} for the second time; a line that is to replace an earlier one "
                    "ends in #fairseq:overwrite"
                )
            self.index[symbol] = len(self.symbols)
            self.symbols.append(symbol)

    def __len__(self) -> int:
        return len(self.symbols)

    def difference(self, other: Dictionary) -> str | None:
        """A sentence on the first line in which two files differ, both named; None if they hold the same symbols."""
        if self.symbols == other.symbols:
            return None
        pairs = itertools.zip_longest(self.symbols, other.symbols)
        place, (mine, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        shown = ["nothing" if symbol is None else repr(symbol[:40]) for symbol in (mine, theirs)]
        line = place - len(SPECIAL) + 1
        return f"{self.path} and {other.path} differ first in line {line}: {shown[0]} and {shown[1]}"


@kept(16)
def read_dictionary(dict_txt: Path) -> Dictionary:
    """The dictionary of this file, which each process reads once until the file changes."""
    return Dictionary(dict_txt)


def text_of(path: Path, what: str) -> str:
    """The text of a small file; ``what`` is the expected kind of file, for errors.

    Raises:
        ValueError: the file is missing, not a regular file, larger than :data:`MOST_BYTES`, or not UTF-8.
    """
    try:
        check_regular(path, what)
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"{path} is not {what}: it has {size:,} bytes, expected {MOST_BYTES:,} at most")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {what}: {error.reason} at byte {error.start}, expected UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _is_count(text: str) -> bool:
    """Whether fairseq, which calls ``int``, accepts ``text`` as a count."""
    try:
        int(text)
    except ValueError:
        return False
    return True
