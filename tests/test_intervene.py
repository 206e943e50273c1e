"""Interventions: they do what their words say, on every rank, and leave nothing behind."""

import itertools
import math

import numpy as np
import pytest
import torch
from branch_cases import BASE
from synthetic_traces import synthetic

import moekit
from moekit.invariance import batch_invariance
from moekit.nn import gate
from moekit.nn.config import ModelConfig
from moekit.nn.gates import gate_of
from moekit.nn.intervene import Force, plan
from moekit.nn.passes import Pass
from moekit.routing.compare import compare, weight_change

TEXTS = [list(range(5, 25)), list(range(40, 73)), list(range(100, 111))]


def config(**options) -> ModelConfig:
    return ModelConfig(**{**vars(BASE), **options})


@pytest.fixture(scope="module")
def rng():
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def models(reference):
    """The same model on one rank and on two."""
    with (
        moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as one,
        moekit.load(reference / "checkpoint", 2, "cpu", progress=False) as two,
    ):
        yield one, two


def on_both(models, texts, *, options=None, **changes):
    """The trace inside ``route(**changes)``, which must not depend on the world size."""
    options = {"progress": False, "batch_size": 2} | (options or {})
    found = []
    for model in models:
        with model.route(**changes):
            found.append(model.trace(texts, **options))
    one, two = found
    assert np.array_equal(one.experts, two.experts) and np.array_equal(one.kept, two.kept)
    np.testing.assert_allclose(one.weights, two.weights, atol=1e-5)
    np.testing.assert_allclose(one.logprob, two.logprob, atol=1e-5)
    return one


# -------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize(
    "changes, layers",
    [
        ({"capacity_token_fraction": 0.5}, []),
        ({"mask": {1: [0, 2]}, "capacity_token_fraction": 0.5}, [1]),
        ({"force": Force(3, sample=1, layers=1)}, [1]),
        ({"drop_second": True}, [1, 3]),
    ],
)
def test_only_layers_that_change_get_changes(changes, layers):
    """Any other layer routes as it does without an experiment, with the same kernels."""
    seen, settings = Pass(), config(layers=4, moe_freq=2)
    plan(settings, **changes).apply(seen, torch.arange(2), torch.arange(3))
    assert [n for n in (1, 3) if seen.edit is not None and seen.edit(n, settings) is not None] == layers
    assert (seen.edit is None) == (layers == [])


def test_masked_experts_by_hand():
    """Probabilities 1/2, 1/4, 1/8, 1/8; without the first: 1/2, 1/4, 1/4."""
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    edit = gate.Edit(mask=torch.tensor([True, False, False, False]))
    found = gate_of(config(experts=4)).route(logits, fraction=None, edit=edit)
    assert found.experts.tolist() == [[[1, 2]]]
    assert found.probs[0, 0].tolist() == pytest.approx([0, 0.5, 0.25, 0.25])
    assert found.weights[0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_forced_experts_by_hand():
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125]] * 3]).log()
    forced = torch.tensor([[[3, 1], [2, -1], [-1, -1]]])
    found = gate_of(config(experts=4)).route(logits, fraction=None, edit=gate.Edit(forced=forced))
    assert found.experts.tolist() == [[[3, 1], [2, 0], [0, 1]]]
    want = [[1 / 3, 2 / 3], [0.2, 0.8], [2 / 3, 1 / 3]]  # their own probabilities, normalised
    assert torch.allclose(found.weights[0], torch.tensor(want))
    assert torch.allclose(found.probs, torch.softmax(logits, -1))


def test_forced_tokens_queue_like_others():
    """Five tokens forced to one expert with two places: the first two get in."""
    logits = torch.zeros(1, 5, 8)
    edit = gate.Edit(forced=torch.tensor([[[6, 7]] * 5]))
    found = gate_of(config()).route(logits, fraction=0.4, edit=edit)
    assert found.capacity == 2
    assert found.kept[0].tolist() == [[True, True]] * 2 + [[False, False]] * 3
    assert not found.weights[0, 2:].any()


