"""GPT-2's byte-level byte-pair encoding, with the same result as fairseq on every text.

A text is first cut into pieces: a word with the space before it, a number, a run of signs, or a run of blanks. Then the
bytes of each piece are merged pair by pair. The library ``tokenizers`` does the merging. It does not do the cutting,
because its cutting is slow, and because its tables lack thousands of newer letters that are in ``regex``, the library
that fairseq uses. So this file cuts a whole text at once, with the tables of ``regex``.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from reprlib import repr

import numpy as np
import regex
from tokenizers.models import BPE

from moekit import json_text
from moekit.data.dictionary import text_of

# The limit of an id, which takes 4 bytes in the library's tables.
MOST_IDS = 1 << 32
# Special symbols, such as <|endoftext|>, which are not the result of a merge.
SPECIAL = regex.compile(r"<.*>|\[.*\]")
# The most other symbols that are neither a byte nor the result of a merge.
MOST_UNMADE = 8

LETTER, NUMBER, SIGN, BLANK, LINE_END = range(5)


@functools.cache
def kinds() -> np.ndarray:
    """[0x110000] uint8: the kind of every code point, according to ``regex``."""
    kind = np.full(0x110000, SIGN, np.uint8)
    # Code points above this range are neither letters nor numbers nor blanks; a test checks this.
    text = "".join(map(chr, range(0x40000)))
    for code, pattern in ((LETTER, r"\p{L}+"), (NUMBER, r"\p{N}+"), (BLANK, r"\s+")):
        for run in regex.finditer(pattern, text):
            kind[run.start() : run.end()] = code
    kind[ord("\n")] = LINE_END
    return kind


def cut(text: str) -> tuple[bytes, np.ndarray]:
    """Find the first byte of each piece of ``text``.

    The pieces are those of GPT-2's pattern: ``'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|
    \\s+(?!\\S)|\\s+``. In words: runs of one kind; the last blank of a run belongs to what follows if it is a space,
    else it is a piece; some endings after an apostrophe are a piece. A line end is a separate piece and ends any other.

    Returns:
        The text in UTF-8, and the offset of each piece's first byte in it, int64.

    Raises:
        UnicodeEncodeError: the text holds half a surrogate pair, which has no UTF-8; the error is a ValueError.
    """
    data = text.encode()
    if not data:
        return data, np.zeros(0, np.int64)
    ascii_only = len(data) == len(text)
    points = np.frombuffer(
        data if ascii_only else text.encode("utf-32-le"), np.uint8 if ascii_only else np.uint32
    )
    kind = kinds()[points]
    begins = np.ones(len(points), bool)
    begins[1:] = (kind[1:] != kind[:-1]) | (kind[1:] == LINE_END)

    last_blanks = np.flatnonzero((kind[:-1] == BLANK) & (kind[1:] < BLANK))
    begins[last_blanks] = True
    begins[last_blanks[points[last_blanks] == ord(" ")] + 1] = False

    apostrophes = np.flatnonzero((points == ord("'")) & begins)
    ends = apostrophes + _ending(points, apostrophes)
    begins[apostrophes[ends > apostrophes] + 1] = False
    begins[ends[ends < len(points)]] = True

    if ascii_only:
        return data, np.flatnonzero(begins)
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    return data, (np.cumsum(widths) - widths)[begins]


def _ending(points: np.ndarray, apostrophes: np.ndarray) -> np.ndarray:
    """The length of the English ending that begins at each apostrophe: 2 for 's 't 'm 'd, 3 for 'll 're 've, else 0."""
    padded = np.append(points, [0, 0])
    first, second = padded[apostrophes + 1], padded[apostrophes + 2]
    two = np.isin(first, [ord(letter) for letter in "stmd"])
    three = np.logical_or.reduce([(first == ord(a)) & (second == ord(b)) for a, b in ("ll", "re", "ve")])
    return 2 * two + 3 * three


