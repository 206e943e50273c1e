"""The demo's text, tokenizer and binarised data agree with each other and with fairseq's own encoder."""

import json
import random
import struct
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import moekit.demo
from moekit.demo import corpus, readers, tokenizer
from moekit.demo.readers import Document
from moekit.demo.sources import DOMAINS, packages

FOLDER = Path(moekit.demo.__file__).parent
DATA, BPE = FOLDER / "data", FOLDER / "gpt2_bpe"
SPLITS = ("valid", "test")
ODD_LINES = [
    "don't I'LL we've",
    "naïve Straße Ёж",
    "x  =   [1,2]\t# 3½ ²",
    "日本語 😀",
    "\u00a0a\u2028b",
    "'s's",
    "{{{}}}",
]


def lines_of(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").split("\n")[:-1]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.load_bpe(BPE)


@pytest.mark.parametrize("split", SPLITS)
def test_each_line_has_a_domain_and_survives_the_encoder(split, bpe):
    text, domains = lines_of(f"{split}.txt"), lines_of(f"{split}.domains.txt")
    assert len(text) == len(domains)
    assert list(dict.fromkeys(domains)) == list(DOMAINS)  # contiguous blocks, in order
    assert sum(a != b for a, b in pairwise(domains)) == len(DOMAINS) - 1
    sizes = Counter()
    for line, domain in zip(text, domains, strict=True):
        assert line == line.strip() != ""  # fairseq's encoder strips lines and drops empty ones
        sizes[domain] += len(line.encode()) + 1
    assert min(sizes.values()) > 0.6 * max(sizes.values())


@pytest.mark.parametrize("split", SPLITS)
def test_shipped_binarised_data_is_the_shipped_text(split, bpe):
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(DATA / "data-bin" / "dict.txt"))
    dataset = data_utils.load_indexed_dataset(str(DATA / "data-bin" / split), dictionary)
    encoded = tokenizer.encode(bpe, lines_of(f"{split}.txt"))
    assert len(dataset) == len(encoded)
    expected = tokenizer.flat_tokens([encoded], BPE)
    assert np.array_equal(np.concatenate([dataset[i].numpy() for i in range(len(dataset))]), expected)
    by_fairseq = [
        dictionary.encode_line(" ".join(map(str, ids)), add_if_not_exist=False).numpy() for ids in encoded
    ]
    assert np.array_equal(np.concatenate(by_fairseq), expected)
    assert dictionary.unk() not in expected


def test_same_ids_as_fairseqs_encoder(bpe):
    from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

    reference = get_encoder(str(BPE / "encoder.json"), str(BPE / "vocab.bpe"))
    lines = lines_of("valid.txt") + lines_of("test.txt") + ODD_LINES
    assert tokenizer.encode(bpe, lines) == [reference.encode(line.strip()) for line in lines]


def test_encode_then_decode_gives_the_line_back(bpe):
    for split in SPLITS:
        lines = lines_of(f"{split}.txt")
        assert [tokenizer.decode(bpe, ids) for ids in tokenizer.encode(bpe, lines)] == lines


def test_empty_lines_are_left_out(bpe):
    assert tokenizer.encode(bpe, ["", " a b ", "\t"]) == tokenizer.encode(bpe, ["a b"])


def test_dictionary_holds_every_type_by_falling_count():
    rows = [line.split() for line in (BPE / "dict.txt").read_text().splitlines()]
    types = json.loads((BPE / "encoder.json").read_text())
    names = [name for name, _ in rows if name.isdigit()]
    assert sorted(map(int, names)) == sorted(types.values()) == list(range(tokenizer.TYPES))
    assert [name for name, _ in rows[len(names) :]] == ["madeupword0000", "madeupword0001", "madeupword0002"]
    counts = [int(count) for _, count in rows]
    assert counts == sorted(counts, reverse=True)
    assert tokenizer.SPECIALS + len(rows) == 8192
    assert (BPE / "dict.txt").read_bytes() == (DATA / "data-bin" / "dict.txt").read_bytes()


def test_figures_are_those_of_the_shipped_text():
    figures = json.loads((DATA / "meta.json").read_text())["splits"]
    for split in SPLITS:
        total = figures[split]["total"]
        assert total["bytes"] == (DATA / f"{split}.txt").stat().st_size
        for column in ("bytes", "tokens"):
            assert total[column] == sum(figures[split][domain][column] for domain in DOMAINS)
    assert figures["train"].keys() == figures["valid"].keys() == {*DOMAINS, "total"}


def test_sources_name_every_domain_package_and_held_out_document():
    page = (FOLDER / "SOURCES.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"
    ]
    listed = {(row[0], row[1]) for row in rows[2:]}
    assert listed == {(domain, source.package) for domain, sources in DOMAINS.items() for source in sources}
    assert {row[1] for row in rows[2:]} == set(packages())
    assert all(all(row) and row[4].isdigit() for row in rows[2:])
    for split in SPLITS:
        for domain in DOMAINS:
            assert f"- {split}, {domain}: `" in page


def test_unigram_cost_by_hand():
    # train counts 3, 0, 1 plus one each: 4/7, 1/7, 2/7
    bits = tokenizer.cross_entropy(np.array([2, 1, 0]), np.array([3, 0, 1]))
    assert bits == pytest.approx(2 * np.log2(7 / 4) + np.log2(7))


