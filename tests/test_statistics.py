"""Intervals over whole units, tests by permutation, and information: by hand, against slow ways, and calibrated."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from synthetic_traces import synthetic
from test_metrics import make

from moekit.routing import calibration, metrics, statistics
from moekit.routing.calibration import Source
from moekit.routing.compare import change_by_domain, compare
from moekit.routing.pairs import align
from moekit.routing.trace import join


def slow(metric):
    """The same metric, so that bootstrap cannot use its counts."""

    def again(trace, *args, **options):
        with statistics.resampling(statistics.Plan()):
            return metric(trace, *args, **options)

    return again


# -------------------------------------------------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("metric", ["load", "gate", "drops", "repeats"])
def test_counting_units_equals_drawing_tokens(metric):
    """The fast way draws counts, the slow one makes the trace of every resample."""
    trace, _ = synthetic(tokens=600, block=40, experts=6)
    fast = metrics.bootstrap(trace, metric, resamples=60)
    drawn = metrics.bootstrap(trace, slow(metrics.METRICS[metric]), resamples=60)
    np.testing.assert_allclose(fast["low"], drawn["low"], atol=1e-6)
    np.testing.assert_allclose(fast["high"], drawn["high"], atol=1e-6)
    assert (fast["note"] == "").any()


@pytest.mark.parametrize("metric", ["balance", "hot_set"])
def test_the_middle_of_a_spread_is_by_resamples_and_its_width_by_the_jackknife(metric):
    """24 samples: each resample and each trace without a sample is made, and measured as a trace."""
    from scipy.stats import t

    trace, _ = synthetic(tokens=600, block=25, experts=6)
    fast = metrics.bootstrap(trace, metric, resamples=60)
    drawn = metrics.bootstrap(trace, slow(metrics.METRICS[metric]), resamples=60)
    known = fast["low"].notna().to_numpy()
    assert known.mean() > 0.7 and (fast["note"] != "too few").all()
    middle = [(table["low"] + table["high"])[known] / 2 for table in (fast, drawn)]
    np.testing.assert_allclose(*middle, atol=1e-6)
    measured = metrics.METRICS[metric]
    without = np.stack([measured(trace.select(mask=trace.sample != sample))["value"] for sample in range(24)])
    error = np.sqrt(23 / 24 * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    half = (fast["high"] - fast["low"])[known] / 2
    np.testing.assert_allclose(half, t.ppf(0.975, 23) * error[known], atol=1e-6)


def test_a_spread_of_few_units_has_no_interval():
    told = metrics.bootstrap(synthetic(tokens=600, block=40, experts=6)[0], "balance")
    assert told["low"].isna().all() and (told["note"] == "too few").all()


def test_a_note_says_why_there_is_no_interval():
    """Eleven samples: no drop at all does not vary; a spread needs more; and one long sample tells as much as few."""
    trace, _ = synthetic(tokens=330, block=30, experts=6)
    whole = dataclasses.replace(trace, kept=np.full_like(trace.kept, True))
    for metric in ("drops", slow(metrics.drops)):
        told = metrics.bootstrap(whole, metric, resamples=50)
        assert told["value"].eq(0).all() and told["units"].eq(11).all()
        assert told["low"].isna().all() and (told["note"] == "does not vary").all()
    assert (metrics.bootstrap(whole, "balance")["note"] == "too few").all()
    few = whole.select(mask=whole.sample < 7)
    assert (metrics.bootstrap(few, "drops")["note"] == "too few").all()
    assert (metrics.bootstrap(trace, "repeats")["note"] == "").all()
    # Ten samples of one token and one of 30: 40^2 / (30^2 + 10) = 1.8 equal ones.
    uneven = trace.select(mask=(trace.sample == 0) | (trace.position == 0))
    for metric in ("drops", "gate"):
        assert metrics.bootstrap(uneven, metric)["note"].eq("too few").all()


def test_an_interval_by_hand():
    again = np.array([1.0, 2.0, 3.0, 6.0])
    low, high = statistics.interval(again, 2.5, 10)
    half = 2.2621571627 * again.std(ddof=1) * math.sqrt(10 / 9)
    assert (low, high) == (pytest.approx(2 * 2.5 - 3 - half), pytest.approx(2 * 2.5 - 3 + half))
    assert statistics.interval(again, 2.5, 10, error=1.0)[1] == pytest.approx(2 + 2.2621571627)
    assert (
        np.isnan(statistics.interval(again, 2.5, 7)).all()
        and np.isnan(statistics.interval(again * 0, 0, 10)).all()
    )
    values = np.random.default_rng(0).normal(size=12)
    without = np.array([np.delete(values, n).mean() for n in range(12)])
    assert statistics.jackknife(without) == pytest.approx(values.std(ddof=1) / math.sqrt(12))


@pytest.mark.parametrize("metric", [metrics.domain_specialisation, metrics.domain_information])
def test_labels_are_drawn_with_their_tokens(metric):
    trace, labels = synthetic(tokens=800, block=40, experts=6, domains=2)
    fast = metrics.bootstrap(trace, metric, labels, resamples=60)
    drawn = metrics.bootstrap(trace, slow(metric), labels, resamples=60)
    few = fast["units"] < statistics.FEW
    np.testing.assert_allclose(fast["value"], drawn["value"])
    if metric is metrics.domain_information:
        np.testing.assert_allclose(fast[["low", "high"]], drawn[["low", "high"]], atol=1e-6)
    else:
        # The slow way knows no domain's own number of units.
        assert (fast["units"] <= drawn["units"]).all() and not few.all()


@pytest.mark.parametrize(
    ("metric", "options", "needed"),
    [("drops", {}, statistics.FEW), ("hot_set", {"sizes": [6]}, statistics.FEW_FOR_SPREAD)],
)
def test_as_many_units_as_are_needed_are_not_too_few(metric, options, needed):
    """What does not vary has no interval, however many units there are; a token less, and they tell as much as fewer."""
    trace, _ = synthetic(tokens=30 * needed, block=30, experts=6)
    whole = dataclasses.replace(trace, kept=np.full_like(trace.kept, True))
    assert (metrics.bootstrap(whole, metric, **options)["note"] == "does not vary").all()
    fewer = whole.select(mask=whole.sample > 0)
    assert (metrics.bootstrap(fewer, metric, **options)["note"] == "too few").all()
    if metric == "drops":
        told = metrics.bootstrap(whole.select(mask=np.arange(len(whole)) > 0), metric)
        assert told["units"].eq(needed - 0.1).all() and (told["note"] == "too few").all()


def test_the_interval_is_that_of_units_and_not_of_tokens():
    """Samples that are all of one expert: 40 samples tell as much as 40 tokens."""
    chosen = np.repeat(np.arange(40) % 2, 25)
    trace = make(chosen[:, None, None], sample=np.repeat(np.arange(40), 25), num_experts=2)
    row = metrics.bootstrap(trace, "load").iloc[0]
    spread = math.sqrt(0.25 / 40)
    assert row["high"] - row["low"] == pytest.approx(2 * 2.02 * spread, rel=0.15)
    low, high = metrics.wilson(np.array([500]), np.array([1000]))
    assert (row["high"] - row["low"]) > 4 * (high - low)[0]


def test_units_are_samples_groups_of_them_or_the_callers():
    trace, _ = synthetic(tokens=400, block=10)
    assert metrics.bootstrap(trace, "load")["units"].iloc[0] == 40
    assert metrics.bootstrap(trace, "load", by="block", size=4)["units"].iloc[0] == 10
    documents = np.repeat(["a", "b"], 200)
    told = metrics.bootstrap(trace, "load", by=documents)
    assert (told["note"] == "too few").all() and told[["low", "high"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="by='token'"):
        metrics.bootstrap(trace, "load", by="token")
    with pytest.raises(ValueError, match="by has shape"):
        metrics.bootstrap(trace, "load", by=[1, 2])
    with pytest.raises(ValueError, match="metric='lod'"):
        metrics.bootstrap(trace, "lod")
    with pytest.raises(ValueError, match="no table with the column value"):
        metrics.bootstrap(trace, metrics.counts)


def test_every_metric_of_a_trace_has_an_interval():
    trace, _ = synthetic(tokens=480, block=40, experts=6)
    for name in set(metrics.METRICS) - {"counts", "coactivation", "transitions"}:
        frame = metrics.bootstrap(trace, name, resamples=12)
        assert {"value", "low", "high", "units", "note"} <= set(frame.columns), name
        varies = frame["note"] == ""
        assert (frame.loc[varies, "low"] <= frame.loc[varies, "high"]).all(), name


def test_a_metric_of_the_users_own():
    trace, _ = synthetic(tokens=400, block=20, vocab=30)

    def busiest(trace):
        return pd.DataFrame({"layer": trace.layers, "value": metrics.counts(trace).max(axis=1) / len(trace)})

    frame = metrics.bootstrap(trace, busiest, resamples=50)
    assert frame["layer"].tolist() == [1, 3] and frame["note"].eq("").all()


class Busiest(pd.DataFrame):
    """A table that is a metric of the user's own."""

    def __init__(self, trace, kind=float, factor=1):
        value = metrics.counts(trace).max(axis=1) / len(trace) * factor
        super().__init__({"layer": trace.layers, "value": value.astype(kind)})


