"""Text files to files of GPT-2's ids: the same bytes as fairseq's ``multiprocessing_bpe_encoder``, many times faster."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moekit.data.bpe import BytePairs, cut
from moekit.data.lines import Block, blocks, in_order
from moekit.data.progress import bar

PLACES = 1 << 19  # of the table of short pieces
REMEMBERED = 1 << 18  # pieces in the other memory; then all are forgotten
WORTH_KEEPING = 64  # bytes: longer pieces hardly come again


@dataclass(frozen=True)
class Encoded:
    """What was encoded: ``lines`` written, and ``dropped`` ones, which were empty."""

    lines: int
    dropped: int


def encode_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    encoder_json: str | Path,
    vocab_bpe: str | Path,
    keep_empty: bool = True,
    workers: int = 1,
) -> Encoded:
    """Write GPT-2's ids of ``inputs``, one after the other, to ``output``: a line a line, ids in decimal, spaces between.

    The bytes are those of fairseq's ``multiprocessing_bpe_encoder`` (with ``--keep-empty`` if ``keep_empty``): lines
    end in ``\\n``, ``\\r\\n`` or ``\\r``, and lose the blanks at both ends; lines left empty are kept or dropped. Line
    ends themselves are not encoded: binarising turns each into ``</s>``.

    ``output`` appears under its name only when it is whole.

    Raises:
        ValueError: an input is missing or not UTF-8, or the BPE files are not what they should be.
    """
    inputs, output = [Path(path) for path in inputs], Path(output)
    for path in inputs:
        if not path.is_file():
            raise ValueError(f"there is no file {path} to encode")
    encoder(
        str(encoder_json), str(vocab_bpe)
    )  # says what is wrong with the files here rather than in a worker
    work = functools.partial(_encode_block, str(encoder_json), str(vocab_bpe), keep_empty)
    todo = (block for path in inputs for block in blocks(path))
    part = output.with_name(output.name + ".part")
    lines = dropped = 0
    with (
        open(part, "w", encoding="ascii", newline="\n") as file,
        bar(f"encode {output.name}", sum(path.stat().st_size for path in inputs)) as progress,
    ):
        for block, (text, empty) in in_order(work, todo, workers):
            file.write(text)
            lines += text.count("\n")
            dropped += empty
            progress.update(block.end - block.start)
    part.replace(output)
    return Encoded(lines, dropped)


class LineEncoder:
    """Text to lines of ids, with a memory of pieces.

    Most pieces of a text came before, and most are short. So a piece of up to 15 bytes is looked up, a whole block's at
    once, in a table where it has one place, which it may lose to another. The others are looked up one by one.
    """

    def __init__(self, bpe: BytePairs) -> None:
        self.bpe = bpe
        self._first = np.zeros(PLACES, np.uint64)  # the key of the piece at each place
        self._second = np.zeros(PLACES, np.uint64)  # 0 is no piece's
        self._values = np.full(PLACES, "", object)  # its ids in decimal, a space before each
        self._slow = _Memory(bpe)

    def encode(self, text: str) -> str:
        """The ids of ``text`` in decimal, spaces between, its line ends kept."""
        data, starts = cut(text)
        if not data:
            return ""
        lengths = np.diff(starts, append=len(data))
        first, second = _keys(data, starts, lengths)
        places = _places(first, second)
        known = (self._first.take(places) == first) & (self._second.take(places) == second)
        ids = self._values.take(places)
        unknown = np.flatnonzero(~known)
        spans = zip(starts[unknown].tolist(), (starts + lengths)[unknown].tolist(), strict=True)
        ids[unknown] = [self._slow[data[start:end]] for start, end in spans]
        new = unknown[
            lengths[unknown] <= SHORT
        ]  # those that want the same place: the last gets it, in all three
        taken = places[new]
        self._first[taken], self._second[taken], self._values[taken] = first[new], second[new], ids[new]
        return "".join(ids.tolist()).replace("\n ", "\n").removeprefix(" ")


SHORT = 15  # bytes: what fits into two 8-byte words with its length
_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd, and bits of no pattern


def _keys(data: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two words a piece, uint64: its bytes, and its length on top of the second; unique for short pieces."""
    words = np.ndarray(
        len(data) + 8, "<u8", data + bytes(16), strides=(1,)
    )  # the 8 bytes from each offset on
    first = words[starts] & _LOW_BYTES.take(np.minimum(lengths, 8))
    second = words[starts + 8] & _LOW_BYTES.take(np.clip(lengths - 8, 0, 7))
    return first, second | np.minimum(lengths, 255).astype(np.uint64) << np.uint64(56)


def _places(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    mixed = (first * _MIX[0] ^ second * _MIX[1]) * _MIX[0]
    return (mixed >> np.uint64(64 - PLACES.bit_length() + 1)).astype(np.int64)


class _Memory(dict[bytes, str]):
    """The ids of each piece in decimal, a space before each; of a line end, itself."""

    def __init__(self, bpe: BytePairs) -> None:
        super().__init__({b"\n": "\n"})
        self._bpe = bpe

    def __missing__(self, piece: bytes) -> str:
        ids = "".join([f" {number}" for number in self._bpe.merge(piece)])
        if len(piece) <= WORTH_KEEPING:
            if len(self) > REMEMBERED:
                self.clear()
                self[b"\n"] = "\n"
            self[piece] = ids
        return ids


@functools.cache
def encoder(encoder_json: str, vocab_bpe: str) -> LineEncoder:
    """This process's encoder for these files."""
    return LineEncoder(BytePairs(encoder_json, vocab_bpe))


def _encode_block(encoder_json: str, vocab_bpe: str, keep_empty: bool, block: Block) -> tuple[str, int]:
    """A block's lines of ids, and how many empty lines were dropped."""
    lines = [line.strip() for line in block.read()]
    kept = lines if keep_empty else [line for line in lines if line]
    text = "".join([line + "\n" for line in kept])
    return encoder(encoder_json, vocab_bpe).encode(text), len(lines) - len(kept)
