"""What a change does to each domain, and what tells a token's expert: for papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.notebook.style import CHOICE_COLOURS, INK, KINDS, STYLE

if TYPE_CHECKING:
    import pandas as pd

# what may be drawn: its column, the columns of its interval, the axis's name and where nothing changes
DRAWN = {
    "perplexity_ratio": (("ratio_low", "ratio_high"), "perplexity after / before", 1.0),
    "change": (("low", "high"), "change of the log-probability, nats a token", 0.0),
}


def changes(tables: Mapping[str, pd.DataFrame], value: str = "perplexity_ratio") -> Figure:
    """What one or more changes do to each domain: a mark and its 95 % interval; filled where the change survives its test.

    Args:
        tables: name of the change -> :func:`moekit.routing.compare.change_by_domain`.
        value: "perplexity_ratio" or "change".

    Raises:
        ValueError: another ``value``.
    """
    if value not in DRAWN:
        raise ValueError(f"value={value!r}; expected one of {', '.join(DRAWN)}")
    (low, high), name, nothing = DRAWN[value]
    order = [str(domain) for domain in next(iter(tables.values()))["domain"]][::-1]
    with rc_context(STYLE):
        fig = Figure(figsize=(6, 1.1 + 0.28 * len(order)), layout="constrained")
        ax = fig.subplots()
        for number, (label, table) in enumerate(tables.items()):
            colour = CHOICE_COLOURS[number % len(CHOICE_COLOURS)]
            shift = 0.6 * ((number + 0.5) / len(tables) - 0.5)
            for row in table.to_dict("records"):
                y = order.index(str(row["domain"])) - shift
                ax.plot([row[low], row[high]], [y, y], color=colour, lw=1.4)
                ax.plot(row[value], y, "o", ms=5, color=colour, mfc=colour if row["survives"] else "white")
            ax.plot([], [], "o", color=colour, label=label)
        ax.axvline(nothing, color=INK, lw=0.8, ls="--")
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(-0.6, len(order) - 0.4)
        ax.set(xlabel=f"{name}; 95 % over samples; filled: survives a sign-flip test (Holm, 5 %)")
        # Within the axes it would hide intervals.
        fig.legend(loc="outside upper center", ncols=3, fontsize=8)
    return fig


def information(table: pd.DataFrame) -> Figure:
    """How much of the entropy of a token's expert is told by what, layer by layer.

    Args:
        table: :func:`moekit.routing.metrics.information`.
    """
    layers, kinds = table["layer"].unique(), table["of"].unique()
    with rc_context(STYLE):
        fig = Figure(figsize=(6, 2.6), layout="constrained")
        ax = fig.subplots()
        width = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            share = table[table["of"] == kind].set_index("layer")["share"].reindex(layers)
            at = np.arange(len(layers)) + (number - (len(kinds) - 1) / 2) * width
            ax.bar(at, 100 * share, width, label=kind, color=KINDS[number % len(KINDS)])
        ax.axhline(0, color=INK, lw=0.8)
        ax.set_xticks(range(len(layers)), [f"layer {n}" for n in layers])
        ax.set(ylabel="% of the expert's entropy", title="Told of a token's expert, corrected by shuffles")
        ax.legend(ncols=2, fontsize=8)
    return fig


def written(table: pd.DataFrame) -> Figure:
    """The share of a domain's tokens that choose one of its experts: in text that the model reads, and in text that it writes.

    Args:
        table: :func:`moekit.notebook.inspection.written`.
    """
    kinds = {"read": "in the text", "written": "in what the model writes"}
    with rc_context(STYLE):
        fig = Figure(figsize=(6, 1.1 + 0.28 * len(table)), layout="constrained")
        ax = fig.subplots()
        at = np.arange(len(table))[::-1]
        for number, (kind, label) in enumerate(kinds.items()):
            y, colour = at + 0.12 - 0.24 * number, CHOICE_COLOURS[number]
            ax.hlines(y, 100 * table[f"{kind}_low"], 100 * table[f"{kind}_high"], color=colour, lw=1.4)
            ax.plot(100 * table[kind], y, "o", ms=5, color=colour, label=label)
        ax.plot(100 * table["load"], at, "|", ms=9, color=INK, label="in all that the model writes")
        names = (f"{row.domain}, {row.layer}:{row.expert}" for row in table.itertuples())
        ax.set_yticks(at, list(names))
        ax.set(
            xlabel="% of the domain's tokens whose first choice is the expert (layer:expert); 95 % over samples",
            xlim=(0, None),
            ylim=(-0.6, len(table) - 0.4),
        )
        fig.legend(loc="outside upper center", ncols=3, fontsize=8)
    return fig