@pytest.mark.parametrize("generated", [False, True])
def test_a_trace_of_the_same_tokens_is_drawn_with_the_first(generated):
    before, _ = synthetic(tokens=800, block=20, experts=6)
    after, _ = synthetic(tokens=800, block=20, experts=6, seed=1)
    if generated:
        before = dataclasses.replace(before, generated=before.position >= 5)
    after = dataclasses.replace(after, token=before.token, generated=before.generated)
    fast = metrics.bootstrap(before, metrics.agreement, after, resamples=60)
    assert (fast["note"] == "").any()
    again = slow(metrics.agreement)
    for drawn in (
        metrics.bootstrap(before, again, after, resamples=60),
        metrics.bootstrap(before, again, after=after, resamples=60),
        metrics.bootstrap(
            before, lambda one, others: again(one, *others.values()), {"x": after}, resamples=60
        ),
    ):
        np.testing.assert_allclose(fast[["low", "high"]], drawn[["low", "high"]], atol=1e-6)


Both = collections.namedtuple("Both", "labels trace")


@pytest.mark.parametrize("generated", [False, True])
def test_what_a_container_holds_is_drawn_as_if_it_stood_alone(generated):
    before, labels = synthetic(tokens=400, block=20, experts=6)
    if generated:
        before = dataclasses.replace(before, generated=before.position >= 5)
    after, _ = synthetic(tokens=400, block=20, experts=6, seed=1)
    after = dataclasses.replace(after, token=before.token, generated=before.generated)

    def of_both(one, two):
        of_labels = metrics.domain_information(one, two.labels).assign(statistic="information")
        tables = of_labels, metrics.agreement(one, two.trace)
        return pd.concat([table[["layer", "statistic", "value"]] for table in tables])

    def alone(one, labels, trace):
        return of_both(one, Both(labels, trace))

    def held(one, others, name):
        return of_both(one, others[name][0])

    def unordered(one, labels, traces):
        return alone(one, *labels, *traces)

    wanted = metrics.bootstrap(before, alone, labels, after, resamples=20)
    assert (wanted["note"] == "").any()
    objects = np.empty(2, object)
    objects[:] = labels, after
    for told in (
        metrics.bootstrap(before, lambda one, two: alone(one, *two), [labels, after], resamples=20),
        metrics.bootstrap(before, lambda one, two: alone(one, *two), iter((labels, after)), resamples=20),
        metrics.bootstrap(before, lambda one, two: alone(one, *two), objects, resamples=20),
        metrics.bootstrap(before, of_both, two=Both(iter(labels), after), resamples=20),
        metrics.bootstrap(before, held, {"x": iter([Both(labels, after)])}, "x", resamples=20),
        metrics.bootstrap(before, held, [1, (Both(labels, after), 2)], name=1, resamples=20),
        metrics.bootstrap(before, unordered, {"a": labels}.values(), {after}, resamples=20),
    ):
        pd.testing.assert_frame_equal(told, wanted)


