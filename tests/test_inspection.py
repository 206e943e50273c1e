import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest
from synthetic_traces import synthetic
from test_project import ROOT

import moekit
from moekit.notebook import inspection, parameters, routing_plots
from moekit.notebook.parameters import ParameterError
from moekit.routing import metrics
from moekit.routing.domains import domains_of
from moekit.routing.trace import Trace


def test_layers_are_whole_numbers():
    kind = {"layers": parameters.Wholes(optional=True)}
    assert parameters.check({"layers": [1, 3.0]}, kind).layers == [1, 3]
    assert parameters.check({"layers": 5}, kind).layers == [5]
    assert parameters.check({"layers": "[1, 5]"}, kind).layers == [1, 5]
    assert parameters.check({"layers": None}, kind).layers is None
    with pytest.raises(ParameterError, match=r"layers=\['a'\]: expected a list of whole numbers or None"):
        parameters.check({"layers": ["a"]}, kind)


def test_masked_experts_are_named_as_in_the_explorer():
    assert inspection.masked_name({5: [8, 2], 1: [0]}) == "5:8, 5:2, 1:0"


def test_texts_are_labelled_one_by_one():
    trace, _ = synthetic(tokens=30, block=10)
    assert inspection.labels_of(trace, "demo", None, True)[[0, 10, 29]].tolist() == [
        "text 0",
        "text 1",
        "text 2",
    ]
    assert inspection.labels_of(trace, "demo", ["a", "b", "c"], True)[25] == "c"
    with pytest.raises(ValueError, match="2 labels for 3 texts"):
        inspection.labels_of(trace, "demo", ["a", "b"], True)


def test_data_without_domains_has_no_labels(reference, capsys):
    trace, _ = synthetic(tokens=30)
    trace = dataclasses.replace(trace, meta={"subset": "valid"})
    assert inspection.labels_of(trace, str(reference / "data-bin"), None, False) is None
    assert capsys.readouterr().out.startswith("No domains: there is no file")


def test_the_favourite_is_the_expert_that_others_use_least():
    trace, _ = synthetic(tokens=400, layers=(1, 3), experts=6)
    domains = np.array(["a", "b"])[np.arange(400) % 2]
    experts = np.zeros((400, 2, 2), np.int16)
    experts[..., 1] = 1  # alike for both in layer 1
    experts[:, 1, 1] = np.where(
        (domains == "a") | (np.arange(400) % 8 == 1), 4, 2
    )  # and a quarter of b like a
    table = inspection.favourites(dataclasses.replace(trace, experts=experts), domains, None).set_index(
        "domain"
    )
    assert table.loc["a", ["layer", "expert", "share", "next"]].tolist() == [3, 4, 1, 0.25]
    assert table.loc["b", ["layer", "expert", "share", "next"]].tolist() == [3, 2, 0.75, 0]
    np.testing.assert_allclose(table["chance"], [(200 + 50) / 400, 150 / 400])
    np.testing.assert_allclose(table["lift"], table["share"] / table["chance"])
    few = dataclasses.replace(trace, experts=experts).select(samples=[*np.unique(trace.sample)[:2]])
    told = inspection.favourites(few, domains[: len(few)], None)
    assert told["note"].eq("too few").all() and not told["survives"].any()
    uniform = inspection.favourites(
        dataclasses.replace(trace, experts=experts), domains, None, against="uniform"
    )
    assert uniform["chance"].eq(2 / 6).all() and uniform["against"].eq("uniform").all()


def test_change_is_the_mean_difference_a_domain():
    trace, _ = synthetic(tokens=40, block=10)
    labels = np.repeat(["a", "b"], 20)
    after = dataclasses.replace(
        trace, logprob=trace.logprob + np.where(labels == "a", -0.5, 0.25).astype(np.float32)
    )
    table = inspection.change_by_domain(trace, after, labels)
    assert table["domain"].tolist() == ["a", "b"]
    np.testing.assert_allclose(table["change"], [-0.5, 0.25], atol=1e-6)
    assert table["tokens"].tolist() == [18, 18]  # a sample's last token has no target
    assert table["rerouted"].eq(0).all() and table["note"].eq("too few").all()
    assert inspection.change_by_domain(trace, after, None)["domain"].tolist() == ["all"]


@pytest.fixture(scope="module")
def of_the_demo():
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        trace = model.trace("demo", max_tokens=24_000, progress=False)
        yield model, trace.labelled(domain=domains_of(trace))


