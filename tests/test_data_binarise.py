"""Binarising: the same bytes as fairseq-preprocess."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moekit.data import Binarised, binarise
from moekit.data.binarise import id_type
from moekit.data.dictionary import Dictionary


def fairseq_files(source: Path, prefix: Path, dict_txt: Path) -> dict[str, bytes]:
    """fairseq-preprocess's own inner call, with one worker."""
    from fairseq.binarizer import FileBinarizer, VocabularyDatasetBinarizer
    from fairseq.data import Dictionary

    vocabulary = Dictionary.load(str(dict_txt))
    binarizer = VocabularyDatasetBinarizer(vocabulary, append_eos=True)
    summary = FileBinarizer.multiprocess_dataset(
        str(source), "mmap", binarizer, str(prefix), vocab_size=len(vocabulary), num_workers=1
    )
    return {"bin": read(prefix, "bin"), "idx": read(prefix, "idx"), "summary": summary}


def read(prefix: Path, end: str) -> bytes:
    return Path(f"{prefix}.{end}").read_bytes()


def dictionary(path: Path, symbols: list[str]) -> Path:
    path.write_text(
        "".join(f"{symbol} {len(symbols) - i}\n" for i, symbol in enumerate(symbols)), encoding="utf-8"
    )
    return path


def odd_lines(lines: int) -> str:
    rng = random.Random(3)
    words = [*map(str, range(60)), "unknown", "</s>", "<unk>", "<pad>", "日本", "\ufeff"]
    blanks = [" ", "  ", "\t", "\x0b", "\x1c", "\u3000", "\u2028", "\x85"]
    made = [
        "".join(rng.choice(words) + rng.choice(blanks) for _ in range(rng.choice([0, 1, 5, 40])))
        for _ in range(lines)
    ]
    return "".join(line + rng.choice(["\n", "\n", "\n", "\r\n", "\r"]) for line in made) + "12 13"


def test_the_same_bytes_as_fairseq_on_odd_lines(tmp_path):
    (tmp_path / "text").write_text(odd_lines(15_000), encoding="utf-8", newline="")
    vocabulary = dictionary(tmp_path / "dict.txt", [*map(str, range(50)), "日本"])
    expected = fairseq_files(tmp_path / "text", tmp_path / "theirs", vocabulary)
    got = binarise(tmp_path / "text", tmp_path / "ours", vocabulary, workers=2)
    assert read(tmp_path / "ours", "bin") == expected["bin"]
    assert read(tmp_path / "ours", "idx") == expected["idx"]
    theirs = expected["summary"]
    assert (got.lines, got.tokens, got.unknown) == (theirs.num_seq, theirs.num_tok, theirs.num_replaced)
    assert got.unknown_percent == pytest.approx(theirs.replaced_percent)
    # Ten numbers, "unknown", "\ufeff".
    assert got.unknown_types == len(theirs.replaced) == 12


@pytest.mark.parametrize("types, size", [(65_499, 2), (65_500, 4), (70_000, 4)])
def test_ids_take_two_or_four_bytes_as_in_fairseq(tmp_path, types, size):
    vocabulary = dictionary(tmp_path / "dict.txt", [str(i) for i in range(types - 4)])
    (tmp_path / "text").write_text(f"0 {types - 5} 17\n\n{types - 4}\n")
    expected = fairseq_files(tmp_path / "text", tmp_path / "theirs", vocabulary)
    binarise(tmp_path / "text", tmp_path / "ours", vocabulary)
    assert id_type(types).itemsize == size
    assert (read(tmp_path / "ours", "bin"), read(tmp_path / "ours", "idx")) == (
        expected["bin"],
        expected["idx"],
    )
    assert Binarised(tmp_path / "ours").ids.tolist() == [4, types - 1, 21, 2, 2, 3, 2]


