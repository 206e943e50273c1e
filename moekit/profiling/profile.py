"""A profile: where the time of a few steps goes, on all ranks."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit import json_text, results
from moekit.arguments import Path as PathKind
from moekit.arguments import check, check_regular, shown
from moekit.nn.parts import FETCH
from moekit.profiling import table
from moekit.profiling.naming import EXPERTS, PARTS
from moekit.profiling.perfetto import trace_of
from moekit.worker.steps import seconds_a_step

if TYPE_CHECKING:
    import pandas as pd

# The most bytes and values of a file, unpacked: one from elsewhere may unpack to any number.
MOST = 100_000_000
MOST_VALUES = MOST // 16


@dataclass(frozen=True, eq=False)
class Profile:
    """What :meth:`moekit.api.Model.profile` returns.

    Attributes:
        frame: a row for each kernel of each rank, and for each time without one, in order: ``rank``; ``step``; ``layer``, -1
            outside of the layers; ``part`` (:data:`moekit.profiling.naming.PARTS`); ``kernel``, "" for none; ``start`` and
            ``duration`` in seconds, on one clock; ``exclusive``, the seconds of ``duration`` in which no earlier kernel
            ran, so that those of a rank sum up to its steps; ``bytes`` and ``flop`` that it had to move and to compute at
            least: a part's (moekit/profiling/least.py), shared among its kernels by their time. A rank that waits in an
            exchange for the slowest rank is ``waiting``; between kernels, a GPU is ``idle`` if the next one was launched
            already, and waits for the ``host`` if not. ``fetch`` is the copying of experts from host memory, and its bytes
            are those that were fetched. A GPU copies beside what it computes: a copy is then ``exclusive`` while nothing
            else runs.
        plain, profiled: [W, steps] seconds of the steps, measured by the clock of the process, without and with the profiler;
            of "decode" there are more of the former.
        rows: what the experts got: ``rank``, ``step``, ``layer``, ``rows``, and ``experts`` with a row.
        meta: ``mode``, ``blocks``, ``tokens`` (a step and rank), ``world_size``, ``device``, ``dtype``, ``experts``
            (their type: "int8", "fp8" or None), ``resident`` (how many a layer are in slots; None: all), ``backend``,
            ``capacity_token_fraction``, ``chip``, ``copy`` (bytes a second), ``matmul`` (operations a second), ``link``
            (bytes a second from host memory), ``jitter`` (seconds by which the ranks' clocks may differ), ``versions``.
        events: the profiler's own events of each rank; not saved.
    """

    frame: pd.DataFrame
    plain: np.ndarray
    profiled: np.ndarray
    rows: pd.DataFrame
    meta: dict[str, Any]
    events: list[list[dict[str, Any]]] = field(default_factory=list, repr=False)

    def __repr__(self) -> str:
        m = self.meta
        return (
            f"<profile of {m['mode']}: {self.profiled.shape[1]} steps of {m['tokens']:,} tokens on each of {m['world_size']} x "
            f"{m['chip']}, {1e3 * self.step:.2f} ms a step>"
        )

    @property
    def step(self) -> float:
        """The median seconds of a step without the profiler, on the slowest rank."""
        return seconds_a_step(self.plain)

    @property
    def slowdown(self) -> float:
        """A step under the profiler as a multiple of one without."""
        return seconds_a_step(self.profiled) / self.step

    def shares(self) -> pd.DataFrame:
        """The mean step by part, see :func:`moekit.profiling.table.by_part`."""
        # Profiles of an earlier version fetched nothing, and know no link.
        link = self.meta.get("link", math.nan)
        return table.by_part(self.frame, self.meta["copy"], self.meta["matmul"], link)

    @property
    def limit(self) -> float:
        """The least seconds of the mean step: of its parts one after the other, or of its fetches if they take longer.

        ``max(sum of least of the other parts, bytes fetched / link)``, since experts can be fetched beside all other work.
        """
        parts = self.shares().set_index("part")["least"]
        return max(parts.drop(FETCH, errors="ignore").sum(), parts.get(FETCH, 0.0))

    def experts(self) -> pd.DataFrame:
        """The experts' time beside the rows they got.

        Returns:
            One row per (layer, rank), means over steps: ``layer``, ``rank``, ``rows``, ``experts`` (with a row),
            ``seconds`` (of both products, and of the gate's choice where it is in their kernel), ``waiting`` (seconds in which the
            rank waits for others in that layer), ``busiest`` (rows of the busiest rank as a multiple of the mean).
        """
        frame = self.frame
        steps = frame["step"].nunique()
        at = ["layer", "rank"]
        inside = frame[frame["part"].isin([EXPERTS, "experts up", "experts down"])]
        found = self.rows.groupby(at)[["rows", "experts"]].mean()
        for name, rows in {"seconds": inside, "waiting": frame[frame["part"] == "waiting"]}.items():
            found[name] = (rows.groupby(at)["exclusive"].sum() / steps).reindex(found.index)
        found = found.fillna(0.0).reset_index()
        each = found.groupby("layer")["rows"]
        found["busiest"] = each.transform("max") / each.transform("mean").clip(lower=1e-30)
        return found

    def busiest(self) -> dict[int, float]:
        """For each layer with experts, the share of a step in which the experts of its busiest rank compute."""
        found = self.experts()
        whole = self.frame["exclusive"].sum() / (self.frame["step"].nunique() * self.frame["rank"].nunique())
        rows = found.loc[found.groupby("layer")["rows"].idxmax()]
        return dict(zip(rows["layer"].tolist(), (rows["seconds"] / whole).tolist(), strict=True))

    def save(self, path: str | Path) -> None:
        """Write all but ``events`` to one file, for :meth:`load`.

        Raises:
            ValueError: the profile is too large to be read again.
            moekit.results.NotWritten: (a ValueError) the folder is missing or cannot be written to, or its disk is full.
        """
        held = {
            "meta": self.meta,
            "plain": self.plain.tolist(),
            "profiled": self.profiled.tolist(),
            "frame": self.frame.to_dict("list"),
            "rows": self.rows.to_dict("list"),
        }
        text = json.dumps(held)
        if len(text) > MOST or json_text.values(text) > MOST_VALUES:
            raise ValueError(
                f"the profile takes {len(text):,} bytes and {json_text.values(text):,} values; {MOST:,} and {MOST_VALUES:,} "
                "can be read: profile fewer steps"
            )
        with results.whole(path, make=True) as part:
            part.write_bytes(gzip.compress(text.encode(), 6))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, or it is no profile.
        """
        import pandas as pd

        path = check("path", path, PathKind())
        check_regular(path, "a profile that Profile.save wrote")
        try:
            with gzip.open(path) as file:
                text = file.read(MOST + 1)
            if len(text) > MOST:
                raise ValueError(f"it unpacks to more than {MOST:,} bytes")
            held = _held(text)
            plain, profiled = (np.array(held[name], dtype=float) for name in ("plain", "profiled"))
            found = cls(
                pd.DataFrame(held["frame"]), plain, profiled, pd.DataFrame(held["rows"]), held["meta"]
            )
            _check(found)
            return found
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{path} is no profile that Profile.save wrote: {error}; name one, or profile anew"
            ) from error

    def save_trace(self, path: str | Path) -> None:
        """Write the events of all ranks as one file for Perfetto's and Chrome's viewers: JSON, with gzip.

        Each rank has the profiler's own lanes, and one that shows the parts.

        Raises:
            ValueError: this profile was read from a file, which holds no events.
            moekit.results.NotWritten: (a ValueError) the folder is missing or cannot be written to, or its disk is full.
        """
        if not self.events:
            raise ValueError(
                "this profile was read from a file and has no events; write the trace where it was made"
            )
        held = json.dumps(trace_of(self.frame, self.events, self.meta), allow_nan=False).encode()
        with results.whole(path, make=True) as part:
            part.write_bytes(gzip.compress(held, 6))


