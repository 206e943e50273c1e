"""A model with experts beside a dense one: what each costs, and how well each predicts each kind of text.

sparse, dense = moekit.load("demo"), moekit.load("demo-dense")
traces = [model.trace("demo") for model in (sparse, dense)]
table = sparse_dense.by_domain(*traces, domains_of(traces[0]))
sparse_dense.picture(table, sparse_dense.costs({"sparse": sparse, "dense": dense}))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.nn.cost import flop_per_token
from moekit.nn.transformer import parameters
from moekit.notebook.style import CHOICE_COLOURS, INK, STYLE
from moekit.routing.compare import change_by_domain

if TYPE_CHECKING:
    from moekit.api import Model
    from moekit.routing.trace import Trace

# The name of all text together, the last row of a table.
ALL = "all"


def by_domain(sparse: Trace, dense: Trace, labels: np.ndarray) -> pd.DataFrame:
    """The loss of two models on the same tokens, by domain.

    Args:
        sparse, dense: traces of the same text; each may be of any model.
        labels: [T] domains of the tokens.

    Returns:
        A row per domain, the domain with the largest gain first, and one for all text: ``domain``, ``tokens``, ``sparse`` and
        ``dense`` (bits a token), ``gain`` (dense - sparse, bits a token) with ``low`` and ``high`` (95 % over samples),
        ``perplexity_ratio`` (sparse / dense), ``p`` and ``survives`` (sign flips over samples, Holm's correction over
        domains), see :func:`moekit.routing.compare.change_by_domain`.

    Raises:
        ValueError: the traces are not of the same tokens, or there is no label for each.
    """
    labels = np.asarray(labels)
    if not len(sparse) == len(dense) == len(labels):
        raise ValueError(
            f"the traces have {len(sparse)} and {len(dense)} tokens, and there are {len(labels)} labels; expected traces of "
            "the same text and a label for each of its tokens"
        )
    rows = []
    for names in (labels, np.full(len(labels), ALL)):
        change = change_by_domain(dense.without_experts(), sparse.without_experts(), names)
        for row in change.sort_values("change", ascending=False).to_dict("records"):
            here = names == row["domain"]
            rows.append(
                {
                    "domain": row["domain"],
                    "tokens": row["tokens"],
                    "sparse": _bits(sparse, here),
                    "dense": _bits(dense, here),
                    "gain": row["change"] / math.log(2),
                    "low": row["low"] / math.log(2),
                    "high": row["high"] / math.log(2),
                    "perplexity_ratio": row["perplexity_ratio"],
                    "p": row["p"],
                    "survives": row["survives"],
                }
            )
    return pd.DataFrame(rows)


def _bits(trace: Trace, here: np.ndarray) -> float:
    """The mean loss of some tokens, in bits."""
    return float(-np.nanmean(trace.logprob[here], dtype=np.float64) / math.log(2))


def costs(models: Mapping[str, Model], length: int | None = None) -> pd.DataFrame:
    """What models cost, one row per model: ``parameters``, and ``flop`` a token (:func:`moekit.nn.cost.flop_per_token`).

    Args:
        length: tokens of a sample; None: as many as the model has positions.
    """
    rows = {
        name: {
            "parameters": parameters(model.config),
            "flop": flop_per_token(model.config, length or model.config.max_positions),
        }
        for name, model in models.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def picture(table: pd.DataFrame, costs: pd.DataFrame | None = None) -> Figure:
    """The loss of both models by domain, and at the right the perplexity of one over the other's with its 95 % interval.

    Args:
        table: :func:`by_domain`.
        costs: :func:`costs` of ``sparse`` and ``dense``, for the title.
    """
    order = np.arange(len(table))[::-1]
    with rc_context(STYLE):
        fig = Figure(figsize=(9, 1.3 + 0.3 * len(table)), layout="constrained")
        loss, ratio = fig.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        loss.hlines(order, table["sparse"], table["dense"], color="0.75", lw=2)
        for name, colour in zip(("sparse", "dense"), CHOICE_COLOURS, strict=False):
            loss.plot(table[name], order, "o", ms=6, color=colour, label=name)
        loss.set_yticks(order, table["domain"])
        loss.set(xlabel="loss, bits a token")
        loss.legend(loc="center left", fontsize=8)
        # A gain of g bits is a perplexity of 2 ** -g times the other's.
        colour = CHOICE_COLOURS[0]
        ratio.hlines(order, 2.0 ** -table["high"], 2.0 ** -table["low"], color=colour, lw=1.4)
        for y, value, survives in zip(order, table["perplexity_ratio"], table["survives"], strict=True):
            ratio.plot(value, y, "o", ms=5, color=colour, mfc=colour if survives else "white")
        ratio.axvline(1, color=INK, lw=0.8, ls="--")
        ratio.set(
            xlabel="perplexity, sparse / dense; 95 % over samples;\nfilled: survives a sign-flip test (Holm, 5 %)"
        )
        for ax in (loss, ratio):
            ax.axhline(0.5, color="0.85", lw=0.8)
        fig.suptitle(_title(costs), fontsize=11, x=0.01, ha="left")
    return fig


def _title(costs: pd.DataFrame | None) -> str:
    if costs is None:
        return "Sparse against dense"
    flop, size = costs["flop"] / 1e6, costs["parameters"] / 1e6
    sizes = f"{size['sparse']:.3g} and {size['dense']:.3g} million parameters"
    if math.isclose(flop["sparse"], flop["dense"], rel_tol=0.01):
        return (
            f"Sparse against dense at equal compute: {flop['sparse']:.3g} million operations a token; {sizes}"
        )
    return f"Sparse against dense: {flop['sparse']:.3g} and {flop['dense']:.3g} million operations a token; {sizes}"
