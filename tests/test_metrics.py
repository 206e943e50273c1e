"""Every metric by hand on a trace of a few tokens, and against plain loops on random traces."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
from synthetic_traces import synthetic

from moekit.routing import expert_caches as offload
from moekit.routing import metrics
from moekit.routing.statistics import random_choices
from moekit.routing.trace import Trace


def make(experts, *, kept=None, sample=None, token=None, num_experts=4, layers=None, probs=None, **fields):
    """A trace of ``experts`` [T][L][K]."""
    experts = np.array(experts, dtype=np.int16)
    tokens, depth, _ = experts.shape
    sample = np.zeros(tokens, np.int32) if sample is None else np.array(sample, np.int32)
    starts = np.searchsorted(sample, sample)
    token = np.arange(tokens) + 4 if token is None else np.array(token)
    kept = np.ones(experts.shape, bool) if kept is None else np.array(kept, bool)
    probs = np.full(experts.shape, 0.25) if probs is None else np.array(probs)
    columns = {
        "sample": sample,
        "position": (np.arange(tokens) - starts).astype(np.int32),
        "token": token.astype(np.int32),
        "target": np.append(token[1:], 1).astype(np.int32),
        "generated": np.zeros(tokens, bool),
        "logprob": np.zeros(tokens, np.float32),
        "predicted": np.full(tokens, -1, np.int32),
        "layers": tuple(range(depth)) if layers is None else layers,
        "experts": experts,
        "probs": probs.astype(np.float32),
        "weights": (probs * kept).astype(np.float32),
        "kept": kept,
        "entropy": np.ones((tokens, depth), np.float32),
        "full": {},
        "num_experts": num_experts,
        "meta": {},
    }
    return Trace(**(columns | fields))


@pytest.fixture(scope="module", params=[0, 1, 2])
def random(request):
    """Small random traces, so that plain loops can follow."""
    return synthetic(
        tokens=[257, 400, 90][request.param],
        layers=[(1, 3), (0, 1, 2), (5,)][request.param],
        experts=[8, 13, 2][request.param],
        block=[64, 50, 90][request.param],
        vocab=40,
        seed=request.param,
    )


def rows(frame, *keys):
    """value by the columns ``keys``."""
    return {tuple(r[k] for k in keys): r["value"] for r in frame.to_dict("records")}


def choices(trace, place, dispatched=False):
    """For each token the experts it chose (or that got it)."""
    return [
        [int(e) for e, k in zip(es, ks, strict=True) if k or not dispatched]
        for es, ks in zip(trace.experts[:, place], trace.kept[:, place], strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- load


def test_load_by_hand():
    trace = make([[[0, 1]], [[0, 2]], [[0, 1]], [[1, 0]]], kept=[[[1, 1]], [[1, 0]], [[0, 1]], [[1, 1]]])
    found = metrics.load(trace)
    assert found["count"].tolist() == [4, 3, 1, 0] and found["value"].tolist() == [0.5, 0.375, 0.125, 0]
    assert (found["chance"] == 0.25).all()
    assert metrics.load(trace, choice=0)["count"].tolist() == [3, 1, 0, 0]
    assert metrics.load(trace, choice=1)["count"].tolist() == [1, 2, 1, 0]
    assert metrics.load(trace, dispatched=True)["count"].tolist() == [3, 3, 0, 0]
    assert found[["low", "high"]].isna().all(axis=None), "one sample has no interval"
    # Wilson for 4 of 8: centre 1/2, half width z sqrt(1/4/8 + z2/4/64) / (1 + z2/8)
    z = 1.959964
    half = z * math.sqrt(1 / 32 + z * z / 256) / (1 + z * z / 8)
    low, high = metrics.wilson(np.array([4, 0]), np.array([8, 8]))
    assert low[0] == pytest.approx(0.5 - half) and high[0] == pytest.approx(0.5 + half)
    assert low[1] == pytest.approx(0) and high[1] == pytest.approx(z * z / 8 / (1 + z * z / 8))


@pytest.mark.parametrize("dispatched", [False, True])
def test_load_brute(random, dispatched):
    trace, _ = random
    found = metrics.load(trace, dispatched=dispatched).set_index(["layer", "expert"])["count"]
    for place, layer in enumerate(trace.layers):
        count = Counter(itertools.chain(*choices(trace, place, dispatched)))
        assert found[layer].tolist() == [count[e] for e in range(trace.num_experts)]


def test_balance_by_hand():
    # counts 4, 3, 1, 0: mean 2
    trace = make([[[0, 1]], [[0, 2]], [[0, 1]], [[1, 0]]], sample=[0, 0, 1, 1])
    found = rows(metrics.balance(trace), "statistic")
    assert found["cv",] == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 4) / 2)
    gini = sum(abs(a - b) for a in (4, 3, 1, 0) for b in (4, 3, 1, 0)) / (2 * 4 * 8)
    assert found["gini",] == pytest.approx(gini)
    assert found["max_over_mean",] == 2
    entropy = -sum(p * math.log(p) for p in (1 / 2, 3 / 8, 1 / 8))
    assert found["effective_experts",] == pytest.approx(math.exp(entropy))
    assert found["top_20_share",] == 0.5 and found["unused",] == 1


def test_balance_of_even_and_of_one_sided_loads():
    even = rows(metrics.balance(make([[[0, 1]], [[2, 3]]])), "statistic")
    assert even["cv",] == even["gini",] == even["unused",] == 0
    assert even["effective_experts",] == pytest.approx(4) and even["max_over_mean",] == 1
    one = rows(metrics.balance(make([[[2]], [[2]]])), "statistic")
    assert one["gini",] == pytest.approx(3 / 4) and one["effective_experts",] == pytest.approx(1)


def test_where_nothing_is_counted_nothing_is_known_of_the_balance():
    """Layer 0 dispatches no second choice, and layer 1 those of four samples in thirty."""
    trace, _ = synthetic(tokens=1200, layers=(0, 1), experts=6, block=40)
    kept = np.ones_like(trace.kept)
    kept[:, 0, 1] = False
    kept[:, 1, 1] = trace.sample < 4
    trace = dataclasses.replace(trace, kept=kept)
    told = metrics.bootstrap(trace, "balance", choice=1, dispatched=True).set_index(["layer", "statistic"])
    unused = told.xs("unused", level="statistic")["value"]
    assert unused[0] == 6 and unused[1] < 6
    others = told.drop(index="unused", level="statistic")
    assert others.loc[0, "value"].isna().all() and not others.loc[1, "value"].isna().any()
    # A resample without any of the four samples tells nothing either.
    assert others["low"].isna().all() and others["note"].eq("too few").all()

    trace = dataclasses.replace(trace, kept=np.stack([kept[:, 0] & False, kept[:, 1]], axis=1))
    told = metrics.bootstrap(trace, "hot_set", sizes=[2, 6], dispatched=True).set_index(["layer", "size"])
    assert told.loc[0, ["value", "held_out"]].isna().all().all() and told.loc[0, "note"].eq("too few").all()
    assert told.loc[(1, 6), "value"] == 1 and told.loc[(1, 6), "note"] == "does not vary"
    assert told.loc[(1, 2), "low"] < 1 and told.loc[(1, 2), "note"] == ""


def test_a_layer_of_few_units_says_nothing_of_the_others():
    """Layer 0 dispatches choices of four samples in thirty, layer 1 all."""
    trace, _ = synthetic(tokens=1200, layers=(0, 1), experts=6, block=40)
    kept = np.ones_like(trace.kept)
    kept[:, 0] = (trace.sample < 4)[:, None]
    trace = dataclasses.replace(trace, kept=kept)
    told = metrics.bootstrap(trace, "hot_set", sizes=[2, 6], dispatched=True).set_index(["layer", "size"])
    assert told["note"].to_dict() == {
        (0, 2): "too few",
        (0, 6): "too few",
        (1, 2): "",
        (1, 6): "does not vary",
    }
    assert told["units"].to_dict() == {(0, 2): 4, (0, 6): 4, (1, 2): 30, (1, 6): 30}
    told = metrics.bootstrap(trace, "balance", dispatched=True).set_index(["layer", "statistic"])
    assert told.loc[0, "note"].eq("too few").all() and told.loc[0, "low"].isna().all()
    others = told.loc[1, "note"].to_dict()
    assert others.pop("unused") == "does not vary" and set(others.values()) == {""}


def test_chance_values_are_what_uniform_routing_gives():
    """Every metric on a trace that is uniformly random: its value is close to what it calls chance."""
    rng = np.random.default_rng(7)
    tokens, experts = 40_000, 32
    chosen = np.stack([random_choices(rng, tokens, 2, experts) for _ in range(2)], axis=1)
    trace = make(
        chosen, sample=np.arange(tokens) // 200, token=rng.integers(4, 300, tokens), num_experts=experts
    )
    groups = (np.arange(tokens) // 2000) % 4
    frames = {
        "load": metrics.load(trace),
        "domain": metrics.domain_specialisation(trace, groups),
        "coactivation": metrics.coactivation(trace).top(32 * 31, 1),
        "transitions": metrics.transitions(trace).top(32 * 32, 1),
    }
    for name, frame in frames.items():
        inside = (frame["low"] <= frame["chance"]) & (frame["chance"] <= frame["high"])
        assert 0.92 < inside.mean() < 0.98, name  # 95 % intervals
        assert frame["value"].mean() == pytest.approx(frame["chance"].mean(), rel=0.02), name
    close = {
        "balance": (metrics.balance(trace), 0.25),
        "repeats": (metrics.repeats(trace), 0.1),
        "predictability": (metrics.predictability(trace), 0.03),
        "vocabulary": (metrics.vocabulary_specialisation(trace), 0.03),
        "hot_set": (metrics.hot_set(trace), 0.01),
        "information": (metrics.domain_information(trace, groups), 0.6),
        "cache": (metrics.cache_hits(trace), 0.1),
    }
    for name, (frame, tolerance) in close.items():
        assert np.allclose(frame["value"], frame["chance"], rtol=tolerance), (name, frame)


def test_chance_at_512_experts():
    """The figures that the literature gives: 1/512 and 1 - C(510, 2) / C(512, 2)."""
    found = metrics.repeats(make([[[0, 1]], [[1, 2]]], num_experts=512)).set_index("statistic")["chance"]
    assert round(100 * found["first"], 3) == 0.195 and round(100 * found["either"], 2) == 0.78


def test_intervals_narrow_with_more_samples():
    trace, _ = synthetic(tokens=20_000, layers=(1,), experts=8, block=50)
    widths = []
    for samples in (40, 400):
        frame = metrics.gate(trace.select(samples=range(samples))).set_index("statistic")
        assert (frame["low"] < frame["value"]).all() and (frame["value"] < frame["high"]).all()
        widths.append((frame["high"] - frame["low"])["entropy"])
    assert 0.2 < widths[1] / widths[0] < 0.5  # one over the root of ten


def test_one_sample_has_no_bootstrap_interval():
    trace, _ = synthetic(tokens=100, block=100)
    for frame in (metrics.gate(trace), metrics.balance(trace), metrics.repeats(trace)):
        assert frame[["low", "high"]].isna().all().all() and frame["value"].notna().all()


def test_dead_experts():
    trace = make([[[0, 1], [2, 3]], [[0, 3], [0, 1]]])
    found = metrics.dead_experts(trace)
    assert found["value"].tolist() == [1, 0] and found["experts"].tolist() == [[2], []]
    assert found["chance"][0] == pytest.approx(4 * (1 / 2) ** 2)
    assert found["limit"][0] == pytest.approx(1.959964**2 / 2 / (1 + 1.959964**2 / 2))
    dropped = make([[[0, 1]], [[2, 3]]], kept=[[[1, 1]], [[0, 1]]])
    assert metrics.dead_experts(dropped, dispatched=True)["experts"].tolist() == [[2]]


# ------------------------------------------------------------------------------------------------- gate and drops


def test_gate_by_hand():
    probs = [[[0.5, 0.25]], [[0.75, 0.125]]]
    trace = make([[[0, 1]], [[1, 2]]], probs=probs, entropy=np.array([[0.5], [1.5]], np.float32))
    found = metrics.gate(trace).set_index("statistic")
    assert found["value"].to_dict() == pytest.approx(
        {
            "entropy": 1,
            "normalised_entropy": 1 / math.log(4),
            "confidence": 0.625,
            "mass": 0.8125,
            "margin": 0.4375,
        }
    )
    chance = {"entropy": math.log(4), "normalised_entropy": 1, "confidence": 0.25, "mass": 0.5, "margin": 0}
    assert found["chance"].to_dict() == pytest.approx(chance)


@pytest.mark.parametrize("by", ["layer", "choice", "position", "expert"])
def test_drops_brute(random, by):
    trace, _ = random
    width = math.ceil((trace.position.max() + 1) / 10)
    made, lost = Counter(), Counter()
    for t, place, k in itertools.product(range(len(trace)), range(len(trace.layers)), range(trace.top_k)):
        key = {
            "layer": None,
            "choice": k,
            "position": trace.position[t] // width * width,
            "expert": trace.experts[t, place, k],
        }[by]
        made[trace.layers[place], key] += 1
        lost[trace.layers[place], key] += not trace.kept[t, place, k]
    frame = metrics.drops(trace, by, bins=10)
    assert frame["chance"].isna().all()  # nothing told the capacity
    assert frame["choices"].sum() == trace.experts.size
    for row in frame.to_dict("records"):
        key = row["layer"], None if by == "layer" else row[by]
        assert (row["choices"], row["dropped"]) == (made[key], lost[key])


def test_a_choice_that_an_experiment_leaves_out_is_no_drop():
    kept = [[[1, 0]], [[1, 0]], [[0, 0]], [[1, 0]]]
    meta = {"intervention": {"drop_second": True}, "groups": [[1, 4, 1]]}
    for fraction, lost in ((0.5, 1), (None, 0)):
        trace = make(
            [[[0, 1]], [[0, 2]], [[0, 1]], [[1, 0]]],
            kept=kept,
            meta=meta | {"capacity_token_fraction": fraction},
        )
        made = 4 if fraction else 3
        [whole] = metrics.drops(trace).to_dict("records")
        assert (whole["choices"], whole["dropped"], whole["value"]) == (made, lost, lost / made)
        first, second = metrics.drops(trace, "choice").to_dict("records")
        assert (first["choices"], first["dropped"], second["choices"]) == (made, lost, 0)
        assert math.isnan(second["value"]) and math.isnan(second["chance"])
        # First choices alone fill the buffers, of all choices as of these.
        chance = metrics.drop_probability(4, 4, 2, fraction and 2)[:, 0].mean()
        assert whole["chance"] == first["chance"] == pytest.approx(chance)
        by = metrics.drops(trace, "expert")
        assert by["choices"].sum() == made and by["dropped"].sum() == lost
        assert metrics.drops(trace, "position")["choices"].sum() == made


def test_new_tokens_are_read_without_a_capacity():
    """Of two tokens that were read and two new ones, each kind has one second choice that was not dispatched."""
    trace = make(
        [[[0, 1]], [[0, 2]], [[0, 1]], [[1, 0]]],
        kept=[[[1, 1]], [[1, 0]], [[1, 0]], [[1, 1]]],
        generated=np.array([False, False, True, True]),
        meta={"capacity_token_fraction": 0.25},
    )
    for prompt, made, lost in ((False, 3, 0), (True, 7, 1)):
        [found] = metrics.drops(trace, prompt=prompt).to_dict("records")
        assert (found["choices"], found["dropped"]) == (made, lost)


@pytest.mark.parametrize("room", [1, 3])
def test_drop_probability_against_simulation(room):
    rng = np.random.default_rng(room)
    tokens, experts, runs = 24, 8, 2000
    dropped = np.zeros((tokens, 2))
    for _ in range(runs):
        chosen = random_choices(rng, tokens, 2, experts)
        taken = Counter()
        for k, t in itertools.product(range(2), range(tokens)):  # all first choices, then all second ones
            dropped[t, k] += taken[chosen[t, k]] >= room
            taken[chosen[t, k]] += 1
    found = metrics.drop_probability(tokens, experts, 2, room)
    assert np.abs(found - dropped / runs).max() < 0.06
    assert np.abs(found.mean(axis=0) - dropped.mean(axis=0) / runs).max() < 0.01
    assert not metrics.drop_probability(tokens, experts, 2, None).any()
    assert found[0, 0] == 0  # who comes first is never dropped


def test_drops_take_their_chance_from_the_run():
    trace = make(
        [[[0, 1]]] * 8,
        sample=[0, 0, 1, 1, 2, 2, 3, 3],
        meta={"capacity_token_fraction": 0.25, "groups": [[2, 2, 2]]},
    )
    found = metrics.drops(trace, "position")["chance"]
    table = metrics.drop_probability(4, 4, 2, 1).mean(axis=1)
    assert found.tolist() == pytest.approx([(table[0] + table[2]) / 2, (table[1] + table[3]) / 2])
    with pytest.raises(ValueError, match="by='token'"):
        metrics.drops(trace, "token")


# --------------------------------------------------------------------------------------------------- pairs of experts


@pytest.mark.parametrize("dispatched", [False, True])
def test_coactivation_brute(random, dispatched):
    trace, _ = random
    found = metrics.coactivation(trace, dispatched=dispatched)
    for place, layer in enumerate(trace.layers):
        together = np.zeros((trace.num_experts,) * 2, int)
        for some in choices(trace, place, dispatched):
            for i, j in itertools.product(some, some):
                together[i, j] += 1
        assert np.array_equal(found.counts[place], together)
        assert np.array_equal(found.base[place], together.diagonal())
        ratio = found.ratio(layer)
        i, j = 0, 1
        if together[i, i]:
            assert ratio[i, j] == together[i, j] / together[i, i]


def test_coactivation_counts_all_pairs_of_many_choices():
    """Not only choices of neighbouring rank."""
    found = metrics.coactivation(make([[[0, 1, 2]], [[2, 3, 0]]]))
    assert found.counts[0].tolist() == [[2, 1, 2, 1], [1, 1, 1, 0], [2, 1, 2, 1], [1, 0, 1, 1]]
    assert found.chance == 2 / 3
    best = found.top(2, min_count=1)
    assert (best["value"] == 1).all() and (best["expert"] != best["partner"]).all()
    assert set(zip(best["expert"], best["partner"], strict=True)) <= {
        (0, 2),
        (2, 0),
        (1, 0),
        (1, 2),
        (3, 0),
        (3, 2),
    }
    assert set(found.top(20, min_count=2)["expert"]) == {0, 2}
    with pytest.raises(ValueError, match="layer 9"):
        found.ratio(9)


def test_transitions_and_predictability_brute(random):
    trace, _ = random
    found = metrics.transitions(trace)
    assert found.between == list(itertools.pairwise(trace.layers))
    foreseen = rows(metrics.predictability(trace), "layer")
    for place in range(len(trace.layers) - 1):
        count = defaultdict(Counter)
        for t in range(len(trace)):
            count[int(trace.experts[t, place, 0])][int(trace.experts[t, place + 1, 0])] += 1
        for i, j in itertools.product(range(trace.num_experts), repeat=2):
            assert found.counts[place, i, j] == count[i][j]
        hits = sum(max(c.values(), default=0) for c in count.values())
        assert foreseen[trace.layers[place],] == pytest.approx(hits / len(trace))


# ------------------------------------------------------------------------------------- what experts are used for


@pytest.mark.parametrize("dispatched", [False, True])
def test_domain_specialisation_brute(random, dispatched):
    trace, groups = random
    found = rows(
        metrics.domain_specialisation(trace, groups, dispatched=dispatched), "layer", "domain", "expert"
    )
    size = Counter(groups)
    count = Counter()
    for place, layer in enumerate(trace.layers):
        for domain, some in zip(groups, choices(trace, place, dispatched), strict=True):
            count.update((layer, domain, e) for e in some)
    assert len(found) == len(trace.layers) * len(size) * trace.num_experts
    for (layer, domain, expert), value in found.items():
        assert value == pytest.approx(count[layer, domain, expert] / size[domain])
    with pytest.raises(ValueError, match="groups has shape"):
        metrics.domain_specialisation(trace, groups[1:])


def test_domain_information():
    experts = [[[0]], [[0]], [[1]], [[1]]]
    told = metrics.domain_information(make(experts), ["a", "a", "b", "b"])
    assert told["value"][0] == pytest.approx(1) and told["domain_entropy"][0] == pytest.approx(1)
    assert metrics.domain_information(make(experts), ["a", "b", "a", "b"])["value"][0] == pytest.approx(0)


def test_domain_information_brute(random):
    trace, groups = random
    found = rows(metrics.domain_information(trace, groups), "layer")
    for place, layer in enumerate(trace.layers):
        first = trace.experts[:, place, 0].tolist()
        both, one, other = Counter(zip(first, groups, strict=True)), Counter(first), Counter(groups)
        n = len(trace)
        bits = sum(c / n * math.log2(c * n / (one[e] * other[d])) for (e, d), c in both.items())
        assert found[layer,] == pytest.approx(bits)


@pytest.mark.parametrize("by", ["input", "target", "predicted"])
def test_vocabulary_specialisation_brute(random, by):
    trace, _ = random
    types = {"input": trace.token, "target": trace.target, "predicted": trace.predicted}[by]
    used = [t for t in range(len(trace)) if by != "target" or types[t] != 1]
    frame = metrics.vocabulary_specialisation(trace, by, min_count=4)
    per_expert = metrics.vocabulary_specialisation(trace, by, min_count=4, per_expert=True)
    for place, layer in enumerate(trace.layers):
        count = defaultdict(Counter)
        for t in used:
            count[types[t]][int(trace.experts[t, place, 0])] += 1
        shares = defaultdict(list)
        for c in count.values():
            if c.total() >= 4:
                best = min(c, key=lambda e: (-c[e], e))
                shares[best].append(c[best] / c.total())
        everything = list(itertools.chain(*shares.values()))
        row = frame[frame["layer"] == layer].iloc[0]
        assert row["types"] == len(everything) and row["value"] == pytest.approx(np.mean(everything))
        part = per_expert[per_expert["layer"] == layer]
        assert part["expert"].tolist() == sorted(shares)
        assert part["value"].tolist() == pytest.approx([np.mean(shares[e]) for e in sorted(shares)])


def test_target_and_predicted_are_not_swapped():
    token, predicted = [5, 6, 5, 6], np.array([7, 7, 8, 8], np.int32)
    trace = make([[[0]], [[1]], [[2]], [[1]]], token=token, predicted=predicted)
    value = {
        by: metrics.vocabulary_specialisation(trace, by, min_count=1)["value"][0]
        for by in ("input", "target", "predicted")
    }
    # inputs 5 -> 0, 2; 6 -> 1, 1. targets 6 -> 0, 2; 5 -> 1. predicted 7 -> 0, 1; 8 -> 2, 1.
    assert value == {"input": 0.75, "target": 0.75, "predicted": 0.5}
    with pytest.raises(ValueError, match="predicted=True"):
        metrics.top_tokens(make([[[0]]]), 0, 0, by="predicted")
    with pytest.raises(ValueError, match="by='output'"):
        metrics.vocabulary_specialisation(trace, "output")


def test_top_tokens_brute(random):
    trace, _ = random
    layer, expert = trace.layers[-1], 1
    total, count = Counter(), Counter()
    for token, some in zip(trace.token.tolist(), choices(trace, len(trace.layers) - 1), strict=True):
        total[token] += 1
        count[token] += expert in some
    ranked = sorted(
        (t for t in total if total[t] >= 3 and count[t]), key=lambda t: (-count[t] / total[t], -count[t], t)
    )
    frame = metrics.top_tokens(trace, layer, expert, n=7, min_count=3)
    assert frame["token"].tolist() == ranked[:7]
    assert frame["count"].tolist() == [count[t] for t in ranked[:7]]
    assert frame["value"].tolist() == pytest.approx([count[t] / total[t] for t in ranked[:7]])
    with pytest.raises(ValueError, match="layer 77"):
        metrics.top_tokens(trace, 77, 0)
    with pytest.raises(ValueError, match="no expert 99"):
        metrics.top_tokens(trace, layer, 99)


# ------------------------------------------------------------------------------------------------ along the text


def test_repeats_brute(random):
    trace, _ = random
    found = rows(metrics.repeats(trace), "layer", "statistic")
    pairs = [t for t in range(1, len(trace)) if trace.sample[t] == trace.sample[t - 1]]
    for place, layer in enumerate(trace.layers):
        some = choices(trace, place)
        first = np.mean([some[t][0] == some[t - 1][0] for t in pairs])
        either = np.mean([bool(set(some[t]) & set(some[t - 1])) for t in pairs])
        assert found[layer, "first"] == pytest.approx(first)
        assert found[layer, "either"] == pytest.approx(either)


def test_repeats_do_not_cross_samples_or_gaps():
    trace = make([[[0, 1]], [[0, 1]], [[0, 1]]], sample=[0, 0, 1])
    trace = trace.select(mask=np.array([True, True, True]))
    found = metrics.repeats(trace)
    assert found["value"].tolist() == [1, 1]
    gap = trace.select(mask=np.array([True, False, True]))
    assert metrics.repeats(gap)["value"].isna().all()


def test_agreement_brute(random):
    trace, _ = random
    other, _ = synthetic(
        tokens=len(trace),
        layers=trace.layers,
        experts=trace.num_experts,
        block=int(trace.position.max()) + 1,
        seed=9,
    )
    other = make(
        other.experts,
        sample=trace.sample,
        token=trace.token,
        kept=other.kept,
        num_experts=trace.num_experts,
        layers=trace.layers,
    )
    found = rows(metrics.agreement(trace, other), "layer", "statistic")
    for place, layer in enumerate(trace.layers):
        ours, theirs = choices(trace, place), choices(other, place)
        got = [choices(t, place, dispatched=True) for t in (trace, other)]
        both = list(zip(ours, theirs, strict=True))
        assert found[layer, "overlap"] == pytest.approx(np.mean([len(set(a) & set(b)) / 2 for a, b in both]))
        assert found[layer, "first"] == pytest.approx(np.mean([a[0] == b[0] for a, b in both]))
        assert found[layer, "set"] == pytest.approx(np.mean([set(a) == set(b) for a, b in both]))
        kept = np.mean([set(a) == set(b) for a, b in zip(*got, strict=True)])
        assert found[layer, "kept"] == pytest.approx(kept)
    same = metrics.agreement(trace, trace)
    assert (same["value"] == 1).all()


def test_hot_set_brute(random):
    trace, _ = random
    sizes = [1, trace.num_experts // 2, trace.num_experts]
    found = metrics.hot_set(trace, sizes)
    for place, layer in enumerate(trace.layers):
        count = Counter(itertools.chain(*choices(trace, place)))
        part = found[found["layer"] == layer]
        for size, value in zip(part["size"], part["value"], strict=True):
            assert value == pytest.approx(sum(n for _, n in count.most_common(size)) / count.total())
    assert (found["value"] >= found["held_out"].fillna(0) - 0.2).all()
    with pytest.raises(ValueError, match="expected numbers from 1"):
        metrics.hot_set(trace, [0])


def test_hot_set_held_out_ranks_by_other_samples():
    trace = make([[[0]], [[0]], [[1]], [[0]]], sample=[0, 0, 1, 1])
    found = metrics.hot_set(trace, [1])
    assert found["value"][0] == 0.75 and found["held_out"][0] == 0.5


# ---------------------------------------------------------------------------------------------------------- caches


def lru(stream, size):
    cache, hits = [], 0
    for x in stream:
        if x in cache:
            hits += 1
            cache.remove(x)
        elif len(cache) == size:
            cache.pop(0)
        cache.append(x)
    return hits


def lfu(stream, size):
    number, last, hits = Counter(), {}, 0
    for t, x in enumerate(stream):
        hits += x in sorted(number, key=lambda e: (-number[e], -last[e]))[:size]
        number[x] += 1
        last[x] = t
    return hits


def belady(stream, size):
    cache, hits = set(), 0
    for t, x in enumerate(stream):
        if x in cache:
            hits += 1
            continue
        cache.add(x)
        if len(cache) > size:
            rest = stream[t + 1 :]
            cache.remove(max(cache, key=lambda e, rest=rest: rest.index(e) if e in rest else len(stream)))
    return hits


def test_caches_by_hand():
    stream = [0, 1, 0, 2, 1, 0, 0]
    assert [lru(stream, 2), lfu(stream, 2), belady(stream, 2)] == [2, 3, 4]
    trace = make([[[e]] for e in stream])
    found = rows(metrics.cache_hits(trace, [1, 2, 3]), "policy", "size")
    assert found["lru", 2] == 2 / 7 and found["lfu", 2] == 3 / 7 and found["oracle", 2] == 4 / 7
    assert found["lru", 1] == 1 / 7 and found["lru", 3] == found["oracle", 3] == 4 / 7


def test_the_worked_examples():
    never = offload.NEVER
    assert offload.lru_distance(np.array([0, 1, 2, 1, 0])).tolist() == [never, never, never, 1, 2]
    assert offload.oracle_hits([np.array([0, 1, 2, 0, 1])], 3, np.array([1, 2, 3])).tolist() == [[1, 2, 2]]


@pytest.mark.parametrize("length", [offload.BLOCK - 1, offload.BLOCK, 3 * offload.BLOCK + 1])
def test_ranks_do_not_depend_on_blocks(length, monkeypatch):
    stream = np.random.default_rng(length).integers(0, 40, length)
    found = [offload.lru_distance(stream), offload.lfu_rank(stream)]
    monkeypatch.setattr(offload, "BLOCK", 3)
    assert np.array_equal(found, [offload.lru_distance(stream), offload.lfu_rank(stream)])


@pytest.mark.parametrize("experts, length", [(3, 0), (3, 1), (4, 60), (9, 200), (25, 250)])
def test_caches_brute(experts, length):
    rng = np.random.default_rng(length)
    for _ in range(3):
        stream = rng.choice(experts, length, p=rng.dirichlet(np.full(experts, 0.7)))
        sizes, some = np.arange(1, experts + 1), stream.tolist()
        assert offload.hits(offload.lru_distance(stream), sizes).tolist() == [lru(some, s) for s in sizes]
        assert offload.hits(offload.lfu_rank(stream), sizes).tolist() == [lfu(some, s) for s in sizes]
        oracle = offload.oracle_hits([stream, stream[:7]], experts, sizes)
        assert oracle[0].tolist() == [belady(some, s) for s in sizes]
        assert oracle[1].tolist() == [belady(some[:7], s) for s in sizes]


def test_the_oracle_in_pieces_is_close_to_the_whole(monkeypatch):
    trace, _ = synthetic(tokens=6000, layers=(0,), experts=16)
    stream, sizes = trace.experts[:, 0].ravel(), np.array([1, 2, 4, 8])
    monkeypatch.setattr(offload, "PIECE", 10**9)
    whole = offload.oracle_hits([stream], 16, sizes)
    monkeypatch.setattr(offload, "PIECE", 1500)
    assert np.abs(offload.oracle_hits([stream], 16, sizes) - whole).max() <= len(stream) * 1e-3


def test_cache_hits_take_what_was_dispatched():
    kept = [[[1, 1]], [[1, 0]], [[1, 1]]]
    trace = make([[[0, 1]], [[0, 2]], [[1, 2]]], kept=kept)
    found = metrics.cache_hits(trace, [2])
    assert (found["requests"] == 5).all()
    assert (metrics.cache_hits(trace, [2], dispatched=False)["requests"] == 6).all()


def test_nobody_beats_the_oracle(random):
    trace, _ = random
    found = metrics.cache_hits(trace).pivot(index=["layer", "size"], columns="policy", values="value")
    assert (found["oracle"] >= found[["lru", "lfu"]].max(axis=1)).all()


def half_generated(tokens=400, block=20):
    """A trace whose samples are continued in their second half, where nothing drops, and the same one as if all of it was read."""
    trace, labels = synthetic(tokens=tokens, block=block, experts=8)
    new = trace.position >= block // 2
    trace = dataclasses.replace(trace, kept=trace.kept | new[:, None, None])
    return dataclasses.replace(trace, generated=new), trace, labels


def same(one, other):
    if isinstance(one, metrics.Pairs):
        assert (one.counts == other.counts).all() and (one.base == other.base).all()
    elif isinstance(one, np.ndarray):
        assert (one == other).all()
    else:
        pd.testing.assert_frame_equal(one, other)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_with_the_prompt_all_tokens_count_as_if_they_had_been_read(name):
    written, read, _ = half_generated()
    metric = metrics.METRICS[name]
    same(metric(written, prompt=True), metric(read))
    same(metric(written), metric(read.select(mask=written.generated)))


@pytest.mark.parametrize("name", ["load", "gate", "cache_hits", "repeats"])
def test_a_bootstrap_with_the_prompt_is_of_the_metric_with_the_prompt(name):
    written, read, _ = half_generated()
    same(
        metrics.bootstrap(written, name, resamples=20, prompt=True),
        metrics.bootstrap(read, name, resamples=20),
    )


def test_sizes_are_no_labels_though_there_are_as_many_as_tokens():
    written, read, _ = half_generated(tokens=8, block=8)
    new, sizes = read.select(mask=written.generated), range(1, 9)
    for metric in (metrics.hot_set, metrics.cache_hits):
        same(metric(written, sizes=list(sizes)), metric(new, sizes=list(sizes)))
    same(
        metrics.bootstrap(read, "cache_hits", resamples=5, sizes=list(sizes)),
        metrics.bootstrap(read, "cache_hits", resamples=5, sizes=np.array([*sizes, 8])),
    )
    for trace in (written, read):
        same(
            metrics.bootstrap(trace, "cache_hits", list(sizes), resamples=5),
            metrics.bootstrap(trace, metrics.cache_hits, sizes=list(sizes), resamples=5),
        )


def test_an_iterator_of_labels_lasts_for_all_resamples():
    _, read, labels = half_generated()
    how = {"resamples": 5}
    wanted = metrics.bootstrap(read, metrics.information, labels, **how)
    same(metrics.bootstrap(read, metrics.information, iter(labels), **how), wanted)


def test_labels_of_generated_text_come_from_any_iterable():
    written, _, labels = half_generated()
    wanted = metrics.domain_specialisation(written, labels)
    for given in (iter(labels), (label for label in labels), dict(enumerate(labels)).values()):
        same(metrics.domain_specialisation(written, given), wanted)
    told = metrics.information(written, classes={"sizes": iter(labels)})
    same(told, metrics.information(written, classes={"sizes": labels}))
    for unordered in (set(labels), dict.fromkeys(labels)):
        with pytest.raises(ValueError, match="expected one for each token"):
            metrics.domain_specialisation(written, unordered)


def test_all_metrics_run_on_a_large_capacity_and_top_1():
    trace, _ = synthetic(tokens=500, choices=1, experts=5, block=100)
    for name, metric in metrics.METRICS.items():
        assert metric(trace) is not None, name


@pytest.mark.parametrize(
    "name", [*metrics.METRICS, "counts", "top_tokens", "agreement", "domain_specialisation"]
)
def test_nothing_to_measure_is_said(name):
    trace, _ = synthetic()
    metric = metrics.METRICS.get(name) or getattr(metrics, name)
    more = {"top_tokens": (1, 0), "agreement": (trace,), "domain_specialisation": ([],)}.get(name, ())
    for nothing, missing in (
        (trace.select(mask=np.zeros(len(trace), dtype=bool)), "tokens"),
        (trace.select(layers=[]), "layers"),
    ):
        with pytest.raises(ValueError, match=f"the trace has no {missing}"):
            metric(nothing, *more)
