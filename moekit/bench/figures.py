"""The figures that a bench reports, each with the limit of the device and the goal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moekit.units import GIB


@dataclass(frozen=True)
class Figure:
    """A row of a bench's table.

    Attributes:
        work: the measured work.
        value: the figure in ``unit``; None if it could not be measured, with the reason in ``note``.
        limit: the best value that any program could reach, from the ceilings measured in the same run.
        goal: the goal on this machine; None on machines without a goal.
        lower: whether a lower value is better, as for times and memory.
        gpu_gib, host_gib: peak memory during the measurement, of the rank that used most: the memory that torch allocated
            on the GPU, and the memory of the process without mapped files.
    """

    work: str
    value: float | None
    unit: str
    limit: float | None = None
    goal: float | None = None
    lower: bool = False
    gpu_gib: float | None = None
    host_gib: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The share of the limit that is reached: 1 at the limit, for either direction of better."""
        if self.value is None or self.limit is None:
            return None
        return self.limit / self.value if self.lower else self.value / self.limit

    @property
    def met(self) -> bool | None:
        if self.value is None or self.goal is None:
            return None
        return bool(self.value <= self.goal if self.lower else self.value >= self.goal)

    def row(self) -> dict[str, Any]:
        return {
            "work": self.work,
            "figure": rounded(self.value),
            "unit": self.unit,
            "limit": rounded(self.limit),
            "ratio": rounded(self.ratio),
            "goal": rounded(self.goal),
            "met": self.met,
            "GPU GiB": rounded(self.gpu_gib),
            "host GiB": rounded(self.host_gib),
            "note": self.note,
        }


def rounded(value: float | None) -> float | None:
    """``value`` rounded to three significant digits, or to a whole number if it has more digits."""
    if value is None:
        return None
    return float(f"{value:.3g}") if abs(value) < 1000 else float(round(value))


# (shape, ranks, what) -> the goal on H200s with float16 or bfloat16 weights.
GOALS: dict[tuple[str, int, str], float] = {
    ("15b", 1, "score 1"): 255e3,
    ("15b", 1, "score 4"): 800e3,
    ("15b", 1, "score 32"): 1.4e6,
    ("15b", 4, "score 1"): 1.7e6,
    ("15b", 4, "score 4"): 2.8e6,
    ("15b", 8, "score 1"): 3.4e6,
    ("15b", 8, "score 4"): 5.4e6,
    ("52b", 1, "score 16"): 520e3,
    ("15b", 1, "score memory"): 36.0,
    ("15b", 2, "all-to-all"): 20.0,
    ("15b", 2, "against one"): 1.7,
    ("15b", 4, "against one"): 3.85,
    ("15b", 8, "against one"): 7.6,
    ("52b", 4, "against one"): 3.9,
    ("52b", 8, "against one"): 7.7,
    # Milliseconds of a step of one sequence a rank, and tokens/s of more.
    ("15b", 1, "decode 1"): 0.18,
    ("15b", 4, "decode 1"): 0.35,
    ("15b", 8, "decode 1"): 0.4,
    ("52b", 8, "decode 1"): 0.8,
    ("15b", 1, "decode 8"): 8 / 0.45e-3,
    ("15b", 1, "decode 16"): 16 / 0.65e-3,
    ("15b", 1, "decode 64"): 64 / 1.75e-3,
    ("15b", 4, "decode 64"): 160e3,
    ("15b", 8, "decode 64"): 380e3,
    ("15b", 1, "load"): 1.5,
    ("15b", 4, "load"): 4.0,
    ("15b", 8, "load"): 4.0,
    ("15b", 1, "load memory"): 4.0,
    ("15b", 1, "score 1 int8"): 380e3,
    ("15b", 1, "score 32 int8"): 1.0e6,
    ("15b", 1, "score memory int8"): 16.5,
    ("15b", 1, "decode 1 int8"): 0.25,
    ("15b", 1, "decode 64 int8"): 60e3,
}
# The same at any number of ranks.
GOALS |= {
    ("15b", ranks, what): value
    for ranks in (1, 2, 4, 8)
    for what, value in {"evaluate share": 97.0, "generate share": 90.0, "reading": 1.0}.items()
}


def goal(shape: str, world_size: int, what: str, gpu: str, dtype: str) -> float | None:
    """The goal for ``what`` on the GPU called ``gpu``; None if no goal is set."""
    if "H200" not in gpu or dtype not in ("float16", "bfloat16"):
        return None
    return GOALS.get((shape, world_size, what))


def too_large(needed: float, what: str, free: float, spare: float = 0.0) -> str:
    """The reason why ``needed`` bytes of ``what`` do not fit and leave ``spare`` bytes; "" if they do.

    Free memory that is unknown, NaN, is taken to be enough.
    """
    if not needed + spare >= free:
        return ""
    return f"does not fit: {needed / GIB:.1f} GiB of {what}, {free / GIB:.1f} GiB are free"


def spread(seconds: Sequence[float]) -> str:
    """The spread of repeated measurements, as text for a note."""
    middle = statistics.median(seconds)
    return f"{len(seconds)} runs, {min(seconds) / middle - 1:+.0%} to {max(seconds) / middle - 1:+.0%}"
