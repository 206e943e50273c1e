"""Pictures of tasks and domains, for evaluate_tasks.ipynb."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.domains import WHOLE
from moekit.notebook.style import CHOICE_COLOURS, INK, STYLE, done

if TYPE_CHECKING:
    import pandas as pd

OWN, BASELINE, *_ = CHOICE_COLOURS


@rc_context(STYLE)
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
        figure.legend(loc="outside right upper")
    _names(axes, [f"{row.task} ({row.items})" for row in rows.itertuples()])
    axes.set(xlabel=f"{metric}, with 1.96 standard errors")
    axes.set_title("Tasks (items)", fontsize=11)
    return done(figure)


@rc_context(STYLE)
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
        figure.legend(loc="outside right upper")
    _names(axes, table["domain"])
    axes.set(xlabel="bits per token, with 95 % intervals over samples")
    axes.set_title("Perplexity by domain", fontsize=11)
    return done(figure)


@rc_context(STYLE)
def capacities(table: pd.DataFrame) -> Figure:
    """Bits per token against the capacity, a line for each domain, and the share of choices that are dropped.

    Args:
        table: of :func:`moekit.domains.evaluate_domains`.
    """
    told = table[table["capacity"].map(lambda value: isinstance(value, float))]
    free = table[table["capacity"].isna()].set_index("domain")["bits_per_token"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for number, (name, rows) in enumerate(told.groupby("domain", sort=False)):
        rows = rows.sort_values("capacity")
        again, colour = divmod(number, len(CHOICE_COLOURS))
        style = {"color": CHOICE_COLOURS[colour], "linewidth": 1.2, "linestyle": "--" if again else "-"}
        if name == WHOLE:
            style = {"color": INK, "linewidth": 2.5}
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
    figure.legend(*above.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return done(figure)


def _sideways(rows: int):
    return plt.subplots(figsize=(8, 1.2 + 0.36 * max(1, rows)), layout="constrained")


def _dots(axes, place, value, widths, colour: str, label: str, shift: float = 0.0) -> None:
    widths = np.nan_to_num(np.asarray(widths, float))
    axes.errorbar(
        value, place + shift, xerr=widths, fmt="o", color=colour, label=label, markersize=5, capsize=2
    )


def _names(axes, names) -> None:
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
