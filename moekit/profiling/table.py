"""The table of a profile: what each rank did at each moment of its calls, and what that had to cost at least."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moekit.nn.parts import FETCH, WHOLE
from moekit.profiling.events import Row, Seen, rows_of
from moekit.profiling.least import Cost, of_both_products, of_whole_step
from moekit.profiling.naming import (
    EXPERTS,
    NO_WORK,
    OUTSIDE,
    PARTS,
    Name,
    is_exchange,
    named_of_graphs,
    placed,
)

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "rank",
    "step",
    "layer",
    "part",
    "kernel",
    "start",
    "duration",
    "exclusive",
    "bytes",
    "flop",
)
Named = tuple[Row, Name]


def table(
    ranks: Sequence[Seen], on_device: bool, costs: Sequence[Mapping[int, Mapping[tuple[int, str], Cost]]]
) -> pd.DataFrame:
    """One row for each kernel and each time without one, of all ranks.

    Args:
        ranks: what each rank did, on one clock.
        costs: for each rank, by step, the least cost of each (layer, part).

    Returns:
        Columns :data:`COLUMNS`; times in seconds, ``start`` from the first call's.
    """
    import pandas as pd

    found, fetched = zip(*(_of_rank(one, on_device) for one in ranks), strict=True)
    _wait_apart(found)
    zero = min(start for one in ranks for start, _ in one.calls)
    records = []
    for rank, rows in enumerate(found):
        for (row, name), share in zip(rows, _shares(rows), strict=True):
            of_step = costs[rank].get(name.step, {})
            cost = of_step.get((name.layer, name.part), Cost())
            if name.part == FETCH:
                cost = Cost(fetched[rank][name])
            elif name.part == WHOLE:
                cost = of_whole_step(of_step)
            elif name.part == EXPERTS:
                cost = of_both_products(of_step, name.layer)
            records.append(
                (
                    rank,
                    name.step,
                    name.layer,
                    name.part,
                    row.kernel.name,
                    (row.start - zero) / 1e9,
                    row.duration / 1e9,
                    row.exclusive / 1e9,
                    cost.bytes * share,
                    cost.flop * share,
                )
            )
    frame = pd.DataFrame(records, columns=COLUMNS)
    return frame.sort_values(["rank", "start"], kind="stable", ignore_index=True)


def _of_rank(one: Seen, on_device: bool) -> tuple[list[Named], dict[Name, int]]:
    """The rows of a rank, with their names, and the bytes of the experts that it fetched.

    Each call counts on from the steps of those before it.
    """
    found: list[Named] = []
    fetched: dict[Name, int] = defaultdict(int)
    names = named_of_graphs(one.kernels, one.template)
    first = 0
    for call, (start, end) in enumerate(one.calls):
        inside = [i for i, k in enumerate(one.kernels) if start <= k.launched < end]
        rows = rows_of(call, start, end, [one.kernels[i] for i in inside], on_device)
        steps = max((names[i].step for i in inside), default=0) + 1
        known = [names[i] for i in inside] + [Name(steps - 1, OUTSIDE, "")]
        for row in rows:
            # A time without a kernel goes with the kernel that follows it.
            name = known[row.place]
            found.append((row, name._replace(step=first + name.step, part=row.waits or name.part)))
        for at, ranges in one.fetches:
            if start <= at < end:
                name = placed(ranges)
                fetched[name._replace(step=first + name.step)] += int(ranges[-1].removeprefix(FETCH))
        first += steps
    return found, fetched


def _wait_apart(ranks: Sequence[list[Named]]) -> None:
    """Split each exchange at the moment when the last rank comes to it: until then, a rank is "waiting"."""
    places = [[i for i, (row, _) in enumerate(rows) if is_exchange(row.kernel.name)] for rows in ranks]
    if len(ranks) == 1 or len({len(own) for own in places}) != 1:
        return
    latest = [max(ranks[r][i][0].start for r, i in enumerate(at)) for at in zip(*places, strict=True)]
    for rank, own in enumerate(places):
        split = dict(zip(own, latest, strict=True))
        found: list[Named] = []
        for place, (row, name) in enumerate(ranks[rank]):
            begun = row.start + row.duration - row.exclusive
            waited = min(row.exclusive, max(0, split.get(place, 0) - begun))
            if waited:
                found.append(
                    (
                        replace(row, start=begun, duration=waited, exclusive=waited),
                        name._replace(part="waiting"),
                    )
                )
            if not waited or row.exclusive > waited:
                rest = replace(
                    row,
                    start=row.start + waited,
                    duration=row.duration - waited,
                    exclusive=row.exclusive - waited,
                )
                found.append((rest, name))
        ranks[rank][:] = found


def _shares(rows: Sequence[Named]) -> list[float]:
    """What each row has of its name's least cost: rows of a name share it by their exclusive times.

    If these are zero, as those of copies that other kernels run through, they share it by their durations.
    """
    alone: dict[Name, int] = defaultdict(int)
    whole: dict[Name, int] = defaultdict(int)
    for row, name in rows:
        alone[name] += row.exclusive
        whole[name] += row.duration
    return [
        row.exclusive / alone[name] if alone[name] else row.duration / whole[name] if whole[name] else 0.0
        for row, name in rows
    ]


def by_part(frame: pd.DataFrame, copy: float, matmul: float, link: float = math.nan) -> pd.DataFrame:
    """The mean step of a rank by part, beside the limit of the chip.

    The least time of a part in a layer is ``max(bytes / copy, flop / matmul)``, and that of "fetch" is ``bytes / link``: experts
    that are fetched cross the link once.

    Args:
        copy: bytes per second of a copy.
        matmul: operations per second of a large product.
        link: bytes per second from host memory, which "fetch" alone needs.

    Returns:
        ``part``, ``seconds`` (of a step and rank), ``share`` (of the step), ``bytes`` and ``flop`` (at least), ``least``
        (seconds in which the chip could do that), ``of_limit`` (``least / seconds``; NaN for what is no work). A GPU fetches
        beside what it computes: the ``seconds`` of "fetch" are those in which nothing else runs, and its ``of_limit`` is
        of all the time that its copies take.
    """
    steps, ranks = frame["step"].nunique(), frame["rank"].nunique()
    cells = frame.groupby(["rank", "step", "layer", "part"])[["exclusive", "duration", "bytes", "flop"]].sum()
    cells["least"] = np.maximum(cells["bytes"] / copy, cells["flop"] / matmul)
    fetched = cells.index.get_level_values("part") == FETCH
    cells.loc[fetched, "least"] = cells.loc[fetched, "bytes"] / link
    found = cells.groupby("part").sum() / (steps * ranks)
    found = found.reindex([part for part in PARTS if part in found.index]).reset_index()
    found = found.rename(columns={"exclusive": "seconds"})
    found.insert(2, "share", found["seconds"] / found["seconds"].sum())
    took = found["seconds"].where(found["part"] != FETCH, found.pop("duration"))
    worked = ~found["part"].isin(NO_WORK) & (took > 0) & (found["least"] > 0)
    found["of_limit"] = (found["least"] / took).where(worked)
    return found
