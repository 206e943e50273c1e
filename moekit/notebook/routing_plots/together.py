"""Which experts are chosen together."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from moekit.arguments import Whole
from moekit.checked import checked
from moekit.notebook.style import INK, KINDS, RATIO, RATIO_COLOURS, STYLE, log2, ratio_bar
from moekit.routing import metrics
from moekit.routing.trace import TRACE, Trace, need_layers


@checked(trace=TRACE, layer=Whole(0), pairs=Whole(0))
def coactivation(trace: Trace, layer: int | None = None, pairs: int = 15) -> Figure:
    """Which experts of a layer are chosen together: N(i, j) / N(i), clustered, as a multiple of chance.

    :func:`moekit.routing.metrics.coactivation`; at the right the pairs that share most tokens. Grey: the diagonal, and experts
    that no token chose.

    Raises:
        ValueError: each token has one choice, or no such layer.
    """
    from scipy.cluster import hierarchy

    need_layers(trace, "coactivation")
    if trace.top_k < 2:
        raise ValueError("each token has one choice in this trace, no second one; expected two or more")
    trace = metrics.counted(trace)
    layer = trace.layers[0] if layer is None else layer
    found = metrics.coactivation(trace.select(layers=layer))
    experts, chance, both, alone = trace.num_experts, found.chance, found.counts[0], found.base[0]
    given = both / np.maximum(alone, 1)[:, None]
    # Experts are near each other if they share more tokens than their loads explain.
    apart = 1 / (1 + both * alone.sum() / np.maximum(np.outer(alone, alone), 1))
    tree = hierarchy.linkage(apart[np.triu_indices(experts, 1)], "average")
    order = hierarchy.leaves_list(
        hierarchy.optimal_leaf_ordering(tree, apart[np.triu_indices(experts, 1)]) if experts <= 128 else tree
    )

    with rc_context(STYLE):
        fig = Figure(figsize=(9.4, 5.2), layout="constrained")
        heat, bars = fig.subplots(1, 2, width_ratios=[3, 1.5])
        shown = log2(given[np.ix_(order, order)] / chance)
        np.fill_diagonal(shown, np.nan)
        idle = alone[order] == 0
        shown[idle] = shown[:, idle] = np.nan
        image = heat.imshow(
            shown,
            cmap=RATIO_COLOURS,
            norm=RATIO,
            interpolation="nearest" if experts <= 256 else "antialiased",
        )
        if experts <= 32:
            heat.set_xticks(range(experts), order, fontsize=7)
            heat.set_yticks(range(experts), order, fontsize=7)
        heat.set(xlabel="expert j (clustered)", ylabel="expert i")
        heat.set_title(f"Layer {layer}: share of i's tokens that also chose j")
        ratio_bar(fig, image, heat, f"× chance ({100 * chance:.2g} %)", shrink=0.7)
        i, j = np.triu_indices(experts, 1)
        best = np.argsort(-both[i, j], kind="stable")[:pairs]
        best = best[both[i, j][best] > 0]
        share = 100 * both[i, j][best] / len(trace)
        bars.barh(range(len(best)), share, color=KINDS[0])
        # Uniform routing chooses i for K of E tokens, and j for the chance of these.
        uniform = 100 * chance * trace.top_k / experts
        bars.axvline(uniform, color=INK, lw=1, ls="--", label="uniform routing")
        bars.set_yticks(range(len(best)), [f"{i[n]} + {j[n]}" for n in best], fontsize=8)
        bars.invert_yaxis()
        bars.set(xlabel="% of tokens")
        bars.set_title("commonest pairs")
        bars.legend(loc="lower right", fontsize=8)
    return fig
