"""Encoding: fairseq's own encoder is the oracle, on every kind of text."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import regex

from moekit.data import Codec, encode_files
from moekit.data import encode as encode_module
from moekit.data.bpe import BytePairs, cut
from moekit.data.lines import Block, blocks, in_order
from moekit.paths import DEMO_BPE as DEMO

ENCODER, VOCAB, DICT = DEMO / "encoder.json", DEMO / "vocab.bpe", DEMO / "dict.txt"
PATTERN = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


@pytest.fixture(scope="module")
def bpe() -> BytePairs:
    return BytePairs(ENCODER, VOCAB)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load("demo")


def fairseq_lines(path: Path, keep_empty: bool) -> str:
    """What fairseq's script writes: its own encoder object on its own way of reading lines."""
    from fairseq.examples.roberta.multiprocessing_bpe_encoder import MultiprocessingEncoder

    encoder = MultiprocessingEncoder(
        Namespace(encoder_json=str(ENCODER), vocab_bpe=str(VOCAB), keep_empty=keep_empty)
    )
    encoder.initializer()
    with open(path, encoding="utf-8") as file:
        results = [encoder.encode_lines([line]) for line in file]
    return "".join(lines[0] + "\n" for verdict, lines in results if verdict == "PASS")


# ------------------------------------------------------------------------------------------------ pieces


def pieces(text: str) -> list[str]:
    data, starts = cut(text)
    return [data[a:b].decode() for a, b in itertools.pairwise([*starts.tolist(), len(data)])]


@pytest.mark.parametrize(
    "alphabet", ["' strevlmd", "'sldt a1.\t", "a1 .\t\u00a0\u3000é中\x1c\x85'😀\u0301\U000323af", " \ta"]
)
def test_pieces_are_those_of_the_pattern(alphabet):
    rng = random.Random(alphabet)
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(10)))
        assert pieces(text) == PATTERN.findall(text), repr(text)


def test_every_character_is_cut_as_the_pattern_cuts_it():
    """Also those that younger Unicode versions added: regex has their kinds, older tables do not."""
    text = "".join(f"a{chr(c)} {chr(c)}1" for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 10)
    assert pieces(text) == PATTERN.findall(text)


def test_half_a_surrogate_pair_is_no_text():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        cut("a\ud800")


# ------------------------------------------------------------------------------------------------- files