@pytest.mark.parametrize("before", [False, True])
def test_dropped_second_choices_take_no_place(before, rng):
    logits = torch.randn(1, 40, 8, generator=rng)
    settings = config(normalize_before_dropping=before)
    plain = gate_of(settings).route(logits, fraction=0.1)
    edited = gate_of(settings).route(logits, fraction=0.1, edit=gate.Edit(drop_second=True))
    assert torch.equal(edited.experts, plain.experts) and not edited.kept[..., 1].any()
    assert torch.equal(edited.kept[..., 0], plain.kept[..., 0])
    kept = edited.kept[..., 0]
    first, second = plain.gate_probs.unbind(-1)
    want = first / (first + second) if before else torch.ones_like(first)
    assert torch.allclose(edited.weights[..., 0], want * kept) and not edited.weights[..., 1].any()


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_drop_second_with_drawn_second_experts(policy, rng):
    logits = torch.randn(1, 20, 8, generator=rng)
    found = gate_of(config(second_expert=policy)).route(
        logits,
        fraction=None,
        noise=lambda kind, like: torch.full_like(like, 0.1),
        edit=gate.Edit(drop_second=True),
    )
    assert not found.kept[..., 1].any()


# -------------------------------------------------------------------------------------------------- with a model


def test_masked_experts_get_nothing(models):
    plain = models[0].trace(TEXTS, batch_size=2, progress=False)
    for mask in ({1: [0, 3], 3: [5]}, [(1, 0), (1, 3), (3, 5)]):
        found = on_both(models, TEXTS, mask=mask, options={"full": [1]})
        assert not np.isin(found.experts[:, 0], [0, 3]).any() and not (found.experts[:, 1] == 5).any()
        assert np.isin(plain.experts[:, 0], [0, 3]).any()
        assert not found.full[1][:, [0, 3]].any()
        np.testing.assert_allclose(found.full[1].astype(float).sum(axis=1), 1, atol=5e-3)
    # Who did not want them is routed as before, in the first such layer.
    others = ~np.isin(plain.experts[:, 0], [0, 3]).any(axis=1)
    assert others.any() and np.array_equal(plain.experts[others, 0], found.experts[others, 0])
    assert found.meta["intervention"]["mask"] == [[1, 0], [1, 3], [3, 5]]


def test_masking_an_unused_expert_changes_nothing(models):
    plain = models[0].trace(TEXTS[:1], progress=False)
    unused = sorted(set(range(8)) - set(plain.experts[:, 1].ravel().tolist()))
    with models[0].route(mask={3: unused}):
        masked = models[0].trace(TEXTS[:1], progress=False)
    np.testing.assert_allclose(plain.logprob, masked.logprob, atol=1e-5)


def test_forced_span(models):
    force = Force((5, 2), sample=1, positions=range(4, 7), layers=3)
    plain = models[0].trace(TEXTS, batch_size=2, progress=False)
    found = on_both(models, TEXTS, force=force)
    span = (found.sample == 1) & np.isin(found.position, [4, 5, 6])
    assert (found.experts[span, 1] == [5, 2]).all()
    assert np.array_equal(found.experts[~span], plain.experts[~span])
    assert np.array_equal(found.experts[span, 0], plain.experts[span, 0])
    probs = found.probs[span, 1]
    np.testing.assert_allclose(found.weights[span, 1], probs / probs.sum(axis=1, keepdims=True), atol=1e-6)
    change = compare(plain, found).tokens.set_index(["sample", "position"])["delta"]
    assert change[1].loc[:3].abs().max() < 1e-5 < change[1].loc[4:].abs().max()  # nothing before the span
    assert change[0].abs().max() < 1e-5


def test_forced_first_choice_everywhere(models):
    found = on_both(models, TEXTS, force=[Force(6, sample=0), Force([1, 0], sample=2, layers=[1])])
    assert (found.experts[found.sample == 0][..., 0] == 6).all()
    assert (found.experts[found.sample == 0][..., 1] != 6).all()
    assert (found.experts[found.sample == 2][:, 0] == [1, 0]).all()
    assert not (found.experts[found.sample == 1][..., 0] == 6).all()


