"""Intervals by resampling whole units, and what uniform random routing gives, for the metrics.

Tokens of one text are not independent, so a unit is a sample, some neighbouring samples, or what the caller names (a
document). The bootstrap draws units with replacement (Efron and Tibshirani 1993, chapter 8). What it draws is how often each
unit counts: counts are made once for each unit, and a resample is a product of matrices.

Uniform random routing: every token chooses K different experts, each set of K with the same probability.
Letters: T tokens, K choices, E experts, U units, R resamples.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moekit.arguments import Whole, check, has_order, is_many, shown

if TYPE_CHECKING:
    from moekit.routing.trace import Trace

# standard deviations of a normal distribution on either side of its mean that hold 95 %
Z = 1.959964
# A trace of more samples than this is resampled in groups of neighbouring samples.
BLOCKS = 500
RESAMPLES = 400
# neighbouring samples of a unit, for by="block"
BLOCK = 4
# An interval of fewer units than this does not hold what it promises, so there is none.
FEW = 8
# That of a statistic of all experts at once, whose bias is large where units are few.
FEW_FOR_SPREAD = 20
# of every simulation and bootstrap: the same trace gives the same figures
SEED = 0
# simulated traces whose mean is a chance value
DRAWS = 20


@dataclass
class Plan:
    """How metrics resample, with the arguments of :func:`moekit.routing.metrics.bootstrap`.

    Attributes:
        used: whether a metric has asked for units.
        few: how many units the intervals need that were asked for.
        thin: whether one was asked for of fewer.
    """

    by: str | Sequence | np.ndarray = "sample"
    size: int = BLOCK
    resamples: int = RESAMPLES
    seed: int = SEED
    used: bool = field(default=False, compare=False)
    few: int = field(default=0, compare=False)
    thin: bool = field(default=False, compare=False)


_plan: ContextVar[Plan | None] = ContextVar("plan", default=None)


@contextlib.contextmanager
def resampling(plan: Plan) -> Iterator[Plan]:
    """Metrics called in here resample as ``plan`` says."""
    before = _plan.set(plan)
    try:
        yield plan
    finally:
        _plan.reset(before)


def array_of(name: str, given: Iterable[Any] | np.ndarray) -> np.ndarray:
    """What any iterable gives, read once, as an array; ``name`` is the argument's.

    Raises:
        ValueError: it has no items, or they make no array.
    """
    try:
        if is_many(given) and has_order(given):
            as_it_is = hasattr(given, "__array__") or isinstance(given, Sequence)
            return np.asarray(given if as_it_is else list(given))
    except (TypeError, ValueError, RuntimeError):
        # A tensor without data, of a type that NumPy has not, or lists of several lengths.
        pass
    raise ValueError(f"{name}={shown(given)}: expected one for each token")


def unit_of(trace: Trace, by: str | Sequence | np.ndarray = "sample", size: int = BLOCK) -> np.ndarray:
    """[T] int64, each token's unit, from 0.

    Args:
        by: "sample"; "block": ``size`` neighbouring samples; or [T] labels of units, such as a document's number.

    Raises:
        ValueError: ``by`` is something else.
    """
    size = check("size", size, Whole())
    if not isinstance(by, str):
        labels = array_of("by", by)
        if labels.shape != (len(trace),):
            raise ValueError(
                f"by has shape {list(labels.shape)}; expected a unit for each of {len(trace)} tokens"
            )
        return np.unique(labels, return_inverse=True)[1]
    if by not in ("sample", "block"):
        raise ValueError(f"by={shown(by)}; expected sample, block, or an array with a unit for each token")
    number = np.unique(trace.sample, return_inverse=True)[1]
    return number if by == "sample" else number // size


@dataclass(frozen=True)
class Units:
    """A trace in units that are drawn whole.

    Attributes:
        unit: [T] int64, each token's unit.
        draws: [R, U] float64, how often a resample holds each unit.
    """

    unit: np.ndarray
    draws: np.ndarray

    @property
    def number(self) -> int:
        return self.draws.shape[1]


def units(trace: Trace, some: np.ndarray | None = None) -> Units:
    """The units that the plan in force asks for; more than ``BLOCKS`` are put together with their neighbours.

    Args:
        some: [T] bool, the tokens that count; None: all. Units without any of them are left out, and ``unit`` is of these tokens.
    """
    plan = _plan.get() or Plan()
    plan.used = True
    unit = unit_of(trace, plan.by, plan.size)
    if some is not None:
        unit = np.unique(unit[some], return_inverse=True)[1]
    return units_of(unit, plan.resamples, plan.seed)


def units_of(unit: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> Units:
    """Units of tokens that lie in ``unit`` [T], from 0; more than ``BLOCKS`` are put together with their neighbours."""
    found = int(unit.max(initial=-1)) + 1
    n = min(found, BLOCKS)
    unit = unit * n // max(1, found)
    rng = np.random.default_rng(seed)
    return Units(unit, rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float))


def interval(
    again: np.ndarray,
    value: np.ndarray | float,
    number: np.ndarray | float,
    error: np.ndarray | float | None = None,
    few: int = FEW,
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of each column: the value without its bias, -/+ t times its standard error.

    A resample repeats units, so it is less even than the trace by about as much as the trace is less even than its source:
    the bias is the mean of the resamples - value (Efron and Tibshirani 1993, section 10.2). t is Student's with n - 1
    degrees of freedom, n units, as a standard error of few units is uncertain. Percentiles of the resamples are narrower
    and held the truth less often.

    Args:
        again: [R, ...] the statistic of each resample.
        value: [...] that of the trace.
        number: [...] units, or as many equal ones as tell as much.
        error: [...] the standard error; None: the resamples' standard deviation, times sqrt(n / (n - 1)), since they vary
            about the trace as a mean of n numbers does about theirs.
        few: units below which there is no interval.

    Returns:
        ``low`` and ``high`` [...]; NaN for fewer than ``few`` units, where all resamples are equal, and where one resample is NaN.
    """
    from scipy.stats import t

    again = np.asarray(again, dtype=float)
    number = np.broadcast_to(np.asarray(number, dtype=float), again.shape[1:])
    if (plan := _plan.get()) is not None:
        plan.few = max(plan.few, few)
        plan.thin |= bool((number < few).any())
    known = np.maximum(number, 2)
    if error is None:
        error = again.std(axis=0, ddof=1) * np.sqrt(known / (known - 1))
    middle, half = 2 * value - again.mean(axis=0), t.ppf(0.975, known - 1) * error
    flat = (again.max(axis=0) == again.min(axis=0)) | (number < few)
    return tuple(np.where(flat, np.nan, end)[()] for end in (middle - half, middle + half))


