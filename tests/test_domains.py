"""Perplexity by domain: sums against the whole, bytes by hand, and a sweep of capacities against runs of their own."""

import dataclasses
import itertools
import math
import os

import numpy as np
import pandas as pd
import pytest
import torch

import moekit
from moekit.batches import Batch, count_scored
from moekit.data import Codec, binarise
from moekit.data.dictionary import Dictionary
from moekit.domains import OTHER, WHOLE, compare_domains, score_domains
from moekit.fairseq_data import Data
from moekit.nn.gate import Gate
from moekit.nn.gates import GATES, Top2
from moekit.nn.intervene import Force
from moekit.notebook import routing_plots, task_report
from moekit.paths import DEMO_BPE, DEMO_TEXT
from moekit.routing import metrics
from moekit.routing.domains import domains_of, lines_of
from moekit.routing.statistics import holm, paired
from moekit.scoring import perplexity_of, token_table
from moekit.symbols import PAD

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


def test_a_table_of_tokens_by_hand():
    """Sorted by sample; without padding, a context, and the symbol that begins a sentence where one does."""
    tokens, targets = np.array([[2, 5, 6], [2, 7, PAD]]), np.array([[5, 6, 8], [7, PAD, PAD]])
    batches = [
        Batch(4, np.array([3, 1]), tokens, targets, np.array([1, 0])),
        Batch(9, np.array([0]), tokens[:1] + 10, targets[:1] + 10, np.array([0])),
    ]
    columns = {
        "a": {4: np.arange(6).reshape(2, 3), 9: np.full((1, 3), 7)},
        "b": {4: -np.ones((2, 3)), 9: np.zeros((1, 3))},
    }
    found = token_table(batches, columns)
    assert found.columns.tolist() == ["sample", "position", "token", "target", "a", "b"]
    assert found["sample"].tolist() == [0, 0, 0, 1, 3, 3] and found["position"].tolist() == [0, 1, 2, 0, 1, 2]
    assert found["token"].tolist() == [12, 15, 16, 2, 5, 6] and found["target"].tolist() == [
        15,
        16,
        18,
        7,
        6,
        8,
    ]
    assert found["a"].tolist() == [7, 7, 7, 3, 1, 2] and found["b"].tolist() == [0, 0, 0, -1, -1, -1]
    assert len(found) == count_scored(batches)
    assert token_table(batches, {}, skip_first=True)["target"].tolist() == [16, 18, 8]
    with pytest.raises(ValueError, match="^the text has no tokens to score$"):
        token_table([], {"a": {}}, whose="the text")


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_table_of_tokens_is_that_of_each_row_by_itself(skip_first, repeated):
    """Several shapes in any order, padding, contexts, rows without a target, and a sample that comes twice."""
    draw, batches, values = np.random.default_rng(5), [], {}
    samples = draw.permutation(40)
    for index, start in enumerate(range(0, 40, 2)):
        shape = (2, (5, 8, 3)[index % 3])
        targets = draw.integers(4, 99, shape).astype(np.int32)
        targets[draw.random(shape) < 0.2] = PAD
        ids = samples[start : start + 2] // (2 if repeated else 1)
        tokens = draw.integers(4, 99, shape).astype(np.int32)
        batches.append(Batch(index, ids, tokens, targets, draw.integers(0, 4, 2)))
        values[index] = draw.random(shape).astype(np.float32)
    rows = []
    for batch in batches:
        for row, sample in enumerate(batch.ids.tolist()):
            for place in np.flatnonzero(batch.scored(row)).tolist()[skip_first:]:
                token, target = batch.tokens[row, place], batch.targets[row, place]
                rows.append((sample, place, int(token), int(target), float(values[batch.index][row, place])))
    found = token_table(batches, {"logprob": values}, skip_first=skip_first)
    # Ties stand in an order of their own.
    assert sorted(found.itertuples(index=False, name=None)) == sorted(rows)
    assert list(zip(found["sample"], found["position"], strict=True)) == sorted(row[:2] for row in rows)
    assert found.index.equals(pd.RangeIndex(len(rows)))
    types = [str(kind) for kind in found.dtypes]
    assert types == ["int64", "int64", "int32", "int32", "float32"]