def test_a_container_without_anything_of_tokens_is_given_as_it_is():
    trace, _ = synthetic(tokens=400, block=20)
    # As many items as tokens, in no order, are none of tokens.
    for given in (
        [1, ("a", None), np.arange(3), {"b"}],
        collections.Counter("a"),
        {*range(400)},
        bytes(400),
        bytearray(400),
    ):

        def same(one, other, given=given):
            assert other is given
            return Busiest(one)

        metrics.bootstrap(trace, same, given, resamples=2)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("by", ["sample", "part"])
@pytest.mark.parametrize("lacking", ["one", "other", "both"])
def test_a_trace_with_other_tokens_of_the_same_samples_is_drawn_with_the_first(lacking, by, told):
    """A trace of generated text, cut to its new tokens, beside one that is not marked so; and one that lacks tokens."""
    trace, _ = synthetic(tokens=800, block=20, experts=6)
    other, _ = synthetic(tokens=800, block=20, experts=6, seed=1)
    other = dataclasses.replace(other, token=trace.token if told else np.full_like(trace.token, -1))
    first = trace.select(mask=trace.position >= 5)
    if lacking != "other":
        trace = dataclasses.replace(trace, generated=trace.position >= 5)
    if lacking != "one":
        other = other.select(mask=other.position % 10 != 9)
    if lacking == "both":
        other = other.select(mask=other.position % 4 != 0)

    def bootstrap(one, two):
        units = one.sample if by == "sample" else one.sample * 2 + (one.position >= 10)
        return metrics.bootstrap(one, slow(metrics.agreement), two, by=units, resamples=20)

    # What both have, as two traces with the same tokens.
    wanted = bootstrap(*align(first if lacking != "other" else trace, other))
    assert (wanted["note"] == "").any()
    pd.testing.assert_frame_equal(bootstrap(trace, other), wanted)