def jackknife(without: np.ndarray) -> np.ndarray:
    """[U, ...] a statistic of the trace without each unit -> [...]: its standard error (Efron and Tibshirani 1993, 11.5)."""
    n = len(without)
    return np.sqrt((n - 1) ** 2 / max(1, n) * without.var(axis=0, ddof=1)) if n > 1 else without[0] * np.nan


def effective(size: np.ndarray) -> np.ndarray:
    """[U, ...] tokens of each unit -> [...]: how many equal units tell as much, (sum n)^2 / sum n^2 (Kish 1965)."""
    size = np.asarray(size, dtype=float)
    return size.sum(axis=0) ** 2 / np.maximum((size**2).sum(axis=0), 1e-30)


def share_of_units(count: np.ndarray, total: np.ndarray, found: Units) -> dict[str, np.ndarray]:
    """``value`` = sum of count / sum of total, its bootstrap interval, and how many ``units`` tell it, as columns.

    Args:
        count, total: [U, ...] of each unit; ``total`` broadcasts against ``count``.
    """
    count = np.asarray(count, dtype=float)
    total = np.asarray(total, dtype=float)
    value = count.sum(axis=0) / np.maximum(total.sum(axis=0), 1e-30)
    again = drawn(found, count) / np.maximum(drawn(found, total), 1e-30)
    number = np.broadcast_to(effective(total), value.shape)
    low, high = interval(again, value, number)
    value = np.where(total.sum(axis=0) > 0, value, np.nan)
    # They are rounded down: too few are not as many as are needed.
    rounded = np.floor(number * 10) / 10
    return {"value": value, "low": np.clip(low, 0, 1), "high": np.clip(high, 0, 1), "units": rounded}


def drawn(found: Units, count: np.ndarray) -> np.ndarray:
    """[U, ...] of each unit -> [R, ...] of each resample."""
    return (found.draws @ count.reshape(len(count), -1)).reshape(-1, *count.shape[1:])


@dataclass(frozen=True)
class _Numbers:
    """Numbers, in an array of any shape."""

    optional: bool = False
    expected = "numbers, in an array of any shape"

    def convert(self, value: object) -> np.ndarray:
        return np.asarray(value, dtype=float)


