"""Pictures of a load and of a result, as matplotlib figures that read well on light and dark pages."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from moekit import checkpoint as ckpt
from moekit.arguments import Whole
from moekit.checked import Instance, checked
from moekit.nn.dispatch import owned
from moekit.nn.experts import TENSORS
from moekit.notebook import coloured_text
from moekit.notebook.coloured_text import Span
from moekit.notebook.pieces import CODEC, visible_pieces
from moekit.notebook.style import done
from moekit.routing import statistics

if TYPE_CHECKING:
    from moekit.data.codec import Codec

RANK_COLOURS = plt.get_cmap("tab10").colors
# two colours that colour-blind people can tell apart
FILLED = ListedColormap(["#EE8866", "#77AADD"])
SURPRISE = plt.get_cmap("YlOrRd")
# bits that the legend of a passage shows; more than the last have its colour
SURPRISE_KEYS = (0, 3, 6, 9, 12)
TOKENS = Instance(pd.DataFrame, "Evaluation.tokens, or what model.score gives")


def shards(checkpoint: str | Path, world_size: int) -> Figure:
    """Which rank reads which file for which experts: files on the left, ranks on the right, experts as ribbons.

    Of a dense model, each rank reads all files.
    """
    plan = ckpt.survey(ckpt.find(checkpoint))
    if not plan.config.moe_layers:
        return _copies([source.path.name for source in plan.sources], world_size)
    sources = [source for source in plan.sources if len(source.experts)]
    experts = plan.config.experts
    height = max(2.6, 0.28 * max(len(sources), 3 * world_size))
    figure, axes = plt.subplots(figsize=(8, min(height, 14)), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(experts, -0.06 * experts))
    axes.axis("off")
    for x, title in ((1.5, "files"), (8.5, "ranks")):
        axes.text(x, -0.02 * experts, title, ha="center", va="bottom", fontsize=12, fontweight="bold")
    for source in sources:
        _box(axes, 0, 3, (source.experts.start, source.experts.stop), "0.85", source.path.name, len(sources))
    for rank in range(world_size):
        colour = RANK_COLOURS[rank % len(RANK_COLOURS)]
        held = owned(experts, world_size, rank)
        names = f"rank {rank}: " + (f"experts {held.start}–{held.stop - 1}" if len(held) else "no experts")
        _box(axes, 7, 10, (held.start, held.stop), (*colour, 0.35), names, world_size)
        for source in sources:
            shared = range(max(held.start, source.experts.start), min(held.stop, source.experts.stop))
            if len(shared):
                axes.fill_between([3, 7], shared.start, shared.stop, color=colour, alpha=0.25, linewidth=0)
    axes.text(
        5,
        experts * 1.01,
        f"every rank also reads {plan.sources[0].path.name}",
        ha="center",
        va="top",
        fontsize=9,
        color="0.4",
    )
    figure.suptitle(f"{experts} experts a layer: {len(sources)} files to {world_size} ranks", fontsize=13)
    return done(figure)


def _copies(files: list[str], world_size: int) -> Figure:
    """Files that each rank reads whole."""
    rows = max(len(files), world_size)
    figure, axes = plt.subplots(figsize=(8, min(max(1.8, 0.5 * rows), 14)), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(rows, -0.15 * rows))
    axes.axis("off")
    for x, title in ((1.5, "files"), (8.5, "ranks")):
        axes.text(x, -0.03 * rows, title, ha="center", va="bottom", fontsize=12, fontweight="bold")
    tall, each = rows / len(files), rows / world_size
    for rank in range(world_size):
        colour = RANK_COLOURS[rank % len(RANK_COLOURS)]
        axes.fill_between(
            [3, 7], [0, rank * each], [rows, (rank + 1) * each], color=colour, alpha=0.2, linewidth=0
        )
        _box(
            axes,
            7,
            10,
            (rank * each, (rank + 1) * each),
            (*colour, 0.35),
            f"rank {rank}: the whole model",
            world_size,
        )
    for place, name in enumerate(files):
        _box(axes, 0, 3, (place * tall, (place + 1) * tall), "0.85", name, len(files))
    title = "no experts: the rank reads the whole model"
    if world_size > 1:
        title = (
            f"no experts: each of {world_size} ranks reads the whole model, and takes its share of the text"
        )
    figure.suptitle(title, fontsize=13)
    return done(figure)


def _box(axes, left: float, right: float, rows: tuple[float, float], colour, label: str, boxes: int) -> None:
    top, bottom = rows
    if top == bottom:
        return
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, facecolor=colour, edgecolor="white", linewidth=1.5)
    )
    if boxes <= 64:
        size = 10 if boxes <= 16 else 6
        axes.text((left + right) / 2, (top + bottom) / 2, label, ha="center", va="center", fontsize=size)


def filled(table: pd.DataFrame) -> Figure:
    """``report.filled``: a cell an expert, blue where it got all its tensors, orange where it did not."""
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.35 * max(1, len(table))), layout="constrained")
    if table.empty:
        axes.axis("off")
        axes.set_title("no experts: each rank filled its copy of the whole model once", fontsize=11)
        return done(figure)
    complete = (table.to_numpy() == TENSORS).astype(float)
    axes.imshow(complete, aspect="auto", cmap=FILLED, vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(table)), table.index)
    if table.shape[1] <= 64:
        axes.set_xticks(np.arange(-0.5, table.shape[1]), minor=True)
        axes.set_yticks(np.arange(-0.5, len(table)), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"{int(complete.sum())} of {complete.size} experts filled exactly once", fontsize=11)
    return done(figure)


@checked(tokens=TOKENS, bins=Whole())
def loss_by_position(tokens: pd.DataFrame, bins: int = 32) -> Figure:
    """Mean loss in bits by how much of the sample was read, with the 95 % interval of each mean over samples.

    The axis counts the tokens of the sample that the model has read, ``position`` + 1. Where fewer than eight samples are
    that long, there is no interval (:func:`moekit.routing.statistics.interval`).

    Args:
        tokens: ``Evaluation.tokens``.
        bins: groups of positions, of doubling width where samples are long.
    """
    bits = -tokens["logprob"].to_numpy() / math.log(2)
    position = tokens["position"].to_numpy()
    longest = int(position.max()) + 1
    edges = np.unique(np.round(np.geomspace(1, longest + 1, min(bins, longest) + 1)).astype(int)) - 1
    group = np.digitize(position, edges) - 1
    # Tokens of one sample are not independent, so samples are the units.
    units = statistics.units_of(np.unique(tokens["sample"], return_inverse=True)[1])
    rows = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        here = group == number
        if here.any():
            mean = statistics.mean_of(bits[here], units.unit[here], units)
            rows.append(((start + 1 + end) / 2, *mean))
    middle, mean, low, high = np.array(rows).T

    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    if not np.isnan(low).all():
        style = {"alpha": 0.25, "color": "tab:blue", "linewidth": 0}
        axes.fill_between(middle, low, high, label="95 % over samples", **style)
    axes.plot(middle, mean, color="tab:blue", marker="o", markersize=3, label="mean of the tokens there")
    axes.axhline(
        bits.mean(), color="0.4", linestyle="--", linewidth=1, label=f"all tokens: {bits.mean():.2f}"
    )
    axes.legend(frameon=False)
    axes.set(xscale="log", xlabel="tokens of the sample that were read", ylabel="loss, bits a token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("Loss by position in the sample", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return done(figure)


@checked(tokens=TOKENS, codec=CODEC, sample=Whole(0), limit=Whole())
def passage(tokens: pd.DataFrame, codec: Codec | None, sample: int | None = None, limit: int = 220) -> Figure:
    """The beginning of a sample, each piece coloured by how much it surprised the model.

    Args:
        tokens: ``Evaluation.tokens``.
        codec: None shows tokens by their ids.
        sample: which sample; None: the one in the middle.
        limit: how many tokens.
    """
    if sample is None:
        ids = np.sort(tokens["sample"].unique())
        sample = int(ids[len(ids) // 2])
    rows = tokens[tokens["sample"] == sample].head(limit)
    if rows.empty:
        there = f"{tokens['sample'].min()} to {tokens['sample'].max()}"
        raise ValueError(f"there is no sample {sample} among the scored tokens; expected one of {there}")
    bits = -rows["logprob"].to_numpy() / math.log(2)
    words = visible_pieces(codec, rows["target"])
    spans = [Span(word, _surprise(b)) for word, b in zip(words, bits, strict=True)]
    keys = [(f"{b} bits", _surprise(b)) for b in SURPRISE_KEYS]
    keys[-1] = (f"{keys[-1][0]} and more", keys[-1][1])
    return coloured_text.figure(spans, f"Sample {sample}, coloured by surprise", keys, columns=92)


def _surprise(bits: float) -> str:
    """The colour of a token that cost ``bits`` bits."""
    return to_hex(SURPRISE(min(1.0, bits / SURPRISE_KEYS[-1])))
