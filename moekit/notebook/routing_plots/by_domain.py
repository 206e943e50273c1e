"""Which experts a domain uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.notebook.style import RATIO, RATIO_COLOURS, STYLE, log2, ratio_bar
from moekit.routing import metrics
from moekit.routing.trace import labels as labels_of

if TYPE_CHECKING:
    from moekit.routing.trace import Trace


def domain_heatmap(trace: Trace, domains: np.ndarray) -> Figure:
    """Which experts the domains use: one panel per layer, one row per domain; experts are ordered by the domain that uses
    them most.

    The colour is :func:`moekit.routing.metrics.domain_specialisation` as a multiple of its chance value; over each panel
    :func:`moekit.routing.metrics.domain_information`.

    Args:
        domains: [T] labels.
    """
    domains = labels_of(domains)
    labels, size = np.unique(domains, return_counts=True)
    experts, told = trace.num_experts, metrics.domain_information(trace, domains)
    found = metrics.domain_specialisation(trace, domains)
    ratios = (found["value"] / found["chance"]).to_numpy().reshape(len(trace.layers), len(labels), experts)
    with rc_context(STYLE):
        height = 0.17 * len(labels) + 0.45
        fig = Figure(figsize=(9, height * len(trace.layers) + 0.7), layout="constrained")
        axes = fig.subplots(len(trace.layers), 1, squeeze=False).ravel()
        for place, (ax, layer) in enumerate(zip(axes, trace.layers, strict=True)):
            ratio = ratios[place]
            idle = ~ratio.any(axis=0)
            order = np.lexsort([-ratio.max(axis=0), ratio.argmax(axis=0), idle])
            shown = np.where(idle, np.nan, log2(ratio))[:, order]
            image = ax.imshow(shown, aspect="auto", cmap=RATIO_COLOURS, norm=RATIO, interpolation="nearest")
            ax.set_yticks(range(len(labels)), labels, fontsize=8)
            ax.set_xticks(*((range(experts), order) if experts <= 32 else ([], [])), fontsize=7)
            ax.tick_params(length=0)
            bits = told.iloc[place]
            ax.set_title(
                f"layer {layer}: the first choice tells {bits['value']:.2f} of the domain's {bits['domain_entropy']:.2f} bits "
                f"(random routing {bits['chance']:.2f})",
                fontsize=9,
            )
        ratio_bar(fig, image, axes, "× uniform", shrink=min(1, 2 / len(axes)))
        what = "experts, by the domain that uses them most" + (
            "" if experts <= 32 else f" ({experts} a layer)"
        )
        axes[-1].set_xlabel(what)
        tokens = f"{size.min():,} to {size.max():,}" if size.min() < size.max() else f"{size.min():,}"
        fig.suptitle(f"Experts by domain; {tokens} tokens a domain", x=0.01, ha="left", fontsize=10)
    return fig