def wilson(successes: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a proportion (Wilson 1927); NaN where there was no trial."""
    successes, trials = check("successes", successes, _Numbers()), check("trials", trials, _Numbers())
    if np.any(successes > trials) or np.any(successes < 0):
        raise ValueError(
            f"successes={shown(successes)}: expected from 0 to as many as trials={shown(trials)}"
        )
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


def mean_of(values: np.ndarray, unit: np.ndarray, found: Units) -> tuple[float, float, float]:
    """The mean over tokens, with its bootstrap interval over units: ``value``, ``low``, ``high``; NaN without tokens.

    Args:
        values: [n], of some tokens.
        unit: [n], the units of these tokens.
    """
    total = np.bincount(unit, values, minlength=found.number)
    number = np.bincount(unit, minlength=found.number)
    if not number.sum():
        return math.nan, math.nan, math.nan
    value = float(total.sum() / number.sum())
    again = (found.draws @ total) / np.maximum(found.draws @ number, 1)
    low, high = interval(again, value, effective(number))
    return value, float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """What changed between two runs over the same tokens, by units.

    Attributes:
        tokens: tokens where the change is known.
        value: mean change a token.
        low, high: its 95 % interval over units (:func:`interval`), NaN as ``note`` says.
        p: of the sign-flip test: if the runs did not differ, each unit's change could as well have the other sign (Fisher
            1935; two-sided). Its least value is 2^(1 - units), so that few units cannot tell anything.
        effect: mean over standard deviation of the units' means (Cohen's d_z).
        same_sign: share of the units whose change has the sign of ``value``.
        units: how many.
    """

    tokens: int
    value: float
    low: float
    high: float
    p: float
    effect: float
    same_sign: float
    units: int

    @property
    def note(self) -> str:
        """Why there is no interval: "too few" units, or it "does not vary" between enough of them; "" where there is one."""
        if not math.isnan(self.low):
            return ""
        return "does not vary" if self.units >= FEW and math.isnan(self.effect) else "too few"

    def between(self, form: str, of: Callable[[float], float] = float) -> str:
        """The interval in words, or why there is none.

        Args:
            form: of an end, such as "{:+.4f}".
            of: what becomes of each end before it is written; where it falls, the ends change places.
        """
        if self.note:
            return f"no interval: {self.note}"
        low, high = sorted((of(self.low), of(self.high)))
        return f"{form.format(low)} to {form.format(high)}"


def paired(change: np.ndarray, unit: np.ndarray, draws: int = 4000, seed: int = SEED) -> Paired:
    """The statistics of ``change`` [T] (NaN: unknown), whose tokens lie in units ``unit`` [T]."""
    known = ~np.isnan(change)
    change = np.asarray(change, dtype=float)[known]
    if not len(change):
        return Paired(0, *[math.nan] * 6, units=0)
    unit = np.unique(np.asarray(unit)[known], return_inverse=True)[1]
    return paired_sums(np.bincount(unit, change), np.bincount(unit), draws, seed)


def paired_sums(total: np.ndarray, number: np.ndarray, draws: int = 4000, seed: int = SEED) -> Paired:
    """The statistics of changes of which each unit's sum ``total`` [U] and number of tokens ``number`` [U], at least 1, are known."""
    n, rng = len(number), np.random.default_rng(seed)
    value = total.sum() / number.sum()
    again = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    low, high = interval((again @ total) / (again @ number), value, effective(number))
    signs = rng.choice([-1.0, 1.0], size=(draws, n))
    reached = np.abs(signs @ total) >= np.abs(total.sum()) * (1 - 1e-9)
    p = max((1 + reached.sum()) / (1 + draws), 2.0 ** (1 - n))
    means = total / number
    spread = means.std(ddof=1) if n > 1 else math.nan
    effect = float(means.mean() / spread) if spread > 0 else math.nan
    same = float((np.sign(means) == np.sign(value)).mean())
    return Paired(int(number.sum()), float(value), float(low), float(high), float(p), effect, same, n)


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for how many there are (Holm 1979): the probability of any error in the family; NaN stays."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    known = int((~np.isnan(p)).sum())
    found = np.full(len(p), np.nan)
    factors = np.arange(known, 0, -1)
    found[order[:known]] = np.minimum(1, np.maximum.accumulate(p[order[:known]] * factors))
    return found


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


def random_counts(tokens: int, k: int, experts: int, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """[draws, experts] float64 counts of uniform random routing to ``k`` different experts of each token."""
    rng = np.random.default_rng(seed)
    counts = np.empty((draws, experts))
    # The time does not depend on the tokens, since they are counted: ``waiting`` has those with 1 to k choices left. A token with n
    # choices left takes the next of m experts with the probability n / m.
    missing = np.arange(1, k + 1)
    waiting = np.zeros((draws, k), dtype=np.int64)
    waiting[:, -1] = tokens
    for expert in range(experts):
        chosen = rng.binomial(waiting, np.minimum(missing / (experts - expert), 1))
        counts[:, expert] = chosen.sum(axis=1)
        waiting -= chosen
        waiting[:, :-1] += chosen[:, 1:]
    return counts


def entropy_bits(p: np.ndarray) -> np.ndarray:
    """Entropy of the distributions ``p`` [..., n] over the last axis, in bits."""
    # Subtracted from 0, since -0 is printed as such.
    return 0 - (p * np.log2(np.where(p > 0, p, 1))).sum(axis=-1)
