"""Pictures with descriptions, tables as LaTeX, settings, and the explorer within a notebook."""

import nbconvert
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from synthetic_traces import synthetic

from moekit.notebook import pictures, routing_plots
from moekit.notebook.explorer import explore
from moekit.routing import metrics
from moekit.routing.compare import change_by_domain


def page(bundle: dict) -> str:
    """The HTML page of a notebook with one output."""
    output = nbformat.v4.new_output("display_data", bundle)
    cell = nbformat.v4.new_code_cell("x", outputs=[output])
    return nbconvert.HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]


def test_a_converted_picture_has_alternative_text():
    figure = Figure()
    figure.subplots().set(title='Load "a" & b', xlabel="expert")
    picture = pictures.Picture(figure)
    assert picture.alt == 'Load "a" & b; across: expert'
    text = page(picture._repr_mimebundle_())
    assert 'Load "a" &amp; b; across: expert\'' in text
    assert "No description has been provided" not in text
    assert pictures.Picture(figure, "own words").alt == "own words"


def test_the_explorer_stands_in_a_converted_notebook():
    trace, domains = synthetic(tokens=300)
    bundle = {"text/html": explore(trace, domains=domains).embedded().data}
    text = page(bundle)
    assert "<iframe" in text and "array-choice" in text and "<details>" in text


def test_latex():
    table = pd.DataFrame({"a_b": ["x_1", "50 %"], "p": [0.0001, 0.25], "n": [1234, 5], "ok": [True, False]})
    text = pictures.latex(table, "A & b", "t", digits=2)
    assert r"\begin{tabular}{lrrl}" in text and r"\caption{A \& b}" in text and r"\label{tab:t}" in text
    assert r"x\_1 & $<0.01$ & $1,234$ & yes \\" in text and r"50 \% & $0.25$ & $5$ & no \\" in text
    assert pictures.latex(pd.DataFrame({"v": [np.nan]}), "c", "l").count("--") == 1


def test_files_for_a_paper(tmp_path):
    trace, labels = synthetic(tokens=600, block=30, domains=2)
    table = change_by_domain(trace, trace, labels)
    told = metrics.information(trace, labels, min_count=2, shuffles=2)
    figures = {
        "changes": routing_plots.changes({"one": table, "two": table}),
        "change": routing_plots.changes({"one": table}, value="change"),
        "information": routing_plots.information(told),
    }
    names = pictures.save(tmp_path / "out", figures, {"told": (told, "What tells.")})
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 8 and r"\toprule" in (tmp_path / "out" / "told.tex").read_text()
    with pytest.raises(ValueError, match="value='delta'"):
        routing_plots.changes({"one": table}, value="delta")


def test_settings_come_from_the_traces():
    trace, _ = synthetic(tokens=60, block=20)
    trace.meta.update(capacity_token_fraction=0.25, intervention={"mask": [[5, 8]]}, batch_size=2)
    other, _ = synthetic(tokens=40, block=20)
    found = pictures.settings({"one": trace, "two": other})
    assert found[["tokens", "samples", "capacity", "mask"]].to_numpy().tolist() == [
        [60, 3, "0.25", "5:8"],
        [40, 2, "none", "none"],
    ]
