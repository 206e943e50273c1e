"""Placing experts on ranks: by hand and against all placements, and models that were loaded in another order."""

import dataclasses
import itertools

import numpy as np
import pytest
from synthetic_traces import synthetic

import moekit
from moekit import metrics
from moekit.profiling.run import holders
from moekit.routing import placement as placing
from moekit.routing import statistics
from moekit.routing.statistics import random_choices


def all_placements(experts: int, ranks: int) -> set[tuple[int, ...]]:
    return set(itertools.permutations(placing.contiguous(experts, ranks).tolist()))


def imbalance(load, rank, ranks) -> float:
    of_ranks = [sum(load[e] for e in range(len(load)) if rank[e] == r) for r in range(ranks)]
    return max(of_ranks) * ranks / sum(of_ranks)


def test_the_heaviest_go_first_by_hand():
    # 9 to rank 0, 7 and 6 to rank 1; rank 0 has 9, rank 1 has 13, so 4 and 1 go to rank 0; rank 1 takes the last.
    assert placing.packed(np.array([4, 9, 1, 6, 0, 7]), 2).tolist() == [0, 0, 0, 1, 1, 1]
    assert placing.contiguous(7, 3).tolist() == [0, 0, 1, 1, 2, 2, 2]
    # 8 becomes 4 + 4, then 6 becomes 3 + 3.
    assert placing.replicated(np.array([8, 1, 6, 2]), 2).tolist() == [0, 0, 1, 2, 2, 3]
    rows = placing.loads(
        np.array([8.0, 1, 6, 2]), np.array([0, 0, 1, 2, 2, 3]), np.array([0, 1, 1, 0, 1, 1]), 2
    )
    assert rows.tolist() == [7, 10]


@pytest.mark.parametrize(("experts", "ranks"), [(6, 2), (6, 3), (7, 2), (8, 4)])
def test_the_greedy_placement_against_all(experts, ranks):
    rng = np.random.default_rng(experts * ranks)
    every = all_placements(experts, ranks) if experts < 8 else None
    for _ in range(20):
        load = rng.geometric(0.1, experts)
        rank = placing.packed(load, ranks)
        assert np.bincount(rank, minlength=ranks).tolist() == placing.sizes(experts, ranks).tolist()
        found = imbalance(load, rank, ranks)
        assert found == pytest.approx(placing.imbalance(placing.loads(load, np.arange(experts), rank, ranks)))
        if every is not None:
            best = min(imbalance(load, one, ranks) for one in every)
            mean = np.mean([imbalance(load, one, ranks) for one in every])
            assert best <= found + 1e-9 and found <= 4 / 3 * best + 1e-9 and found <= mean + 1e-9


def test_no_choice_of_copies_is_more_even():
    rng = np.random.default_rng(1)
    for redundant in (0, 1, 3, 4):
        load = rng.integers(1, 30, 5)
        copies = np.bincount(placing.replicated(load, redundant))
        assert copies.sum() == 5 + redundant
        others = [c for c in itertools.product(range(1, redundant + 2), repeat=5) if sum(c) == 5 + redundant]
        assert (load / copies).max() == min((load / np.array(c)).max() for c in others)


@pytest.fixture(scope="module")
def trace():
    return synthetic(tokens=2000, layers=(1, 3), experts=6, block=100)[0]


def test_the_metric_by_brute_force(trace):
    table = metrics.placement(trace, 3, share={1: 0.5, 3: 0.25}).set_index(["layer", "placement"])
    odd = np.unique(trace.sample, return_inverse=True)[1] % 2 == 1
    for index, layer in enumerate(trace.layers):
        chosen = np.where(trace.kept, trace.experts, 6)[:, index]
        fit, judge = (np.bincount(chosen[half].ravel(), minlength=7)[:6] for half in (~odd, odd))
        rank = [0, 0, 1, 1, 2, 2]
        assert table.loc[(layer, "contiguous"), "value"] == pytest.approx(imbalance(judge, rank, 3))
        mean = np.mean([imbalance(judge, one, 3) for one in all_placements(6, 3)])
        assert table.loc[(layer, "shuffled"), "value"] == pytest.approx(mean, rel=0.03)
        fitted = placing.packed(fit, 3)
        assert table.loc[(layer, "fitted"), "value"] == pytest.approx(imbalance(judge, fitted, 3))
        saved = {1: 0.5, 3: 0.25}[layer] * (1 - imbalance(judge, fitted, 3) / imbalance(judge, rank, 3))
        assert table.loc[(layer, "fitted"), "saved"] == pytest.approx(saved)
        # With as many copies as experts and more, every expert can be everywhere.
        many = metrics.placement(trace, 3, redundant=60).set_index(["layer", "placement"])
        assert many.loc[(layer, "replicated"), "value"] < 1.1
    assert (table["low"] <= table["value"] + 0.05).all() and (table["high"] >= table["value"] - 0.05).all()


def test_units_that_placements_are_fitted_to_do_not_count():
    """Half the samples judge: eight of sixteen are enough for an interval, seven of fifteen are not."""
    trace = synthetic(tokens=1600, layers=(1,), experts=6, block=100)[0]
    told = metrics.bootstrap(trace, metrics.placement, 3)
    assert told["units"].eq(8).all() and told["note"].eq("").all()
    # The interval by hand, of the eight alone.
    chosen = np.where(trace.kept, trace.experts, 6)[:, 0]
    counts = np.array(
        [np.bincount(chosen[trace.sample == n].ravel(), minlength=7)[:6] for n in range(1, 16, 2)]
    )
    resamples = statistics.units_of(np.arange(8), 1000).draws @ counts
    again = np.array([imbalance(one, [0, 0, 1, 1, 2, 2], 3) for one in resamples])
    contiguous = told.set_index("placement").loc["contiguous"]
    ends = statistics.interval(again, contiguous["value"], 8)
    assert contiguous[["low", "high"]].tolist() == pytest.approx(ends)
    few = trace.select(mask=trace.sample < 15)
    told = metrics.bootstrap(few, metrics.placement, 3)
    assert told["units"].eq(7).all() and told["note"].eq("too few").all() and told["low"].isna().all()


