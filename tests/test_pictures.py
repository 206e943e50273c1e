"""Pictures with descriptions, tables as LaTeX, settings, and the explorer within a notebook."""

import functools

import nbconvert
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from synthetic_traces import synthetic

from moekit.domains import WHOLE
from moekit.notebook import pictures, plots, report, routing_plots, task_plots
from moekit.notebook.explorer import explore
from moekit.routing import metrics
from moekit.routing.compare import change_by_domain
from moekit.scoring import Evaluation


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
    assert r"x\_1 & $<0.01$ & $1{,}234$ & yes \\" in text and r"50 \% & $0.25$ & $5$ & no \\" in text
    assert pictures.latex(pd.DataFrame({"v": [np.nan]}), "c", "l").count("--") == 1
    odd = pictures.latex(pd.DataFrame({"v": [np.inf, -np.inf], "piece": ["<a|b>", "~^\\"]}), "c", "l")
    assert r"$\infty$ & \textless{}a\textbar{}b\textgreater{} \\" in odd
    assert r"$-\infty$ & \textasciitilde{}\textasciicircum{}\textbackslash{} \\" in odd
    for asked, said in (
        (("x", "c", "l"), "^table='x': expected a table"),
        ((table, None, "l"), "^caption=None: expected text"),
        ((table, "c", "l", "x"), "^digits='x': expected a whole number of at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            pictures.latex(*asked)


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
    # A table for a paper writes 2 as a whole number, also beside generated text, which has no batches.
    assert found["batch_size"].tolist() == [2, "–"] and "$2$" in pictures.latex(found, "c", "l")
    assert [pictures.capacity_name(f) for f in (None, 0.25, -1.25)] == ["none", "0.25", "training"]
    near = (0.1234567, 0.1234568, 1.0, 1e-7)
    names = [pictures.capacity_name(f) for f in near]
    assert names == ["0.1234567", "0.1234568", "1", "0.0000001"], "two capacities of a study have two names"


def scored(samples: int, length: int, bits: np.ndarray) -> pd.DataFrame:
    """``Evaluation.tokens`` of samples of one length; ``bits`` [samples, length] is the loss of each token."""
    number, position = np.divmod(np.arange(samples * length), length)
    columns = {"sample": number, "position": position, "token": 2, "target": 5}
    return pd.DataFrame(columns | {"logprob": -bits.ravel() * np.log(2)})


@pytest.mark.parametrize("tokens", [None, [1], {"logprob": [1.0]}])
def test_pictures_of_tokens_take_the_table_of_tokens(tokens):
    for picture in (plots.loss_by_position, functools.partial(plots.passage, codec=None)):
        with pytest.raises(ValueError, match=r"^tokens=.*: expected Evaluation\.tokens"):
            picture(tokens)


def test_the_loss_by_position_has_intervals_over_samples():
    samples, length = 40, 64
    of_sample = np.random.default_rng(0).normal(4, 1, samples)
    tokens = scored(samples, length, np.repeat(of_sample[:, None], length, axis=1))
    axes = plots.loss_by_position(tokens).axes[0]
    read, mean = axes.lines[0].get_data()
    assert read[0] == 1 and read[-1] < length and mean == pytest.approx(of_sample.mean())
    # All tokens of a sample are alike, so many positions tell no more than one.
    ends = axes.collections[0].get_paths()[0].vertices
    for here in (read[0], read[-1]):
        low, high = np.sort(ends[ends[:, 0] == here, 1])[[0, -1]]
        half = 2.02 * of_sample.std(ddof=1) / np.sqrt(samples)
        assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    few = plots.loss_by_position(tokens[tokens["sample"] < 3]).axes[0]
    assert not few.collections and len(few.get_legend().get_texts()) == 2


def test_the_first_tokens_have_their_text():
    tokens = scored(1, 8, np.ones((1, 8)))
    shown = report.first_tokens(Evaluation(1.0, 2.0, 8, 1.0, 8.0, tokens), None, rows=3)
    assert shown.columns.tolist() == ["sample", "position", "token", "target", "piece", "logprob"]
    assert shown["piece"].tolist() == [" 5"] * 3 and "piece" not in tokens


def test_the_key_of_the_capacities_has_the_order_of_the_lines():
    added = {"b": 0.5, "a": 2.0, WHOLE: 1.0} | {f"more {n}": 0.1 / (n + 1) for n in range(6)}
    rows = [(name, None, 4.0, 0.0) for name in added]
    rows += [
        (name, share, 4 + cost * (1 - share), 0.3) for name, cost in added.items() for share in (0.5, 0.1)
    ]
    table = pd.DataFrame(rows, columns=["domain", "capacity", "bits_per_token", "dropped"])
    figure = task_plots.capacities(table.astype({"capacity": object}).where(table.notna(), None))
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert key == ["a", WHOLE, "b", *(f"more {n}" for n in range(6))]
    lines = figure.axes[0].lines[: len(added)]
    assert lines[0].get_ydata()[0] == pytest.approx(1.8)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(added)


def test_domains_beside_a_baseline_show_the_paired_difference():
    """The interval of each value and difference; filled where it survives; and no such panel where nothing pairs."""
    columns = {
        "domain": ["a", "b", "c"],
        "bits_per_token": [4.0, 5.0, 6.0],
        "low": [3.8, 4.8, 6.1],
        "high": [4.3, 5.3, 6.3],
    }
    columns |= {f"{name}_baseline": columns[name] for name in ("bits_per_token", "low", "high")}
    columns |= {
        "difference": [-0.2, 0.1, np.nan],
        "difference_low": [-0.3, 0.12, np.nan],
        "difference_high": [-0.05, 0.2, np.nan],
        "survives": [True, False, False],
    }
    table = pd.DataFrame(columns)
    loss, paired = task_plots.domains(table).axes
    assert loss.get_ylim() == paired.get_ylim()
    # An interval without its bias may lie beside the value, and is drawn where it is.
    drawn = [segment[:, 0].tolist() for segment in loss.collections[0].get_segments()]
    assert drawn == [[3.8, 4.3], [4.8, 5.3], [6.1, 6.3]]
    kept, other = paired.lines[:2]
    assert kept.get_xydata().tolist() == [[-0.2, 0]]
    assert kept.get_markerfacecolor() != "white" and other.get_markerfacecolor() == "white"
    kept, other = (lines.get_segments() for lines in paired.collections)
    assert kept[0].tolist() == [[-0.3, 0], [-0.05, 0]] and other[0].tolist() == [[0.12, 1], [0.2, 1]]
    assert len(task_plots.domains(table.assign(difference=np.nan)).axes) == 1


def test_an_accuracy_has_an_interval_where_all_items_are_right():
    columns = {
        "task": ["a", "b"],
        "metric": "acc",
        "value": [1.0, 0.5],
        "stderr": [0.0, 0.1],
        "items": [38, 4],
    }
    axes = task_plots.tasks(pd.DataFrame(columns)).axes[0]
    (first, second) = axes.collections[0].get_segments()
    # Wilson's interval of 38 of 38 begins at 1 / (1 + 1.96^2 / 38), and that of 2 of 4 is 0.150 to 0.850.
    assert first[:, 0] == pytest.approx([1 / (1 + 1.96**2 / 38), 1], abs=1e-4)
    assert second[:, 0] == pytest.approx([0.150, 0.850], abs=1e-3)
    margins = task_plots.tasks(pd.DataFrame(columns | {"metric": "margin"}), "margin").axes[0]
    assert margins.collections[0].get_segments()[1][:, 0] == pytest.approx([0.304, 0.696])


def test_tasks_without_the_metric_are_named():
    """A task of the user's may have a perplexity alone, which is no accuracy."""
    columns = {
        "task": ["a", "b", "b"],
        "metric": ["acc", "perplexity", "acc_norm"],
        "value": [0.5, 40.0, 1.0],
    }
    table = pd.DataFrame(columns | {"stderr": [0.1, 2.0, 0.0], "items": [4, 9, 38]})
    axes = task_plots.tasks(table).axes[0]
    assert axes.get_title(loc="left") == "Tasks (items); not those without acc: b"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a (4)"]
    axes = task_plots.tasks(table[1:]).axes[0]
    assert axes.get_xlabel() == "value, with 95 % intervals" and axes.get_title(loc="left") == "Tasks (items)"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["b, perplexity (9)", "b, acc_norm (38)"]
    perplexity, accuracy = axes.collections[0].get_segments()
    assert perplexity[:, 0] == pytest.approx([40 - 2 * 1.96, 40 + 2 * 1.96])
    assert accuracy[:, 0] == pytest.approx([1 / (1 + 1.96**2 / 38), 1], abs=1e-4)
