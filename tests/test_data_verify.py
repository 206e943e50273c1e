"""Which data is read, in every format of fairseq, and what is said of data that cannot be."""

import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from processes import ran

import moekit
from moekit.data.dictionary import Dictionary
from moekit.data.verify import verify
from moekit.fairseq_data import Data, check_files, data_folder, lines, open_data
from moekit.symbols import EOS

HOW = {"tokens_per_sample": 64, "progress": False}


@pytest.fixture(scope="module")
def model(reference):
    with moekit.load(reference / "checkpoint", 2, "cpu", progress=False) as model:
        yield model


@pytest.fixture
def data(reference, tmp_path):
    """A copy of the reference's data that can be changed."""
    shutil.copytree(reference / "data-bin", tmp_path / "data-bin", copy_function=shutil.copyfile)
    return tmp_path / "data-bin"


def write_mmap(prefix: Path, texts) -> None:
    from fairseq.data.indexed_dataset import make_builder

    write(make_builder(f"{prefix}.bin", "mmap", 200), prefix, texts)


def write_cached(prefix: Path, texts) -> None:
    from fairseq.data.indexed_dataset import make_builder

    write(make_builder(f"{prefix}.bin", "cached"), prefix, texts)


def write(builder, prefix: Path, texts) -> None:
    import torch

    for ids in texts:
        builder.add_item(torch.tensor([*ids, EOS], dtype=torch.int32))
    builder.finalize(f"{prefix}.idx")


def texts_of(prefix: Path) -> list[list[int]]:
    sizes, ids = lines(prefix)
    return [part[:-1].tolist() for part in np.split(ids, np.cumsum(sizes)[:-1])]


# ----------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("mode", ["none", "eos", "complete"])
def test_fairseqs_older_formats_hold_the_same_text(model, reference, data, mode):
    """``--dataset-impl cached`` and ``lazy`` write one format; ``raw`` is a text beside dict.txt."""
    how = {"sample_break_mode": mode, "batch_size": 2, **HOW}
    wanted = model.evaluate(reference / "data-bin", **how)
    write_cached(data / "valid", texts_of(reference / "data-bin" / "valid"))
    assert model.evaluate(data, **how).tokens.equals(wanted.tokens)
    assert model.trace(data, **how).meta["subset"] == "valid"
    if mode == "none":
        assert round(wanted.loss_base2, 4) == 8.6039
        context = {"context_window": 16, "batch_size": 1, **HOW}
        found = model.evaluate(data, **context)
        assert found.tokens.equals(model.evaluate(reference / "data-bin", **context).tokens)
    for name in ("valid.bin", "valid.idx"):
        (data / name).unlink()
    symbols = Dictionary(data / "dict.txt").symbols
    text = [" ".join(symbols[i] for i in ids) for ids in texts_of(reference / "data-bin" / "valid")]
    (data / "valid").write_text("\n".join(text) + "\n")
    assert model.evaluate(data, **how).tokens.equals(wanted.tokens)


def test_other_formats_are_refused_by_name(data):
    (data / "valid.idx").write_bytes(b"HUFFIDX\x00\x00" + bytes(50))
    with pytest.raises(
        ValueError, match=r"valid\.idx is of fairseq's 'huffman' format; expected mmap, cached"
    ):
        check_files(data, "valid")


def test_of_several_folders_the_first_is_read(model, reference, tmp_path, monkeypatch):
    first = reference / "data-bin"
    wanted = model.evaluate(first, **HOW).tokens
    both = f"{first}{os.pathsep}/nowhere"
    assert model.evaluate(both, **HOW).tokens.equals(wanted)
    assert len(model.trace(both, **HOW)) and data_folder(both) == first
    monkeypatch.setenv("HOME", str(first.parent))
    assert model.evaluate("~/data-bin", **HOW).tokens.equals(wanted)
    (tmp_path / "a:b").mkdir()
    with pytest.raises(ValueError, match="a:b': fairseq reads a colon as the end of a folder's name; rename"):
        model.evaluate(tmp_path / "a:b", **HOW)