def test_forcing_what_the_gate_chose_changes_nothing(models):
    plain = models[0].trace(TEXTS[:1], progress=False)
    force = [
        Force(plain.experts[t, place].tolist(), sample=0, positions=t, layers=layer)
        for t, (place, layer) in itertools.product(range(len(plain)), enumerate(plain.layers))
    ]
    with models[0].route(force=force):
        forced = models[0].trace(TEXTS[:1], progress=False)
    np.testing.assert_allclose(plain.logprob, forced.logprob, atol=1e-6)


@pytest.mark.parametrize(
    "force, told",
    [
        (Force(1, sample=3), "sample 3; .* 3, from 0 to 2: name one"),
        (
            Force(1, sample=2, positions=[12, 40]),
            "positions 12, 40 of sample 2; expected at least one of its positions, 0 to 11",
        ),
        (Force(1, sample=0, positions=()), "positions none"),
    ],
)
def test_a_force_that_meets_no_token_is_a_mistake(models, force, told):
    model = models[0]
    with model.route(force=[Force(2, sample=0), force]):
        for call in (model.trace, model.score):
            with pytest.raises(ValueError, match=told):
                call(TEXTS)
    if force.positions is None:
        with model.route(force=force), pytest.raises(ValueError, match=told):
            model.generate(TEXTS, max_new_tokens=2, progress=False)


def test_of_two_forces_for_one_token_the_last_counts(models):
    """As if the first one had not named the token: no token has one expert twice."""
    layer = models[0].config.moe_layers[-1]
    both, one = Force((4, 2), sample=0, positions=(0, 1), layers=layer), Force(2, sample=0, positions=(1, 2))
    for model in models:
        found = {}
        for name, forces in {
            "one": [one],
            "both": [both],
            "one last": [both, one],
            "both last": [one, both],
        }.items():
            with model.route(force=forces):
                trace = model.trace(TEXTS[:1], progress=False)
            assert (trace.experts[..., 0] != trace.experts[..., 1]).all()
            found[name] = trace.experts[:, trace.at(layer)]
        assert (found["one last"][1] == found["one"][1]).all() and (found["one last"][0] == [4, 2]).all()
        assert (found["both last"][1] == [4, 2]).all() and found["both last"][2, 0] == 2


def test_a_force_may_reach_beyond_the_sample_and_into_new_tokens(models):
    new = Force((3, 4), sample=1, positions=range(len(TEXTS[1]) + 1, 999))  # after </s> and the prompt
    with models[0].route(force=new):
        with pytest.raises(ValueError, match="34, 35, 36, 37, 38, ... of sample 1; expected .* 0 to 33"):
            models[0].score(TEXTS)
        found = models[0].generate(TEXTS, max_new_tokens=3, trace=True, progress=False)[1].trace
    assert (found.experts[found.generated] == [3, 4]).all() and found.generated.sum() == 2
    assert not (found.experts[~found.generated] == [3, 4]).all()


def test_capacity_and_second_choices(models):
    tight = models[0].trace(TEXTS, batch_size=2, capacity_token_fraction=0.05, progress=False)
    assert not tight.kept.all()
    free = on_both(models, TEXTS, capacity_token_fraction=None, options={"capacity_token_fraction": 0.05})
    assert free.kept.all() and free.meta["capacity_token_fraction"] is None
    found = on_both(models, TEXTS, capacity_token_fraction=0.05)
    assert np.array_equal(found.kept, tight.kept) and found.meta["capacity_token_fraction"] == 0.05
    first = on_both(models, TEXTS, drop_second=True)
    assert first.kept[..., 0].all() and not first.kept[..., 1].any()
    np.testing.assert_allclose(first.weights[..., 0], 1, atol=1e-6)


