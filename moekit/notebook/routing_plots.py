"""Pictures of a routing trace that stay readable at 512 experts: sorted or clustered, with what uniform random
routing would give.

Each function takes a :class:`moekit.routing.trace.Trace` and returns a matplotlib figure (or HTML); none touches pyplot's state.
Colours: Paul Tol's "light" scheme for kinds, which carries black text, one hue for amounts, blue to orange around a
baseline: all told apart by colour-blind people. Figures are white cards on purpose: they look alike in light and dark themes.

Shape letters: T tokens, L traced layers, K choices, E experts, D domains.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from moekit.nn import gate
from moekit.routing import metrics

if TYPE_CHECKING:
    from IPython.display import HTML

    from moekit.data import Codec
    from moekit.routing.trace import Trace

KINDS = (
    "#77AADD",
    "#EE8866",
    "#EEDD88",
    "#44BB99",
    "#FFAABB",
    "#99DDFF",
    "#BBCC33",
    "#AAAA00",
)  # Tol's light
INK = "#111111"
STYLE = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
# log2 of a ratio to the baseline, an eighth to eight times. Pale below 1: at 512 experts most ratios are 0.
RATIO = Normalize(-3, 3)
RATIO_COLOURS = LinearSegmentedColormap.from_list(
    "ratio", [(0, "#8FB0D8"), (0.5, "#FFFFFF"), (0.78, "#F2994A"), (1, "#8C3A04")]
).with_extremes(bad="#E4E4E4")
RATIO_TICKS = {-3: "≤ 1/8", -2: "1/4", -1: "1/2", 0: "1", 1: "2", 2: "4", 3: "≥ 8"}


# ---------------------------------------------------------------------------------------------------------- the text


def text_html(
    trace: Trace,
    codec: Codec | None = None,
    sample: int | None = None,
    layer: int | None = None,
    by: str = "expert",
) -> HTML:
    """A sample's text, each token coloured by its first choice; inline styles only, so that nbconvert keeps it.

    Args:
        sample: its number in the trace; None: the first.
        layer: a traced model layer; None: the first.
        by: "expert": the 8 most frequent experts have colours; "confidence": the first choice's gate probability.

    Raises:
        ValueError: no such sample or layer, or another ``by``.
    """
    from IPython.display import HTML

    part, place, words, fills, keys = _coloured(trace, codec, sample, layer, by)
    chips = "".join(
        f'<span style="background:{colour};color:{INK};border-radius:3px;padding:1px 7px;margin-right:5px">{name}</span>'
        for name, colour in keys
    )
    body = []
    for row, (word, fill) in enumerate(zip(words, fills, strict=True)):
        chosen = ", ".join(
            f"E{e} {p:.2f}" + ("" if kept else " dropped")
            for e, p, kept in zip(
                part.experts[row, place], part.probs[row, place], part.kept[row, place], strict=True
            )
        )
        gap = " " if word[:1] == " " and word.strip() else ""
        style = f"background:{fill};color:{INK};" if fill else ""
        body.append(
            f'{gap}<span title="{chosen}" style="{style}border-radius:3px;padding:1px 0;white-space:pre-wrap">'
            f"{html.escape(word[len(gap) :])}</span>" + ("<br>" if word.endswith("¶") else "")
        )
    return HTML(
        f'<div style="font-family:system-ui,sans-serif;font-size:14px;line-height:1.8;max-width:60em;'
        f'overflow-wrap:anywhere"><div style="font-size:12px"><b>{_of(part, place)}</b> &nbsp; {chips}'
        f"{_said(by, trace.num_experts)}</div>{''.join(body)}</div>"
    )


def text_figure(
    trace: Trace,
    codec: Codec | None = None,
    sample: int | None = None,
    layer: int | None = None,
    by: str = "expert",
    max_tokens: int = 300,
) -> Figure:
    """:func:`text_html` as a figure, of the sample's first ``max_tokens`` tokens."""
    part, place, words, fills, keys = _coloured(trace, codec, sample, layer, by)
    columns, line, size, width = (
        110,
        0.21,
        9,
        0.602,
    )  # characters, inches, points, DejaVu Sans Mono's width in em
    spots, x, y = [], 0, 0
    for word, fill in zip(words[:max_tokens], fills, strict=False):
        if x and x + len(word.rstrip("¶")) > columns:
            x, y, word = 0, y + 1, word.lstrip(" ") or word
        spots.append((x, y, word, fill))
        x += len(word)
        if word.endswith("¶"):
            x, y = 0, y + 1
    height = (y + 3.6) * line
    with rc_context(STYLE):
        fig = Figure(figsize=(columns * size * width / 72 + 0.3, height))
        ax = fig.add_axes((0, 0, 1, 1))
        ax.set(xlim=(-1.5, columns + 2), ylim=(y + 1.1, -2.5))
        ax.axis("off")
        ax.text(0, -1.9, _of(part, place), weight="bold", va="center")
        at = 0.0
        for name, colour in keys:
            ax.add_patch(
                FancyBboxPatch((at, -1.15), len(name), 0.6, boxstyle="round,pad=0.1", fc=colour, ec="none")
            )
            ax.text(at + len(name) / 2, -0.83, name, ha="center", va="center", size=8)
            at += len(name) + 1.5
        ax.text(at + 0.5, -0.83, _said(by, trace.num_experts), va="center", size=8)
        for x, y, word, fill in spots:
            lead = len(word) - len(word.lstrip(" ")) if word.strip() else 0
            if fill:
                ax.add_patch(Rectangle((x + lead, y + 0.06), len(word) - lead, 0.88, fc=fill, ec="none"))
            for offset, letter in enumerate(
                word
            ):  # letter by letter: other fonts' widths cannot shift the rest
                if letter != " ":
                    ax.text(
                        x + offset + 0.5,
                        y + 0.74,
                        letter,
                        family="DejaVu Sans Mono",
                        size=size,
                        ha="center",
                        parse_math=False,
                    )
    return fig


