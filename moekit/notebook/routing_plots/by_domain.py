"""Which experts a domain uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.arguments import shown
from moekit.notebook.style import INK, RATIO, RATIO_COLOURS, STYLE, log2, ratio_bar
from moekit.routing import metrics

if TYPE_CHECKING:
    import pandas as pd

    from moekit.routing.trace import Trace


def domain_heatmap(
    trace: Trace,
    domains: str | np.ndarray,
    *,
    against: str = "load",
    choice: int | None = None,
    mark: bool = True,
    tested: pd.DataFrame | None = None,
) -> Figure:
    """Which experts the domains use: one panel per layer, one row per domain; experts are ordered by the domain that uses
    them most.

    The colour is :func:`moekit.routing.metrics.domain_specialisation` as a multiple of its baseline; over each panel
    :func:`moekit.routing.metrics.domain_information`. A dot marks the pairs that survive
    :func:`moekit.routing.metrics.permutation` of the domains over samples.

    Args:
        domains: [T] labels, or the name of the trace's column.
        against: "load": the expert's own load; "uniform": the same for all experts.
        choice: only this choice (0: first); None: all.
        mark: draw the dots. They test the lift over the expert's own load, whatever ``against`` is.
        tested: the test's table, made of the same trace, domains and choice; None: with its defaults.

    Raises:
        ValueError: ``tested`` has rows of other layers, domains or experts.
    """
    new = metrics.new_tokens(trace)
    domains = trace.labels_of(domains)
    if new is not None:
        trace, domains = trace.select(mask=new), domains[new]
    labels, size = np.unique(domains, return_counts=True)
    shape = len(trace.layers), len(labels), trace.num_experts
    told = metrics.domain_information(trace, domains, choice=choice or 0)
    found = metrics.domain_specialisation(trace, domains, against=against, choice=choice)
    ratios = np.nan_to_num(found["lift"].to_numpy()).reshape(shape)
    marked = np.zeros(shape, bool)
    if mark:
        tested = metrics.permutation(trace, domains, choice=choice) if tested is None else tested
        marked = _survivors(tested, found).reshape(shape)
    experts = trace.num_experts
    with rc_context(STYLE):
        height = 0.17 * len(labels) + 0.45
        fig = Figure(figsize=(9, height * len(trace.layers) + 0.9), layout="constrained")
        axes = fig.subplots(len(trace.layers), 1, squeeze=False).ravel()
        for layer_index, (ax, layer) in enumerate(zip(axes, trace.layers, strict=True)):
            ratio = ratios[layer_index]
            idle = ~ratio.any(axis=0)
            order = np.lexsort([-ratio.max(axis=0), ratio.argmax(axis=0), idle])
            shown = np.where(idle, np.nan, log2(ratio))[:, order]
            image = ax.imshow(shown, aspect="auto", cmap=RATIO_COLOURS, norm=RATIO, interpolation="nearest")
            rows, columns = np.nonzero(marked[layer_index][:, order])
            ax.scatter(columns, rows, s=9, color=INK, linewidths=0)
            ax.set_yticks(range(len(labels)), labels, fontsize=8)
            ax.set_xticks(*((range(experts), order) if experts <= 32 else ([], [])), fontsize=7)
            ax.tick_params(length=0)
            bits, which = told.iloc[layer_index], "first" if not choice else f"{choice + 1}."
            ax.set_title(
                f"layer {layer}: the {which} choice tells {bits['value']:.2f} of the domain's {bits['domain_entropy']:.2f} "
                f"bits (random routing {bits['chance']:.2f})",
                fontsize=9,
            )
        name = "× the expert's own load" if against == "load" else "× uniform"
        ratio_bar(fig, image, axes, name, shrink=min(1, 2 / len(axes)))
        what = "experts, by the domain that uses them most" + (
            "" if experts <= 32 else f" ({experts} a layer)"
        )
        axes[-1].set_xlabel(what)
        tokens = f"{size.min():,} to {size.max():,}" if size.min() < size.max() else f"{size.min():,}"
        base = "the expert's own load" if against == "load" else "uniform routing"
        of = "all choices" if choice is None else f"choice {choice + 1}"
        dots = (
            "\ndots: the lift over the expert's own load survives a permutation of the domains over samples (5 % a layer)"
            if mark
            else ""
        )
        fig.suptitle(
            f"Experts by domain, {of}, against {base}; {tokens} tokens a domain{dots}",
            x=0.01,
            ha="left",
            fontsize=9,
        )
    return fig


def _survivors(tested: pd.DataFrame, found: pd.DataFrame) -> np.ndarray:
    """Which rows of ``found`` survive the test, in their order."""
    keys = ["layer", "domain", "expert"]
    if not {*keys, "survives"} <= set(getattr(tested, "columns", ())) or not (
        tested[keys].reset_index(drop=True).equals(found[keys])
    ):
        raise ValueError(
            f"tested={shown(tested)}: expected what metrics.permutation gives of the same trace and domains, a row for each layer, "
            "domain and expert"
        )
    return tested["survives"].to_numpy(bool)
