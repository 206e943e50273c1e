"""How busy each expert is."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.arguments import Whole
from moekit.checked import checked
from moekit.notebook.style import (
    CHOICE_COLOURS,
    INK,
    RATIO,
    RATIO_COLOURS,
    STYLE,
    log2,
    plain_log,
    ramp,
    ratio_bar,
)
from moekit.routing import metrics
from moekit.routing.statistics import random_counts
from moekit.routing.trace import TRACE, Trace

# experts of a layer whose numbers fit into the cells of a heat map
NUMBERED = 32
# random traces that the band is made of
DRAWS = 100


@checked(trace=TRACE, seed=Whole(0))
def load_heatmap(trace: Trace, seed: int = 0) -> Figure:
    """Load of every expert of every layer, busiest first: a heat map with the experts' numbers, and the curves below it.

    Load is the share of all K T choices, dropped ones included, as a multiple of the uniform share 1/E. The grey band
    holds 90 % of what uniform random routing gives at this number of tokens: even then some experts are busier.
    """
    trace = metrics.counted(trace)
    counts = metrics.counts(trace)
    total, experts = len(trace) * trace.top_k, trace.num_experts
    order = np.argsort(-counts, axis=1, kind="stable")
    ratio = np.take_along_axis(counts, order, axis=1) / (total / experts)
    drawn = random_counts(len(trace), trace.top_k, experts, DRAWS, seed)
    low, high = np.quantile(-np.sort(-drawn, axis=1) / (total / experts), (0.05, 0.95), axis=0)
    place_of = np.arange(1, experts + 1)
    with rc_context(STYLE):
        rows = max(1.0, 0.24 * len(trace.layers))
        fig = Figure(figsize=(9, rows + 3.4), layout="constrained")
        heat, curve = fig.subplots(2, 1, height_ratios=[rows, 2.6])
        image = heat.imshow(
            log2(ratio),
            aspect="auto",
            cmap=RATIO_COLOURS,
            norm=RATIO,
            interpolation="nearest",
            extent=(0.5, experts + 0.5, len(counts), 0),
        )
        heat.set_yticks(np.arange(len(counts)) + 0.5, [f"layer {n}" for n in trace.layers])
        heat.set_title(f"Load of {experts} experts, busiest first in each layer; {len(trace):,} tokens")
        heat.tick_params(left=False)
        if experts <= NUMBERED:
            for place in np.ndindex(order.shape):
                heat.text(place[1] + 1, place[0] + 0.5, order[place], ha="center", va="center", fontsize=7)
        ratio_bar(fig, image, heat, "× uniform")
        curve.fill_between(
            place_of, low, high, color="#BBBBBB", lw=0, step="mid", label="uniform random routing, 90 %"
        )
        for row, layer, colour in zip(ratio, trace.layers, ramp(len(counts)), strict=True):
            curve.plot(
                place_of,
                np.where(row > 0, row, np.nan),
                color=colour,
                lw=1.4,
                drawstyle="steps-mid",
                label=f"layer {layer}",
            )
        curve.axhline(1, color=INK, lw=1, ls="--")
        curve.set(
            xlabel="experts of a layer, from the busiest to the least used",
            ylabel="× uniform",
            xlim=(0.5, experts + 0.5),
            yscale="log",
        )
        plain_log(curve)
        curve.legend(ncols=2, loc="upper right", fontsize=8)
        idle = "; ".join(
            f"layer {n}: {z}" for n, z in zip(trace.layers, (counts == 0).sum(axis=1), strict=True) if z
        )
        if idle:
            curve.set_title(f"experts that no token chose: {idle}", fontsize=8)
    return fig


@checked(trace=TRACE, named=Whole(0))
def choices(trace: Trace, named: int = 5) -> Figure:
    """First against second choices: one panel a layer, and in it each expert's share of either, with 95 % intervals over samples.

    On the diagonal lie experts that are first and second choices alike. Above it lie those that are mostly second choices,
    which a capacity drops first.

    Args:
        named: experts farthest from the diagonal whose numbers are written beside them.

    Raises:
        ValueError: each token has one choice.
    """
    if trace.top_k < 2:
        raise ValueError("each token has one choice in this trace, no second one; expected two or more")
    first, second = (metrics.load(trace, choice=choice) for choice in range(2))
    columns = min(3, len(trace.layers))
    rows = -(-len(trace.layers) // columns)
    with rc_context(STYLE):
        fig = Figure(figsize=(3.1 * columns, 3.1 * rows + 0.4), layout="constrained")
        panels = fig.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels[len(trace.layers) :]:
            ax.set_visible(False)
        for ax, layer in zip(panels, trace.layers, strict=False):
            one, other = (
                100 * table[table["layer"] == layer].set_index("expert") for table in (first, second)
            )
            x, y = one["value"], other["value"]
            ax.hlines(y, one["low"], one["high"], color="#BBBBBB", lw=0.8)
            ax.vlines(x, other["low"], other["high"], color="#BBBBBB", lw=0.8)
            ax.plot(x, y, "o", ms=4, color=CHOICE_COLOURS[0], mec="white", mew=0.4)
            top = max(x.max(), y.max()) * 1.05
            ax.plot([0, top], [0, top], color=INK, lw=0.8, ls="--")
            for expert in (y - x).abs().nlargest(named).index:
                ax.annotate(
                    str(expert), (x[expert], y[expert]), xytext=(3, 3), textcoords="offset points", fontsize=7
                )
            ax.set(xlim=(0, top), ylim=(0, top), aspect="equal")
            both = x.rank().corr(y.rank())
            ax.set_title(f"layer {layer}: rank correlation {both:.2f}", fontsize=9)
        fig.supxlabel("% of first choices", fontsize=9)
        fig.supylabel("% of second choices", fontsize=9)
        fig.suptitle(
            "Each expert's share of first and of second choices; bars: 95 % over samples; dashed: equal shares",
            x=0.01,
            ha="left",
            fontsize=9,
        )
    return fig
