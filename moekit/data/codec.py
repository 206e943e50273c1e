"""Conversion between text and the ids of a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moekit import arguments, paths
from moekit.data.bpe import BytePairs
from moekit.data.dictionary import Dictionary
from moekit.symbols import BOS, EOS, PAD, UNK

FILES = ("encoder.json", "vocab.bpe", "dict.txt")


def places(checkpoint: Path) -> list[Path]:
    """The folders in which a checkpoint's codec is looked for, beside the files in ``checkpoint``."""
    return [checkpoint, checkpoint / "gpt2_bpe", checkpoint.parent / "gpt2_bpe"]


def has_codec(folder: Path) -> bool:
    """Whether a folder has a codec's files."""
    return all((folder / name).is_file() for name in FILES)


class Codec:
    """The codec of a fairseq language model: GPT-2's byte-level BPE, then fairseq's dictionary.

    fairseq's tools encode text line by line and end each line with ``</s>``. This class does the same, and it decodes
    ``</s>`` to a line end.

        codec = Codec.load("demo")
        ids = codec.encode("Two lines.\\nHere.")
        codec.decode(ids)
        codec.pieces(ids)

    Here the ids have no ``</s>`` at the end, because the text does not end with a line end. ``decode`` gives the same text,
    and ``pieces`` gives ``["Two", " lines", ".", "</s>", "Here", "."]``.

    Args:
        encoder_json, vocab_bpe: GPT-2's files: symbol to id, and merges.
        dict_txt: fairseq's dictionary, whose symbols are GPT-2's ids in decimal.

    Attributes:
        bos, pad, eos, unk: ids of the special symbols: 0, 1, 2 and 3 in every fairseq dictionary.

    Raises:
        ValueError: a file is missing, or it has not the format that its name says.
    """

    bos, pad, eos, unk = BOS, PAD, EOS, UNK
    reads_text = True

    def __init__(self, encoder_json: str | Path, vocab_bpe: str | Path, dict_txt: str | Path) -> None:
        self.encoder_json, self.vocab_bpe = Path(encoder_json), Path(vocab_bpe)
        self.bpe = BytePairs(encoder_json, vocab_bpe)
        self.dictionary = Dictionary(dict_txt)
        self._ids = {number: self.dictionary.index.get(str(number), UNK) for number in self.bpe.bytes_of}
        if set(self._ids.values()) == {UNK}:
            raise ValueError(f"{dict_txt} holds none of {encoder_json}'s ids: it is of another model")
        self._bytes = {self._ids[number]: text for number, text in self.bpe.bytes_of.items()}
        self._bytes.pop(UNK, None)

    @classmethod
    def load(cls, folder: str | Path = "demo") -> Codec:
        """The codec of the three files in ``folder``; "demo" is the codec of the demo model."""
        folder = paths.of_demo(folder, "bpe") or arguments.check("bpe", folder, arguments.Path())
        return cls(*(folder / name for name in FILES))

    def __repr__(self) -> str:
        return f"<codec of {self.dictionary.path.parent}: {len(self):,} types>"

    def __len__(self) -> int:
        """The number of types of the dictionary, including the special ones; all ids are below it."""
        return len(self.dictionary)

    def id_of(self, number: int) -> int:
        """The dictionary's id of GPT-2's id ``number``; that of ``<unk>`` where it has none."""
        return self._ids.get(number, UNK)

    def encode(self, text: str) -> list[int]:
        """The dictionary's ids of ``text``, including blanks at the ends of lines; each line end becomes ``</s>``.

        A line ends in ``\\n``, ``\\r\\n`` or ``\\r``. A piece that the dictionary lacks becomes ``<unk>``.
        """
        ids: list[int] = []
        for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n")):
            if number:
                ids.append(EOS)
            ids.extend(self._ids[piece] for piece in self.bpe.encode(line))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. ``<s>`` and ``<pad>`` add no text; bytes that are not UTF-8 become U+FFFD."""
        hidden = {BOS: b"", PAD: b"", EOS: b"\n"}
        return b"".join(hidden.get(number, self._text(number)) for number in self._checked(ids)).decode(
            errors="replace"
        )

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id as readable text, or as its symbol (``</s>``); bytes of an incomplete character as ``\\xe2``."""
        return [self._text(number).decode(errors="backslashreplace") for number in self._checked(ids)]

    def sizes(self) -> np.ndarray:
        """[len(self)] int64, the bytes of text that each id stands for: ``</s>`` for the one of a line end, ``<unk>`` for none.

        The bytes of an unknown piece are not known from its id.
        """
        found = np.array([len(self._text(number)) for number in range(len(self))])
        found[[BOS, PAD, UNK]], found[EOS] = 0, 1
        return found

    def _text(self, number: int) -> bytes:
        return self._bytes.get(number) or self.dictionary.symbols[number].encode()

    def _checked(self, ids: Iterable[int]) -> list[int]:
        numbers, types = list(map(int, ids)), len(self)
        for number in (min(numbers), max(numbers)) if numbers else ():
            if not 0 <= number < types:
                raise ValueError(f"id {number} is outside the dictionary, whose ids are 0 to {types - 1}")
        return numbers


class Ids:
    """The replacement of a missing codec: it shows tokens as ids, and raises an error for text.

    Args:
        why: the message of the error that :meth:`encode` raises.
    """

    bos, pad, eos, unk = BOS, PAD, EOS, UNK
    reads_text = False

    def __init__(self, why: str = "these tokens have no codec") -> None:
        self.why = why

    def __repr__(self) -> str:
        return f"<no codec, tokens are ids: {self.why}>"

    def encode(self, text: str) -> list[int]:
        """Raise a ValueError with the message ``why``."""
        raise ValueError(self.why)

    def decode(self, ids: Iterable[int]) -> str:
        """The ids, each after a space."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id after a space."""
        return [f" {int(number)}" for number in ids]
