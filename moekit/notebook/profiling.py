"""What profile_inference.ipynb needs beside profiles and pictures: tables and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from moekit.notebook import report
from moekit.routing import metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moekit.notebook.timeline import Timeline
    from moekit.profiling import Profile
    from moekit.routing.trace import Trace

# Ranks that a placement is looked at for, where the model's own leave nothing to place.
RANKS = 4


def overview(profiles: Mapping[int, Profile]) -> pd.DataFrame:
    """One row for each number of blocks: ``blocks``, ``ms a step`` and ``tokens a second`` (of all ranks, without the
    profiler), ``slowdown`` (with it), ``ms by the parts`` (with it), ``limit ms`` (of the chip), ``at work`` (the share of a
    step in which a kernel runs that is no waiting)."""
    rows = []
    for blocks, one in profiles.items():
        table = one.shares()
        working = ~table["part"].isin(["waiting", "idle", "host"])
        rows.append(
            {
                "blocks": blocks,
                "ms a step": 1e3 * one.step,
                "tokens a second": one.meta["world_size"] * one.meta["tokens"] / one.step,
                "slowdown": one.slowdown,
                "ms by the parts": 1e3 * table["seconds"].sum(),
                "limit ms": 1e3 * one.limit,
                "at work": table.loc[working, "share"].sum(),
            }
        )
    return pd.DataFrame(rows)


def placements(trace: Trace, profile: Profile) -> pd.DataFrame:
    """``metrics.placement`` for the profile's ranks, and ``ranks``, how many these are. Where the profile has one, or more than a
    layer has experts, they are :data:`RANKS`, and nothing is ``saved``."""
    ranks, share = profile.meta["world_size"], None
    if ranks == 1 or ranks > trace.num_experts:
        ranks = min(RANKS, trace.num_experts)
    else:
        share = profile.busiest()
    table = metrics.placement(trace, ranks, share=share)
    table.insert(1, "ranks", ranks)
    return table


def saved(table: pd.DataFrame) -> pd.DataFrame:
    """What each placement would save of a step, over all layers, beside the mean ``value`` of the layers."""
    each = table.groupby("placement", sort=False)
    total = each["saved"].sum(min_count=1)
    return pd.DataFrame(
        {"busiest rank, × mean": each["value"].mean(), "saved of a step": total}
    ).reset_index()


def save(
    output_dir: str | Path,
    profiles: Mapping[int, Profile],
    figures: Mapping[str, Figure | None],
    tables: Mapping[str, pd.DataFrame | None],
    view: Timeline,
) -> Path:
    """Write ``profile_{blocks}.json.gz`` of each profile, ``trace.json.gz`` and ``timeline.html`` of the last one,
    and the figures and tables, as :func:`moekit.notebook.report.write` does."""

    def more(folder: Path) -> None:
        for blocks, one in profiles.items():
            one.save(folder / f"profile_{blocks}.json.gz")
        view.profile.save_trace(folder / "trace.json.gz")
        view.save_html(folder / "timeline.html")

    return report.write(output_dir, figures, tables, more)
