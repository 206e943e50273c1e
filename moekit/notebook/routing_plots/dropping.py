"""What capacity drops along a sample."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.arguments import Flag, Whole
from moekit.checked import checked
from moekit.notebook.pictures import capacity_name
from moekit.notebook.style import CHOICE_COLOURS, STYLE
from moekit.routing import metrics
from moekit.routing.trace import TRACE, Trace, need_layers, need_tokens


@checked(trace=TRACE, bins=Whole(), prompt=Flag())
def drops_by_position(trace: Trace, bins: int = 32, *, prompt: bool = False) -> Figure:
    """Share of choices that capacity dropped, along the sample: one panel per layer, one line per choice.

    :func:`moekit.routing.metrics.drops`. The title says where the share may hold second choices that the gate did not draw.

    Of a trace of generated text the new tokens count, which ``model.generate`` never drops; ``prompt=True`` counts the prompt's,
    too.
    """
    need_tokens(trace, "drops_by_position")
    need_layers(trace, "drops_by_position")
    trace = trace if prompt else metrics.counted(trace)
    begin, end = int(trace.position.min()), int(trace.position.max()) + 1
    bins = min(bins, end - begin)
    edges = begin + np.arange(bins + 1) * (end - begin) // bins
    where = np.digitize(trace.position, edges) - 1
    made, dropped = metrics.made_and_dropped(trace)
    # of the whole positions from one edge to the next one, which is the next bin's
    middle = (edges[:-1] + edges[1:] - 1) / 2
    chance = metrics.drop_chance(trace)
    if chance is not None:
        there = np.bincount(trace.position, minlength=end) > 0
        chance = np.where(there[:, None], chance, np.nan)
    columns = min(3, len(trace.layers))
    rows = -(-len(trace.layers) // columns)
    with rc_context(STYLE):
        fig = Figure(figsize=(9, 0.9 + 1.7 * rows), layout="constrained")
        axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for layer_index, (ax, layer) in enumerate(zip(axes, trace.layers, strict=False)):
            for k in range(trace.top_k):
                size = np.bincount(where, made[:, layer_index, k], minlength=len(middle))
                lost = np.bincount(where, dropped[:, layer_index, k], minlength=len(middle))
                ax.plot(
                    middle,
                    # A place without such a choice has no share, and no point on a line.
                    100 * lost / np.where(size > 0, size, np.nan),
                    color=CHOICE_COLOURS[k % len(CHOICE_COLOURS)],
                    lw=1.6,
                    label=f"choice {k + 1}",
                )
                if chance is not None:
                    ax.plot(
                        100 * chance[:, k],
                        color=CHOICE_COLOURS[k % len(CHOICE_COLOURS)],
                        lw=1.2,
                        ls=":",
                        label=f"choice {k + 1}, uniform random routing",
                    )
            share = 100 * dropped[:, layer_index].sum() / max(1, made[:, layer_index].sum())
            ax.set_title(f"layer {layer}: {share:.1f} % dropped")
        for ax in axes[len(trace.layers) :]:
            ax.axis("off")
        axes[0].set_ylim(0, max(1, axes[0].get_ylim()[1]))
        fraction = trace.meta.get("capacity_token_fraction")
        title = f"Choices {metrics.drops_name(trace)}, by position in the sample; capacity: {capacity_name(fraction)}"
        fig.suptitle(title, x=0.01, ha="left", fontsize=10)
        for layer_index in range(0, len(trace.layers), columns):
            axes[layer_index].set_ylabel("% dropped")
        for layer_index in range(max(0, len(trace.layers) - columns), len(trace.layers)):
            axes[layer_index].set_xlabel("position")
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return fig
