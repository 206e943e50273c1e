"""A profile as timeline.js takes it, and the page of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moekit.notebook import standalone
from moekit.notebook.style import PART_COLOURS
from moekit.profiling import PARTS

if TYPE_CHECKING:
    from moekit.profiling import Profile

HERE = Path(__file__).parent


def pack(profile: Profile) -> tuple[dict, list[np.ndarray]]:
    """Header and arrays.

    Returns:
        The header: ``ranks``, ``parts`` and their ``colours``, ``kernels`` (names), ``steps`` (start and end of each, in
        seconds) and ``arrays`` as (name, dtype) pairs; and the arrays [rows], sorted by rank and start: ``rank``, ``step``,
        ``layer``, ``part`` and ``kernel`` (numbers), ``start`` and ``duration`` (seconds in which no earlier kernel ran).
    """
    frame = profile.frame[profile.frame["exclusive"] > 0]
    begun = frame["start"] + frame["duration"] - frame["exclusive"]
    frame = frame.assign(begun=begun).sort_values(["rank", "begun"], kind="stable")
    kernels, kernel = np.unique(frame["kernel"].to_numpy(dtype=str), return_inverse=True)
    parts = [part for part in PARTS if (frame["part"] == part).any()]
    ends = (
        frame.assign(end=frame["begun"] + frame["exclusive"])
        .groupby("step")
        .agg({"begun": "min", "end": "max"})
    )
    arrays = {
        "rank": frame["rank"].to_numpy(np.uint8),
        "step": frame["step"].to_numpy(np.uint16),
        "layer": frame["layer"].to_numpy(np.int16),
        "part": frame["part"].map(parts.index).to_numpy(np.uint8),
        "kernel": kernel.astype(np.uint32),
        "start": frame["begun"].to_numpy(np.float64),
        "duration": frame["exclusive"].to_numpy(np.float32),
    }
    names, flat = standalone.listed(arrays)
    header = {
        "ranks": int(frame["rank"].max()) + 1,
        "parts": parts,
        "colours": [PART_COLOURS[part] for part in parts],
        "kernels": kernels.tolist(),
        "steps": ends.to_numpy().tolist(),
        "arrays": names,
    }
    return header, flat


def page(profile: Profile) -> str:
    """The text of the page that :func:`save_html` writes."""
    return standalone.page("moekit: where the time goes", HERE / "timeline.js", *pack(profile))


def save_html(profile: Profile, path: str | Path) -> Path:
    """Write the timeline as one page, of about 25 bytes for each kernel; returns ``path``.

    Raises:
        moekit.results.NotWritten: (a ValueError) the folder cannot be written to, or its disk is full.
    """
    return standalone.save(path, page(profile))
