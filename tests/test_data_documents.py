"""Files of documents in the Pile's form: what becomes of them, and damage."""

import json
import tracemalloc

import pytest
import zstandard

from moekit.data import prepare, settings
from moekit.data.documents import UNNAMED, unfold
from moekit.fairseq_data import lines

DOCUMENTS = [
    {"text": "Once upon a time.\nThere was a man.\n\n", "meta": {"pile_set_name": "Books"}},
    {"text": "x = 1\r\n\r\ny = 2", "meta": {"pile_set_name": "Git\nhub"}},
    {"text": "Größe", "meta": {}},
    {"text": ""},
]
TEXT = "Once upon a time.\nThere was a man.\n\nx = 1\n\ny = 2\n\nGröße\n\n\n\n"
DOMAINS = ["Books"] * 3 + ["Git hub"] * 4 + [UNNAMED] * 4


def written(path, documents=DOCUMENTS):
    text = "".join(json.dumps(document) + "\n" for document in documents).encode()
    if path.name.endswith(".zst"):
        # Two frames, cut within a line.
        pack = zstandard.ZstdCompressor().compress
        text = pack(text[:70]) + pack(text[70:])
    path.write_bytes(text)
    return path


@pytest.mark.parametrize("name", ["val.jsonl.zst", "val.jsonl"])
def test_documents_are_lines_with_an_empty_one_after_each(tmp_path, name):
    found = unfold([written(tmp_path / name)], tmp_path / "text", tmp_path / "domains")
    assert found == {"documents": 4, "lines": 11, "domains": 3}
    assert (tmp_path / "text").read_text() == TEXT
    assert (tmp_path / "domains").read_text().split("\n") == [*DOMAINS, ""]


def test_a_document_of_numbers_is_a_text_like_any_other(tmp_path):
    text = "1," * 700_000
    unfold([written(tmp_path / "x.jsonl", [{"text": text}])], tmp_path / "text", tmp_path / "domains")
    assert (tmp_path / "text").read_text() == text + "\n\n"


def test_the_domains_of_many_lines_take_little_memory(tmp_path):
    name, count = "d" * 100, 200_000
    path = written(tmp_path / "x.jsonl", [{"text": "\n" * count + "x", "meta": {"pile_set_name": name}}])
    tracemalloc.start()
    try:
        found = unfold([path], tmp_path / "text", tmp_path / "domains")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == {"documents": 1, "lines": count + 2, "domains": 1}
    assert (tmp_path / "domains").read_text() == f"{name}\n" * (count + 2)
    # All of them are 20 MB.
    assert peak < 8e6


def test_prepare_reads_the_piles_form(tmp_path):
    """Shards become one text, with a domain for each line, and the data is that of the plain text."""
    source = tmp_path / "pile"
    source.mkdir()
    written(source / "00.jsonl.zst", DOCUMENTS[:2])
    written(source / "01.jsonl.zst", DOCUMENTS[2:])
    written(source / "test.jsonl.zst", DOCUMENTS[:1])
    said = []

    def prepared(of):
        options = {"data_dir": tmp_path / "data", "bpe": "demo", "workers": 1}
        return prepare(settings(source=of, **options), said.append)

    found = prepared(source)
    assert found.texts["valid"][0].read_text() == TEXT
    assert (found.data_bin / "valid.domains.txt").read_text().split("\n") == [*DOMAINS, ""]
    assert "4 documents of 3 domains" in said[0] and set(found.summaries) == {"valid", "test"}
    (tmp_path / "plain.txt").write_text(TEXT)
    plain = prepared(tmp_path / "plain.txt")
    for one, other in zip(lines(found.data_bin / "valid"), lines(plain.data_bin / "valid"), strict=True):
        assert one.tolist() == other.tolist()
    assert not prepared(source).done, "a second run does nothing"
    written(source / "01.jsonl.zst", DOCUMENTS[1:])
    assert "unfold valid" in prepared(source).done


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no zstandard", "line 1: .*; expected a JSON object with a text"),
        (
            zstandard.ZstdCompressor().compress(b'{"text": "a"}\n{"text": 1}\n'),
            "line 2: no object with a text",
        ),
        (zstandard.ZstdCompressor().compress(b'{"text": "a"}\n[1]\n'), "line 2: no object with a text"),
        (zstandard.ZstdCompressor().compress(b'{"text": "a"}\n{"te'), "line 2: "),
        (zstandard.ZstdCompressor().compress(b'\n\n{"text": "\\ud800"}'), "line 3: .*surrogates"),
        (zstandard.ZstdCompressor().compress(b'{"text": "' + b"\xff" + b'"}'), "line 1: .*utf-8"),
        (zstandard.ZstdCompressor().compress(b"[" * 100_000), "line 1: "),
        (
            zstandard.ZstdCompressor().compress(b'{"text": "a", "meta": {"pile_set_name": "\\ud800"}}'),
            "line 1: .*surrogates",
        ),
        (
            # It would be written once for each of the text's lines.
            zstandard.ZstdCompressor().compress(
                b'{"text": "a", "meta": {"pile_set_name": "' + b"x" * 101 + b'"}}'
            ),
            "line 1: a pile_set_name of 101 characters, more than 100;",
        ),
        (
            zstandard.ZstdCompressor(write_content_size=True).compress(b'{"text": "abc"}\n' * 99)[:-9],
            "line [0-9]+: .*in the middle",
        ),
    ],
)
def test_damage_is_one_sentence_with_its_line(tmp_path, content, said):
    (tmp_path / "x.jsonl.zst").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.jsonl\.zst, {said}") as caught:
        unfold([tmp_path / "x.jsonl.zst"], tmp_path / "text", tmp_path / "domains")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "text").exists() and not (tmp_path / "domains").exists()


def test_without_zstandard_the_way_out_is_named(tmp_path, monkeypatch):
    path = written(tmp_path / "x.jsonl.zst")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"zstandard is missing: pip install 'moekit\[eval\]'"):
        unfold([path], tmp_path / "text", tmp_path / "domains")
