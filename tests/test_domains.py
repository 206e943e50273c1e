"""Perplexity by domain: sums against the whole, bytes by hand, and a sweep of capacities against runs of their own."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

import moekit
from moekit.data import Codec, binarise
from moekit.data.dictionary import Dictionary
from moekit.domains import WHOLE
from moekit.paths import DEMO_BPE, DEMO_TEXT
from moekit.routing.domains import domains_of, lines_of

BATCHES = 12


@pytest.fixture(scope="module")
def model():
    with moekit.load("demo", 2, "cpu", progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def swept(model):
    """Every capacity that a call takes, in no order."""
    fractions = [0.25, None, 1.0, 0.5, "training"]
    return model.evaluate(
        domains="demo", capacity_token_fraction=fractions, max_batches=BATCHES, progress=False
    )


def blocks(model):
    return list(itertools.islice(model.open_data("demo"), BATCHES))


def of(table, capacity, domain=WHOLE):
    here = table["capacity"].isna() if capacity is None else table["capacity"].eq(capacity)
    [row] = table[here & (table["domain"] == domain)].to_dict("records")
    return row


def test_the_domains_are_the_whole_by_weight(model, swept):
    for capacity, rows in swept.groupby("capacity", dropna=False):
        capacity = None if capacity is None or capacity != capacity else capacity
        parts = rows[rows["domain"] != WHOLE]
        whole = model.evaluate("demo", capacity_token_fraction=capacity, max_batches=BATCHES, progress=False)
        row = of(swept, capacity)
        assert row["tokens"] == whole.ntokens == parts["tokens"].sum()
        assert row["bits_per_token"] == pytest.approx(whole.loss_base2, abs=1e-6)
        mean = (parts["bits_per_token"] * parts["tokens"]).sum() / parts["tokens"].sum()
        assert mean == pytest.approx(whole.loss_base2, abs=1e-6)
        assert row["perplexity"] == pytest.approx(whole.perplexity, rel=1e-5)
        assert row["bytes"] == parts["bytes"].sum()
    assert {*swept["domain"]} <= {*lines_of("demo", "valid")[0], WHOLE} and swept["domain"].nunique() > 4


def test_a_domain_is_the_tokens_of_its_lines(model, swept):
    """A line's tokens are those that are predicted; the first one is read from the end of the line before it."""
    whole = model.evaluate("demo", max_batches=BATCHES, progress=False).tokens
    labels, sizes, ids = lines_of("demo", "valid")
    place = whole["sample"] * 256 + whole["position"]
    assert (ids[place] == whole["target"]).all()
    label = np.repeat(labels, sizes)[place]
    for name in ("german", "maths"):
        bits = -whole["logprob"][label == name] / math.log(2)
        assert of(swept, None, name)["bits_per_token"] == pytest.approx(bits.mean(), abs=1e-5)


def test_sizes_of_a_codec():
    codec = Codec.load("demo")
    text = "Größe, naïve\n\nдом x = 1"
    assert codec.sizes()[codec.encode(text)].sum() == len(text.encode())
    assert codec.sizes()[[codec.bos, codec.pad, codec.eos, codec.unk]].tolist() == [0, 0, 1, 0]


def test_a_capacity_of_1_is_none_and_runs_no_pass_again(model, swept):
    one, none = of(swept, 1.0), of(swept, None)
    assert one["bits_per_token"] == none["bits_per_token"] and one["dropped"] == none["dropped"] == 0
    direct = model.evaluate("demo", capacity_token_fraction=1.0, max_batches=BATCHES, progress=False)
    assert direct.loss_base2 == pytest.approx(none["bits_per_token"], abs=1e-6)
    # A block with padding runs again.
    padded = sum(batch.padded() for batch in blocks(model))
    assert padded <= 1 and one["run"] == padded and one["batches"] == BATCHES
    assert [of(swept, c)["run"] for c in (None, 0.25, "training")] == [BATCHES] * 3


