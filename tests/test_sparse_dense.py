"""Sparse against dense: the table by hand, the picture, and the demo's dense sibling."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic_traces import synthetic

from moekit.nn.record import nothing
from moekit.notebook import sparse_dense
from moekit.routing.trace import TOKEN_COLUMNS, Trace


def traces() -> tuple[Trace, Trace, np.ndarray]:
    """A trace with experts, one without of the same tokens, and two domains of unequal gain; a token knows no target."""
    sparse, _ = synthetic(tokens=640, layers=(1, 3), experts=8, block=32)
    columns = {name: getattr(sparse, name).copy() for name in TOKEN_COLUMNS}
    labels = np.where(sparse.sample % 2, "odd", "even")
    loss = np.where(labels == "odd", 2.0, 1.0) * math.log(2)
    noise = np.random.default_rng(0).normal(0, 0.01, len(labels))
    known = np.arange(len(labels)) != 639
    columns["logprob"] = np.where(known, -loss, np.nan).astype(np.float32)
    object.__setattr__(sparse, "logprob", columns["logprob"])
    worse = np.where(labels == "odd", 0.5, 0.25) * math.log(2) + noise
    columns["logprob"] = (columns["logprob"] - worse).astype(np.float32)
    dense = Trace(**columns, **nothing(len(labels)), layers=(), full={}, num_experts=0, meta={})
    return sparse, dense, labels


def test_the_table_by_hand():
    sparse, dense, labels = traces()
    table = sparse_dense.by_domain(sparse, dense, labels).set_index("domain")
    assert table.index.tolist() == ["odd", "even", "all"]
    counts = {name: int((labels[:-1] == name).sum()) for name in ("odd", "even")}
    assert table["tokens"].to_dict() == counts | {"all": 639}
    assert table["sparse"].tolist()[:2] == pytest.approx([2, 1], abs=1e-6)
    assert table["gain"].tolist()[:2] == pytest.approx([0.5, 0.25], abs=2e-3)
    np.testing.assert_allclose(table["dense"] - table["sparse"], table["gain"], atol=1e-6)
    for name in ("sparse", "dense", "gain"):
        mean = sum(table.loc[d, name] * n for d, n in counts.items()) / 639
        assert table.loc["all", name] == pytest.approx(mean, abs=1e-6)
    np.testing.assert_allclose(table["perplexity_ratio"], 2.0 ** -table["gain"], rtol=1e-6)
    assert (table["low"] < table["gain"]).all() and (table["gain"] < table["high"]).all()
    assert table["survives"].all()


def test_other_tokens_are_no_comparison():
    sparse, dense, labels = traces()
    with pytest.raises(
        ValueError, match="the traces have 640 and 32 tokens, and there are 640 labels; expected"
    ):
        sparse_dense.by_domain(sparse, dense.select(samples=0), labels)
    moved = replace(dense, sample=dense.sample + 1)
    with pytest.raises(
        ValueError, match="the traces share 608 of 640 tokens|the traces are not of the same text"
    ):
        sparse_dense.by_domain(sparse, moved, labels)


def test_the_picture():
    table = sparse_dense.by_domain(*traces())
    costs = pd.DataFrame({"parameters": [8.17e6, 2.64e6], "flop": [5.65e6, 5.65e6]}, ["sparse", "dense"])
    figure = sparse_dense.picture(table, costs)
    loss, ratio = figure.axes
    assert [label.get_text() for label in loss.get_yticklabels()] == ["odd", "even", "all"]
    assert loss.lines[0].get_xdata().tolist() == table["sparse"].tolist()
    assert loss.lines[1].get_xdata().tolist() == table["dense"].tolist()
    assert [line.get_xdata()[0] for line in ratio.lines[:3]] == table["perplexity_ratio"].tolist()
    assert figure.get_suptitle() == (
        "Sparse against dense at equal compute: 5.65 million operations a token; 8.17 and 2.64 million parameters"
    )
    costs.loc["dense", "flop"] = 3e6
    told = sparse_dense.picture(table, costs).get_suptitle()
    assert told.startswith("Sparse against dense: 5.65 and 3 million operations a token;")
    assert sparse_dense.picture(table).get_suptitle() == "Sparse against dense"
