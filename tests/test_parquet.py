"""A trace's file: whole, damaged, of another version, and no trace at all."""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_traces import synthetic

from moekit.nn.record import nothing
from moekit.routing import parquet
from moekit.routing.trace import TOKEN_COLUMNS, Trace

ARRAYS = [*TOKEN_COLUMNS, "experts", "probs", "weights", "kept", "entropy"]


def same(one: Trace, other: Trace) -> bool:
    plain = one.layers == other.layers and one.num_experts == other.num_experts and one.meta == other.meta
    columns = all(
        np.array_equal(getattr(one, n), getattr(other, n), equal_nan=n in ("logprob", "output_entropy"))
        for n in ARRAYS
    )
    full = one.full.keys() == other.full.keys()
    columns = columns and {n: v.tolist() for n, v in one.labels.items()} == {
        n: v.tolist() for n, v in other.labels.items()
    }
    return plain and columns and full and all(np.array_equal(one.full[n], other.full[n]) for n in one.full)


@pytest.fixture(scope="module")
def made():
    made, _ = synthetic(tokens=200, layers=(1, 3), experts=8, block=64)
    probs = np.random.default_rng(0).dirichlet(np.ones(8), 200).astype(np.float16)
    columns = {name: getattr(made, name) for name in ARRAYS}
    return Trace(**columns, layers=(1, 3), full={3: probs}, num_experts=8, meta={"subset": "valid", "é": [1]})


def with_head(path, change) -> None:
    """The file with another head, and the checksum that goes with it."""
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[parquet.HEAD])
    change(head)
    text = json.dumps(head).encode()
    checksum = zlib.crc32(text)
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_binary(column.type):
            checksum = zlib.crc32(b"".join(column.to_pylist()), checksum)
        else:
            checksum = zlib.crc32(column.to_numpy(zero_copy_only=False).tobytes(), checksum)
    pq.write_table(table.replace_schema_metadata({parquet.HEAD: text, parquet.CHECKSUM: str(checksum)}), path)


def test_what_is_saved_is_what_is_loaded(made, tmp_path):
    made.save(tmp_path / "t.parquet")
    assert same(Trace.load(tmp_path / "t.parquet"), made)
    with_head(tmp_path / "t.parquet", lambda head: None)
    assert same(Trace.load(tmp_path / "t.parquet"), made)
    nothing = made.select(mask=np.zeros(200, dtype=bool))
    nothing.save(tmp_path / "t.parquet")
    assert same(Trace.load(tmp_path / "t.parquet"), nothing)


def test_a_file_of_format_1_has_no_checksum(made, tmp_path):
    path = tmp_path / "t.parquet"
    made.save(path)
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[b"moekit.trace"]) | {"format": 1}
    table = table.drop_columns("output_entropy")
    pq.write_table(table.replace_schema_metadata({"moekit.trace": json.dumps(head)}), path)
    assert same(Trace.load(path), dataclasses.replace(made, output_entropy=None))


def test_a_file_of_format_2_has_no_entropy_of_the_output(made, tmp_path):
    path = tmp_path / "t.parquet"
    told = dataclasses.replace(made, output_entropy=np.linspace(0, 2, len(made), dtype=np.float32))
    told.save(path)
    assert same(Trace.load(path), told)
    table = pq.read_table(path).drop_columns("output_entropy")
    pq.write_table(table, path)
    with_head(path, lambda head: head.update(format=2))
    assert same(Trace.load(path), made)
    with_head(path, lambda head: None)
    with_head(path, lambda head: head.update(format=3))
    with pytest.raises(ValueError, match="it lacks the column output_entropy"):
        Trace.load(path)


def test_a_trace_without_experts(made, tmp_path):
    """Of a dense model: the columns of the tokens, and nothing else."""
    tokens = {name: getattr(made, name) for name in TOKEN_COLUMNS}
    dense = Trace(**tokens, **nothing(len(made)), layers=(), full={}, num_experts=0, meta={})
    dense.save(tmp_path / "t.parquet")
    assert same(Trace.load(tmp_path / "t.parquet"), dense)
    assert pq.read_table(tmp_path / "t.parquet").column_names == list(TOKEN_COLUMNS)


