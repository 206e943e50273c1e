"""Encoding of text files to GPT-2's ids: the same bytes as fairseq's ``multiprocessing_bpe_encoder``, many times faster."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moekit.data.bpe import BytePairs, cut
from moekit.data.kept import kept
from moekit.data.lines import Block, blocks, in_order
from moekit.data.progress import bar

# The most pieces whose ids are kept; beyond it, the table is cleared.
REMEMBERED = 1 << 18
# The most bytes of a piece whose ids are kept; longer pieces rarely occur again.
WORTH_KEEPING = 64
_LINE_END = {b"\n": "\n"}


@dataclass(frozen=True)
class Encoded:
    """Counts of encoded text: ``lines`` that were written, and ``dropped`` lines, which were empty."""

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
    """Write GPT-2's ids of ``inputs``, one after the other, to ``output``: one line per line, decimal ids between spaces.

    The bytes are those of fairseq's ``multiprocessing_bpe_encoder`` (with ``--keep-empty`` if ``keep_empty``): lines
    end in ``\\n``, ``\\r\\n`` or ``\\r``, and lose the blanks at both ends; lines left empty are kept or dropped. Line
    ends are not encoded: binarising turns each into ``</s>``.

    ``output`` appears under its name only when it is complete.

    Raises:
        ValueError: an input is missing or not UTF-8, or a BPE file is invalid.
    """
    inputs, output = [Path(path) for path in inputs], Path(output)
    for path in inputs:
        if not path.is_file():
            raise ValueError(f"there is no file {path} to encode")
    # The encoder is loaded here, and not first in a worker, so that an error about the files is raised at once.
    encoder(encoder_json, vocab_bpe)
    work = functools.partial(_encode_block, Path(encoder_json), Path(vocab_bpe), keep_empty)
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


class LineEncoder(dict[bytes, str]):
    """Encodes text to lines of ids: a map from a piece (bytes) to its decimal ids, with a space before each id.

    A line end maps to itself. Most pieces of a text repeat, so the ids of up to ``REMEMBERED`` pieces are kept.
    """

    def __init__(self, bpe: BytePairs) -> None:
        super().__init__(_LINE_END)
        self._bpe = bpe

    def encode(self, text: str) -> str:
        """The decimal ids of ``text``, separated by spaces, with its line ends."""
        data, starts = cut(text)
        spans = itertools.pairwise([*starts.tolist(), len(data)])
        ids = "".join([self[data[start:end]] for start, end in spans])
        return ids.replace("\n ", "\n").removeprefix(" ")

    def __missing__(self, piece: bytes) -> str:
        ids = "".join([f" {number}" for number in self._bpe.merge(piece)])
        if len(piece) <= WORTH_KEEPING:
            if len(self) > REMEMBERED:
                self.clear()
                self.update(_LINE_END)
            self[piece] = ids
        return ids


@kept(2)
def encoder(encoder_json: Path, vocab_bpe: Path) -> LineEncoder:
    """The encoder for these files, which each process loads once until one of them changes."""
    return LineEncoder(BytePairs(encoder_json, vocab_bpe))


def _encode_block(encoder_json: Path, vocab_bpe: Path, keep_empty: bool, block: Block) -> tuple[str, int]:
    """The lines of ids of a block, and the number of dropped empty lines."""
    lines = [line.strip() for line in block.read()]
    left = lines if keep_empty else [line for line in lines if line]
    text = "".join([line + "\n" for line in left])
    return encoder(encoder_json, vocab_bpe).encode(text), len(lines) - len(left)