def test_generation_and_scoring_are_changed_too(models, reference):
    seen = []
    with models[0].route(mask={1: [0, 1, 2, 3]}):
        models[0].generate(
            [[5, 6, 7], [8]],
            max_new_tokens=5,
            record=lambda layer, routing: seen.append((layer, routing.experts)),
            progress=False,
        )
        masked = models[0].evaluate(reference / "data-bin", max_batches=4, progress=False, trace=True)
    first = [experts for layer, experts in seen if layer == 1]
    assert len(first) == 5 and all((experts > 3).all() for experts in first)
    assert (masked.trace.experts[:, 0] > 3).all()
    plain = models[0].evaluate(reference / "data-bin", max_batches=4, progress=False)
    assert masked.loss_base2 != plain.loss_base2


def test_the_block_ends(models):
    model = models[0]
    plain = model.trace(TEXTS, progress=False)
    with pytest.raises(RuntimeError, match="inside"), model.route(mask={1: [0]}):
        raise RuntimeError("inside")
    with model.route(mask={1: [0]}), pytest.raises(ValueError, match="inside another"):
        with model.route(drop_second=True):
            pass
    assert model.intervention is None
    assert np.array_equal(plain.experts, model.trace(TEXTS, progress=False).experts)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"mask": {0: [1]}}, r"^mask: layer 0 holds no experts; those that do are \[1, 3\]"),
        ({"mask": {1: [8]}}, "^mask: layer 1 has no expert 8: they are 0 to 7"),
        ({"mask": [(1, e) for e in range(7)]}, "mask leaves 1 of the 8 experts of layer 1"),
        ({"force": Force((1, 1), sample=0)}, "1 to 2 different experts"),
        ({"force": Force((1, 2, 3), sample=0)}, "1 to 2 different experts"),
        ({"force": Force(9, sample=0)}, "^force: layer 1 has no expert 9"),
        ({"force": Force(2, sample=0, layers=2)}, "^force: layer 2 holds no experts"),
        ({"force": Force(2, sample=0), "mask": {3: [2]}}, "expert 2 of layer 3 is masked"),
        ({"capacity_token_fraction": math.inf}, "capacity_token_fraction=inf"),
    ],
)
def test_mistakes(changes, told):
    with pytest.raises(ValueError, match=told):
        plan(config(), **changes)


def test_a_top_1_gate_has_no_second_choice():
    with pytest.raises(ValueError, match="one choice"):
        plan(config(gate="top1"), drop_second=True)
    with pytest.raises(ValueError, match="1 to 1 different"):
        plan(config(gate="top1"), force=Force((1, 2), sample=0))


# ---------------------------------------------------------------------------------------------------- comparisons


def test_weight_change_by_hand():
    one, _ = synthetic(tokens=3, layers=(1,), block=3)
    other, _ = synthetic(tokens=3, layers=(1,), block=3)
    one.experts[:, 0] = [[0, 1], [0, 1], [0, 1]]
    other.experts[:, 0] = [[1, 0], [0, 2], [2, 3]]
    one.weights[:, 0] = [[0.75, 0.25]] * 3
    other.weights[:, 0] = [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]
    assert weight_change(one, other)[:, 0].tolist() == pytest.approx([0, 0.5, 1])


def test_compare_against_plain_loops(models):
    before = models[0].trace(TEXTS, batch_size=3, progress=False)
    after = models[0].trace(TEXTS, batch_size=3, capacity_token_fraction=0.05, progress=False)
    found = compare(before, after)
    assert found.tokens["delta"].isna().sum() == len(TEXTS)
    assert found.delta == pytest.approx(np.nanmean(after.logprob - before.logprob), abs=1e-6)
    for t, row in enumerate(found.tokens.to_dict("records")):
        changed = [
            layer
            for place, layer in enumerate(before.layers)
            if set(before.experts[t, place].tolist()) != set(after.experts[t, place].tolist())
        ]
        assert row["layers_changed"] == len(changed) and row["first_changed"] == (changed or [-1])[0]
        assert row["drops_before"] == 0 and row["drops_after"] == (~after.kept[t]).sum()
    for place, row in enumerate(found.layers.to_dict("records")):
        kept = [
            {e for e, k in zip(*some, strict=True) if k} != {e for e, k in zip(*other, strict=True) if k}
            for some, other in zip(
                zip(before.experts[:, place].tolist(), before.kept[:, place].tolist(), strict=True),
                zip(after.experts[:, place].tolist(), after.kept[:, place].tolist(), strict=True),
                strict=True,
            )
        ]
        assert row["kept_changed"] == pytest.approx(np.mean(kept)) and row["kept_changed"] > 0
        assert row["dropped_before"] == 0
        assert row["dropped_after"] == pytest.approx((~after.kept[:, place]).mean())
    nothing = compare(before, before)
    assert nothing.delta == 0 and not nothing.layers.drop(columns="layer").to_numpy().any()


