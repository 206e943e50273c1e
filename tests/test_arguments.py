"""What arguments may be, and the one sentence that names a bad one."""

import re
import sys
from pathlib import Path as File

import numpy as np
import pandas as pd
import pytest
import torch

from moekit.arguments import (
    Capacity,
    Choice,
    Flag,
    Number,
    Path,
    Text,
    Texts,
    Whole,
    Wholes,
    check,
    listed,
    sequences,
)
from moekit.notebook.parameters import ParameterError, parameter
from moekit.progress import bar

DEEP: list = []
for _ in range(3000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        (Whole(), np.int64(2), 2),
        (Whole(), np.uint8(2), 2),
        (Whole(), np.array(2), 2),
        (Whole(), torch.tensor(2), 2),
        (Whole(), np.float32(1e3), 1000),
        (Number(), np.float32(0.5), 0.5),
        (Number(), np.int64(3), 3.0),
        (Capacity(), "training", -1.0),
        (Capacity(), np.float64(0.05), 0.05),
        (Capacity(), None, None),
        (Capacity(zero=True), 0, -1.0),
        (Capacity(), -2, -2.0),
        (Flag(), np.bool_(True), True),
        (Text(), File("a/b"), "a/b"),
        (Path(), "~/x", File.home() / "x"),
        (Path(), File("~"), File.home()),
        (Texts(), (t for t in ["a", "b"]), ["a", "b"]),
        (Texts(), pd.Series(["a", "b"]), ["a", "b"]),
        (Texts(), {"x": "a"}.values(), ["a"]),
        (Texts(paths=True), File("a/b"), ["a/b"]),
        (Texts(paths=True), iter(["a", File("b/c")]), ["a", "b/c"]),
        (Texts(), '["a", "b"]', ['["a", "b"]']),
        (Wholes(), np.int64(3), [3]),
        (Wholes(), range(1, 4), [1, 2, 3]),
        (Wholes(), np.array([1, 3]), [1, 3]),
        (Wholes(), (n for n in (1, 3)), [1, 3]),
        (Wholes(), {3, 1}, [1, 3]),
        (Texts(), {"b": 1, "a": 2}.keys(), ["b", "a"]),
    ],
)
def test_what_is_taken(kind, given, meant):
    found = check("x", given, kind)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        (Texts(), '["a", "b"]', ["a", "b"]),
        (Texts(), "['a', 'b']", ["a", "b"]),
        (Texts(), "[1] and more", ["[1] and more"]),
        (Texts(), "[1, 2]", ["[1, 2]"]),
        (Texts(), "[]", []),
        (Wholes(), "[1, 3]", [1, 3]),
        (Whole(optional=True), "None", None),
        (Capacity(), "none", None),
        (Path(), "~/x", File.home() / "x"),
    ],
)
def test_what_papermill_spells(kind, given, meant):
    assert parameter("x", given, kind) == meant


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (Whole(), 0, "x=0: expected a whole number of at least 1"),
        (Whole(), np.nan, "x=nan: expected a whole number of at least 1"),
        (Whole(), np.inf, "x=inf: expected a whole number of at least 1"),
        (Whole(), np.bool_(True), "x=np.True_: expected a whole number of at least 1"),
        (Whole(), np.array([2, 3]), "x=array([2, 3]): expected a whole number of at least 1"),
        (Whole(), 2**70, f"x={2**70}: expected at most {2**63 - 1}"),
        (Whole(optional=True), "4", "x='4': expected a whole number of at least 1 or None"),
        (Number(above=0, most=1), 0, "x=0: expected a number above 0 up to 1"),
        (Number(), 1j, "x=1j: expected a number"),
        (Capacity(), "all", "x='all': expected a number above 0, 'training' or None"),
        (
            Capacity(),
            0,
            "x=0: expected a number above 0, 'training' for the training's rule, or None to drop nothing",
        ),
        (Capacity(), np.nan, "x=nan: expected a number above 0, 'training' or None"),
        (Choice(("a", "b")), ["a"], "x=['a']: expected one of a, b"),
        (Choice(("a", "b")), np.array(["a"]), "x=array(['a'], dtype='<U1'): expected one of a, b"),
        (Flag(), 1, "x=1: expected True or False"),
        (Flag(), DEEP, "x=[[[[[[[...]]]]]]]: expected True or False"),
        (
            Flag(),
            torch.empty((), device="meta"),
            "x=tensor(..., device='meta', size=()): expected True or False",
        ),
        (Path(), "\ud800", r"x='\ud800': expected the path of a file or folder"),
        (Path(), "a" * 5000, f"x='{'a' * 37}...{'a' * 38}': expected at most 4096 characters"),
        (Wholes(), np.array(0.5), "x=array(0.5): expected a list of whole numbers"),
        (Path(), "", "x='': expected the path of a file or folder"),
        (Path(), "a\0b", r"x='a\x00b': expected the path of a file or folder"),
        (Path(), 7, "x=7: expected the path of a file or folder"),
        (
            Path(),
            "file:///data",
            "x='file:///data': an address; expected the path of a file or folder on this machine, without '://'",
        ),
        (
            Path(),
            "~nobody-of-this-name/x",
            "x='~nobody-of-this-name/x': this machine has no such home folder; write the path without '~'",
        ),
        (Texts(), b"a", "x=b'a': expected a list of texts"),
        (Texts(), {"a": 1}, "x={'a': 1}: expected a list of texts"),
        (Texts(), {"a"}, "x={'a'}: expected a list of texts"),
        (Texts(), ["a", 1], "x=['a', 1]: expected a list of texts"),
        (Texts(), [File("a")], "x=[PosixPath('a')]: expected a list of texts"),
        (Texts(paths=True), [File("a"), 1], "x=[PosixPath('a'), 1]: expected a list of texts or paths"),
        (
            Texts(),
            ["\ud800"],
            r"x=['\ud800']: its character 0 is half of a surrogate pair; decode the text anew, for instance as UTF-8",
        ),
        (Wholes(), [1.5], "x=[1.5]: expected a list of whole numbers"),
        (Wholes(), {"a"}, "x={'a'}: expected a list of whole numbers"),
        (Wholes(), {1: 2}, "x={1: 2}: expected a list of whole numbers"),
        (
            Wholes(ordered=True),
            {1},
            "x={1}: expected a list of whole numbers in an order, which a set does not have",
        ),
        (Texts(), pd.DataFrame({"a": ["b"]}), "x=a 0 b: expected a list of texts"),
    ],
)
def test_what_is_refused(kind, given, said):
    with pytest.raises(ValueError, match="^" + re.escape(said) + "$"):
        check("x", given, kind)
    with pytest.raises(ParameterError, match="^" + re.escape(said) + "$"):
        parameter("x", given, kind)