def test_the_same_files_as_the_command(tmp_path, reference):
    """The whole command, its dictionary included, on text that was recorded."""
    raw = reference / "raw"
    for subset in ("train", "valid", "test"):
        binarise(raw / f"{subset}.bpe", tmp_path / subset, raw / "dict.txt")
        for end in ("bin", "idx"):
            assert read(tmp_path / subset, end) == read(reference / "data-bin" / subset, end), subset
    (tmp_path / "text").write_text(odd_lines(500), encoding="utf-8", newline="")
    vocabulary = dictionary(tmp_path / "dict.txt", [*map(str, range(50)), "日本"])
    subprocess.run(
        [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--srcdict", vocabulary]
        + ["--validpref", tmp_path / "text", "--destdir", tmp_path / "theirs", "--workers", "2"],
        check=True,
        capture_output=True,
        timeout=120,
    )
    binarise(tmp_path / "text", tmp_path / "ours", vocabulary)
    assert read(tmp_path / "ours", "bin") == read(tmp_path / "theirs" / "valid", "bin")
    assert read(tmp_path / "ours", "idx") == read(tmp_path / "theirs" / "valid", "idx")
    assert vocabulary.read_bytes() == (tmp_path / "theirs" / "dict.txt").read_bytes()


def test_offsets_written_in_several_steps(tmp_path, monkeypatch):
    from moekit.data.binarise import HEADER, _finish_index

    sizes = np.array([3, 1, 4, 1, 5, 9, 2], "<i4")
    for step in (1, 3, 7, 100):
        with open(tmp_path / "idx", "w+b") as file:
            file.seek(HEADER.size)
            file.write(sizes.tobytes())
            _finish_index(file, len(sizes), np.dtype("<u2"), step)
        offsets = np.frombuffer((tmp_path / "idx").read_bytes()[HEADER.size + 4 * 7 :], "<i8")
        assert offsets.tolist() == [0, 6, 8, 16, 18, 28, 46]


def test_a_dictionary_that_changes_counts_at_once(tmp_path):
    (tmp_path / "text").write_text("a b\nb a\n")
    for symbols, ids in ((["a", "b"], [4, 5, 2, 5, 4, 2]), (["b", "a"], [5, 4, 2, 4, 5, 2])):
        vocabulary = dictionary(tmp_path / "dict.txt", symbols)
        binarise(tmp_path / "text", tmp_path / "data", vocabulary)
        assert Binarised(tmp_path / "data").ids.tolist() == ids


def test_nothing_half_written_gets_a_name(tmp_path):
    vocabulary = dictionary(tmp_path / "dict.txt", ["a"])
    (tmp_path / "text").write_bytes(b"a a\n" * 200_000 + b"\xff\n")
    with pytest.raises(ValueError, match="line 200001"):
        binarise(tmp_path / "text", tmp_path / "out", vocabulary)
    assert not list(tmp_path.glob("out.bin")) and not list(tmp_path.glob("out.idx"))


def test_damaged_data_is_not_opened(tmp_path):
    vocabulary = dictionary(tmp_path / "dict.txt", ["a"])
    (tmp_path / "text").write_text("a a\na\n")
    binarise(tmp_path / "text", tmp_path / "out", vocabulary)
    data = Binarised(tmp_path / "out")
    assert len(data) == 2 and data.sizes.tolist() == [3, 2] and data.ids.tolist() == [4, 4, 2, 4, 2]
    whole = read(tmp_path / "out", "bin")
    (tmp_path / "out.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="8 bytes, but its index out.idx counts 5 tokens of 2 bytes"):
        Binarised(tmp_path / "out")
    (tmp_path / "out.idx").write_bytes(read(tmp_path / "out", "idx")[:-1])
    with pytest.raises(ValueError, match="has 49 bytes; expected 50 for its 2 lines"):
        Binarised(tmp_path / "out")
    with pytest.raises(ValueError, match="there is no binarised data"):
        Binarised(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------- dictionaries


@pytest.mark.parametrize(
    "text",
    ["a 1\nb 2\n", "a 1\nb 2\na 3 #fairseq:overwrite\n", "a b 1\n  x\t 2\n", "</s> 1 #fairseq:overwrite\n"],
)
def test_dictionaries_as_fairseq_reads_them(tmp_path, text):
    from fairseq.data import Dictionary as Theirs

    (tmp_path / "dict.txt").write_text(text)
    ours, theirs = Dictionary(tmp_path / "dict.txt"), Theirs.load(str(tmp_path / "dict.txt"))
    assert ours.symbols == theirs.symbols and ours.index == theirs.indices


@pytest.mark.parametrize(
    "text, match",
    [
        ("a 1\nb\n", "line 2: expected '<symbol> <count>', found 'b'"),
        ("a one\n", "line 1: expected"),
        ("a 1\n\nb 2\n", "line 2: expected"),
        ("a 1\na 2\n", "line 2: 'a' for the second time"),
        ("<unk> 2\n", "line 1: '<unk>' for the second time"),
    ],
)
def test_dictionaries_that_fairseq_refuses_too(tmp_path, text, match):
    from fairseq.data import Dictionary as Theirs

    (tmp_path / "dict.txt").write_text(text)
    with pytest.raises(ValueError, match=match):
        Dictionary(tmp_path / "dict.txt")
    with pytest.raises((ValueError, RuntimeError)):
        Theirs.load(str(tmp_path / "dict.txt"))