@pytest.mark.parametrize("fraction", [None, 0.05])
def test_what_an_experiment_leaves_out_is_no_drop_in_a_comparison(models, fraction):
    """Second choices ask for no place: of first ones alone, some find none with a capacity."""
    options = {"batch_size": 3, "capacity_token_fraction": fraction, "progress": False}
    before = models[0].trace(TEXTS, **options)
    with models[0].route(drop_second=True):
        after = models[0].trace(TEXTS, **options)
        [_, together] = batch_invariance(
            models[0], TEXTS, batch_sizes=(3,), capacities=fraction, progress=False
        ).summary["dropped"]
    lost = ~after.kept[:, :, 0]
    assert lost.any() == (fraction is not None)
    found = compare(before, after)
    assert found.layers["dropped_after"].tolist() == pytest.approx(lost.mean(axis=0))
    assert found.layers["dropped_before"].tolist() == pytest.approx((~before.kept).mean(axis=(0, 2)))
    assert found.tokens["drops_after"].tolist() == lost.sum(axis=1).tolist()
    assert together == pytest.approx(lost.mean())


def test_batch_invariance(models):
    found = batch_invariance(
        models[0], TEXTS, batch_sizes=(3,), capacities=(None, 0.05), progress=False
    ).summary
    assert found["batch_size"].tolist() == [1, 3, 1, 3]
    free, tight = found.iloc[1], found.iloc[3]
    assert free["dropped"] == free["kept_changed"] == free["tokens_changed"] == 0
    assert free["max_abs_delta"] < 1e-5
    assert tight["dropped"] > 0.1 and tight["kept_changed"] > 0 and tight["max_abs_delta"] > 0.01
    assert (found.iloc[[0, 2]][["experts_changed", "max_abs_delta"]] == 0).all().all()


def test_batch_invariance_takes_one_capacity_and_says_what_it_does_not_take(models):
    found = batch_invariance(
        models[0], TEXTS[:2], batch_sizes=2, capacities=np.array(0.5), progress=False
    ).summary
    assert found["capacity_token_fraction"].tolist() == [0.5, 0.5] and found["batch_size"].tolist() == [1, 2]
    found = batch_invariance(
        models[0], TEXTS[:2], batch_sizes=(1,), capacities=(None, 0.5, None, np.float64(0.5)), progress=False
    )
    assert found.summary["capacity_token_fraction"].tolist() == pytest.approx([np.nan, 0.5], nan_ok=True)
    assert list(found.traces) == [(1, None), (1, 0.5)]
    for asked, said in (
        ({"model": "demo"}, "model='demo': expected a model"),
        ({"batch_sizes": "x"}, "batch_sizes='x': expected a list of whole numbers"),
        ({"capacities": []}, r"capacities=\[\]: expected one or more"),
        ({"capacities": [0.5, "x"]}, "capacities='x': expected"),
        ({"capacities": bytearray([1])}, r"capacities=bytearray\(b'\\x01'\): expected"),
        ({"tolerance": None}, "tolerance=None: expected a number of at least 0"),
        ({"batch_size": 2}, "batch_size=2: expected batch_sizes"),
        ({"capacity_token_fraction": 0.5}, "capacity_token_fraction=0.5: expected capacities"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            batch_invariance(**{"model": models[0], "texts": TEXTS[:2]} | asked)