def test_training_a_tokenizer_writes_gpt2_files(tmp_path):
    lines = ["the cat sat on the mat", "the hat that the cat had"] * 3
    bpe = tokenizer.train_bpe(lines, tmp_path, num_types=256 + 5 + 1)
    types = json.loads((tmp_path / "encoder.json").read_text())
    assert list(types.values()) == list(range(262))
    assert (types["!"], types["a"], types["ÿ"], types["Ġ"], types["<|endoftext|>"]) == (0, 64, 187, 220, 261)
    assert (tmp_path / "vocab.bpe").read_text(encoding="utf-8").splitlines()[0] == "#version: 0.2"
    tokenizer.write_dictionary(Counter(i for ids in tokenizer.encode(bpe, lines) for i in ids), tmp_path)
    rows = (tmp_path / "dict.txt").read_text().splitlines()
    assert (len(rows) + tokenizer.SPECIALS) % 8 == 0
    assert rows[-1].split() == [f"madeupword{len(rows) - 262 - 1:04d}", "0"]
    with pytest.raises(ValueError, match="expected 4000"):
        tokenizer.train_bpe(lines, tmp_path, num_types=4000)


def test_html_keeps_prose_of_one_language(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>Der Titel der Seite und noch mehr davon und mehr</title></head><body>"
        "<p>Sie können die Datei mit dem <b>Befehl</b>\n öffnen und dann\n nicht mehr schließen.</p>"
        "<p>You can open the file with the command and then not close it again.</p>"
        "<h2>3.1.2. Die Dateien und der Befehl, mit dem sie geöffnet werden</h2>"
        "<pre>der die das und ist nicht ein eine zu den mit für von auf</pre>"
        "<p>Drücken Sie <span>Strg</span><span hidden='true'><span>Befehl</span>staste</span>+A, "
        "um den Text zu wählen.</p>"
        "<p>zu kurz und der Rest</p></body></html>",
        encoding="utf-8",
    )
    (document,) = readers.html("german")(page)
    assert document.blocks == [
        ["Sie können die Datei mit dem Befehl öffnen und dann nicht mehr schließen."],
        ["Drücken Sie Strg+A, um den Text zu wählen."],
    ]


def test_code_loses_notices_and_tables(tmp_path):
    source = tmp_path / "a.c"
    source.write_text("/* Copyright 1999 A. */\n\nint\nadd (int a)\n{\n\n0x1, 0x2, 0x3,\n\nreturn a;\n}\n")
    (document,) = readers.code(source)
    assert document.blocks == [["int", "add (int a)", "{"], ["return a;", "}"]]


def test_r_novels_reads_chapters(tmp_path):
    def vector(lines, kind=16):
        strings = b"".join(struct.pack(">ii", 0x40009, len(s)) + s for s in map(str.encode, lines))
        header = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8"
        data = header + struct.pack(">ii", kind, len(lines)) + strings
        return struct.pack(">i", len(data)) + zlib.compress(data)

    first = vector(
        ["A NOVEL", "", "Chapter 1", "", "One", "two.", "", "Three.", "CHAPTER II", "Four.", "", "THE END"]
    )
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(first + vector(["CHAPTER I", "Fünf."]))
    assert list(readers.r_novels(path)) == [
        Document("#novel1-chapter1", [["One two."], ["Three."]]),
        Document("#novel1-chapter2", [["Four."]]),
        Document("#novel2-chapter1", [["Fünf."]]),
    ]
    path.write_bytes(vector(["x"], kind=13))
    with pytest.raises(ValueError, match="type 13, expected a character vector"):
        list(readers.r_novels(path))


def test_metamath_pairs_comments_with_statements(tmp_path):
    path = tmp_path / "set.mm"
    path.write_text(
        "$( Heading $) $c x $.\n  $( Identity.  (Contributed by NM,\n 1-Jan-1999.) $)\n"
        "  id $p |- ( ph\n -> ph ) $=\n ( wi ) ABC $.\n $( A class. $) cA $a class A $.\n"
    )
    (document,) = readers.metamath(path)
    assert document.blocks == [["Identity.", "id |- ( ph -> ph )"], ["A class.", "cA class A"]]


def test_repeats_are_found_word_for_word_and_nearly():
    repeats = corpus.Repeats()
    sentence = "one two three four five six seven eight nine ten eleven twelve thirteen 14"
    assert not repeats.seen([sentence])
    assert repeats.seen([sentence.upper().replace("14", "15")])
    assert repeats.seen([sentence + " and then a little more"])
    assert not repeats.seen(["quite another text of more than eight words that shares nothing with it"])
    assert not repeats.seen(["short"])
    assert repeats.seen(["Short"])


def test_held_out_documents_are_whole_bounded_and_not_in_train():
    documents = [
        Document(f"d{i}", [[f"{i} {j} " + "x" * 90] for j in range(n)])
        for i, n in enumerate([30, 60, 200] * 12)
    ]
    parts = corpus.split(documents, random.Random(0))
    names = {part: {document.name for document in parts[part]} for part in parts}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == len(documents)
    for part in SPLITS:
        assert 0.8 * corpus.HELD_OUT_BYTES < sum(map(corpus.size, parts[part])) <= corpus.HELD_OUT_BYTES
        assert all(document.blocks[0][0].startswith(document.name[1:] + " 0 ") for document in parts[part])
        assert max(map(corpus.size, parts[part])) < corpus.HELD_OUT_DOCUMENT.stop


def test_tidy_leaves_nothing_that_an_encoder_would_change():
    assert corpus.tidy("\ufeff a\u00a0\u2028b\t c\u0301\u00ad\x0c") == "a b ć"
