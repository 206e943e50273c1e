"""The way of tokens through the layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moekit.arguments import Whole
from moekit.checked import checked
from moekit.notebook.pieces import CODEC, visible_pieces
from moekit.notebook.style import INK, STYLE, commonest
from moekit.routing.trace import TRACE, Trace, need_layers, need_tokens

if TYPE_CHECKING:
    from moekit.data import Codec


@checked(trace=TRACE, codec=CODEC, sample=Whole(0), start=Whole(0), tokens=Whole())
def paths(
    trace: Trace, codec: Codec | None = None, sample: int | None = None, start: int = 0, tokens: int = 40
) -> Figure:
    """The way of some tokens through the layers: every choice's expert by number, as wide as its combine weight.

    Colours mark the experts commonest in these tokens, layer by layer; choices that are not dispatched are struck through.

    Args:
        sample: its number in the trace; None: the first.
        start, tokens: which of its tokens.
    """
    need_tokens(trace, "paths")
    need_layers(trace, "paths")
    sample = int(trace.sample[0]) if sample is None else sample
    part = trace.select(samples=sample)
    part = part.select(mask=(part.position >= start) & (part.position < start + tokens))
    if not len(part):
        raise ValueError(
            f"the trace has no tokens of sample {sample} from position {start} on; expected a sample from "
            f"{trace.sample.min()} to {trace.sample.max()}, and a position in it"
        )
    words, count, depth, k = visible_pieces(codec, part.token), len(part), len(trace.layers), trace.top_k
    with rc_context(STYLE):
        fig = Figure(figsize=(2.2 + 1.25 * depth, 0.8 + 0.2 * count), layout="constrained")
        ax = fig.subplots()
        for layer_index in range(depth):
            colours = commonest(part.experts[:, layer_index].ravel())
            for row in range(count):
                left = layer_index + 0.04
                for n in range(k):
                    expert, kept = (
                        int(part.experts[row, layer_index, n]),
                        bool(part.kept[row, layer_index, n]),
                    )
                    share = 0.92 / k
                    wide = share * float(part.weights[row, layer_index, n])
                    ax.add_patch(Rectangle((left, row - 0.42), share - 0.03, 0.84, fc="#F3F3F3", ec="none"))
                    ax.add_patch(
                        Rectangle(
                            (left, row - 0.42),
                            max(0, wide - 0.03),
                            0.84,
                            fc=colours.get(expert, "#CCCCCC"),
                            ec="none",
                        )
                    )
                    ax.text(
                        left + (share - 0.03) / 2,
                        row,
                        f"{expert}",
                        ha="center",
                        va="center_baseline",
                        size=7.5,
                        color=INK if kept else "#999999",
                    )
                    if not kept:
                        ax.plot([left + 0.06, left + share - 0.09], [row, row], color="#D55E00", lw=1.1)
                    left += share
        ax.set(xlim=(0, depth), ylim=(count - 0.4, -0.6))
        ax.set_xticks(np.arange(depth) + 0.48, [f"layer {n}" for n in trace.layers])
        ax.xaxis.tick_top()
        ax.set_yticks(
            range(count),
            [w.strip() or "␣" for w in words],
            family="DejaVu Sans Mono",
            size=8,
            parse_math=False,
        )
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
        fig.suptitle(
            f"Sample {sample}, positions {part.position[0]} to {part.position[-1]}\n"
            "experts by number, bars by combine weight, struck through where not dispatched",
            x=0.01,
            ha="left",
            fontsize=9,
        )
    return fig