def _coloured(
    trace: Trace, codec: Codec | None, sample: int | None, layer: int | None, by: str
) -> tuple[Trace, int, list[str], list[str], list[tuple[str, str]]]:
    """A sample, the layer's place, its words, a colour each ("" for none), and the legend."""
    if by not in ("expert", "confidence"):
        raise ValueError(f"by={by!r}; expected expert or confidence")
    sample = int(trace.sample[0]) if sample is None else sample
    part = trace.select(samples=sample)
    if not len(part):
        raise ValueError(f"the trace has no sample {sample}")
    place = 0 if layer is None else trace.at(layer)
    words = pieces(codec, part.token)
    if by == "confidence":
        ramp = colormaps["YlGnBu"]
        fills = [
            to_hex(ramp(0.65 * p)) for p in part.probs[:, place, 0]
        ]  # not darker: black text stands on it
        return (
            part,
            place,
            words,
            fills,
            [(f"{p:g}", to_hex(ramp(0.65 * p))) for p in (0, 0.25, 0.5, 0.75, 1)],
        )
    colours = _kinds(part.experts[:, place, 0])
    fills = [colours.get(e, "") for e in part.experts[:, place, 0].tolist()]
    return part, place, words, fills, [(f"E{e}", colour) for e, colour in colours.items()]


def pieces(codec: Codec | None, ids: Sequence[int]) -> list[str]:
    """Each token for the eye: line ends as ¶, tabs as ⇥, what an imported trace does not tell as ?."""
    if codec is None:
        return [f" {i}" for i in ids]
    known = [codec.pieces([i])[0] if i >= 0 else "?" for i in ids]
    return [p.replace("</s>", "¶").replace("\n", "¶").replace("\t", "⇥") for p in known]


def _kinds(experts: np.ndarray) -> dict[int, str]:
    """The most frequent experts, busiest first, and their colours."""
    names, counts = np.unique(experts, return_counts=True)
    return dict(zip(names[np.argsort(-counts, kind="stable")].tolist(), KINDS, strict=False))


def _of(part: Trace, place: int) -> str:
    return f"sample {part.sample[0]}, layer {part.layers[place]}"


