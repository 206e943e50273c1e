"""Intervals of shares and means, and what uniform random routing gives, for the metrics.

Uniform random routing: every token chooses K different experts, each set of K with the same probability.
Letters: T tokens, K choices, E experts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moekit.routing.trace import Trace

# standard deviations of a normal distribution on either side of its mean that hold 95 %
Z = 1.959964
# A trace of more samples than this is resampled in blocks of neighbouring samples.
BLOCKS = 500
RESAMPLES = 400
# of every simulation and bootstrap: the same trace gives the same figures
SEED = 0
# simulated traces whose mean is a chance value
DRAWS = 20


def wilson(successes: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a proportion (Wilson 1927); NaN where there was no trial."""
    successes, trials = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = successes / trials
        centre = p + Z**2 / (2 * trials)
        half = Z * np.sqrt(p * (1 - p) / trials + Z**2 / (4 * trials**2))
        return (centre - half) / (1 + Z**2 / trials), (centre + half) / (1 + Z**2 / trials)


def share(count: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
    """``value`` = count / total and its Wilson interval, ``low`` and ``high``, as columns of a table."""
    low, high = wilson(count, total)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"value": count / total, "low": low, "high": high}


def normal(n: float, total: float, squares: float) -> tuple[float, float, float]:
    """The mean of n values with this sum and sum of squares, and its normal interval."""
    if n < 1:
        return math.nan, math.nan, math.nan
    mean = total / n
    half = Z * math.sqrt(max(0.0, squares / n - mean**2) / (n - 1)) if n > 1 else math.nan
    return mean, mean - half, mean + half


def bootstrap(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """What a bootstrap over samples needs.

    Returns:
        [RESAMPLES, blocks] float64, how often each block is drawn; and [T] int64, each token's block: its sample, or
        some neighbouring samples together where there are more than ``BLOCKS``.
    """
    samples, block = np.unique(trace.sample, return_inverse=True)
    n = min(len(samples), BLOCKS)
    block = block * n // max(1, len(samples))
    rng = np.random.default_rng(SEED)
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float), block


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values; NaN if they are all equal, as those of one block are."""
    if np.ptp(values) == 0:
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def mean_of(values: np.ndarray, block: np.ndarray, resamples: np.ndarray) -> tuple[float, float, float]:
    """The mean over tokens, with its bootstrap interval over blocks."""
    blocks = resamples.shape[1]
    total = np.bincount(block, values, minlength=blocks)
    number = np.bincount(block, minlength=blocks)
    if not number.sum():
        return math.nan, math.nan, math.nan
    if blocks == 1:
        return float(total.sum() / number.sum()), math.nan, math.nan
    again = (resamples @ total) / np.maximum(resamples @ number, 1)
    low, high = np.percentile(again, [2.5, 97.5])
    return float(total.sum() / number.sum()), float(low), float(high)


def random_choices(rng: np.random.Generator, tokens: int, k: int, experts: int) -> np.ndarray:
    """[tokens, k] int64, different experts in each row, uniform."""
    chosen = np.empty((tokens, k), dtype=np.int64)
    for i in range(k):
        draw = rng.integers(0, experts - i, tokens)
        # The draw-th of the experts that are left: in ascending order, each one taken already moves it up by one.
        for taken in np.sort(chosen[:, :i], axis=1).T:
            draw += draw >= taken
        chosen[:, i] = draw
    return chosen


def random_counts(tokens: int, k: int, experts: int) -> np.ndarray:
    """[DRAWS, experts] float64 counts of uniform random routing."""
    rng = np.random.default_rng(SEED)
    return np.stack(
        [
            np.bincount(random_choices(rng, tokens, k, experts).ravel(), minlength=experts)
            for _ in range(DRAWS)
        ]
    ).astype(float)


def entropy_bits(p: np.ndarray) -> np.ndarray:
    """Entropy of the distributions ``p`` [..., n] over the last axis, in bits."""
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1)
