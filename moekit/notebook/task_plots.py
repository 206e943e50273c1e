"""Pictures of tasks and domains, for evaluate_tasks.ipynb."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.domains import WHOLE
from moekit.notebook.style import CHOICE_COLOURS, INK, STYLE, done
from moekit.routing.statistics import wilson

if TYPE_CHECKING:
    import pandas as pd

OWN, BASELINE, *_ = CHOICE_COLOURS
# One more than there are colours, so that a pair of both comes back late.
MARKERS = "osD^vPX"


@rc_context(STYLE)
def tasks(table: pd.DataFrame, metric: str = "acc") -> Figure:
    """A metric of each task with its 95 % interval, beside the baseline's.

    An accuracy has Wilson's interval, which holds also where all items or none are right; another metric has 1.96 standard
    errors on either side.

    Args:
        table: of :func:`moekit.notebook.task_report.task_table`.
        metric: the title names tasks without it. Where no task has it, all metrics of all tasks are drawn, by their names.
    """
    rows = table[table["metric"] == metric]
    title, axis, names = "Tasks (items)", metric, rows["task"]
    if rows.empty:
        rows, axis, names = table, "value", table["task"] + ", " + table["metric"]
    elif without := list(dict.fromkeys(table["task"][~table["task"].isin(names)])):
        title += f"; not those without {metric}: {', '.join(without)}"
    figure, (axes,) = _sideways(len(rows))
    place = np.arange(len(rows))
    share = rows["metric"].str.startswith("acc").to_numpy()
    for end, colour, label, shift in (("", OWN, "checkpoint", 0.0), ("_baseline", BASELINE, "baseline", 0.2)):
        if f"value{end}" in rows:
            value, width = rows[f"value{end}"], 1.96 * rows[f"stderr{end}"]
            low, high = wilson(np.where(share, value * rows["items"], 0), rows["items"])
            low, high = np.where(share, low, value - width), np.where(share, high, value + width)
            _dots(axes, place + shift, value, low, high, colour, label)
    if "value_baseline" in rows:
        figure.legend(loc="outside right upper")
    _names(axes, names + " (" + rows["items"].astype(str) + ")")
    axes.set(xlabel=f"{axis}, with 95 % intervals")
    axes.set_title(title, fontsize=11)
    return done(figure)


@rc_context(STYLE)
def domains(table: pd.DataFrame) -> Figure:
    """Bits per token of each domain with its interval, beside the baseline's, and at the right the paired difference.

    Args:
        table: of :func:`moekit.notebook.task_report.domain_table`.
    """
    paired = "difference" in table and table["difference"].notna().any()
    figure, (axes, *right) = _sideways(len(table), 2 if paired else 1)
    place = np.arange(len(table))
    for end, colour, label, shift in (("", OWN, "checkpoint", 0.0), ("_baseline", BASELINE, "baseline", 0.2)):
        if f"bits_per_token{end}" in table:
            drawn = (table[f"{name}{end}"] for name in ("bits_per_token", "low", "high"))
            _dots(axes, place + shift, *drawn, colour, label)
    if "bits_per_token_baseline" in table:
        figure.legend(loc="outside right upper")
    _names(axes, table["domain"])
    axes.set(xlabel="bits per token, with 95 % intervals over samples")
    axes.set_title("Loss by domain", fontsize=11)
    for beside in right:
        _differences(beside, place, table)
    return done(figure)


def _differences(axes, place: np.ndarray, table: pd.DataFrame) -> None:
    """The paired differences of :func:`moekit.domains.compare_domains`, filled where they survive the test."""
    for survives, fill in ((True, OWN), (False, "white")):
        here = (table["survives"] == survives).to_numpy()
        drawn = (table.loc[here, name] for name in ("difference", "difference_low", "difference_high"))
        _dots(axes, place[here], *drawn, OWN, fill=fill)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
    axes.set(xlabel="bits per token, 95 % over samples;\nfilled: survives a sign-flip test (Holm, 5 %)")
    axes.set_title("Checkpoint minus baseline, paired", fontsize=11)


@rc_context(STYLE)
def capacities(table: pd.DataFrame) -> Figure:
    """Bits per token against the capacity, a line for each domain, and the share of choices that are dropped.

    Args:
        table: of :func:`moekit.domains.evaluate_domains`.
    """
    told = table[table["capacity"].map(lambda value: isinstance(value, float))]
    free = table[table["capacity"].isna()].set_index("domain")["bits_per_token"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    lines = {name: rows.sort_values("capacity") for name, rows in told.groupby("domain", sort=False)}
    # The key has the order of the lines at the smallest capacity.
    cost = {name: rows["bits_per_token"].iloc[0] - free[name] for name, rows in lines.items()}
    parts = itertools.count()
    for name in sorted(lines, key=cost.get, reverse=True):
        rows = lines[name]
        style = {"color": INK, "linewidth": 2.5, "marker": "o"}
        if name != WHOLE:
            number = next(parts)
            colour, marker = (kinds[number % len(kinds)] for kinds in (CHOICE_COLOURS, MARKERS))
            style = {"color": colour, "linewidth": 1.2, "marker": marker}
        above.plot(rows["capacity"], rows["bits_per_token"] - free[name], markersize=5, label=name, **style)
        below.plot(rows["capacity"], rows["dropped"], markersize=5, **style)
    above.axhline(0, color="0.7", linewidth=1)
    above.set(ylabel="bits per token added")
    above.set_title("What a capacity costs, against none", fontsize=11)
    below.set(
        ylabel="share of choices dropped",
        xlabel="capacity: the share of a block's tokens that an expert takes at most",
    )
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return done(figure)


def _sideways(rows: int, columns: int = 1):
    size = (8 if columns == 1 else 10, 1.2 + 0.36 * max(1, rows))
    figure, axes = plt.subplots(1, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    return figure, axes[0]


def _dots(axes, place, value, low, high, colour: str, label: str = "", fill: str | None = None) -> None:
    """Each value and its interval, which is drawn as it is: one that is corrected for a bias may lie beside its value."""
    axes.hlines(place, low, high, color=colour)
    axes.plot(value, place, "o", color=colour, label=label, mfc=fill or colour, markersize=5)


def _names(axes, names) -> None:
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