# ---------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("format", [write_mmap, write_cached])
@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ([], {}, r"valid\.idx holds no lines: there is nothing to score"),
        (
            [[5] * 70],
            {"sample_break_mode": "eos"},
            r"valid: all 1 samples are longer than the model's 64 positions",
        ),
        ([[], [], []], {"sample_break_mode": "complete_doc"}, r"valid has only blank lines"),
        (
            [[5, 200]],
            {},
            r"valid\.bin: id 200 at place 1 is outside dict\.txt beside it, whose ids are 0 to 199",
        ),
    ],
)
def test_text_that_leaves_nothing_to_score_is_one_sentence(
    model, data, recwarn, format, texts, options, said
):
    format(data / "valid", texts)
    for call in (model.evaluate, model.trace):
        with pytest.raises(ValueError, match=said) as found:
            call(data, **HOW, **options)
        assert "\n" not in str(found.value)
    assert not [w for w in recwarn if w.category is not DeprecationWarning]


@pytest.mark.parametrize("mode", ["none", "eos", "complete"])
def test_blank_lines_are_scored_without_a_warning(model, data, mode):
    write_mmap(data / "valid", [[5, 6, 7], [], [8], [], []])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = model.evaluate(data, sample_break_mode=mode, **HOW)
    assert found.tokens["target"].tolist() == [5, 6, 7, EOS, EOS, 8, EOS, EOS, EOS]
    texts = [[5, 6, 7, EOS], [EOS], [8, EOS], [EOS], [EOS]]
    if mode == "eos":
        np.testing.assert_allclose(found.tokens["logprob"], model.score(texts)["logprob"], atol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is empty; expected a line '<symbol> <count>' for each type"),
        (b"a 1\na 2\n", "line 2: 'a' for the second time"),
        (b"a\n", "line 1: expected '<symbol> <count>', found 'a'"),
        (b"\xff\xfea 1\n", "is not a dict.txt: invalid start byte at byte 0, expected UTF-8"),
        (b"a 1\n", "valid.bin: id 51 at place 0 is outside dict.txt beside it, whose ids are 0 to 4"),
    ],
)
def test_a_dictionary_that_is_none_is_one_sentence_with_its_file(model, data, text, said):
    (data / "dict.txt").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(said)) as found:
        model.evaluate(data, **HOW)
    assert str(data) in str(found.value) and "\n" not in str(found.value)


def test_negative_counts_are_taken_as_fairseq_takes_them(model, reference, data):
    (data / "dict.txt").write_text(re.sub(r" (\d+)\n", r" -\1\n", (data / "dict.txt").read_text()))
    wanted = model.evaluate(reference / "data-bin", **HOW).tokens
    assert model.evaluate(data, **HOW).tokens.equals(wanted)


def test_a_dictionary_of_the_same_size_with_other_words_is_refused(reference, data, tmp_path):
    own = tmp_path / "own.txt"
    shutil.copyfile(data / "dict.txt", own)
    words = (data / "dict.txt").read_text().splitlines()
    words[6], words[7] = words[7], words[6]
    (data / "dict.txt").write_text("\n".join(words) + "\n")
    with moekit.load(reference / "checkpoint", 1, "cpu", dictionary=own, progress=False) as model:
        for call in (model.evaluate, model.trace):
            with pytest.raises(ValueError, match="of another dictionary than the model") as found:
                call(data, **HOW)
            said = f"{data}/dict.txt and {own} differ first in line 7: {words[6].split()[0]!r} and {words[7].split()[0]!r}"
            assert said in str(found.value)
        model.evaluate(reference / "data-bin", **HOW)
    with moekit.load("demo", 1, "cpu", progress=False) as model:  # whose codec knows its dictionary
        with pytest.raises(ValueError, match="differ first in line 1"):
            model.evaluate(reference / "data-bin", progress=False)