def text_of_every_kind(lines: int, seed: int = 1) -> bytes:
    rng = random.Random(seed)
    words = (DEMO.parent / "data" / "valid.txt").read_text(encoding="utf-8").split()
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c not in (10, 13)]
    blanks = " \t\x0b\x0c\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2003\u2028\u2029\u3000\ufeff"
    emoji = ["👩‍👩‍👧‍👦", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️", "1️⃣", "🇩🇪", "😀", "e\u0301", "نمی‌خواهم", "हिन्दी"]
    kinds = [
        lambda: "",
        lambda: "".join(rng.choices(blanks, k=rng.randrange(1, 6))),
        lambda: " ".join(rng.choices(words, k=rng.randrange(1, 30))),
        lambda: rng.choice(blanks).join(rng.choices(words, k=rng.randrange(1, 9))),
        lambda: "   ".join(rng.choices(words, k=4)) + "  " + "\t\t".join(rng.choices(words, k=4)) + " \t",
        lambda: "".join(rng.choices(characters, k=rng.randrange(1, 40))),
        lambda: " ".join(rng.choices(emoji + words, k=8)),
        lambda: "".join(rng.choices("'strevlmd \"1", k=30)),
        lambda: (
            bytes(rng.choices(range(256), k=40)).decode(errors="replace").replace("\n", "").replace("\r", "")
        ),
        lambda: rng.choice("=-#_ a") * rng.randrange(1, 200),
        lambda: str(rng.random() * 10 ** rng.randrange(30)) + "\0",
        lambda: "\ufeff" + rng.choice(words),
        lambda: "<|endoftext|> </s> <unk> <pad>",
    ]
    made = [rng.choice(kinds)() for _ in range(lines)]
    # A line of 1 MB.
    made[lines // 3] = " ".join(rng.choices(words, k=180_000))[:1_000_000]
    made[lines // 2] = "".join(rng.choices("ab é中", k=30_000)) + "x" * 3000
    text = "".join(line + rng.choice(["\n"] * 8 + ["\r\n", "\r"]) for line in made)
    return text.encode() + b"the last line has no end"


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "every.txt"
    path.write_bytes(text_of_every_kind(10_000))
    return path


@pytest.mark.parametrize("keep_empty", [True, False])
def test_ten_thousand_lines_of_every_kind(every_kind, tmp_path, keep_empty):
    result = encode_files([every_kind], tmp_path / "out.bpe", ENCODER, VOCAB, keep_empty)
    expected = fairseq_lines(every_kind, keep_empty)
    assert (tmp_path / "out.bpe").read_bytes() == expected.encode()
    assert result.lines == expected.count("\n")
    assert result.lines + result.dropped == len(open(every_kind, encoding="utf-8").readlines())
    assert [path.name for path in tmp_path.iterdir()] == ["out.bpe"]


def test_several_workers_and_blocks_write_the_same(tmp_path):
    text = text_of_every_kind(3000, seed=2) * 2
    (tmp_path / "text").write_bytes(text)
    assert len(list(blocks(tmp_path / "text"))) > 2
    encode_files([tmp_path / "text"], tmp_path / "one", ENCODER, VOCAB, True, workers=1)
    encode_files([tmp_path / "text"], tmp_path / "two", ENCODER, VOCAB, True, workers=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_encoder_that_changes_counts_at_once(tmp_path):
    files = [tmp_path / "encoder.json", tmp_path / "vocab.bpe"]
    alphabet = [symbol for symbol in json.loads(ENCODER.read_text()) if len(symbol) == 1]
    (tmp_path / "text").write_text("abc")
    for ids, merges, expected in (
        ({"ab": 900, "bc": 901}, "a b\nb c\n", [900, alphabet.index("c")]),
        ({"ab": 900, "bc": 901}, "b c\na b\n", [alphabet.index("a"), 901]),
        ({"ab": 901, "bc": 900}, "b c\na b\n", [alphabet.index("a"), 900]),
    ):
        files[0].write_text(json.dumps({symbol: n for n, symbol in enumerate(alphabet)} | ids))
        files[1].write_text(f"#version\n{merges}")
        encode_files([tmp_path / "text"], tmp_path / "out", *files)
        assert [int(number) for number in (tmp_path / "out").read_text().split()] == expected


def test_several_files_follow_one_another(tmp_path):
    # No line end here: the next file begins a line all the same.
    (tmp_path / "a").write_text("one\n\ntwo")
    (tmp_path / "b").write_text("three\n")
    (tmp_path / "c").write_text("")
    got = encode_files(
        [tmp_path / name for name in "acb"], tmp_path / "out", ENCODER, VOCAB, keep_empty=False
    )
    (tmp_path / "joined").write_text("one\ntwo\nthree\n")
    assert (tmp_path / "out").read_text() == fairseq_lines(tmp_path / "joined", True)
    assert (got.lines, got.dropped) == (3, 1)


@pytest.mark.parametrize(
    "broken", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xe2\x82", b"\xc0\xaf", b"\xf5\x80\x80\x80"]
)
def test_broken_utf8_is_refused_as_fairseq_refuses_it(tmp_path, broken):
    good = "grün\r\nzwei\rdrei\n".encode() * 5
    (tmp_path / "text").write_bytes(good + b"vier " + broken + b" \nmore\n")
    with pytest.raises(UnicodeDecodeError):
        fairseq_lines(tmp_path / "text", True)
    with pytest.raises(ValueError, match=rf"text, line 16: byte {len(good) + 5} .* is not UTF-8"):
        encode_files([tmp_path / "text"], tmp_path / "out", ENCODER, VOCAB)
    assert not (tmp_path / "out").exists()


def test_broken_utf8_far_behind(tmp_path):
    (tmp_path / "text").write_bytes(b"0123456789abcde\n" * 100_000 + b"\xff\n")
    with pytest.raises(ValueError, match=r"line 100001: byte 1600000 \(0xff\)"):
        encode_files([tmp_path / "text"], tmp_path / "out", ENCODER, VOCAB)
    assert not (tmp_path / "out").exists()


def test_a_memory_too_small_for_the_text_changes_nothing(every_kind, bpe, monkeypatch):
    text = "".join(line.strip() + "\n" for line in Block(every_kind, 0, every_kind.stat().st_size).read())
    expected = encode_module.LineEncoder(bpe).encode(text)
    monkeypatch.setattr(encode_module, "REMEMBERED", 10)
    small = encode_module.LineEncoder(bpe)
    cuts = [0, *sorted(i + 1 for i, c in enumerate(text) if c == "\n")[::500], len(text)]
    assert "".join(small.encode(text[a:b]) for a, b in itertools.pairwise(cuts)) == expected
    assert len(small) <= 12


def test_pieces_that_share_a_beginning_stay_apart(bpe):
    words = [
        "a",
        "a\0",
        "a\0\0",
        "abcdefgh",
        "abcdefgh\0",
        "abcdefghi",
        "abcdefghijklmno",
        "abcdefghijklmnop",
    ]
    encoder = encode_module.LineEncoder(bpe)
    for a, b in itertools.product(words, words):
        text = f"{a}\n{b}\n"
        expected = "".join(" ".join(map(str, bpe.encode(word))) + "\n" for word in (a, b))
        assert encoder.encode(text) == encoder.encode(text) == expected


# ------------------------------------------------------------------------------------------------ blocks


def test_blocks_are_whole_lines_for_every_kind_of_line_end(tmp_path):
    data = b"one\r\ntwo\rthree\n\n\rfour\r\n\r\nfive" * 3
    (tmp_path / "f").write_bytes(data)
    with open(tmp_path / "f", encoding="utf-8") as file:
        expected = [line.removesuffix("\n") for line in file]
    for size in range(1, 40):
        got = list(blocks(tmp_path / "f", size))
        assert [b.start for b in got] == [0, *(b.end for b in got[:-1])] and got[-1].end == len(data)
        assert [line for block in got for line in block.read()] == expected
    (tmp_path / "empty").touch()
    assert list(blocks(tmp_path / "empty")) == []


def die(block: Block) -> None:
    import os

    os._exit(3)


def test_a_worker_that_dies_is_an_error_and_not_a_wait(tmp_path):
    (tmp_path / "f").write_bytes(b"x\n" * 100)
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(in_order(die, blocks(tmp_path / "f", 10), workers=2))


def test_no_worker_outlives_its_parent(tmp_path):
    import psutil

    (tmp_path / "text").write_bytes(random.Random(5).randbytes(3_000_000).hex().encode() + b"\n")
    (tmp_path / "more").write_bytes((tmp_path / "text").read_bytes() * 20)
    code = (
        "import sys; from moekit.data import encode_files\n"
        f"encode_files([{str(tmp_path / 'more')!r}], {str(tmp_path / 'out')!r}, {str(ENCODER)!r}, {str(VOCAB)!r}, workers=2)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    family = []
    deadline = time.monotonic() + 60
    # Fork server, resource tracker, two workers.
    while len(family) < 4 and time.monotonic() < deadline:
        family = psutil.Process(child.pid).children(recursive=True)
        time.sleep(0.05)
    assert len(family) >= 4
    child.kill()
    child.wait(10)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- codec


def test_text_comes_back(codec, every_kind):
    for text in (
        "",
        "\n",
        "a\n",
        "\na",
        "  two  spaces \t\n\n end ",
        "naïve 中文 😀\x00",
        "It's 3.14\n'quoted'",
    ):
        assert codec.decode(codec.encode(text)) == text
    lines = Block(every_kind, 0, every_kind.stat().st_size).read()[:3000]
    assert codec.decode(codec.encode("\n".join(lines))) == "\n".join(lines)


def test_line_ends_become_eos_and_nothing_else_does(codec):
    a, b = codec.encode("one"), codec.encode("two")
    assert codec.encode("one\ntwo\r\none\rtwo\n") == a + [2] + b + [2] + a + [2] + b + [2]
    assert 2 not in codec.encode("</s> <|endoftext|> \x85\u2028\x0b\x0c")


def test_ids_are_those_of_fairseq_binarised_data(codec):
    from moekit.data import Binarised

    text = (DEMO.parent / "data" / "valid.txt").read_text(encoding="utf-8")
    ids = codec.encode("".join(line.strip() + "\n" for line in text.splitlines()))
    assert np.array_equal(ids, Binarised(DEMO.parent / "data" / "data-bin" / "valid").ids)


def test_pieces_for_the_eye(codec):
    ids = codec.encode("Two lines.\nHere.")
    assert "".join(codec.pieces(ids)) == "Two lines.</s>Here."
    assert codec.pieces([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert codec.decode([0, *codec.encode("a"), 1, 3, 2]) == "a<unk>\n"
    halves = codec.encode("\U000323af")
    assert len(halves) > 1 and codec.decode(halves) == "\U000323af"
    assert "".join(codec.pieces(halves)) == "\\xf0\\xb2\\x8e\\xaf"
    assert codec.decode(halves[:1]) == "\ufffd"


def test_ids_of_any_kind_of_sequence_and_none_outside(codec):
    import torch

    ids = codec.encode("any kind")
    assert codec.decode(torch.tensor(ids)) == codec.decode(np.array(ids, np.uint16)) == "any kind"
    for outside in (-1, len(codec)):
        with pytest.raises(ValueError, match=f"id {outside} is outside the dictionary"):
            codec.decode([outside])


def test_a_piece_that_the_dictionary_lacks_is_unknown(tmp_path, bpe):
    rows = DICT.read_text().splitlines()
    number = bpe.encode("x")[0]
    (tmp_path / "dict.txt").write_text("".join(f"{row}\n" for row in rows if row.split()[0] != str(number)))
    codec = Codec(ENCODER, VOCAB, tmp_path / "dict.txt")
    assert codec.encode("x") == [codec.unk] and codec.decode([codec.unk]) == "<unk>"


# -------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    "encoder, merges, match",
    [
        ("no json", None, "is not an encoder.json"),
        ("[1, 2]", None, "an object from symbols to whole numbers"),
        ("[" * 100_000, None, "is not an encoder.json"),
        ('{"a": -1}', None, "'a' has the id -1, expected a whole number from 0"),
        ('{"a": 1e3}', None, "'a' has the id 1000.0, expected a whole number"),
        ('{"a": true}', None, "'a' has the id True, expected a whole number"),
        (f'{{"a": {2**70}}}', None, "'a' has the id 1180591620717411303424, expected"),
        ('{"a": 1, "b": 1}', None, "two of its symbols have the same id"),
        ('{"\\ud800": 1}', None, "holds half a surrogate pair"),
        ("{}", None, "no symbol for 256 of the 256 bytes"),
        (None, "#version\na b c\n", "line 2: expected two symbols to merge, found 3"),
        (None, "#version\n\u0120 \u0143\n", "line 2 makes '\u0120\u0143', which .* does not have"),
        (None, "#version\nth e\nt h\n", "line 2 merges 'th' and 'e' before a later line makes one of them"),
    ],
)
def test_bpe_files_that_do_not_fit(tmp_path, encoder, merges, match):
    (tmp_path / "encoder.json").write_text(encoder or ENCODER.read_text())
    (tmp_path / "vocab.bpe").write_text(merges or VOCAB.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        BytePairs(tmp_path / "encoder.json", tmp_path / "vocab.bpe")


def test_merges_that_are_cut_short_at_a_line_end(tmp_path):
    lines = VOCAB.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "vocab.bpe").write_text("".join(lines[:-20]), encoding="utf-8")
    message = f"has {len(lines) - 21} merges, and none of them makes 20 of .*encoder.json's symbols"
    with pytest.raises(ValueError, match=message):
        BytePairs(ENCODER, tmp_path / "vocab.bpe")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*encoder.json"):
        Codec.load(tmp_path)
    with pytest.raises(ValueError, match=r"there is no file .*nothing.txt to encode"):
        encode_files([tmp_path / "nothing.txt"], tmp_path / "out", ENCODER, VOCAB)


def test_the_last_merge_without_a_line_end_is_not_read_as_in_fairseq(tmp_path):
    from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

    alphabet = {
        symbol: number for number, symbol in enumerate(json.loads(ENCODER.read_text())) if len(symbol) == 1
    }
    (tmp_path / "encoder.json").write_text(json.dumps({**alphabet, "ab": 900, "abc": 901}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\nab c")
    paths = tmp_path / "encoder.json", tmp_path / "vocab.bpe"
    assert (
        BytePairs(*paths).encode("abc") == get_encoder(*map(str, paths)).encode("abc") == [900, alphabet["c"]]
    )
