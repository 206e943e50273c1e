"""Colours and settings that the figures share.

Paul Tol's "light" scheme for kinds, which carries black text; one hue for amounts; blue to orange around a baseline. All
can be told apart by colour-blind people. Figures have a white ground, so that they look alike in light and dark themes.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

KINDS = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#99DDFF", "#BBCC33", "#AAAA00")
CHOICE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#111111"
# The parts of a pass (moekit.profiling.PARTS). What is no work is grey; exchanges are warm.
PART_COLOURS = {
    "embedding": "#99DDFF",
    "norm": "#BBCC33",
    "attention": "#77AADD",
    "dense": "#44BB99",
    "gate": "#FFAABB",
    "plan": "#E8C4E0",
    "dispatch": "#EE8866",
    "fetch": "#C5705D",
    "experts": "#CCBB44",
    "experts up": "#EEDD88",
    "experts down": "#AAAA00",
    "combine": "#F5B48F",
    "output": "#A48BD0",
    "whole step": "#7E6BB0",
    "log-probabilities": "#CDB8EA",
    "sampling": "#B5E0C8",
    "other": "#C9B79C",
    "waiting": "#8C8C8C",
    "idle": "#DDDDDD",
    "host": "#BBBBBB",
}
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
# A ratio of 0 has no logarithm; anything below an eighth is drawn in the palest blue.
LEAST_RATIO = 2.0**-6


def log2(ratio: np.ndarray) -> np.ndarray:
    """log2 of ratios to the baseline, as ``RATIO_COLOURS`` draws them."""
    return np.log2(np.maximum(ratio, LEAST_RATIO))


def ramp(count: int) -> list:
    """As many colours in order, for layers."""
    return list(colormaps["viridis"](np.linspace(0, 0.88, count)))


def commonest(experts: np.ndarray) -> dict[int, str]:
    """The most frequent experts, busiest first, and a colour for each: as many as there are ``KINDS``."""
    names, counts = np.unique(experts, return_counts=True)
    return dict(zip(names[np.argsort(-counts, kind="stable")].tolist(), KINDS, strict=False))


def ratio_bar(
    fig: Figure, image: object, axes: Axes | np.ndarray | list[Axes], label: str, shrink: float = 1.0
) -> None:
    """The key to ``RATIO_COLOURS``."""
    bar = fig.colorbar(image, ax=axes, pad=0.01, fraction=0.05, shrink=shrink, label=label)
    bar.set_ticks(list(RATIO_TICKS), labels=list(RATIO_TICKS.values()))
    bar.outline.set_visible(False)


def plain_log(ax: Axes) -> None:
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


def done(figure: Figure) -> Figure:
    """A figure of pyplot, ready for any page: on a white ground, and shown once, by the cell that returns it."""
    figure.patch.set_facecolor("white")
    plt.close(figure)
    return figure