def test_a_file_is_read_once_until_it_changes(data, monkeypatch):
    from moekit.data import verify as module

    read = []
    monkeypatch.setattr(module, "_lines", lambda *a, real=module._lines: read.append(a) or real(*a))
    for _ in range(3):
        verify(data, "valid")
    assert len(read) == 1
    ids = np.fromfile(data / "valid.bin", "<u2")
    ids[0] = 300
    ids.tofile(data / "valid.bin")
    for _ in range(2):
        with pytest.raises(ValueError, match="id 300 at place 0"):
            verify(data, "valid")


@pytest.mark.parametrize("name", ["valid.bin", "valid.idx", "dict.txt"])
def test_a_file_without_read_permission_or_of_another_kind_is_named(data, name, monkeypatch):
    (data / name).unlink()
    os.mkfifo(data / name)
    with pytest.raises(ValueError, match=f"{data} has no {name}"):
        check_files(data, "valid")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "https://x/y"}, "data='https://x/y': an address"),
        ({"data": ""}, "data='': expected the path"),
        ({"subset": b"valid"}, "subset=b'valid': expected text"),
        ({"batch_size": 10**12}, "batch_size=1000000000000: expected at most"),
        ({"tokens_per_sample": 0}, "tokens_per_sample=0: expected a whole number of at least 1 or None"),
        ({"context_window": -1}, "context_window=-1: expected a whole number of at least 0"),
    ],
)
def test_what_is_asked_of_data_is_checked(options, said):
    with pytest.raises(ValueError, match=said):
        Data(**({"data": "demo"} | options))


def test_a_context_leaves_room(reference):
    with pytest.raises(ValueError, match="context_window=64 leaves no room in tokens_per_sample=64"):
        open_data(reference / "data-bin", "valid", max_positions=64, context_window=64)


def test_an_interrupt_waits_for_the_import(monkeypatch):
    import signal

    from moekit.fairseq_data import importing_fairseq

    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), importing_fairseq():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("imported")
    assert done == ["imported"] and signal.getsignal(signal.SIGINT) is before


WITH_FAIRSEQ = {
    "data": """
from moekit.fairseq_data import Data, open_data
print(len(open_data(Data("demo"), max_positions=64)) > 9)
""",
    "the command line": """
from moekit.eval_lm import parse
print(parse(["/data", "--path", "model.pt"]).path == "model.pt")
""",
}


@pytest.mark.parametrize("what", WITH_FAIRSEQ)
def test_fairseq_is_imported_where_warnings_are_errors(what):
    """Its import warns of what torch will lack one day."""
    found = ran("-W", "error", "-c", WITH_FAIRSEQ[what], seconds=120)
    assert found.stdout == "True\n", found.stderr


def test_a_folder_that_is_none_is_named(tmp_path, data):
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (tmp_path / "nowhere", r"nowhere has no dict\.txt, it does not exist: expected a folder"),
        (data / "dict.txt", r"dict\.txt has no dict\.txt, it is not a folder: expected a folder"),
        (tmp_path / "empty", "empty has no dict.txt, it is empty: prepare_data"),
    ):
        with pytest.raises(ValueError, match=said):
            check_files(folder, "valid")
    with pytest.raises(ValueError, match=r"has no other\.bin; its subsets are test, train, valid: name one"):
        check_files(data, "other")
    for number in range(100):
        (tmp_path / "empty" / f"{number:03}").touch()
    with pytest.raises(ValueError, match=r"it holds 000, 001, 002, 003, 004, \.\.\.: prepare_data"):
        check_files(tmp_path / "empty", "valid")


def test_a_dictionary_of_many_bytes_is_not_read(model, data):
    os.truncate(data / "dict.txt", 1 << 36)
    with pytest.raises(ValueError, match=r"dict\.txt is not a dict\.txt: it has 68,719,476,736 bytes"):
        model.evaluate(data, **HOW)