def _said(by: str, experts: int) -> str:
    if by == "expert":
        return "other experts: no colour"
    return f"gate probability of the first choice; uniform {1 / experts:.3g}"


# ---------------------------------------------------------------------------------------------------------- load


def load_heatmap(trace: Trace, seed: int = 0) -> Figure:
    """Load of every expert of every layer, busiest first: a heat map, and the curves below it.

    Load is the share of all K T choices, dropped ones included, as a multiple of the uniform share 1/E. The grey band
    holds 90 % of what uniform random routing gives at this number of tokens: even then some experts are busier.
    """
    counts = metrics.counts(trace)  # [L, E]
    total, experts = len(trace) * trace.top_k, trace.num_experts
    ratio = -np.sort(-counts, axis=1) / (total / experts)
    drawn = np.random.default_rng(seed).multinomial(total, np.full(experts, 1 / experts), size=100)
    low, high = np.quantile(-np.sort(-drawn, axis=1) / (total / experts), (0.05, 0.95), axis=0)
    rank = np.arange(1, experts + 1)
    with rc_context(STYLE):
        rows = max(1.0, 0.24 * len(trace.layers))
        fig = Figure(figsize=(9, rows + 3.4), layout="constrained")
        heat, curve = fig.subplots(2, 1, height_ratios=[rows, 2.6])
        image = heat.imshow(
            _log2(ratio),
            aspect="auto",
            cmap=RATIO_COLOURS,
            norm=RATIO,
            interpolation="nearest",
            extent=(0.5, experts + 0.5, len(counts), 0),
        )
        heat.set_yticks(np.arange(len(counts)) + 0.5, [f"layer {n}" for n in trace.layers])
        heat.set_title(f"Load of {experts} experts, busiest first in each layer; {len(trace):,} tokens")
        heat.tick_params(left=False)
        _ratio_bar(fig, image, heat, "× uniform")
        curve.fill_between(
            rank, low, high, color="#BBBBBB", lw=0, step="mid", label="uniform random routing, 90 %"
        )
        for row, layer, colour in zip(ratio, trace.layers, _ramp(len(counts)), strict=True):
            curve.plot(
                rank,
                np.where(row > 0, row, np.nan),
                color=colour,
                lw=1.4,
                drawstyle="steps-mid",
                label=f"layer {layer}",
            )
        curve.axhline(1, color=INK, lw=1, ls="--")
        curve.set(
            xlabel="expert, by rank in its layer", ylabel="× uniform", xlim=(0.5, experts + 0.5), yscale="log"
        )
        _plain_log(curve)
        curve.legend(ncols=2, loc="upper right", fontsize=8)
        idle = "; ".join(
            f"layer {n}: {z}" for n, z in zip(trace.layers, (counts == 0).sum(axis=1), strict=True) if z
        )
        if idle:
            curve.set_title(f"experts that no token chose: {idle}", fontsize=8)
    return fig


# ---------------------------------------------------------------------------------------------------------- drops