def test_the_model_continues_beginnings_of_each_domain(of_the_demo):
    model, trace = of_the_demo
    new = inspection.continued(model, trace, "domain", samples=2, read=20, max_new_tokens=5, temperature=0.0)
    start = np.flatnonzero(np.diff(trace.sample, prepend=-1))
    domains = trace.labels["domain"]
    pure = {n for n in start if len({*domains[n : n + 20]}) == 1}
    prompts = {tuple(trace.token[n + 1 : n + 20]): domains[n] for n in pure}
    for sample in np.unique(new.sample):
        one = new.select(samples=sample)
        # Generation begins with a symbol of its own, and the last new token is no input.
        assert len(one) == 20 + 5 - 1 and one.generated.sum() == 4
        assert (
            prompts[tuple(one.token[1:20])] == one.labels["domain"][0] and len({*one.labels["domain"]}) == 1
        )
    number = pd.Series(new.labels["domain"][np.unique(new.sample, return_index=True)[1]]).value_counts()
    assert set(number.index) == set(domains[sorted(pure)]) and number.max() == 2
    text = model.generate([new.token[1:20].tolist()], max_new_tokens=5, progress=False)[0]
    assert list(text.ids)[:4] == new.select(samples=0).token[20:].tolist()
    with pytest.raises(
        ValueError, match="no sample has 1000 tokens; expected some to continue, so read fewer"
    ):
        inspection.continued(model, trace, "domain", read=1000, max_new_tokens=1)


def test_where_no_sample_is_of_one_domain_its_most_counts():
    asked = {}

    class Silent:
        def generate(self, prompts, **options):
            asked["prompts"] = prompts
            traces = [made.select(samples=number) for number in range(len(prompts))]
            return [SimpleNamespace(trace=one) for one in traces]

    made, _ = synthetic(tokens=60, block=20)
    labels = np.array(["a", "b", "b"] * 20)
    found = inspection.continued(Silent(), made, labels, samples=5, read=6)
    assert len(asked["prompts"]) == 3 and set(found.labels["domain"]) == {"b"}


def test_read_and_written_shares_are_those_of_the_domains(of_the_demo):
    _, trace = of_the_demo
    favourites = inspection.favourites(trace, "domain", None, choice=0)
    half = trace.sample % 2 == 0
    read, new = trace.select(mask=half), trace.select(mask=~half)
    table = inspection.written(read, new, favourites)
    assert len(table) >= 2
    for row in table.itertuples():
        place = trace.at(row.layer)
        for part, share in ((read, row.read), (new, row.written)):
            own = part.experts[part.labels["domain"] == row.domain, place, 0]
            assert share == pytest.approx((own == row.expert).mean())
        assert row.load == pytest.approx((new.experts[:, place, 0] == row.expert).mean())
    figure = routing_plots.written(table)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        f"{row.domain}, {row.layer}:{row.expert}" for row in table.itertuples()
    ]
    assert np.allclose(figure.axes[0].lines[0].get_xdata(), 100 * table["read"])


def test_wide_tables_end_with_chance():
    trace, _ = synthetic(tokens=100, experts=16)
    table = inspection.wide(metrics.gate(trace))
    assert table.index.tolist() == [1, 3, "random routing"]
    assert table.loc["random routing", "confidence"] == pytest.approx(1 / 16)


def test_the_price_of_drops_by_hand():
    free, _ = synthetic(tokens=8)
    tight = dataclasses.replace(free, kept=free.kept.copy(), logprob=np.full(8, -np.log(8), np.float32))
    free = dataclasses.replace(free, kept=np.ones_like(free.kept), logprob=np.full(8, -np.log(2), np.float32))
    tight.kept[:] = True
    tight.kept[:4, 1] = False
    tight.meta["capacity_token_fraction"] = 0.2
    first, second, *_ = tight.layers
    said = inspection.price_of_drops(free, tight)
    assert said.startswith(f"With a capacity of 0.2, 0.0% in layer {first}, 50.0% in layer {second}")
    end = " The text takes 3.000 bits a token with it, 1.000 without a limit."
    assert said.endswith(" of the choices are dropped." + end)
    tight.meta["second_expert"] = "random"
    assert inspection.price_of_drops(free, tight).endswith(" of the choices are dropped, or not drawn." + end)


@pytest.mark.slow
def test_the_notebook_on_four_ranks_equals_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        one = model.trace(
            "demo", capacity_token_fraction=None, max_tokens=3000, predicted=True, progress=False
        )
    one.save(tmp_path / "one.parquet")
    papermill.execute_notebook(
        ROOT / "notebooks" / "inspect_routing.ipynb",
        tmp_path / "out.ipynb",
        parameters={
            "world_size": 4,
            "max_tokens": 3000,
            "compare_with": "one.parquet",
            "output_dir": "results",
        },
        progress_bar=False,
        start_timeout=180,
        execution_timeout=600,
    )
    results = tmp_path / "results"
    four = Trace.load(results / "trace.parquet")
    for name in ("sample", "position", "token", "target", "predicted", "experts", "kept"):
        assert np.array_equal(getattr(four, name), getattr(one, name)), name
    np.testing.assert_allclose(four.weights, one.weights, atol=1e-5)
    np.testing.assert_allclose(four.logprob, one.logprob, atol=1e-4)
    agreement = pd.read_csv(results / "agreement.csv").set_index("statistic")["value"]
    assert (agreement == 1).all()
    # The model is looked at as it computes by itself; the part on drops alone has a limit.
    assert four.kept.all() and (pd.read_csv(results / "drops.csv")["dropped"] > 0).any()
    names = {path.name for path in results.iterdir()}
    assert {"explorer.html", "load.png", "domains.png", "text_by_expert.png", "favourites.csv"} <= names