LABELS = np.array(["French", "ümläut,\n", "", "c\u0301ode\0\0x"])


def test_labels_are_saved_with_the_trace(made, tmp_path):
    path = tmp_path / "t.parquet"
    labelled = made.labelled(domain=LABELS[np.arange(200) % 4], line=range(200))
    labelled.save(path)
    found = Trace.load(path)
    assert same(found, labelled) and found.labels["line"][7] == "7"
    assert pd.read_parquet(path)["labels.domain"].tolist() == labelled.labels["domain"].tolist()
    assert json.loads(pq.read_schema(path).metadata[parquet.HEAD])["format"] == parquet.FORMAT
    none = labelled.select(mask=np.zeros(200, bool))
    none.save(path)
    assert same(Trace.load(path), none)
    made.save(path)
    assert json.loads(pq.read_schema(path).metadata[parquet.HEAD])["format"] == parquet.FORMAT


@pytest.mark.parametrize(
    "labels",
    [
        [],
        {"x": "a"},
        {"x": [1]},
        {"x": ["a"]},
        {"y": ["French"]},
        {"x": ["French", "ümläut,\n", ""]},
        {"x": None},
    ],
)
def test_labels_that_the_file_does_not_hold(made, tmp_path, labels):
    path = tmp_path / "t.parquet"
    made.labelled(x=LABELS[np.arange(200) % 4]).save(path)
    table = pq.read_table(path)
    head = json.loads(table.schema.metadata[parquet.HEAD]) | {"labels": labels}
    pq.write_table(table.replace_schema_metadata({parquet.HEAD: json.dumps(head)}), path)
    with pytest.raises(ValueError, match=r"t\.parquet is damaged") as caught:
        Trace.load(path)
    assert "\n" not in str(caught.value)