def test_a_perplexity_that_is_no_float64_is_infinite():
    assert perplexity_of(3.0) == 8 and perplexity_of(1023.5) < math.inf == perplexity_of(1024.0)


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
    # A block with padding runs again, and with other rows beside them a processor may add up its rows in another order.
    assert one["bits_per_token"] == pytest.approx(none["bits_per_token"], abs=1e-7)
    assert one["dropped"] == none["dropped"] == 0
    direct = model.evaluate("demo", capacity_token_fraction=1.0, max_batches=BATCHES, progress=False)
    assert direct.loss_base2 == pytest.approx(none["bits_per_token"], abs=1e-6)
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


def test_what_asks_for_no_place_is_not_dropped(model):
    how = {"capacity_token_fraction": [None, 0.25], "max_batches": 4, "progress": False}
    with model.route(drop_second=True):
        table = model.evaluate(domains="demo", **how)
        trace = model.trace("demo", capacity_token_fraction=0.25, max_tokens=4 * 256, progress=False)
    assert of(table, None)["dropped"] == 0
    lost = 1 - trace.kept[..., 0].mean()
    assert lost > 0 and of(table, 0.25)["dropped"] == pytest.approx(lost, abs=1e-9)
    with moekit.load("demo", 1, "cpu", progress=False, config={"second_expert": "random"}) as drawing:
        table = drawing.evaluate(domains="demo", **how)
        free = drawing.trace("demo", max_tokens=1000, progress=False)
        tight = drawing.trace("demo", max_tokens=1000, capacity_token_fraction=0.25, progress=False)
        [written] = drawing.generate(
            ["def main("], max_new_tokens=16, trace=True, capacity_token_fraction=0.25, progress=False
        )
    assert of(table, None)["dropped"] == 0 < of(table, 0.25)["dropped"] < 0.4
    assert free.kept[..., 0].all() and not free.kept[..., 1].all()
    found = metrics.drops(free, "choice")
    assert found["value"].eq(0).all() and found["choices"].sum() == free.kept.sum()
    title = routing_plots.drops_by_position(free).get_suptitle()
    assert title == "Choices dropped, by position in the sample; capacity: none"
    # A trace with a capacity does not tell the one from the other, and its picture says so.
    assert routing_plots.drops_by_position(tight).get_suptitle().startswith("Choices dropped, or not drawn,")
    # New tokens are read without a capacity.
    assert not written.trace.kept[written.trace.generated].all()
    assert metrics.drops(written.trace)["value"].eq(0).all()
    plots = [routing_plots.drops_by_position(written.trace, prompt=prompt) for prompt in (False, True)]
    assert [plot.get_suptitle().split(", by")[0] for plot in plots] == [
        "Choices dropped",
        "Choices dropped, or not drawn",
    ]


def test_a_gate_that_draws_nothing_is_not_said_to_draw(monkeypatch):
    """A gate of the user's may do without the option of the config."""
    own = type("Own", (Top2,), {"draws": False, "dispatched": Gate.dispatched})
    monkeypatch.setitem(GATES, "own", own)
    for changes, told, name in (
        ({"gate": "own"}, None, "dropped"),
        ({"gate": "top2"}, "random", "dropped, or not drawn"),
    ):
        config = changes | {"second_expert": "random"}
        with moekit.load("demo", 1, "cpu", progress=False, config=config) as model:
            trace = model.trace([5, 6, 7], capacity_token_fraction=0.25, progress=False)
        assert (trace.meta["second_expert"], metrics.drops_name(trace)) == (told, name)


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


def test_a_forced_sample_is_looked_for_in_the_whole_call(model, folders):
    """Neither in the batches alone that a smaller capacity runs again, nor in each folder by itself."""
    how = {"tokens_per_sample": 32, "max_batches": 6, "progress": False}
    batches = itertools.islice(model.open_data("demo", tokens_per_sample=32), 6)
    for sample in [int(number) for batch in batches for number in batch.ids]:
        with model.route(force=Force(1, sample=sample, positions=0)):
            table = model.evaluate(domains="demo", capacity_token_fraction=[0.9, 0.5], **how)
            alone = model.evaluate(domains="demo", capacity_token_fraction=0.5, **how)
        assert of(table, 0.5)["run"] < 6
        assert of(table, 0.5)["bits_per_token"] == pytest.approx(of(alone, 0.5)["bits_per_token"], abs=1e-6)
    # Sample 20 is one of the 24 lines of the first folder; the second one has 12.
    domains = {name: folders[0][name] for name in ("both", "german")}
    how = {"domains": domains, "sample_break_mode": "eos", "tokens_per_sample": 128, "progress": False}
    plain = model.evaluate(**how)
    with model.route(force=Force((1, 2), sample=20)):
        forced = model.evaluate(**how)
    changed = (plain["bits_per_token"] - forced["bits_per_token"]).abs() > 1e-6
    assert plain["domain"][changed].tolist() == ["both", WHOLE]
    for force, said in (
        (Force(1, sample=24), "the samples of this call are 24, from 0 to 23"),
        (Force(1, sample=20, positions=200), "expected at least one of its positions, 0 to "),
    ):
        with model.route(force=force), pytest.raises(ValueError, match=said):
            model.evaluate(**how)