# The kinds of what a profile holds: of a table's columns, and of the meta. Dense models have no rows of experts.
WORDS, NUMBERS = ("part", "kernel"), ("start", "duration", "exclusive", "bytes", "flop")
COUNTS = {"frame": ("rank", "step", "layer"), "rows": ("rank", "step", "layer", "rows", "experts")}
# What a file has, and the greatest number in it: with more, sums and times in nanoseconds would not be finite.
HELD = {"meta", "plain", "profiled", "frame", "rows"}
LARGEST = 1e30
META = {
    "mode": str,
    "chip": str,
    "blocks": int,
    "tokens": int,
    "world_size": int,
    "copy": float,
    "matmul": float,
}


def _held(text: bytes) -> dict[str, Any]:
    """What the text of a file holds, by its names; the ValueError ends a sentence."""
    try:
        held = json_text.loads(text, most=MOST_VALUES)
    except ValueError as error:
        raise ValueError(f"it {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"it is {shown(held)}")
    if missing := HELD - held.keys():
        raise ValueError(f"it has no {min(missing)!r}")
    return held


def _check(profile: Profile) -> None:
    """Whether a profile that was read holds what its methods and pictures use; the ValueError ends a sentence."""
    frame, meta = profile.frame, profile.meta
    for name, columns in COUNTS.items():
        rows = getattr(profile, name)
        for column in columns:
            if column not in rows or (len(rows) and rows[column].dtype.kind not in "iu"):
                raise ValueError(f"its {name} has no column {column!r} of whole numbers")
    for column in NUMBERS:
        if (
            column not in frame
            or frame[column].dtype.kind not in "iuf"
            or not (frame[column].abs() <= LARGEST).all()
        ):
            raise ValueError(f"its frame has no column {column!r} of numbers up to {LARGEST:g}")
    for column in WORDS:
        if column not in frame or not all(type(one) is str for one in frame[column]):
            raise ValueError(f"its frame has no column {column!r} of words")
    if unknown := set(frame["part"]) - set(PARTS):
        raise ValueError(f"its frame has the part {shown(min(unknown))}, expected one of {', '.join(PARTS)}")
    for name in ("plain", "profiled"):
        seconds = getattr(profile, name)
        if seconds.ndim != 2 or not seconds.size or not ((seconds > 0) & (seconds <= LARGEST)).all():
            raise ValueError(f"{name} holds something else than seconds by rank and step")
    for name, kind in META.items():
        value = meta.get(name) if isinstance(meta, dict) else None
        whole = type(value) is int and kind is not str
        if not (whole or type(value) is kind) or (kind is not str and not 0 < value < math.inf):
            raise ValueError(
                f"its meta has {name}={shown(value)}, expected {'a word' if kind is str else 'a number'}"
            )
    if not isinstance(meta.get("link", math.nan), int | float):
        raise ValueError(f"its meta has link={shown(meta['link'])}, expected a number")
    if not frame["exclusive"].sum() > 0:
        raise ValueError("the steps in its frame take no time")
