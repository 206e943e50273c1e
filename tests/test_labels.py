"""Labels as a column of a trace: added, saved with it, and known to metrics by their name."""

import dataclasses

import numpy as np
import pytest
from synthetic_traces import synthetic

from moekit.notebook import routing_plots
from moekit.notebook.explorer import page
from moekit.routing import metrics
from moekit.routing.compare import change_by_domain
from moekit.routing.trace import Trace, join


def test_labels_are_a_column():
    trace, _ = synthetic(tokens=300)
    domain = np.where(np.arange(300) % 3 == 0, "a", "b")
    found = trace.labelled(domain=domain, number=(i % 5 for i in range(300)))
    assert trace.labels == {} and found.labels["number"][:6].tolist() == ["0", "1", "2", "3", "4", "0"]
    some = found.select(samples=[0, 2], layers=trace.layers[:1])
    assert some.labels["domain"].tolist() == domain[np.isin(trace.sample, [0, 2])].tolist()
    assert found.to_pandas()["domain"].tolist() == np.repeat(domain, len(trace.layers)).tolist()
    kept = found.labelled(number=None, again="domain")
    assert list(kept.labels) == ["domain", "again"] and kept.labels["again"].tolist() == domain.tolist()
    both = join([kept, trace.labelled(domain=["c"] * 300)], renumber=True)
    assert list(both.labels) == ["domain"] and (both.labels["domain"][300:] == "c").all()
    for metric in (
        metrics.domain_specialisation,
        metrics.domain_information,
        metrics.permutation,
        metrics.information,
    ):
        assert metric(found, "domain").equals(metric(trace, domain))
    assert metrics.bootstrap(found, metrics.domain_information, "domain", resamples=20).equals(
        metrics.bootstrap(trace, metrics.domain_information, domain, resamples=20)
    )


@pytest.mark.parametrize(
    "labels, said",
    [
        ({"token": ["a"] * 300}, "has a column token of its own"),
        ({"layer": ["a"] * 300}, "has a column layer of its own"),
        ({"prob_1": ["a"] * 300}, "has a column prob_1 of its own"),
        ({"x": ["a"]}, r"x has shape \[1\]; expected a label for each of 300 tokens"),
        ({"x": ["a"] * 299 + ["\ud800"]}, r"x=\['\\ud800'\]: its character 0 is half of a surrogate pair"),
        ({"\ud800": ["a"] * 300}, r"labels=\['\\ud800'\]: its character 0 is half of a surrogate pair"),
        ({"x": 3}, "x=3: expected a label for each token"),
        ({"x": "y"}, r"no column of labels called 'y': there is none; trace\.labelled"),
    ],
)
def test_labels_that_are_none(labels, said):
    with pytest.raises(ValueError, match=said):
        synthetic(tokens=300)[0].labelled(**labels)


def test_labels_of_generated_text_are_those_of_the_new_tokens():
    trace, _ = synthetic(tokens=300)
    label = np.where(np.arange(300) % 2, "a", "b")
    found = dataclasses.replace(trace, generated=np.arange(300) % 3 > 0).labelled(x=label)
    new = trace.select(mask=found.generated)
    wanted = metrics.domain_specialisation(new, label[found.generated])
    assert metrics.domain_specialisation(found, "x").equals(wanted)
    assert metrics.domain_specialisation(found, "x", prompt=True).equals(
        metrics.domain_specialisation(trace, label)
    )


def test_pictures_and_the_explorer_take_a_columns_name():
    trace, _ = synthetic(tokens=300)
    found = trace.labelled(x=np.where(np.arange(300) % 2, "a", "b"))
    assert routing_plots.domain_heatmap(found, "x", mark=False).axes
    assert page.page(found, None, "x") == page.page(found, None, found.labels["x"])
    change = change_by_domain(found, found, "x")
    assert set(change["domain"]) == {"a", "b"}


def test_labels_have_any_name_and_are_saved_by_it(tmp_path):
    names = ["self", "labels", "", "a.b", "é\n", "\0"]
    found = synthetic(tokens=300)[0].labelled(**{name: [name] * 300 for name in names})
    found.save(tmp_path / "t.parquet")
    again = Trace.load(tmp_path / "t.parquet")
    assert list(again.labels) == names and again.labels_of("self").tolist() == ["self"] * 300


def test_labels_of_no_tokens():
    nothing = synthetic(tokens=300)[0].select(mask=np.zeros(300, bool))
    assert nothing.labelled(domain=[]).labels["domain"].shape == (0,)
