import dataclasses

import numpy as np
import pandas as pd
import papermill
import pytest
from synthetic_traces import synthetic
from test_project import ROOT

import moekit
from moekit.arguments import ParameterError
from moekit.notebook import inspection, parameters
from moekit.routing import metrics
from moekit.routing.trace import Trace


def test_layers_are_whole_numbers():
    kind = {"layers": parameters.Wholes(optional=True)}
    assert parameters.check({"layers": [1, 3.0]}, kind).layers == [1, 3]
    assert parameters.check({"layers": 5}, kind).layers == [5]
    assert parameters.check({"layers": "[1, 5]"}, kind).layers == [1, 5]
    assert parameters.check({"layers": None}, kind).layers is None
    with pytest.raises(ParameterError, match=r"layers=\['a'\]: expected a list of whole numbers or None"):
        parameters.check({"layers": ["a"]}, kind)


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


def test_wide_tables_end_with_chance():
    trace, _ = synthetic(tokens=100, experts=16)
    table = inspection.wide(metrics.gate(trace))
    assert table.index.tolist() == [1, 3, "random routing"]
    assert table.loc["random routing", "confidence"] == pytest.approx(1 / 16)


@pytest.mark.slow
def test_the_notebook_on_four_ranks_equals_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        one = model.trace(
            "demo", capacity_token_fraction=0.2, max_tokens=3000, predicted=True, progress=False
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
    names = {path.name for path in results.iterdir()}
    assert {"explorer.html", "load.png", "domains.png", "text_by_expert.png", "favourites.csv"} <= names