def test_a_trace_that_lacks_samples_is_drawn_where_it_has_them():
    trace, _ = synthetic(tokens=800, block=20, experts=6)
    other, _ = synthetic(tokens=800, block=20, experts=6, seed=1)
    other = dataclasses.replace(other, token=trace.token)

    def first(one, other):
        one, other = align(one, other)
        same = one.experts[..., 0] == other.experts[..., 0]
        return pd.DataFrame({"layer": one.layers, "value": same.mean(axis=0)})

    told = metrics.bootstrap(trace, first, other.select(samples=range(30)), resamples=60)
    draws = statistics.units_of(trace.sample, 60).draws[:, :30]
    same = (trace.experts[..., 0] == other.experts[..., 0]).reshape(40, 20, 2)[:30].mean(axis=1)
    again = draws @ same / draws.sum(axis=1, keepdims=True)
    low, high = statistics.interval(again, same.mean(axis=0), 40)
    np.testing.assert_allclose(told[["low", "high"]], np.stack([low, high], axis=1), atol=1e-6)
    # The samples of a trace that the first one lacks are in none of its units.
    more, _ = synthetic(tokens=1000, block=20, experts=6, seed=1)
    more = dataclasses.replace(more, token=np.concatenate([trace.token, more.token[800:]]))
    for samples in ([3], [3, *range(40, 50)]):
        with pytest.raises(ValueError, match="holds no token of a trace with tokens in 1 of 40 units"):
            metrics.bootstrap(trace, first, more.select(samples=samples), resamples=60)


def test_a_metric_whose_interval_is_dropped_is_drawn():
    before, _ = synthetic(tokens=800, block=20, experts=6)
    after, _ = synthetic(tokens=800, block=20, experts=6, seed=1)
    after = dataclasses.replace(after, token=before.token)
    fast = metrics.bootstrap(before, metrics.agreement, after, resamples=60)
    for dropped in (["low"], ["low", "high", "chance"]):

        def value(one, other, dropped=dropped):
            return metrics.agreement(one, other).drop(columns=dropped)

        told = metrics.bootstrap(before, value, after, resamples=60)
        np.testing.assert_allclose(fast[["low", "high"]], told[["low", "high"]], atol=1e-6)


@pytest.mark.parametrize("told", [True, False])
def test_a_longer_trace_of_the_same_text_is_drawn_with_the_first_by_a_metric_that_aligns_both(told):
    """Samples of a resample have numbers of their own: drawn alone, they would be aligned with other ones."""
    longer, _ = synthetic(tokens=800, block=20, experts=6)
    other, _ = synthetic(tokens=800, block=20, experts=6, seed=1)
    other = dataclasses.replace(other, token=longer.token if told else np.full_like(longer.token, -1))
    trace = longer.select(samples=range(10, 30))
    fast = metrics.bootstrap(trace, metrics.agreement, other, resamples=60)
    assert (fast["note"] == "").any()
    drawn = metrics.bootstrap(trace, slow(metrics.agreement), other, resamples=60)
    np.testing.assert_allclose(fast[["low", "high"]], drawn[["low", "high"]], atol=1e-6)


def test_a_longer_trace_of_the_same_text_keeps_its_other_samples_where_all_of_it_counts():
    longer, _ = synthetic(tokens=800, block=20, experts=6)
    trace = longer.select(samples=range(10, 30))

    def shares(one):
        return metrics.counts(one).max(axis=1) / len(one)

    def more(one, other):
        return pd.DataFrame({"layer": one.layers, "value": shares(one) - shares(other)})

    told = metrics.bootstrap(trace, more, longer, resamples=60)
    draws = statistics.units_of(trace.sample - 10, 60).draws
    counts = np.stack([metrics.counts(longer.select(samples=sample)) for sample in range(40)])
    own = np.tensordot(draws, counts[10:30], 1)
    whole = own + counts[:10].sum(axis=0) + counts[30:].sum(axis=0)
    again = own.max(axis=2) / 400 - whole.max(axis=2) / 800
    low, high = statistics.interval(again, told["value"].to_numpy(), 20)
    np.testing.assert_allclose(told[["low", "high"]], np.stack([low, high], axis=1), atol=1e-6)


def test_a_trace_of_other_tokens_stays_whole():
    trace, _ = synthetic(tokens=400, block=20, experts=6)
    elsewhere = dataclasses.replace(trace, sample=trace.sample + 20)
    for other in (synthetic(tokens=400, block=20, seed=1)[0], elsewhere):
        seen = []

        def against(one, other, seen=seen):
            seen.append(other)
            return Busiest(one)

        metrics.bootstrap(trace, against, other, resamples=5)
        assert len(seen) == 6 and all(one is other for one in seen)


def test_a_class_is_a_metric_and_an_option_and_has_no_items():
    read, _ = synthetic(tokens=400, block=20)
    written = dataclasses.replace(read, generated=read.position >= 10)
    new = read.select(mask=written.generated)
    how = {"kind": np.float32, "factor": np.array(2.0), "resamples": 20}
    wanted = metrics.bootstrap(new, lambda trace, **options: Busiest(trace, **options), **how)
    pd.testing.assert_frame_equal(metrics.bootstrap(written, Busiest, **how), wanted)
    with pytest.raises(TypeError, match="'Trace' object is not iterable"):
        metrics.bootstrap(written, dict)