@pytest.fixture(scope="module")
def dense():
    with moekit.load("demo-dense", 1, "cpu", progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def both(dense, model):
    """The dense model's scores and the sparse one's, of which one was measured under a capacity, too."""
    fractions = ([None], [0.25, None])
    return [
        score_domains(one, "demo", Data("demo"), capacities, 60, progress=False)
        for one, capacities in zip((dense, model), fractions, strict=True)
    ]


def test_the_difference_of_two_models_is_paired(dense, model, both):
    """Against the statistics of each token's change, whose domain is that of its line."""
    table = compare_domains(*both).set_index("domain")
    assert table["capacity"].isna().all() and len(table) == both[1].table["domain"].nunique()
    before, after = (one.evaluate("demo", max_batches=60, progress=False).tokens for one in (dense, model))
    change = -(after["logprob"].astype(float) - before["logprob"]).to_numpy() / math.log(2)
    labels, sizes, _ = lines_of("demo", "valid")
    label = np.repeat(labels, sizes)[before["sample"] * 256 + before["position"]]
    sample = before["sample"].to_numpy()
    by_hand = {name: paired(change[label == name], sample[label == name]) for name in np.unique(label)}
    by_hand[WHOLE] = paired(change, sample)
    for name, told in by_hand.items():
        row = table.loc[name]
        assert (row["tokens"], row["units"]) == (told.tokens, told.units)
        found = row[["difference", "low", "high", "effect", "same_sign"]].to_list()
        expected = [told.value, told.low, told.high, told.effect, told.same_sign]
        np.testing.assert_allclose(np.array(found, float), expected, atol=1e-5)
        assert row["note"] == ("too few" if math.isnan(told.low) else "")
    names = [name for name in table.index if name != WHOLE]
    corrected = holm(np.array([by_hand[name].p for name in names]))
    assert table.loc[names, "p"].to_list() == pytest.approx(corrected.tolist())
    assert table.loc[WHOLE, "p"] == by_hand[WHOLE].p
    assert (table["survives"] == (table["p"] <= 0.05)).all()
    # The pairs tell what the two intervals do not: these overlap.
    alone = [of(one.table, None) for one in both]
    assert alone[1]["high"] > alone[0]["low"] and table.loc[WHOLE, "high"] < 0
    direct = alone[1]["bits_per_token"] - alone[0]["bits_per_token"]
    assert table.loc[WHOLE, "difference"] == pytest.approx(direct, abs=1e-9)


def test_a_model_does_not_differ_from_itself(both):
    table = compare_domains(both[1], both[1])
    assert set(table["capacity"].map(str)) == {"None", "0.25"}
    assert table["difference"].eq(0).all() and table["p"].eq(1).all() and not table["survives"].any()
    assert (table["note"] == np.where(table["units"] < 8, "too few", "does not vary")).all()


def test_other_tokens_have_no_difference(both):
    """One target that differs, a sample that is missing, and blocks of another length."""
    own = both[1].units[None]
    one = own.index[own["domain"] == "german"][0]
    changed = own.assign(digest=own["digest"].where(own.index != one, "0"))
    for other in (changed, own.drop(index=one)):
        mixed = dataclasses.replace(both[1], units={None: other})
        for table in (compare_domains(mixed, both[0]), compare_domains(both[0], mixed)):
            lost = table.set_index("domain")["note"] == OTHER
            assert set(lost.index[lost]) == {"german", WHOLE}
            assert table.set_index("domain")["difference"].isna().eq(lost).all()
    with pytest.raises(ValueError, match=r"before has the capacities \[0.5\], after \[None\]: expected one"):
        compare_domains(dataclasses.replace(both[0], units={0.5: own}), both[0])
    with pytest.raises(ValueError, match="after=.*: expected what score_domains gives"):
        compare_domains(both[0], both[1].table)


def test_a_notebooks_table_has_both_intervals_and_says_what_does_not_pair(both):
    table = task_report.domain_table(both[1], task_report.Measured(None, both[0])).set_index("domain")
    told = compare_domains(*both).set_index("domain").loc[table.index]
    for name, column in (
        ("difference", "difference"),
        ("difference_low", "low"),
        ("difference_high", "high"),
    ):
        pd.testing.assert_series_equal(table[name], told[column], check_names=False)
    free = both[1].table[both[1].table["capacity"].isna()].set_index("domain")
    pd.testing.assert_series_equal(table["low"], free["low"])
    assert task_report.unpaired(table.reset_index()) == task_report.unpaired(None) == ""
    own = both[0].units[None]
    other = dataclasses.replace(both[0], units={None: own[own["domain"] != "german"]})
    lost = task_report.domain_table(both[1], task_report.Measured(None, other))
    said = task_report.unpaired(lost)
    assert said.startswith("No difference for german, (all): the two models did not read the same samples")
    assert lost["bits_per_token_baseline"].notna().all()
    alone = task_report.domain_table(both[1], None)
    assert "difference" not in alone and task_report.unpaired(alone) == ""


def test_two_cuts_of_a_text_are_other_tokens(model):
    cuts = [
        score_domains(model, "demo", Data("demo", tokens_per_sample=n), None, 4, progress=False)
        for n in (64, 32)
    ]
    assert compare_domains(*cuts)["note"].eq(OTHER).all()


def test_folders_pair_by_their_names(model, folders):
    """In whatever order they are named; a folder does not pair with another one."""
    names = {name: folders[0][name] for name in ("german", "python")}
    how = Data("demo", sample_break_mode="eos", tokens_per_sample=128)
    one, turned, other = (
        score_domains(model, asked, how, progress=False)
        for asked in (
            names,
            dict(reversed(names.items())),
            {"german": names["python"], "python": names["python"]},
        )
    )
    assert compare_domains(one, turned)["note"].eq("does not vary").all()
    table = compare_domains(one, other).set_index("domain")
    assert table["note"].to_dict() == {"german": OTHER, "python": "does not vary", WHOLE: OTHER}
    assert table.loc["python", "units"] == 12


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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda text: text.replace(b"\n", b" \xff\n", 7), "valid.domains.txt is not UTF-8: .* at byte"),
        (lambda text: b"x" * 100_000 + text[text.index(b"\n") :], "line 1: a domain of 100,000 characters"),
        (lambda text: b"(all)" + text[text.index(b"\n") :], r"a line has the domain \(all\)"),
    ],
)
def test_labels_from_elsewhere_are_one_sentence(model, tmp_path, changed, said):
    """A label of a million characters took the room of as many for each line of the text."""
    for path in (DEMO_TEXT / "data-bin").iterdir():
        (tmp_path / path.name).symlink_to(path)
    labels = (DEMO_TEXT / "valid.domains.txt").read_bytes()
    (tmp_path / "valid.domains.txt").write_bytes(changed(labels))
    with pytest.raises(ValueError, match=said):
        model.evaluate(domains=tmp_path, max_batches=1, progress=False)