CHOICE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def drops_by_position(trace: Trace, bins: int = 32) -> Figure:
    """Share of choices that capacity dropped, along the sample: one panel a layer, one line a choice."""
    edges = np.linspace(0, trace.position.max() + 1, min(bins, int(trace.position.max()) + 1) + 1)
    where = np.digitize(trace.position, edges) - 1
    size = np.bincount(where, minlength=len(edges) - 1)
    middle = (edges[:-1] + edges[1:]) / 2
    chance = uniform_drops(trace)
    columns = min(3, len(trace.layers))
    rows = -(-len(trace.layers) // columns)
    with rc_context(STYLE):
        fig = Figure(figsize=(9, 0.9 + 1.7 * rows), layout="constrained")
        axes = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for place, (ax, layer) in enumerate(zip(axes, trace.layers, strict=False)):
            for k in range(trace.top_k):
                lost = np.bincount(where, weights=~trace.kept[:, place, k], minlength=len(size))
                ax.plot(
                    middle,
                    100 * lost / np.maximum(size, 1),
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
            share = 100 * (~trace.kept[:, place]).mean()
            ax.set_title(f"layer {layer}: {share:.1f} % dropped")
        for ax in axes[len(trace.layers) :]:
            ax.axis("off")
        axes[0].set_ylim(0, max(1, axes[0].get_ylim()[1]))
        fraction = trace.meta.get("capacity_token_fraction")
        room = "no limit" if fraction is None else f"fraction {fraction:g}"
        fig.suptitle(
            f"Choices dropped, by position in the sample; capacity: {room}", x=0.01, ha="left", fontsize=10
        )
        for place in range(0, len(trace.layers), columns):
            axes[place].set_ylabel("% dropped")
        for place in range(max(0, len(trace.layers) - columns), len(trace.layers)):
            axes[place].set_xlabel("position")
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return fig


def uniform_drops(trace: Trace) -> np.ndarray | None:
    """[P, K]: what uniform random routing would drop at each position (:func:`moekit.routing.metrics.drop_probability`), in
    groups of the trace's commonest shape; None where the trace's meta does not tell the capacity or the shape."""
    groups = trace.meta.get("groups")
    if not groups or "capacity_token_fraction" not in trace.meta:
        return None
    samples, tokens, _ = max(groups, key=lambda group: group[2])
    fraction = trace.meta["capacity_token_fraction"]
    room = gate.capacity(samples * tokens, fraction, trace.top_k, trace.num_experts)
    chance = metrics.drop_probability(samples * tokens, trace.num_experts, trace.top_k, room)
    return chance.reshape(samples, tokens, -1).mean(axis=0)[: trace.position.max() + 1]


# ---------------------------------------------------------------------------------------------------------- together


def coactivation(trace: Trace, layer: int | None = None, pairs: int = 15) -> Figure:
    """Which experts of a layer are chosen together: N(i, j) / N(i), clustered, as a multiple of chance.

    :func:`moekit.routing.metrics.coactivation`; at the right the pairs that share most tokens. Grey: the diagonal, and experts
    that nobody chose.

    Raises:
        ValueError: each token has one choice, or no such layer.
    """
    from scipy.cluster import hierarchy

    if trace.top_k < 2:
        raise ValueError("each token has one choice in this trace: nothing is chosen together")
    layer = trace.layers[0] if layer is None else layer
    found = metrics.coactivation(trace.select(layers=layer))
    experts, chance, both, alone = trace.num_experts, found.chance, found.counts[0], found.base[0]
    given = both / np.maximum(alone, 1)[:, None]
    # Near are experts that go together more than their loads explain.
    apart = 1 / (1 + both * alone.sum() / np.maximum(np.outer(alone, alone), 1))
    tree = hierarchy.linkage(apart[np.triu_indices(experts, 1)], "average")
    order = hierarchy.leaves_list(
        hierarchy.optimal_leaf_ordering(tree, apart[np.triu_indices(experts, 1)]) if experts <= 128 else tree
    )

    with rc_context(STYLE):
        fig = Figure(figsize=(9.4, 5.2), layout="constrained")
        heat, bars = fig.subplots(1, 2, width_ratios=[3, 1.5])
        shown = _log2(given[np.ix_(order, order)] / chance)
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
        _ratio_bar(fig, image, heat, f"× chance ({100 * chance:.2g} %)", shrink=0.7)
        i, j = np.triu_indices(experts, 1)
        best = np.argsort(-both[i, j], kind="stable")[:pairs]
        best = best[both[i, j][best] > 0]
        share = 100 * both[i, j][best] / len(trace)
        bars.barh(range(len(best)), share, color=KINDS[0])
        bars.axvline(100 * 2 / (experts * (experts - 1)), color=INK, lw=1, ls="--", label="uniform routing")
        bars.set_yticks(range(len(best)), [f"{i[n]} + {j[n]}" for n in best], fontsize=8)
        bars.invert_yaxis()
        bars.set(xlabel="% of tokens")
        bars.set_title("commonest pairs")
        bars.legend(loc="lower right", fontsize=8)
    return fig


# ---------------------------------------------------------------------------------------------------------- domains


def domain_heatmap(trace: Trace, domains: np.ndarray) -> Figure:
    """Which experts the domains use: a panel a layer, a row a domain; experts stand by the domain that uses them most.

    The colour is :func:`moekit.routing.metrics.domain_specialisation` as a multiple of its chance value; over each panel
    :func:`moekit.routing.metrics.domain_information`.

    Args:
        domains: [T] labels.
    """
    labels, size = np.unique(np.asarray(domains), return_counts=True)
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
            shown = np.where(idle, np.nan, _log2(ratio))[:, order]
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
        _ratio_bar(fig, image, axes, "× uniform", shrink=min(1, 2 / len(axes)))
        what = "experts, by the domain that uses them most" + (
            "" if experts <= 32 else f" ({experts} a layer)"
        )
        axes[-1].set_xlabel(what)
        tokens = f"{size.min():,} to {size.max():,}" if size.min() < size.max() else f"{size.min():,}"
        fig.suptitle(f"Experts by domain; {tokens} tokens a domain", x=0.01, ha="left", fontsize=10)
    return fig


# ---------------------------------------------------------------------------------------------------------- paths


def paths(
    trace: Trace, codec: Codec | None = None, sample: int | None = None, start: int = 0, tokens: int = 40
) -> Figure:
    """The way of some tokens through the layers: every choice's expert by number, as wide as its combine weight.

    Colours mark the experts commonest in these tokens, layer by layer; dropped choices are struck through.

    Args:
        sample: its number in the trace; None: the first.
        start, tokens: which of its tokens.
    """
    sample = int(trace.sample[0]) if sample is None else sample
    part = trace.select(samples=sample)
    part = part.select(mask=(part.position >= start) & (part.position < start + tokens))
    if not len(part):
        raise ValueError(f"the trace has no tokens of sample {sample} from position {start} on")
    words, count, depth, k = pieces(codec, part.token), len(part), len(trace.layers), trace.top_k
    with rc_context(STYLE):
        fig = Figure(figsize=(2.2 + 1.25 * depth, 0.8 + 0.2 * count), layout="constrained")
        ax = fig.subplots()
        for place in range(depth):
            colours = _kinds(part.experts[:, place].ravel())
            for row in range(count):
                left = place + 0.04
                for n in range(k):
                    expert, kept = int(part.experts[row, place, n]), bool(part.kept[row, place, n])
                    slot = 0.92 / k
                    wide = slot * float(part.weights[row, place, n])
                    ax.add_patch(Rectangle((left, row - 0.42), slot - 0.03, 0.84, fc="#F3F3F3", ec="none"))
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
                        left + (slot - 0.03) / 2,
                        row,
                        f"{expert}",
                        ha="center",
                        va="center_baseline",
                        size=7.5,
                        color=INK if kept else "#999999",
                    )
                    if not kept:
                        ax.plot([left + 0.06, left + slot - 0.09], [row, row], color="#D55E00", lw=1.1)
                    left += slot
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
            "experts by number, bars by combine weight, dropped struck through",
            x=0.01,
            ha="left",
            fontsize=9,
        )
    return fig


# ---------------------------------------------------------------------------------------------------------- shared


def _log2(ratio: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(ratio, 2.0**-6))


def _ramp(count: int) -> list:
    return list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def _ratio_bar(fig: Figure, image: object, axes: object, label: str, shrink: float = 1.0) -> None:
    bar = fig.colorbar(image, ax=axes, pad=0.01, fraction=0.05, shrink=shrink, label=label)
    bar.set_ticks(list(RATIO_TICKS), labels=list(RATIO_TICKS.values()))
    bar.outline.set_visible(False)


def _plain_log(ax: object) -> None:
    """Ticks that read as numbers, whether the axis spans a tenth of a decade or four of them."""
    low, high = ax.get_ylim()
    fine = high / low < 12
    steps = (
        (1, 1.2, 1.4, 1.7, 2, 2.5, 3, 4, 5, 6, 7, 8, 9) if fine else (1, 2, 5) if high / low < 1e3 else (1,)
    )
    ticks = [s * 10.0**e for e in range(-8, 6) for s in steps]
    ax.set_yticks([t for t in ticks if low <= t <= high])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