def with_equal_rows(path, rows: int, head: dict) -> None:
    """The file with its first row so many times, which is packed into almost nothing."""
    table = pq.read_table(path)
    told = json.loads(table.schema.metadata[parquet.HEAD]) | head
    # An array of a thousand rows stands for them all, so that the test takes no memory.
    first = table.take([0] * 1000)
    columns = {
        name: pa.chunked_array([first[name].combine_chunks()] * (rows // 1000)) for name in table.column_names
    }
    pq.write_table(pa.table(columns).replace_schema_metadata({parquet.HEAD: json.dumps(told)}), path)


def test_a_small_file_makes_no_large_trace(made, tmp_path):
    path = tmp_path / "t.parquet"
    probs = np.full((200, 512), 1 / 512, np.float16)
    dataclasses.replace(made, num_experts=512, full={3: probs}).save(path)
    with_equal_rows(path, 500_000, {"format": 1})
    with pytest.raises(ValueError, match=r"t\.parquet is damaged: its [0-9,]+ bytes hold rows of 55[0-9],"):
        Trace.load(path)
    # Labels become texts of one length.
    made.labelled(x=["long" * 5000] * 200).save(path)
    with_equal_rows(path, 10_000, {})
    with pytest.raises(ValueError, match=r"t\.parquet is damaged: its [0-9,]+ bytes hold rows of 80[0-9],"):
        Trace.load(path)
    # What the head does not tell of is not unpacked either: 1 GB of text is one text here.
    with_equal_rows(path, 50_000, {"labels": {"x": ["short"]}})
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    with pytest.raises(ValueError, match=r"t\.parquet is damaged: the column labels\.x"):
        Trace.load(path)
    assert pool.max_memory() < max(before, 300 << 20) + 1


@pytest.mark.parametrize("full, label", [(0, ""), (512, ""), (0, "long" * 75), (0, "long" * 5000)])
def test_rows_that_are_all_equal_are_loaded(made, tmp_path, monkeypatch, full, label):
    """A gate that chooses the same experts for every token, and one text for all of them."""
    monkeypatch.setattr(parquet, "ANY", 0)
    rows = 2000 if len(label) > 1000 else parquet.ROWS + 1
    columns = {name: np.repeat(getattr(made, name)[:1], rows, axis=0) for name in ARRAYS}
    probs = {3: np.full((rows, full), 1 / full, np.float16)} if full else {}
    equal = Trace(**columns, layers=(1, 3), full=probs, num_experts=full or 8, meta={})
    if label:
        equal = equal.labelled(x=np.full(rows, label))
    path = tmp_path / "t.parquet"
    equal.save(path)
    assert same(Trace.load(path), equal)


@pytest.mark.parametrize("labelled", [False, True])
def test_no_changed_bit_gives_another_trace(made, tmp_path, labelled):
    """1,000 files with one bit changed: an error that names the file, or the very trace."""
    path = tmp_path / "t.parquet"
    if labelled:
        made = made.labelled(domain=LABELS[np.arange(200) % 4])
    made.save(path)
    good, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for at, bit in zip(rng.integers(0, len(good), 1000), rng.integers(0, 8, 1000), strict=True):
        bad = bytearray(good)
        bad[at] ^= 1 << bit
        path.write_bytes(bad)
        try:
            assert same(Trace.load(path), made)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 500
            refused += 1
    assert refused > 700


def test_files_that_are_cut(made, tmp_path):
    path = tmp_path / "t.parquet"
    made.save(path)
    good = path.read_bytes()
    for length in (0, 1, 3, 12, len(good) // 2, len(good) - 9, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"t\.parquet is (damaged|not a trace)"):
            Trace.load(path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda head: head.pop("top_k"), r"is damaged: its head cannot be read \(KeyError: .top_k.\)"),
        (lambda head: head.pop("meta"), "its head cannot be read"),
        (lambda head: head.update(layers=3), "its head cannot be read"),
        (lambda head: head.update(layers=["a"]), "no whole numbers"),
        (lambda head: head.update(meta=None), "no whole numbers"),
        (lambda head: head.update(top_k=10**9), "an absurd number"),
        (lambda head: head.update(top_k=0), "an absurd number"),
        (lambda head: head.update(num_experts=10**9), "an absurd number"),
        (lambda head: head.update(num_experts=7), "the column full.3 holds"),
        (lambda head: head.update(layers=[1, 1]), "an absurd number"),
        (lambda head: head.update(layers=[1, 5]), "it lacks the column entropy.5"),
        (lambda head: head.update(top_k=3), r"it lacks the column experts\.1\.2"),
        (lambda head: head.update(format=99), "has format 99; this moekit reads the formats 1 to 4"),
    ],
)
def test_heads_that_make_no_sense(made, tmp_path, change, said):
    path = tmp_path / "t.parquet"
    made.save(path)
    with_head(path, change)
    with pytest.raises(ValueError, match=f"t.parquet.*{said}"):
        Trace.load(path)


def test_experts_that_the_head_does_not_have(made, tmp_path):
    path = tmp_path / "t.parquet"
    made.select(layers=[1]).save(path)
    with_head(path, lambda head: head.update(num_experts=7))
    with pytest.raises(ValueError, match=r"t.parquet is damaged: the experts are 0 to 7; expected 0 to 6"):
        Trace.load(path)


@pytest.mark.parametrize("value", [np.float32(1), np.arange(3), Path("x"), {1, 2}, b"x"])
def test_a_meta_that_is_no_json_is_named_and_nothing_is_written(made, tmp_path, value):
    edited = dataclasses.replace(made, meta=made.meta | {"note": {"deep": [value]}})
    with pytest.raises(ValueError, match=r"^meta\['note'\]=.* cannot be saved; expected what JSON has"):
        edited.save(tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_traces(made, tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(ValueError, match="there is no trace"):
        Trace.load(path)
    path.write_text("text, and more than a few letters of it")
    with pytest.raises(ValueError, match="not a trace that moekit saved"):
        Trace.load(path)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(ValueError, match="not a trace that moekit saved"):
        Trace.load(path)


def test_a_folder_that_is_not_there(made, tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist, so nothing was written: make it"):
        made.save(tmp_path / "nowhere" / "t.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is not a folder"):
        made.save(tmp_path / "file" / "t.parquet")
    (tmp_path / "t.parquet").mkdir()
    with pytest.raises(ValueError, match="t.parquet is a folder, expected a file"):
        made.save(tmp_path / "t.parquet")
