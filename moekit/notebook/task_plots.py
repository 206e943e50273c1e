"""Pictures of tasks and domains, for evaluate_tasks.ipynb."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from moekit.domains import WHOLE
from moekit.notebook.style import done

if TYPE_CHECKING:
    import pandas as pd

OWN, BASELINE = "tab:blue", "0.55"


def tasks(table: pd.DataFrame, metric: str = "acc") -> Figure:
    """A metric of each task with its standard error, beside the baseline's.

    Args:
        table: of :func:`moekit.notebook.task_report.task_table`.
    """
    rows = table[table["metric"] == metric] if (table["metric"] == metric).any() else table
    figure, axes = _sideways(len(rows))
    place = np.arange(len(rows))
    _dots(axes, place, rows["value"], 1.96 * rows["stderr"], OWN, "checkpoint")
    if "value_baseline" in rows:
        _dots(axes, place, rows["value_baseline"], 1.96 * rows["stderr_baseline"], BASELINE, "baseline", 0.2)
        figure.legend(loc="outside right upper", frameon=False)
    _names(axes, [f"{row.task} ({row.items})" for row in rows.itertuples()])
    axes.set(xlabel=f"{metric}, with 1.96 standard errors")
    axes.set_title("Tasks (items)", fontsize=11)
    return done(figure)


def domains(table: pd.DataFrame) -> Figure:
    """Bits per token of each domain with its interval, beside the baseline's.

    Args:
        table: of :func:`moekit.notebook.task_report.domain_table`.
    """
    figure, axes = _sideways(len(table))
    place = np.arange(len(table))
    for end, colour, label, shift in (("", OWN, "checkpoint", 0.0), ("_baseline", BASELINE, "baseline", 0.2)):
        if f"bits_per_token{end}" in table:
            value = table[f"bits_per_token{end}"]
            widths = np.abs([value - table[f"low{end}"], table[f"high{end}"] - value])
            _dots(axes, place, value, widths, colour, label, shift)
    if "bits_per_token_baseline" in table:
        figure.legend(loc="outside right upper", frameon=False)
    _names(axes, table["domain"])
    axes.set(xlabel="bits per token, with 95 % intervals over samples")
    axes.set_title("Perplexity by domain", fontsize=11)
    return done(figure)


def capacities(table: pd.DataFrame) -> Figure:
    """Bits per token against the capacity, a line for each domain, and the share of choices that are dropped.

    Args:
        table: of :func:`moekit.domains.evaluate_domains`.
    """
    told = table[table["capacity"].map(lambda value: isinstance(value, float))]
    free = table[table["capacity"].isna()].set_index("domain")["bits_per_token"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name, rows in told.groupby("domain", sort=False):
        rows = rows.sort_values("capacity")
        style = {"color": "black", "linewidth": 2.5} if name == WHOLE else {"linewidth": 1.2}
        above.plot(
            rows["capacity"],
            rows["bits_per_token"] - free[name],
            marker="o",
            markersize=3,
            label=name,
            **style,
        )
        below.plot(rows["capacity"], rows["dropped"], marker="o", markersize=3, **style)
    above.axhline(0, color="0.7", linewidth=1)
    above.set(ylabel="bits per token, more than without")
    above.set_title("What a capacity costs", fontsize=11)
    below.set(ylabel="share of choices dropped", xlabel="capacity_token_fraction")
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return done(figure)


def _sideways(rows: int):
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * max(1, rows)), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _dots(axes, place, value, widths, colour: str, label: str, shift: float = 0.0) -> None:
    widths = np.nan_to_num(np.asarray(widths, float))
    axes.errorbar(
        value, place + shift, xerr=widths, fmt="o", color=colour, label=label, markersize=5, capsize=2
    )


def _names(axes, names) -> None:
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
