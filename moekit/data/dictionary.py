"""fairseq's ``dict.txt``: which symbol has which id."""

from __future__ import annotations

from pathlib import Path

from moekit.symbols import BOS as BOS
from moekit.symbols import EOS as EOS
from moekit.symbols import PAD as PAD
from moekit.symbols import UNK as UNK

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


class Dictionary:
    """The symbols of a ``dict.txt``, in fairseq's numbering: the four special ones, then a symbol a line.

    Attributes:
        symbols: symbol by id.
        index: id by symbol.

    Raises:
        ValueError: a line is not ``<symbol> <count>``, or names a symbol for the second time without the flag
            ``#fairseq:overwrite``.
    """

    def __init__(self, dict_txt: str | Path) -> None:
        path = Path(dict_txt)
        self.symbols = list(SPECIAL)
        self.index = {symbol: number for number, symbol in enumerate(self.symbols)}
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            raise ValueError(f"there is no file {path}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a dict.txt: {error}") from None
        if lines[-1] == "":
            lines.pop()
        for number, line in enumerate(lines, start=1):
            row = line.rstrip()
            overwrite = row.endswith(" #fairseq:overwrite")
            symbol, _, count = row.removesuffix(" #fairseq:overwrite").rpartition(" ")
            if not symbol or not count.isdecimal():
                raise ValueError(f"{path}, line {number}: expected '<symbol> <count>', found {line[:80]!r}")
            if symbol in self.index and not overwrite:
                raise ValueError(
                    f"{path}, line {number}: {symbol!r} for the second time; a line that is to replace an earlier one "
                    "ends in #fairseq:overwrite"
                )
            self.index[symbol] = len(self.symbols)
            self.symbols.append(symbol)

    def __len__(self) -> int:
        return len(self.symbols)