def test_a_pass_runs_again_only_where_it_would_drop_more(model):
    """The fullest expert of each block, by a trace, says from which capacity on nothing is dropped."""
    trace = model.trace("demo", max_tokens=BATCHES * 256, progress=False)
    batches = blocks(model)

    def fullest(batch):
        experts = trace.experts[trace.sample == batch.ids[0]]
        return max(np.bincount(layer.ravel(), minlength=16).max() for layer in experts.swapaxes(0, 1))

    most = sorted(fullest(batch) for batch in batches if not batch.padded())
    padded = sum(batch.padded() for batch in batches)
    middle = most[len(most) // 2]
    for places in (middle, middle - 1):
        how = {"max_batches": BATCHES, "progress": False}
        table = model.evaluate(domains="demo", capacity_token_fraction=[None, places / 256], **how)
        direct = model.evaluate("demo", capacity_token_fraction=places / 256, **how)
        row = of(table, places / 256)
        assert row["bits_per_token"] == pytest.approx(direct.loss_base2, abs=1e-6)
        assert row["run"] == padded + sum(full > places for full in most) < BATCHES


def test_dropped_is_the_share_of_choices(model, swept):
    how = {"capacity_token_fraction": 0.25, "max_tokens": BATCHES * 256, "progress": False}
    trace = model.trace("demo", **how)
    assert of(swept, 0.25)["dropped"] == pytest.approx(1 - trace.kept.mean(), abs=1e-9)
    # A token is dropped where it is read; in the table it counts where its target stands.
    german = domains_of(trace, "demo") == "german"
    assert of(swept, 0.25, "german")["dropped"] == pytest.approx(1 - trace.kept[german].mean(), abs=0.01)
    with model.route(drop_second=True):
        table = model.evaluate(domains="demo", max_batches=4, progress=False)
    assert of(table, None)["dropped"] == 0.5


def test_intervals(swept):
    row = of(swept, None)
    assert row["low"] < row["bits_per_token"] < row["high"]
    few = of(swept, None, "maths")
    assert math.isnan(few["low"]) and few["tokens"] > 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The demo's lines of two kinds, each in a folder of its own, and both in one."""
    labels, sizes, ids = lines_of("demo", "valid")
    symbols = Dictionary(DEMO_BPE / "dict.txt").symbols
    ends = np.cumsum(sizes)
    place = tmp_path_factory.mktemp("domains")
    chosen = {name: np.flatnonzero(labels == name)[:12] for name in ("german", "python")}
    chosen["both"] = np.concatenate(list(chosen.values()))
    for name, lines in chosen.items():
        folder = place / name / "data-bin"
        folder.mkdir(parents=True)
        text = [" ".join(symbols[i] for i in ids[ends[n] - sizes[n] : ends[n] - 1]) for n in lines]
        (place / name / "valid.bpe").write_text("\n".join(text) + "\n")
        binarise(place / name / "valid.bpe", folder / "valid", DEMO_BPE / "dict.txt", 1)
        (folder / "dict.txt").write_bytes((DEMO_BPE / "dict.txt").read_bytes())
    return {name: place / name / "data-bin" for name in chosen}, chosen


def test_a_folder_for_each_domain(model, folders):
    """Each line is a sample, so that a line has the same context in its own folder and among others."""
    folders, chosen = folders
    how = {"sample_break_mode": "eos", "tokens_per_sample": 128, "progress": False}
    names = {name: folders[name] for name in ("german", "python")}
    table = model.evaluate(domains=names, capacity_token_fraction=[None, 0.3], **how)
    for capacity in (None, 0.3):
        whole = model.evaluate(folders["both"], capacity_token_fraction=capacity, **how)
        row = of(table, capacity)
        assert row["tokens"] == whole.ntokens
        assert row["bits_per_token"] == pytest.approx(whole.loss_base2, abs=1e-6)
        assert row["batches"] == 24
        for name, folder in names.items():
            own = model.evaluate(folder, capacity_token_fraction=capacity, **how)
            assert of(table, capacity, name)["bits_per_token"] == pytest.approx(own.loss_base2, abs=1e-6)
            assert of(table, capacity, name)["batches"] == 12
    # Bytes by hand: the text's own, and one for each line end.
    lines = (DEMO_TEXT / "valid.txt").read_text("utf-8").split("\n")
    for name in names:
        size = sum(len(lines[n].strip().encode()) + 1 for n in chosen[name])
        row = of(table, None, name)
        assert row["bytes"] == size
        assert row["bits_per_byte"] == pytest.approx(row["bits_per_token"] * row["tokens"] / size, rel=1e-9)
    pd.testing.assert_frame_equal(
        model.evaluate(domains=names, capacity_token_fraction=[0.3], **how),
        table[table["capacity"].notna()].reset_index(drop=True).assign(run=[12, 12, 24]),
        atol=1e-6,
    )


def test_a_capacity_is_a_number_of_any_kind(model):
    for number in (0.5, np.array(0.5), torch.tensor(0.5)):
        table = model.evaluate(
            domains="demo",
            capacity_token_fraction=number,
            max_batches=1,
            tokens_per_sample=16,
            progress=False,
        )
        assert set(table["capacity"]) == {0.5}


def test_what_makes_no_sense_is_one_sentence(model, folders):
    for asked, said in (
        ({}, "expected one of the two"),
        ({"data": "demo", "domains": "demo"}, "expected one of the two"),
        ({"domains": {}}, "expected at least one folder by its name"),
        ({"domains": {WHOLE: "demo"}}, r"domains has the name '\(all\)'"),
        ({"domains": {"x": "/nowhere"}}, "/nowhere"),
        ({"domains": {"x": None}}, r"domains\['x'\]=None: expected the path"),
        ({"domains": ["demo"]}, r"domains=\['demo'\]: expected the path"),
        ({"domains": "demo", "capacity_token_fraction": b"0.5"}, "capacity_token_fraction=b'0.5': expected"),
        ({"domains": "demo", "capacity_token_fraction": 1e30}, "expected a number up to 1e\\+09, or None"),
        ({"domains": folders[0]["german"]}, "valid.domains.txt with a domain for each line"),
        ({"domains": "demo", "sample_break_mode": "eos"}, "a folder for each domain"),
        ({"domains": "demo", "trace": True}, "a table of domains has none"),
        ({"domains": "demo", "capacity_token_fraction": []}, "expected at least one"),
        ({"domains": "demo", "capacity_token_fraction": [0.5, 0]}, "capacity_token_fraction=0: expected"),
        ({"data": "demo", "capacity_token_fraction": [0.5]}, "capacity_token_fraction=.*expected a number"),
    ):
        with pytest.raises(ValueError, match=said):
            model.evaluate(**asked, progress=False)