def test_a_layer_of_few_units_says_nothing_of_the_others():
    """Layer 0 dispatches choices of eight samples in sixty, half of which are measured on, layer 1 all."""
    trace, _ = synthetic(tokens=1200, layers=(0, 1), experts=6, block=20)
    kept = np.ones_like(trace.kept)
    kept[:, 0] = (trace.sample < 8)[:, None]
    told = metrics.bootstrap(dataclasses.replace(trace, kept=kept), metrics.placement, 3).set_index("layer")
    assert told.loc[0, "units"].eq(4).all() and told.loc[0, "note"].eq("too few").all()
    assert told.loc[1, "units"].eq(30).all() and told.loc[1, "note"].eq("").all()


def test_uniform_routing_gains_nothing_from_a_placement(trace):
    rng = np.random.default_rng(2)
    chosen = np.stack([random_choices(rng, len(trace), trace.top_k, 6) for _ in trace.layers], axis=1)
    even = moekit.Trace(
        **vars(trace) | {"experts": chosen.astype(np.int16), "kept": np.ones_like(trace.kept)}
    )
    table = metrics.placement(even, 2)
    assert np.allclose(table["value"], table["chance"], atol=0.04)


def test_what_cannot_be_placed(trace):
    with pytest.raises(ValueError, match="ranks=7: expected at most 6"):
        metrics.placement(trace, 7)
    with pytest.raises(ValueError, match="ranks"):
        metrics.placement(trace, 0)
    for share in ({}, {1: 0.5}, 0.5, [0.5, 0.5]):
        with pytest.raises(ValueError, match=r"share=.*: expected a number for each of the layers \[1, 3\]"):
            metrics.placement(trace, 2, share=share)
    with pytest.raises(ValueError, match=r"share\[3\]='x': expected a number"):
        metrics.placement(trace, 2, share={1: 0.5, 3: "x"})


# ----------------------------------------------------------------------------------------------- load(placement=...)


PROMPTS = ["It is", "La table", "def __init__(self"]


@pytest.fixture(scope="module")
def alone():
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        yield (
            model.trace("demo", max_tokens=1500, progress=False),
            model.generate(PROMPTS, max_new_tokens=6, progress=False),
        )


def held(rank) -> dict[int, list[float]]:
    """Sums of this rank's experts, by layer."""
    layers = enumerate(rank.state["model"].layers)
    return {
        i: layer.moe.experts.w1.double().sum((1, 2)).tolist() for i, layer in layers if layer.moe is not None
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_model_in_another_order_computes_the_same(alone, world_size):
    trace, texts = alone
    fitted = metrics.fitted_placement(trace, world_size)
    assert fitted != {layer: placing.contiguous(16, world_size).tolist() for layer in fitted}
    with moekit.load("demo", world_size, "cpu", progress=False, placement=fitted) as model:
        again = model.trace("demo", max_tokens=1500, progress=False)
        written = model.generate(PROMPTS, max_new_tokens=6, progress=False)
        sums = model.ranks.call(held)
        assert [own.tolist() for own in holders(model)] == list(fitted.values())
        filled = [place for part in model.parts for place in part["filled"] if place is not None]
    assert (again.experts == trace.experts).all() and (again.kept == trace.kept).all()
    assert np.allclose(again.logprob, trace.logprob, atol=1e-5, equal_nan=True)
    assert [one.text for one in written] == [one.text for one in texts]
    assert sorted(filled) == [(layer, expert) for layer in (1, 3, 5) for expert in range(16)]
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        [whole] = model.ranks.call(held)
    for layer, rank_of in fitted.items():
        for rank in range(world_size):
            own = [whole[layer][expert] for expert in range(16) if rank_of[expert] == rank]
            assert sums[rank][layer] == pytest.approx(own)


def test_only_named_layers_move(alone):
    placement = {3: [1, 0] * 8}
    with moekit.load("demo", 2, "cpu", progress=False, placement=placement) as model:
        again = model.trace("demo", max_tokens=1500, capacity_token_fraction=0.1, progress=False)
    with moekit.load("demo", 2, "cpu", progress=False) as model:
        expected = model.trace("demo", max_tokens=1500, capacity_token_fraction=0.1, progress=False)
    assert (again.kept == expected.kept).all() and not again.kept.all()
    assert np.allclose(again.logprob, expected.logprob, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        ([0, 1], "expected ranks by layer"),
        ({2: [0] * 16}, "layer 2 holds no experts; those that do are"),
        ({1: [0, 1]}, r"placement\[1\] names a rank for 2 experts; expected 16"),
        (
            {1: [0] * 16},
            r"placement\[1\] gives rank 0 16 experts; expected 8 of 16, as rank 0 of 2 has without it",
        ),
        ({1: [0] * 8 + [2] * 8}, "gives rank 1 0 experts"),
        ({1: "ab"}, r"placement\[1\]"),
    ],
)
def test_a_placement_that_does_not_fit(placement, said):
    with pytest.raises(ValueError, match=said):
        moekit.load("demo", 2, "cpu", progress=False, placement=placement)