def test_labels_that_a_metric_of_the_users_calls_metric_are_drawn_with_the_tokens():
    read, labels = synthetic(tokens=400, block=20)
    written = dataclasses.replace(read, generated=read.position >= 10)

    def of_groups(trace, groups):
        return metrics.information(trace, groups)

    def of_metric(trace, metric):
        return metrics.information(trace, metric)

    wanted = metrics.bootstrap(written, of_groups, labels, resamples=5)
    pd.testing.assert_frame_equal(metrics.bootstrap(written, of_metric, labels, resamples=5), wanted)


def test_iterators_last_for_all_resamples():
    trace, labels = synthetic(tokens=400, block=20)
    units = np.arange(400) // 40
    wanted = metrics.bootstrap(trace, metrics.information, by=units, classes={"x": labels}, resamples=5)
    told = metrics.bootstrap(
        trace, metrics.information, by=iter(units), classes={"x": iter(labels)}, resamples=5
    )
    pd.testing.assert_frame_equal(told, wanted)

    def deep(trace, classes):
        return metrics.information(trace, classes=classes["a"])

    told = metrics.bootstrap(trace, deep, by=units, classes={"a": {"x": iter(labels)}}, resamples=5)
    pd.testing.assert_frame_equal(told, wanted)


# ------------------------------------------------------------------------------------------------------ permutation


def test_permutation_by_hand():
    """Four samples, two labels: of the six arrangements two give the largest lift that is seen."""
    chosen = np.repeat([0, 0, 1, 1], 5)
    trace = make(chosen[:, None, None], sample=np.repeat(np.arange(4), 5), num_experts=2)
    labels = np.repeat(["a", "a", "b", "b"], 5)
    told = metrics.permutation(trace, labels, draws=3000, level=0.4).set_index(["domain", "expert"])
    assert told.loc[("a", 0), "value"] == 2 and told.loc[("a", 1), "value"] == 0
    assert told.loc[("a", 0), "p"] == pytest.approx(1 / 3, abs=0.03)
    assert told.loc[("a", 0), "survives"] and not told.loc[("a", 1), "survives"]
    assert told["units"].eq(2).all()
    assert (told["note"] == "").all()
    few = metrics.permutation(trace, labels, draws=100)
    assert (few["note"] == "too few").all() and not few["survives"].any()
    # A test at 45 % marks a third of what has no structure, less than four fifths of 45 %; one at 20 % marks nothing.
    for level in (0.45, 0.2):
        few = metrics.permutation(trace, labels, draws=3000, level=level)
        assert (few["note"] == "too few").all() and not few["survives"].any()
    with pytest.raises(ValueError, match="statistic='t'"):
        metrics.permutation(trace, labels, statistic="t")


@pytest.mark.parametrize("statistic", ["lift", "difference", "information"])
def test_the_observed_statistic_is_that_of_the_metric(statistic):
    trace, labels = synthetic(tokens=600, block=30, experts=5, domains=3)
    told = metrics.permutation(trace, labels, statistic=statistic, choice=0, draws=50)
    if statistic == "information":
        wanted = metrics.domain_information(trace, labels)["value"]
    else:
        table = metrics.domain_specialisation(trace, labels, choice=0)
        wanted = table["lift"] if statistic == "lift" else table["value"] - table["chance"]
    np.testing.assert_allclose(told["value"], wanted, atol=1e-12)


