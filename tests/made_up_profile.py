"""A profile that can be checked by hand: two ranks, two steps, and who waits for whom."""

import numpy as np
import pandas as pd

from moekit.profiling import Profile
from moekit.profiling.table import COLUMNS


def made_up() -> Profile:
    """Rank 0 computes for 6 ms and exchanges for 2, rank 1 computes for 3 and waits for 3; twice.

    The chip copies 1 GB a second and computes 1e9 operations a second: what is computed takes 1.5 ms of it at least.
    """
    rows = []
    for step, zero in enumerate((0.0, 0.008)):
        rows += [
            (0, step, 1, "experts up", "gemm", zero, 0.006, 0.006, 0.1e6, 1.5e6),
            (0, step, 1, "dispatch", "_meet", zero + 0.006, 0.002, 0.002, 0.2e6, 0),
            (1, step, 1, "experts up", "gemm", zero, 0.003, 0.003, 0.1e6, 1.5e6),
            (1, step, 1, "waiting", "_meet", zero + 0.003, 0.003, 0.003, 0, 0),
            (1, step, 1, "dispatch", "_meet", zero + 0.006, 0.002, 0.002, 0.2e6, 0),
        ]
    got = [(rank, step, 1, 30 - 20 * rank, 3) for rank in (0, 1) for step in (0, 1)]
    meta = {
        "mode": "score",
        "blocks": 2,
        "tokens": 20,
        "world_size": 2,
        "chip": "chip",
        "copy": 1e9,
        "matmul": 1e9,
    }
    return Profile(
        pd.DataFrame(rows, columns=COLUMNS),
        np.full((2, 2), 0.0075),
        np.full((2, 2), 0.008),
        pd.DataFrame(got, columns=["rank", "step", "layer", "rows", "experts"]),
        meta,
    )