@pytest.mark.parametrize("show", ["no", 1, None, pd.Series([1, 2]), torch.ones(2)])
def test_a_bar_takes_a_flag_alone(show):
    with pytest.raises(ValueError, match="^progress=.*: expected True or False$"):
        bar("x", 1, "B", show=show)


def test_a_bar_of_a_process_without_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with bar("x", 2, "B") as shown:
        shown.update(2)


def test_long_values_are_cut():
    with pytest.raises(ValueError, match="x=<a number of 16610 bits>: expected at most 9223372036854775807"):
        check("x", 10**5000, Whole())
    for value in ("a" * 10_000, ["a" * 1000] * 1000, {i: i for i in range(1000)}, np.zeros(10_000)):
        with pytest.raises(ValueError) as found:
            check("x", value, Whole())
        assert len(str(found.value)) < 300


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("abc", ["abc"]),
        (["abc", "def"], ["abc", "def"]),
        ((t for t in ("abc", "def")), ["abc", "def"]),
        (iter(["abc"]), ["abc"]),
        (map(str.upper, "ab"), ["A", "B"]),
        (np.array(["abc", "def"]), ["abc", "def"]),
        (pd.Series(["abc"]), ["abc"]),
        ([5, 6, 7], [[5, 6, 7]]),
        (range(5, 8), [[5, 6, 7]]),
        ((n for n in (5, 6)), [[5, 6]]),
        (torch.tensor([5, 6]), [[5, 6]]),
        (np.array([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        ([torch.tensor([5, 6]), (n for n in (7,)), np.array([8], np.uint16)], [[5, 6], [7], [8]]),
        ((iter([n]) for n in (5, 6)), [[5], [6]]),
        ([[], [5]], [[], [5]]),
        (["abc", [5]], ["abc", [5]]),
    ],
)
def test_texts_and_ids_come_from_any_iterable(given, meant):
    assert sequences("texts", given) == meant


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"abc", "texts=b'abc': found bytes, expected a text, texts, ids or lists of ids"),
        ({"a": 1}, "texts={'a': 1}: found dict, expected a text"),
        ({"a", "b"}, "found set, expected a text"),
        (frozenset({5, 6}), "found frozenset, expected a text"),
        (pd.DataFrame({"text": ["abc"]}), "found DataFrame, expected a text"),
        (File("abc"), "found PosixPath, expected a text"),
        (5, "texts=5: found int, expected a text"),
        (np.array(5), "texts=array(5): found ndarray, expected a text"),
        (torch.tensor(1.5), "texts=tensor(1.5000): found Tensor, expected a text"),
        (torch.empty((), device="meta"), "found Tensor, expected a text"),
        (None, "texts=None: found NoneType, expected a text"),
        ([], 'there are no texts; for an empty one give ""'),
        (iter(()), 'there are no texts; for an empty one give ""'),
        (["abc", b"def"], "text 1 is b'def'; expected a text or ids"),
        ([[5], {6}], "text 1 is {6}; expected a text or ids"),
        ([[5.5]], r"text 0 is [5.5]; expected a text or ids, which are whole numbers"),
        ([[True]], "text 0 is [True]; expected a text or ids"),
        ([5, "abc"], "text 0 is 5; expected a text or ids"),
        ([[[5]]], "text 0 is [[5]]; expected a text or ids"),
        (["ab\udc80"], "text 0 is 'ab\\udc80': its character 2 is half of a surrogate pair"),
    ],
)
def test_what_is_neither_text_nor_ids_is_named(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        sequences("texts", given)


@pytest.mark.parametrize("one", ["ab", b"ab", bytearray(b"ab"), memoryview(b"ab"), 3, np.array(0.5), None])
def test_what_holds_no_others_is_one_item(one):
    assert listed(one) == [one]
    assert listed(iter([one, "x"])) == [one, "x"]


def test_links_that_lead_round_in_a_circle_are_one_sentence(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    if sys.version_info < (3, 13):
        with pytest.raises(ValueError, match="its links lead round in a circle"):
            check("x", tmp_path / "a", Path())


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="a name in it is too long for its file system"):
        check("x", tmp_path / ("a" * 300), Path())


def test_a_path_from_a_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ValueError, match="path='x': the current folder is gone; os.chdir to one"):
        check("path", "x", Path())
    assert check("path", tmp_path, Path()) == tmp_path