def byte_symbols() -> dict[int, str]:
    """The character for each byte in GPT-2's files: the same if it is printable, else a character from U+0100 on."""
    symbols = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    hidden = (byte for byte in range(256) if byte not in symbols)
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class BytePairs:
    """The encoding that ``encoder.json`` (symbol to id) and ``vocab.bpe`` (merges, the first one first) describe.

    Raises:
        ValueError: one of the files has not the format that its name says, or the two files do not fit each other.
    """

    def __init__(self, encoder_json: str | Path, vocab_bpe: str | Path) -> None:
        vocabulary = read_vocabulary(Path(encoder_json))
        merges = read_merges(Path(vocab_bpe))
        _check(vocabulary, merges, Path(encoder_json), Path(vocab_bpe))
        self._model = BPE(vocab=vocabulary, merges=merges)
        self._symbols = byte_symbols()
        byte_of = {ord(symbol): byte for byte, symbol in self._symbols.items()}
        self.bytes_of: dict[int, bytes] = {
            number: symbol.translate(byte_of).encode("latin-1")
            for symbol, number in vocabulary.items()
            if all(ord(character) in byte_of for character in symbol)
        }

    def merge(self, piece: bytes) -> list[int]:
        """GPT-2's ids of one piece."""
        return [token.id for token in self._model.tokenize(piece.decode("latin-1").translate(self._symbols))]

    def encode(self, text: str) -> list[int]:
        """GPT-2's ids of ``text``, which is not changed before encoding."""
        data, starts = cut(text)
        spans = itertools.pairwise([*starts.tolist(), len(data)])
        return [number for start, end in spans for number in self.merge(data[start:end])]


def read_vocabulary(path: Path) -> dict[str, int]:
    """Read ``encoder.json``, a JSON object from symbols to ids."""
    text = text_of(path, "an encoder.json")
    try:
        vocabulary = json_text.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not an encoder.json: it {error}") from None
    if not isinstance(vocabulary, dict):
        raise ValueError(
            f"{path} is not an encoder.json: it holds {repr(vocabulary)}, expected an object from symbols to whole numbers"
        )
    for symbol, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MOST_IDS:
            raise ValueError(
                f"{path} is not an encoder.json: {repr(symbol)} has the id {repr(number)}, expected a whole number from "
                f"0 to {MOST_IDS - 1}"
            )
        if not symbol.isascii() and any("\ud800" <= character <= "\udfff" for character in symbol):
            raise ValueError(f"{path} is not an encoder.json: {repr(symbol)} holds half a surrogate pair")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{path} is not an encoder.json: two of its symbols have the same id")
    return vocabulary


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read ``vocab.bpe``: a version line, then one merge per line. As in fairseq, a last line without an end is ignored."""
    lines = text_of(path, "a vocab.bpe").split("\n")[1:-1]
    merges = [tuple(line.split()) for line in lines]
    for number, merge in enumerate(merges, start=2):
        if len(merge) != 2:
            raise ValueError(f"{path}, line {number}: expected two symbols to merge, found {len(merge)}")
    return merges


def _check(vocabulary: dict[str, int], merges: list[tuple[str, str]], encoder: Path, vocab: Path) -> None:
    lacking = [byte for byte, symbol in byte_symbols().items() if symbol not in vocabulary]
    if lacking:
        raise ValueError(f"{encoder} has no symbol for {len(lacking)} of the 256 bytes, such as {lacking[0]}")
    last_made: dict[str, int] = {}
    for line, merge in enumerate(merges, start=2):
        last_made["".join(merge)] = line
    for line, (left, right) in enumerate(merges, start=2):
        if left + right not in vocabulary:
            raise ValueError(
                f"{vocab}, line {line} makes {repr(left + right)}, which {encoder} does not have"
            )
        # tokenizers merges one pair after the other, and fairseq merges all equal pairs at once. The results are the same
        # only if no merge makes an earlier merge possible.
        if max(last_made.get(left, 0), last_made.get(right, 0)) > line:
            raise ValueError(
                f"{vocab}, line {line} merges {repr(left)} and {repr(right)} before a later line makes one of them"
            )
    unmade = [s for s in vocabulary if len(s) > 1 and s not in last_made and not SPECIAL.fullmatch(s)]
    if len(unmade) > MOST_UNMADE:
        raise ValueError(
            f"{vocab} has {len(merges)} merges, and none of them makes {len(unmade)} of {encoder}'s symbols, such as "
            f"{repr(unmade[0])}; it may be cut short: get both files again"
        )