def test_a_file_of_labels_with_holes_is_refused_by_its_size(model, tmp_path):
    for path in (DEMO_TEXT / "data-bin").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "valid.domains.txt").touch()
    os.truncate(tmp_path / "valid.domains.txt", 1 << 40)
    said = r"valid\.domains\.txt has 1,099,511,627,776 bytes; expected a domain for each line, of [\d,]+ bytes at most"
    with pytest.raises(ValueError, match=said):
        model.evaluate(domains=tmp_path, max_batches=1, progress=False)


def test_a_byte_order_mark_is_no_part_of_a_domain(tmp_path):
    for path in (DEMO_TEXT / "data-bin").iterdir():
        (tmp_path / path.name).symlink_to(path)
    labels = (DEMO_TEXT / "valid.domains.txt").read_bytes()
    (tmp_path / "valid.domains.txt").write_bytes(b"\xef\xbb\xbf" + labels)
    assert list(lines_of(tmp_path, "valid")[0]) == list(lines_of("demo", "valid")[0])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"max_batches": -1}, "max_batches=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"model": "demo"}, "model='demo'"),
        ({"how": "demo"}, "how='demo'"),
        ({"how": None}, "how=None"),
    ],
)
def test_scores_of_domains_check_their_arguments(model, how, said):
    with pytest.raises(ValueError, match=f"^{said}: expected"):
        score_domains(**{"model": model, "domains": "demo", "how": Data("demo")} | how)
