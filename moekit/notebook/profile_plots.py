"""Pictures of a profile: what each rank does when, the parts of a step, the experts' rows, the roofline, the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moekit.nn.parts import FETCH
from moekit.notebook.style import INK, PART_COLOURS, STYLE, plain_log, ramp
from moekit.profiling import PARTS

if TYPE_CHECKING:
    import pandas as pd

    from moekit.profiling import Profile

# What a rank does for others.
ASIDE = ("dispatch", "combine", "waiting")


def timeline(profile: Profile, steps: int = 1) -> Figure:
    """The last ``steps`` steps, one lane a rank, coloured by part; below each lane, what it does for others: exchanges in
    colour, and waiting for the slowest rank in grey. Experts that are fetched are there, too, also while others compute."""
    frame = profile.frame
    frame = frame[frame["step"] > frame["step"].max() - steps]
    fetched = frame[frame["part"] == FETCH]
    frame = frame[frame["exclusive"] > 0]
    begun = frame["start"] + frame["duration"] - frame["exclusive"]
    zero = begun.min()
    ranks = int(frame["rank"].max()) + 1
    with rc_context(STYLE):
        fig = Figure(figsize=(10, 1.6 + 0.75 * ranks), layout="constrained")
        ax = fig.subplots()
        for (rank, part), rows in frame.groupby(["rank", "part"]):
            spans = list(zip(1e3 * (begun[rows.index] - zero), 1e3 * rows["exclusive"], strict=True))
            ax.broken_barh(spans, (rank - 0.3, 0.45), color=PART_COLOURS[part], lw=0)
            if part in ASIDE:
                ax.broken_barh(spans, (rank + 0.2, 0.17), color=PART_COLOURS[part], lw=0)
        for rank, rows in fetched.groupby("rank"):
            spans = list(zip(1e3 * (rows["start"] - zero), 1e3 * rows["duration"], strict=True))
            ax.broken_barh(spans, (rank + 0.2, 0.17), color=PART_COLOURS[FETCH], lw=0)
        ax.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        ax.set(xlabel="ms", ylim=(ranks - 0.5, -0.5))
        below = {
            "exchanges and waiting for the slowest rank": frame["part"].isin(ASIDE).any(),
            "experts that are fetched": len(fetched),
        }
        there = ", and ".join(name for name, shown in below.items() if shown)
        ax.set_title("What each rank does" + (f"; below its lane, {there}" if there else ""))
        fig.suptitle(_said(profile))
        ax.tick_params(left=False)
        _key(fig, [*frame["part"], *fetched["part"]])
    return fig


def shares(profile: Profile) -> Figure:
    """The parts of the mean step, beside the seconds in which the chip could do what they have to."""
    table = profile.shares()
    place = np.arange(len(table))
    with rc_context(STYLE):
        fig = Figure(figsize=(9, 1.1 + 0.3 * len(table)), layout="constrained")
        ax = fig.subplots()
        ax.barh(place, 1e3 * table["seconds"], 0.7, color=[PART_COLOURS[part] for part in table["part"]])
        ax.barh(place, 1e3 * table["least"], 0.3, color=INK, alpha=0.75, label="the chip's limit")
        for at, row in zip(place, table.itertuples(), strict=True):
            limit = "" if np.isnan(row.of_limit) else f", {row.of_limit:.0%} of the limit"
            ax.text(
                1e3 * max(row.seconds, row.least), at, f"  {row.share:.1%}{limit}", va="center", fontsize=8
            )
        ax.set_yticks(place, table["part"])
        ax.invert_yaxis()
        ax.set(xlabel="ms a step and rank")
        ax.margins(x=0.22)
        ax.set_title(
            f"{_said(profile)}: {1e3 * table['seconds'].sum():.2f} ms a step under the profiler, by part"
        )
        # A label ends at most of these bars, wherever in the axes the key would be.
        fig.legend(loc="outside lower right")
    return fig


def experts(profile: Profile) -> Figure:
    """The time of each rank's experts against the rows that they got, and by layer the busiest rank's rows and its time."""
    table = profile.experts()
    layers = sorted(table["layer"].unique())
    colours = dict(zip(layers, ramp(len(layers)), strict=True))
    with rc_context(STYLE):
        fig = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = fig.subplots(1, 2)
        for layer, rows in table.groupby("layer"):
            left.scatter(
                rows["rows"], 1e3 * rows["seconds"], color=colours[layer], s=26, label=f"layer {layer}"
            )
        top = 1.1e3 * table["seconds"].max() if len(table) else 1
        left.set(xlabel="rows of a rank's experts, mean of a step", ylabel="ms", ylim=(0, top))
        left.set_title("Time of the experts against their rows")
        if layers:
            left.legend(fontsize=8)
        each = table.groupby("layer")
        busiest = table.loc[each["rows"].idxmax()].set_index("layer")
        ratios = {
            name: (busiest[column] / each[column].mean()).fillna(0.0)
            for name, column in {"rows": "rows", "time": "seconds"}.items()
        }
        for shift, (name, ratio) in zip((-0.2, 0.2), ratios.items(), strict=True):
            colour = PART_COLOURS["attention" if name == "rows" else "experts down"]
            right.bar(
                np.arange(len(layers)) + shift, ratio, 0.38, color=colour, label=f"{name} of the busiest rank"
            )
        right.axhline(1, color=INK, lw=1, ls="--")
        right.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
        right.set(ylabel="× mean of the ranks")
        right.set_title("The busiest rank")
        right.set_ylim(0, 1.25 * max([1.0, *ratios["rows"], *ratios["time"]]))
        right.legend(fontsize=8, ncols=2, loc="upper left")
        fig.suptitle(_said(profile))
    return fig


def roofline(profile: Profile) -> Figure:
    """A point a part: operations a second against operations a byte, under the limits of the chip.

    Both are of what the part has to do at least, so a point below the roof may do more than it has to, or be slow at it.
    """
    table = profile.shares()
    table = table[(table["flop"] > 0) & (table["bytes"] > 0) & (table["seconds"] > 0)]
    copy, matmul = profile.meta["copy"], profile.meta["matmul"]
    intensity = table["flop"] / table["bytes"]
    across = np.geomspace(min([matmul / copy / 4, *intensity]) / 2, max([matmul / copy, *intensity]) * 4, 200)
    with rc_context(STYLE):
        fig = Figure(figsize=(7.5, 4.4), layout="constrained")
        ax = fig.subplots()
        ax.plot(across, np.minimum(across * copy, matmul) / 1e12, color=INK, lw=1.5)
        for number, (row, x) in enumerate(zip(table.itertuples(), intensity, strict=True)):
            y = row.flop / row.seconds / 1e12
            ax.scatter(
                x, y, color=PART_COLOURS[row.part], edgecolor=INK, lw=0.6, s=20 + 400 * row.share, zorder=3
            )
            # Neighbours have their names at different heights.
            ax.annotate(
                row.part, (x, y), textcoords="offset points", xytext=(9, (-9, 3)[number % 2]), fontsize=8
            )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="operations a byte, at least",
            ylabel="10¹² operations a second",
        )
        ax.set_title(
            f"The roofline, {copy / 1e9:,.0f} GB/s and {matmul / 1e12:,.3g} TFLOP/s; a point's area is its share"
        )
        plain_log(ax)
        fig.suptitle(_said(profile))
    return fig


def by_batch(profiles: Sequence[Profile]) -> Figure:
    """A step without the profiler against its blocks or sequences a rank, and where its time goes."""
    profiles = sorted(profiles, key=lambda one: one.meta["blocks"])
    first = profiles[0].meta
    names = [str(one.meta["blocks"]) for one in profiles]
    unit = "sequences" if first["mode"] == "decode" else "blocks"
    with rc_context(STYLE):
        fig = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = fig.subplots(1, 2)
        blocks = [one.meta["blocks"] for one in profiles]
        left.plot(
            blocks,
            [1e3 * one.step for one in profiles],
            marker="o",
            color=PART_COLOURS["attention"],
            label="measured",
        )
        least = [1e3 * one.limit for one in profiles]
        left.plot(blocks, least, marker="o", color=INK, ls="--", label="the chip's limit")
        left.set(xlabel=f"{unit} a step and rank", ylabel="ms a step", xscale="log", yscale="log")
        left.set_xticks(blocks, names)
        left.minorticks_off()
        plain_log(left)
        left.legend()
        left.set_title(f"{first['mode']}, {first['world_size']} × {first['chip']}: a step by its size")
        bottom = np.zeros(len(profiles))
        tables = [one.shares().set_index("part")["share"] for one in profiles]
        for part in PARTS:
            share = np.array([table.get(part, 0.0) for table in tables])
            right.bar(names, share, 0.7, bottom, color=PART_COLOURS[part])
            bottom += share
        right.set(xlabel=f"{unit} a step and rank", ylabel="share of the step", ylim=(0, 1))
        right.set_title("Where its time goes")
        _key(fig, [part for table in tables for part in table.index])
    return fig


def placements(table: pd.DataFrame) -> Figure:
    """:func:`moekit.notebook.profiling.placements`: how much busier the busiest rank is than the mean, by layer and way of
    placing."""
    ways = list(dict.fromkeys(table["placement"]))
    layers = sorted(table["layer"].unique())
    colours = dict(zip(ways, ("#BBBBBB", "#99DDFF", "#77AADD", "#44BB99"), strict=False))
    with rc_context(STYLE):
        fig = Figure(figsize=(8, 3.4), layout="constrained")
        ax = fig.subplots()
        for i, way in enumerate(ways):
            rows = table[table["placement"] == way].set_index("layer").loc[layers]
            at = np.arange(len(layers)) + 0.8 * (i + 0.5) / len(ways) - 0.4
            ax.bar(at, rows["value"] - 1, 0.8 / len(ways), 1, color=colours[way], label=way)
            # An interval without its bias may lie beside the value.
            ax.vlines(at, rows["low"], rows["high"], color=INK, lw=1)
        ax.axhline(1, color=INK, lw=1)
        ax.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
        ax.set(ylabel="busiest rank, × mean")
        ranks = table["ranks"].iloc[0]
        ax.set_title(
            f"Rows of the busiest of {ranks} ranks on the half of the text that no placement was fitted to"
        )
        fig.legend(loc="outside lower center", ncols=len(ways), fontsize=8)
    return fig


def _said(profile: Profile) -> str:
    m = profile.meta
    return f"{m['mode']}, {m['blocks']} × {m['tokens'] // m['blocks']:,} tokens a step and rank, {m['world_size']} × {m['chip']}"


def _key(fig: Figure, parts: Sequence[str]) -> None:
    there = [part for part in PARTS if part in set(parts)]
    handles = [Patch(color=PART_COLOURS[part], label=part) for part in there]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(9, len(there)), fontsize=8)