def test_a_pair_that_is_there_survives_and_a_busy_expert_does_not():
    """Expert 0 is everybody's; expert 3 is domain b's alone."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.where(np.arange(40) % 2, "b", "a"), 20)
    second = np.where((labels == "b") & (rng.random(800) < 0.6), 3, rng.integers(1, 3, 800))
    chosen = np.stack([np.zeros(800, int), second], axis=1)[:, None]
    trace = make(chosen, sample=np.repeat(np.arange(40), 20))
    told = metrics.permutation(trace, labels).set_index(["domain", "expert"])
    assert told.loc[("b", 3), "survives"] and not told.loc[[("a", 0), ("b", 0)], "survives"].any()
    table = metrics.domain_specialisation(trace, labels).set_index(["domain", "expert"])
    assert table.loc[("a", 0), "lift"] == 1 and table.loc[("a", 0), "value"] == 1
    uniform = metrics.domain_specialisation(trace, labels, against="uniform").set_index(["domain", "expert"])
    assert uniform.loc[("a", 0), "lift"] == 2 and uniform.attrs["against"] == "uniform"
    with pytest.raises(ValueError, match="against='chance'"):
        metrics.domain_specialisation(trace, labels, against="chance")


# --------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(("k", "experts"), [(1, 4), (2, 5), (3, 3), (3, 8)])
def test_random_counts_are_those_of_random_choices(k, experts):
    """They take no memory for each token: a picture of a long trace makes a hundred of them."""
    rng = np.random.default_rng(1)
    one_by_one = [
        np.bincount(statistics.random_choices(rng, 30, k, experts).ravel(), minlength=experts)
        for _ in range(4000)
    ]
    found = statistics.random_counts(30, k, experts, 4000)
    assert (found.sum(axis=1) == 30 * k).all() and found.max() <= 30
    # Sorted, they tell of the spread: the standard error of each mean is 0.05 at most.
    ends = [np.sort(counts, axis=1).mean(axis=0) for counts in (found, one_by_one)]
    np.testing.assert_allclose(*ends, atol=0.3)
    np.testing.assert_allclose(found.mean(axis=0), 30 * k / experts, atol=0.3)
    assert (statistics.random_counts(1 << 50, k, experts, 2).sum(axis=1) == k << 50).all()


def test_sign_flips_by_hand():
    """Three units that all lose: of the eight choices of signs two are as far from 0."""
    told = statistics.paired(np.array([-1.0, -1, -2, -3, np.nan]), np.array([0, 0, 1, 2, 2]))
    assert told.tokens == 4 and told.units == 3 and told.value == -7 / 4 and told.same_sign == 1
    assert told.p == pytest.approx(0.25, abs=0.03) and math.isnan(told.low)
    assert told.effect == pytest.approx(-2.0)  # means -1, -2, -3
    assert told.between("{:.1f}") == "no interval: too few"
    assert statistics.paired(np.full(3, np.nan), np.arange(3)).tokens == 0
    same = statistics.paired(np.ones(10), np.arange(10))
    assert same.between("{:.1f}") == "no interval: does not vary"
    wide = statistics.paired(np.arange(10.0), np.arange(10))
    assert wide.between("{:+.2f}") == f"{wide.low:+.2f} to {wide.high:+.2f}"
    assert wide.between("{:.2f}", lambda end: -end) == f"{-wide.high:.2f} to {-wide.low:.2f}"


def test_no_sentence_tells_an_interval_that_is_not_there():
    trace, _ = synthetic(tokens=60, block=20)
    assert "(no interval: too few)" in repr(compare(trace, trace))
    unknown = dataclasses.replace(trace, logprob=np.full_like(trace.logprob, np.nan))
    assert repr(compare(unknown, trace)).startswith(
        "<comparison of 60 tokens: no log-probability is known in both, 0.0% of tokens"
    )


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, np.nan])[:3].tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert np.isnan(statistics.holm([np.nan, 0.5])).tolist() == [True, False]


def test_change_by_domain_tells_which_survive():
    trace, _ = synthetic(tokens=2000, block=50)
    labels = np.repeat(["a", "b"], 1000)
    rng = np.random.default_rng(1)
    moved = np.where(labels == "a", -0.5, 0) + rng.normal(0, 0.2, 40)[trace.sample]
    after = dataclasses.replace(trace, logprob=trace.logprob + moved.astype(np.float32))
    table = change_by_domain(trace, after, labels).set_index("domain")
    assert table["survives"].to_dict() == {"a": True, "b": False}
    assert table["units"].tolist() == [20, 20]
    assert (table["low"] < table["change"]).all() and (table["change"] < table["high"]).all()
    np.testing.assert_allclose(table["perplexity_ratio"], np.exp(-table["change"]))
    found = compare(trace, after)
    assert len(found.units) == 40 and found.paired.value == pytest.approx(found.delta, abs=1e-6)
    few = change_by_domain(trace, after, labels, by=np.repeat(np.arange(4), 500))
    assert (few["note"] == "too few").all() and not few["survives"].any()


# ---------------------------------------------------------------------------------------------------- information


def test_information_by_hand():
    """The token decides the expert; the position tells nothing."""
    chosen = np.tile([0, 1, 0, 1, 0, 1, 1, 0], 20)
    trace = make(chosen[:, None, None], sample=np.repeat(np.arange(20), 8), token=chosen + 4, num_experts=2)
    told = metrics.information(trace, np.where(chosen, "x", "y")).set_index("of")
    assert told.loc["token", "value"] == pytest.approx(1) and told.loc["token", "entropy"] == pytest.approx(1)
    assert told.loc["token", "corrected"] == pytest.approx(
        told.loc["token", "value"] - told.loc["token", "chance"]
    )
    assert told.loc["domain", "value"] == pytest.approx(1)
    assert told.loc["previous", "tokens"] == 140, "the first token of a sample has none before it"


def test_information_brute():
    trace, labels = synthetic(tokens=500, block=50, experts=5, vocab=30)
    told = metrics.information(trace, labels, min_count=5, shuffles=3).set_index(["layer", "of"])
    for place, layer in enumerate(trace.layers):
        pairs = list(zip(trace.token.tolist(), trace.experts[:, place, 0].tolist(), strict=True))
        number = {t: sum(one == t for one, _ in pairs) for t, _ in pairs}
        pairs = [pair for pair in pairs if number[pair[0]] >= 5]
        n, bits = len(pairs), 0.0
        for t, e in set(pairs):
            both, one, other = (
                pairs.count((t, e)),
                sum(a == t for a, _ in pairs),
                sum(b == e for _, b in pairs),
            )
            bits += both / n * math.log2(both * n / (one * other))
        assert told.loc[(layer, "token"), "value"] == pytest.approx(bits)
        assert told.loc[(layer, "token"), "tokens"] == n


def test_what_tells_nothing_is_corrected_to_nothing():
    rng = np.random.default_rng(0)
    trace = make(rng.integers(0, 8, (4000, 1, 1)), sample=np.arange(4000) // 100, num_experts=8)
    row = metrics.information(trace).set_index("of").loc["position"]
    assert row["value"] > 0.1 and abs(row["share"]) < 0.01


def test_classes_of_tokens():
    pieces = ["The", " 12", " ca", "ts", "\n", "In", "</s>", "x"]
    trace = make(np.zeros((8, 1, 1), int), sample=[0] * 8)
    kind = metrics.classes_of(trace, pieces, lambda piece: "number" if piece.strip().isdigit() else "other")
    assert kind.tolist() == ["other", "number"] + ["other"] * 6
    words = metrics.classes_of(trace, pieces, str, words=True)
    assert words.tolist() == ["The", " 12", " cats", " cats", "\n", "In</s>", "In</s>", "x"]
    told = metrics.information(trace, classes={"kind": kind}, min_count=1, shuffles=1)
    assert "kind" in set(told["of"])
    with pytest.raises(ValueError, match="7 texts for 8 tokens"):
        metrics.classes_of(trace, pieces[1:], str)


# -------------------------------------------------------------------------------------------- which tokens count


def test_new_tokens_count_unless_the_prompt_is_asked_for():
    trace, labels = synthetic(tokens=200, block=50)
    trace = dataclasses.replace(trace, generated=trace.position >= 30)
    new = trace.select(mask=trace.generated)
    pd.testing.assert_frame_equal(metrics.load(trace), metrics.load(new))
    assert metrics.counts(trace, prompt=True).sum() == 2 * 2 * 200
    assert metrics.counts(trace).sum() == 2 * 2 * 80
    pd.testing.assert_frame_equal(
        metrics.domain_specialisation(trace, labels),
        metrics.domain_specialisation(new, labels[trace.generated]),
    )
    units = np.arange(200) // 10
    wanted = metrics.bootstrap(new, "load", by=units[trace.generated])
    pd.testing.assert_frame_equal(metrics.bootstrap(trace, "load", by=units), wanted)


def test_samples_are_unique_in_join():
    one, _ = synthetic(tokens=60, block=20)
    with pytest.raises(ValueError, match="renumber=True"):
        join([one, one])
    both = join([one, one.select(samples=[1, 2])], renumber=True)
    assert np.unique(both.sample).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(both.experts[60:80], one.experts[20:40])


def test_what_is_a_drop_is_the_same_in_all_traces_of_a_join():
    """The meta of one tells it of all: without a capacity, what found no place in another was none."""
    one, _ = synthetic(tokens=60, block=20)
    groups = {"groups": [[1, 20, 3]]}

    def with_meta(**told):
        return dataclasses.replace(one, meta=told)

    free, tight = with_meta(capacity_token_fraction=None), with_meta(capacity_token_fraction=0.2, **groups)
    first = with_meta(capacity_token_fraction=0.2, intervention={"drop_second": True}, **groups)
    for traces, said in (
        ([free, tight], "capacity_token_fraction differs: None and 0.2"),
        ([tight, tight, free], "capacity_token_fraction differs: 0.2 and None"),
        ([tight, first], "drop_second differs: False and True"),
        ([free, with_meta()], "capacity_token_fraction differs: None and 'unknown'"),
        ([with_meta(), free], "capacity_token_fraction differs: 'unknown' and None"),
    ):
        with pytest.raises(ValueError, match=f"the traces' {said}; .* one by one"):
            join(traces, renumber=True)
        assert len(join([trace.without_experts() for trace in traces], renumber=True)) == 60 * len(traces)
    # The chance is that of the groups of all traces, and not known where one tells none, as a generation's.
    longer = with_meta(capacity_token_fraction=0.2, groups=[[1, 20, 1], [2, 30, 4]])
    both = join([tight, longer], renumber=True)
    assert both.meta == {"capacity_token_fraction": 0.2, "groups": [[1, 20, 4], [2, 30, 4]]}
    written = dataclasses.replace(
        with_meta(capacity_token_fraction=0.2, groups=[]), generated=one.position > 9
    )
    assert metrics.drops(tight)["chance"].notna().all()
    assert metrics.drops(join([tight, written], renumber=True), prompt=True)["chance"].isna().all()


def test_unknown_tokens_are_not_different():
    one, _ = synthetic(tokens=60, block=20)
    other = dataclasses.replace(one, token=np.full(60, -1, np.int32), target=np.full(60, 1, np.int32))
    found = compare(other, one).tokens
    assert found["token"].tolist() == one.token.tolist() and found["target"].tolist() == one.target.tolist()
    wrong = dataclasses.replace(
        one, token=np.where(one.token == one.token[0], -1, one.token + 1).astype(np.int32)
    )
    with pytest.raises(ValueError, match="tokens differ"):
        align(one, wrong)


# --------------------------------------------------------------------------------------------------- calibration


def test_the_sources_truth_is_what_a_long_trace_gives():
    source = Source(6000, (20, 20))
    truth = source.truth()
    trace, labels = source.draw(5)
    assert np.allclose(metrics.load(trace)["value"], truth["load"], atol=0.01)
    assert np.allclose(metrics.drops(trace)["value"], truth["drops"], atol=0.01)
    table = metrics.domain_specialisation(trace, labels)
    assert np.allclose(table["value"], truth["domain_specialisation"], atol=0.03)
    assert np.allclose(table["lift"], truth["domain_specialisation: lift"], atol=0.1)
    assert metrics.domain_information(trace, labels)["value"][0] == pytest.approx(
        truth["domain_information"][0], abs=0.01
    )


@pytest.mark.parametrize("source", [Source(60), Source(40, (16, 120))])
def test_intervals_hold_the_truth(source):
    """120 draws with fixed seeds; 95 % +- 3 standard errors of the metrics with one row."""
    for name, held in calibration.coverage(source, 120).items():
        assert 0.89 <= held, (name, held)
    # Wilson's interval, which takes the tokens as independent, does not.
    truth, hits = source.truth()["load"], []
    for seed in range(60):
        count = metrics.counts(source.draw(seed)[0])[0]
        low, high = metrics.wilson(count, np.full(len(count), count.sum()))
        hits.extend((low <= truth) & (truth <= high))
    assert np.mean(hits) < 0.8


def test_tests_keep_their_level():
    for name, wrong in calibration.level(Source(24), 150, permutations=200).items():
        assert 0 <= wrong <= 0.11, (name, wrong)


def test_ties_that_a_single_document_makes_are_too_few():
    """Twelve documents, each with a share of its own for expert 0. There are 132 ways to deal two labels of one document and
    one of ten, yet the largest lift is that of the extreme document in a sixth of them: no test at 5 % can mark it."""
    chosen = np.concatenate([np.arange(24) >= number for number in range(12)]).astype(int)
    trace = make(chosen[:, None, None], sample=np.repeat(np.arange(12), 24), num_experts=2)
    for labels, few in (
        (["a", "b", *"c" * 10], True),
        ([*"cc", *"c" * 8, "a", "b"], True),
        ([*"aaaaaabbbbbb"], False),
    ):
        told = metrics.permutation(trace, np.repeat(labels, 24), draws=4000)
        assert (told["note"] == ("too few" if few else "")).all()
        assert told["survives"].any() != few
    told = metrics.permutation(trace, np.repeat([*"c" * 10, "a", "b"], 24), draws=4000)
    assert told["p"].min() == pytest.approx(1 / 6, abs=0.02)


def test_three_documents_a_domain_keep_their_level_or_are_too_few():
    """With the rule that there were enough arrangements, this source marked 1.5 %."""
    few = []
    for number in range(60):
        trace, labels = Source(12, of_domain=0).draw(number)
        told = metrics.permutation(trace, labels, draws=300, seed=number)
        few.append((told["note"] == "too few").all())
        assert not (told["survives"] & (told["note"] == "too few")).any()
        smallest = min(len(np.unique(trace.sample[labels == domain])) for domain in np.unique(labels))
        assert few[-1] or smallest > 1
    assert 0.5 < np.mean(few) < 0.9


def test_three_documents_a_domain_are_too_few():
    trace, labels = Source(12).draw(0)
    told = metrics.bootstrap(trace, metrics.domain_specialisation, labels)
    assert (told["note"] == "too few").all() and told["low"].isna().all()


def test_permutations_count_pieces_of_mixed_units():
    trace, labels = synthetic(tokens=400, block=40, domains=2)
    told = metrics.permutation(trace, labels, draws=20)
    pieces = {(s, d) for s, d in zip(trace.sample, labels, strict=True)}
    for domain in np.unique(labels):
        number = sum(d == domain for _, d in pieces)
        assert told.loc[told["domain"] == domain, "units"].eq(number).all()
    assert len(told) == len(list(itertools.product(trace.layers, np.unique(labels), range(16))))
