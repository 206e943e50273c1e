"""The gate against hand-worked cases and against a slow, obvious version with one place at a time."""

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from branch_cases import BASE

import moekit
from moekit.headlines import headline
from moekit.nn import gate
from moekit.nn.config import SECOND_EXPERT, ModelConfig
from moekit.nn.gate import Gate
from moekit.nn.gates import GATES, Top2, gate_of
from moekit.nn.operations import PLAIN
from moekit.nn.record import LoadRecorder
from moekit.ranks import start

LOG = torch.log


def config(**options) -> ModelConfig:
    return ModelConfig(**{**vars(BASE), **options})


def slow_route(logits, config, fraction, padding, noise):
    """One group, token by token and place by place, as one would explain it; returns experts, kept, weights."""
    tokens, experts = logits.shape
    probs = torch.softmax(logits, -1)
    choices = []
    for t in range(tokens):
        first = int(probs[t].argmax())
        row = logits[t] + noise("gumbel", logits)[t] if config.second_expert == "sampling" else logits[t]
        second = max((e for e in range(experts) if e != first), key=lambda e: (float(row[e]), -e))
        choices.append([first] if config.gate == "top1" else [first, second])
    k = gate_of(config).top_k
    weight = [[float(probs[t, e]) for e in choices[t]] for t in range(tokens)]
    if config.gate == "top2" and config.normalize_before_dropping:
        weight = [[w / max(sum(row), torch.finfo(torch.float32).eps) for w in row] for row in weight]
    kept = [[padding is None or not bool(padding[t])] * k for t in range(tokens)]
    if config.gate == "top2" and config.second_expert == "random":
        uniform = noise("uniform", logits[:, 0])
        for t in range(tokens):
            kept[t][1] &= 2 * weight[t][1] > float(uniform[t])
    if fraction is not None:
        room = math.ceil(fraction * tokens) if fraction > 0 else k * math.ceil(tokens / experts)
        order = list(range(tokens))
        if config.batch_prioritized and config.gate == "top2":
            order.sort(key=lambda t: -float(probs[t].max()))
        taken = [0] * experts
        for choice, t in itertools.product(range(k), order):
            if kept[t][choice]:
                e = choices[t][choice]
                kept[t][choice] = taken[e] < room
                taken[e] += 1
    if config.gate == "top2" and not config.normalize_before_dropping:
        for t in range(tokens):
            row = [w * g for w, g in zip(weight[t], kept[t], strict=True)]
            weight[t] = [w / max(sum(row), torch.finfo(torch.float32).eps) for w in row]
    weight = [[w * g for w, g in zip(weight[t], kept[t], strict=True)] for t in range(tokens)]
    return torch.tensor(choices), torch.tensor(kept), torch.tensor(weight)


OPTIONS = [
    dict(
        zip(("gate", "second_expert", "normalize_before_dropping", "batch_prioritized"), values, strict=True)
    )
    for values in itertools.product(
        ["top2", "top1"], ["all", "sampling", "random"], [False, True], [False, True]
    )
    if not (values[0] == "top1" and values[1:] != ("all", False, False))
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("fraction", [None, -1.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_slow_way(options, fraction, masked):
    generator = torch.Generator().manual_seed(len(str(options)) + int(100 * (fraction or 0)))
    groups, tokens, experts = 3, 23, 8
    logits = 2 * torch.randn(groups, tokens, experts, generator=generator)
    drawn = {
        "gumbel": torch.randn(groups, tokens, experts, generator=generator),
        "uniform": torch.rand(groups, tokens, generator=generator),
    }
    padding = torch.rand(groups, tokens, generator=generator) < 0.3 if masked else None
    cfg = config(experts=experts, **options)
    found = gate_of(cfg).route(
        logits, fraction=fraction, padding=padding, noise=lambda kind, like: drawn[kind]
    )
    for g in range(groups):
        experts_g, kept, weights = slow_route(
            logits[g],
            cfg,
            fraction,
            None if padding is None else padding[g],
            lambda kind, _, g=g: drawn[kind][g],
        )
        assert found.experts[g].equal(experts_g)
        assert found.kept[g].equal(kept)
        torch.testing.assert_close(found.weights[g], weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("drop_second", [False, True])
def test_a_choice_that_asks_for_no_place_is_not_dropped(drop_second):
    """overflow_expert1 and overflow_expert2 by the lines of top2gate.py: what was not drawn is in neither sum."""
    generator = torch.Generator().manual_seed(3)
    tokens, experts, room = 24, 4, 8
    logits, uniform = torch.randn(1, tokens, experts, generator=generator), torch.rand(1, tokens)
    found = gate_of(config(experts=experts, second_expert="random")).route(
        logits,
        fraction=room / tokens,
        noise=lambda kind, like: uniform,
        edit=gate.Edit(drop_second=True) if drop_second else None,
    )
    counted = LoadRecorder()
    counted(1, found)
    _, made, dropped = counted.counts(1, tokens)
    mask1, mask2 = torch.nn.functional.one_hot(found.experts[0], experts).unbind(1)
    sampled = (2 * found.gate_probs[0, :, 1] > uniform[0]) & (not drop_second)
    mask2 = mask2 * sampled[:, None]
    locations1, locations2 = mask1.cumsum(0) - 1, mask2.cumsum(0) - 1 + mask1.sum(0)
    lost = (mask1 * (locations1 >= room)).sum() + (mask2 * (locations2 >= room)).sum()
    assert made.sum() == mask1.sum() + mask2.sum() < 2 * tokens
    assert dropped.sum() == lost and (lost > 0 or drop_second)


def test_filling_the_buffers_leaves_what_was_asked_for_as_it_is(monkeypatch):
    rule, told = gate_of(config(experts=3)), torch.ones(1, 3, 2, dtype=torch.bool)
    told[0, 0, 1] = False
    asked = told.clone()
    monkeypatch.setattr(rule, "dispatched", lambda *_: told)
    padding = torch.tensor([[False, True, False]])
    found = rule.route(torch.zeros(1, 3, 3), fraction=1 / 3, padding=padding)
    assert found.sought is told and told.equal(asked)
    assert found.kept.tolist() == [[[True, False], [False, False], [False, True]]]


def test_a_gate_that_fills_the_buffers_in_place_hides_no_drop():
    class InPlace(Top2):
        def fill(self, probs, experts, gate_probs, weights, kept, padding, capacity, dtype):
            kept &= gate.buffer_positions(torch.where(kept, experts, self.config.experts), None) < capacity
            return kept, weights * kept, None

    options = config(experts=3, second_expert="random")
    logits = LOG(torch.tensor([0.6, 0.3, 0.1])).repeat(1, 3, 1)
    # The second choice of the last token is not drawn.
    noise = {"noise": lambda kind, like: torch.tensor([[0.5, 0.5, 0.7]])}
    for kind in (Top2, InPlace):
        found, counted = kind(options).route(logits, fraction=1 / 3, **noise), LoadRecorder()
        counted(1, found)
        _, made, dropped = counted.counts(1, 3)
        assert (made.tolist(), dropped.tolist()) == ([[2, 2, 1]], [[0, 2, 1]])


def test_two_places_and_three_tokens_that_want_the_same_expert():
    """Worked by hand. Each token: 0.6 for expert 0, 0.3 for expert 1, 0.1 for expert 2; 2/3 of 3 tokens: 2 places."""
    logits = LOG(torch.tensor([0.6, 0.3, 0.1])).repeat(1, 3, 1)
    found = gate_of(config(experts=3)).route(logits, fraction=2 / 3)
    assert found.capacity == 2
    assert found.experts.tolist() == [[[0, 1]] * 3]
    assert found.kept.tolist() == [[[True, True], [True, True], [False, False]]]
    expected = torch.tensor([[[2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.0, 0.0]]])
    torch.testing.assert_close(found.weights, expected)


def test_second_choices_queue_behind_all_first_choices():
    """Token 0 wants A then B, tokens 1 and 2 want B first: with two places in B, token 0's second choice is out."""
    probs = torch.tensor([[[0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.1, 0.7, 0.2]]])
    found = gate_of(config(experts=3)).route(LOG(probs), fraction=0.5)
    assert found.experts.tolist() == [[[0, 1], [1, 2], [1, 2]]]
    assert found.kept.tolist() == [[[True, False], [True, True], [True, True]]]
    # what is left of token 0 weighs 1 if normalised after dropping, 2/3 if before
    assert found.weights[0, 0].tolist() == pytest.approx([1.0, 0.0])
    before = gate_of(config(experts=3, normalize_before_dropping=True)).route(LOG(probs), fraction=0.5)
    assert before.weights[0, 0].tolist() == pytest.approx([2 / 3, 0.0])


def test_the_surest_tokens_are_served_first_when_prioritized():
    probs = torch.tensor([[[0.5, 0.3, 0.2], [0.8, 0.1, 0.1], [0.6, 0.3, 0.1]]])
    found = gate_of(config(experts=3, batch_prioritized=True)).route(LOG(probs), fraction=0.5)
    assert found.kept[0, :, 0].tolist() == [False, True, True]


def test_masked_padding_takes_no_place_and_gets_no_weight():
    logits = LOG(torch.tensor([0.6, 0.3, 0.1])).repeat(1, 3, 1)
    padding = torch.tensor([[True, False, False]])
    found = gate_of(config(experts=3)).route(logits, fraction=2 / 3, padding=padding)
    assert found.kept.tolist() == [[[False, False], [True, True], [True, True]]]
    assert found.weights[0, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "fraction", "rule", "places"),
    [
        (64, 0.05, "top2", 4),
        (64, -1.0, "top2", 16),
        (64, 0.0, "top2", 16),
        (65, -1.0, "top2", 18),
        (65, -1.0, "top1", 9),
    ],
)
def test_capacity(tokens, fraction, rule, places):
    assert gate_of(config(experts=8, gate=rule)).capacity(tokens, fraction) == places
    assert gate_of(config()).capacity(tokens, None) is None


def test_groups_do_not_compete():
    logits = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    together = gate_of(config()).route(logits, fraction=0.1)
    for g in range(4):
        alone = gate_of(config()).route(logits[g : g + 1], fraction=0.1)
        assert together.kept[g].equal(alone.kept[0])


def test_balance_loss_of_even_and_of_collapsed_routing():
    even = gate_of(config()).route(torch.eye(8)[None] * 50, fraction=None)
    assert float(gate.balance_loss(even)) == pytest.approx(1.0)
    collapsed = gate_of(config()).route(torch.eye(8)[:1].repeat(1, 9, 1) * 50, fraction=None)
    assert float(gate.balance_loss(collapsed)) == pytest.approx(8.0)


@pytest.mark.parametrize("gate_fp32", [False, True])
def test_half_precision_is_computed_step_by_step_as_the_branch_does(gate_fp32):
    """softmax, the pick and the normalisation in float32 or in half, as ``gate_fp32`` says; the weights in half."""
    logits = 3 * torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(5)).half()
    found = gate_of(config(gate_fp32=gate_fp32)).route(logits, fraction=None)
    gates = torch.softmax(logits[0].float() if gate_fp32 else logits[0], dim=1)
    first = gates.argmax(dim=1, keepdim=True)
    second = (
        logits[0]
        .masked_fill(torch.zeros_like(gates).scatter(1, first, 1).bool(), float("-inf"))
        .argmax(1, True)
    )
    both = torch.cat([gates.gather(1, first), gates.gather(1, second)], dim=1)
    total = (both[:, 0] + both[:, 1]).clamp(min=torch.finfo(both.dtype).eps)
    assert found.experts[0].equal(torch.cat([first, second], dim=1))
    assert found.weights.dtype == torch.half
    assert found.weights[0].equal((both / total[:, None]).half())


def test_the_two_precisions_differ():
    logits = 3 * torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(5)).half()
    exact, rough = (gate_of(config(gate_fp32=f)).route(logits, fraction=None).weights for f in (True, False))
    assert not exact.equal(rough)


class Hashed(Gate):
    """A gate of one's own: by the token's position, three experts a token, with equal weights."""

    top_k = 3

    def choose(self, logits, noise=None, edit=None):
        start = torch.arange(logits.shape[-2])
        experts = (start[:, None] + torch.arange(3)).remainder(logits.shape[-1]).expand(*logits.shape[:-1], 3)
        probs = torch.softmax(logits, dim=-1)
        weights = torch.full(experts.shape, 1 / 3)
        return probs, experts, probs.gather(-1, experts), weights


def test_a_users_fill_is_asked_by_the_plain_back_end():
    def fill(self, probs, experts, gate_probs, weights, kept, padding, capacity, dtype):
        return torch.zeros_like(experts, dtype=torch.bool), torch.zeros_like(weights), None

    own = type("Own", (Top2,), {"fill": fill})(config())
    found = own.route(torch.randn(1, 4, BASE.experts), fraction=0.5, fill=PLAIN.fill)
    assert not found.kept.any()


def test_another_gate_has_capacity_and_drops_as_the_others():
    """Three tokens of three experts each, two choices a buffer: the third choice of expert 2 is one too many."""
    gate_of_three = Hashed(config(experts=5))
    assert not gate_of_three.draws and not gate_of_three.softmax_top_k
    found = gate_of_three.route(torch.zeros(1, 3, 5), fraction=0.5)
    assert found.experts.tolist() == [[[0, 1, 2], [1, 2, 3], [2, 3, 4]]] and found.capacity == 2
    assert found.kept.tolist() == [[[True, True, False], [True, True, True], [True, True, True]]]
    assert found.weights[0, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 0])
    assert gate_of_three.capacity(7, -1.0) == 3 * 2


def test_what_a_gate_weighs_a_drop_with_is_ignored():
    """NaN among it, where nothing of a token is kept: times a row of zeros it is NaN again, in an exchange that sends all rows."""

    class Renormalized(Hashed):
        def weigh(self, gate_probs, weights, kept):
            return weights * kept / (weights * kept).sum(dim=-1, keepdim=True)

    found = Renormalized(config(experts=3)).route(torch.zeros(1, 4, 3), fraction=0.25)
    assert found.kept.sum(dim=-1).tolist() == [[1, 1, 1, 0]]
    assert found.weights.equal(found.kept.float())


def test_what_a_gate_says_of_itself():
    assert gate_of(config(gate="top1")).describe() == "top-1"
    assert gate_of(config(second_expert="random")).describe() == "top-2, second expert: random"
    drawing = [
        policy for policy in ("all", "sampling", "random") if gate_of(config(second_expert=policy)).draws
    ]
    assert (
        drawing == ["sampling", "random"] and not gate_of(config(gate="top1", second_expert="random")).draws
    )


# -------------------------------------------------------------------------------------- gates of the user's


def raising(*_, **__):
    raise KeyError("mine")


def raising_for(dtype):
    """Top-2 but for logits of this type."""
    return lambda self, logits, *more: (
        raising() if logits.dtype == dtype else Top2.choose(self, logits, *more)
    )


HOW = {"config": {"gate": "own"}, "progress": False}


FAULTS = {
    "raises": ({"choose": raising}, "KeyError: 'mine'"),
    "raises for the model's type alone": ({"choose": raising_for(torch.float16)}, "KeyError: 'mine'"),
    "raises in its order": ({"order": raising}, "KeyError: 'mine'"),
    "raises in a decode step": (
        {"choose": lambda *asked: raising() if asked[1].shape[1] == 1 else Top2.choose(*asked)},
        "KeyError: 'mine'",
    ),
    "raises for one text": (
        {"choose": lambda *asked: raising() if len(asked[1]) == 1 else Top2.choose(*asked)},
        "KeyError: 'mine'",
    ),
    "has no words": ({"describe": Gate.describe}, "NotImplementedError"),
    "numbers from 1": (
        {"choose": lambda *asked: at(Top2.choose(*asked), 1, lambda experts: experts + 1)},
        r"experts are \[1, .*8\] in torch.int64, expected 0 to 7 in torch.int64",
    ),
    "numbers of another type": (
        {"choose": lambda *asked: at(Top2.choose(*asked), 1, lambda experts: experts + 0.0)},
        r"in torch\.float32, expected 0 to 7 in torch\.int64",
    ),
    "one choice too few": (
        {"choose": lambda *asked: at(Top2.choose(*asked), 1, lambda experts: experts[..., :1])},
        r"experts have the shape \[2, 3, 1\], expected \[2, 3, 2\]",
    ),
    "one word for all choices of a token": (
        {"dispatched": lambda self, probs, *more: torch.ones(*probs.shape[:2], 1, dtype=torch.bool)},
        r"kept have the shape \[2, 3, 1\], expected \[2, 3, 2\]",
    ),
    "bytes in place of words": (
        {"dispatched": lambda self, probs, *more: torch.ones_like(probs, dtype=torch.uint8)},
        "kept are torch.uint8, expected torch.bool",
    ),
    "words of its buffers that are not those it asked for": (
        {
            "dispatched": lambda self, probs, *more: torch.ones(2, dtype=torch.bool),
            "fill": lambda self, probs, experts, gate_probs, weights, *more: (
                torch.ones_like(experts, dtype=torch.bool),
                weights,
                None,
            ),
        },
        r"sought have the shape \[2\], expected \[2, 3, 2\]",
    ),
}


def at(found, place, change):
    return tuple(change(one) if number == place else one for number, one in enumerate(found))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gate_that_fails_is_told_before_a_pass(fault):
    methods, said = FAULTS[fault]
    own = type("Own", (Top2,), methods)(config(experts=8, second_expert="all"))
    with pytest.raises((ValueError, KeyError, NotImplementedError)) as caught:
        own.try_out(torch.device("cpu"), torch.float16)
    assert re.search(said, headline(caught.value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("experts", [2, 3, 512])
@pytest.mark.parametrize("second", SECOND_EXPERT)
@pytest.mark.parametrize("kind", GATES)
def test_gates_that_work_pass_the_trial(kind, second, experts, dtype):
    for changes in ({}, {"batch_prioritized": True, "gate_fp32": True, "normalize_before_dropping": True}):
        gate_of(config(gate=kind, second_expert=second, experts=experts, **changes)).try_out(
            torch.device("cpu"), dtype
        )


def overwriting(self, logits, *more):
    """Top-2, with logits of which nothing is left: those of another call are not zero."""
    found = Top2.choose(self, logits, *more)
    assert logits.any()
    logits.zero_()
    return found


def in_inference_mode(*asked):
    assert torch.is_inference_mode_enabled()
    return Top2.choose(*asked)


def without_edits(self, logits, noise=None, edit=None):
    return raising() if edit is not None else Top2.choose(self, logits, noise)


def in_type(dtype):
    return lambda *asked: at(Top2.choose(*asked), 1, lambda experts: experts.to(dtype))


WORKING = {
    "makes no experiments": without_edits,
    "writes into its logits": overwriting,
    "expects the mode of passes": in_inference_mode,
    "numbers of two bytes": in_type(torch.int16),
    "numbers of four bytes": in_type(torch.int32),
}


@pytest.mark.parametrize("kind", WORKING)
def test_a_gate_that_works_in_passes_is_loaded(kind, monkeypatch):
    monkeypatch.setitem(GATES, "own", type("Own", (Top2,), {"choose": WORKING[kind]}))
    with moekit.load("demo", 1, "cpu", **HOW) as model, moekit.load("demo", 1, "cpu", progress=False) as top2:
        # A capacity fills buffers, which sorts the choices in another place.
        for fraction in (None, 0.3):
            how = {"capacity_token_fraction": fraction}
            assert model.score("def main", **how).equals(top2.score("def main", **how))


def test_a_trial_draws_and_calls_little(monkeypatch):
    """What the user has seeded before a load gives the same numbers after it; a slow gate is called three times."""
    calls = []

    def drawing(self, logits, *more):
        calls.append((torch.rand(1), np.random.rand(), random.random()))
        return Top2.choose(self, logits, *more)

    def drawn():
        return torch.rand(4).tolist(), np.random.rand(4).tolist(), [random.random() for _ in range(4)]

    def seeded():
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    monkeypatch.setitem(GATES, "own", type("Own", (Top2,), {"choose": drawing}))
    seeded()
    expected = drawn()
    seeded()
    with moekit.load("demo", 1, "cpu", **HOW):
        assert len(calls) == 3 and drawn() == expected


def leaving(error):
    def choose(*asked):
        raise error

    return choose


def test_a_gate_that_leaves_is_told_and_an_interrupt_is_one(monkeypatch):
    monkeypatch.setitem(GATES, "own", type("Own", (Top2,), {"choose": leaving(SystemExit(3))}))
    with pytest.raises(ValueError, match=r"^the gate 'own' fails .* on rank 0 \(SystemExit: 3\);"):
        moekit.load("demo", 1, "cpu", **HOW)
    monkeypatch.setitem(GATES, "own", type("Own", (Top2,), {"choose": leaving(KeyboardInterrupt())}))
    with pytest.raises(KeyboardInterrupt):
        moekit.load("demo", 1, "cpu", **HOW)


class Asking(Top2):
    def __init__(self, config, more):
        super().__init__(config)


NO_GATES = {
    "another class": (dict, r"^GATES\['own'\]=.*dict.*: expected a subclass of moekit.nn.gate.Gate$"),
    "no class": (3, r"^GATES\['own'\]=3: expected a subclass of"),
    "more arguments": (Asking, r"GATES\['own'\] raised TypeError: .*'more'; expected a class that makes a"),
    "no choices": (
        type("Own", (Top2,), {"top_k": None}),
        r"^GATES\['own'\]\.top_k=None: expected an integer of at least 1$",
    ),
    "a fraction of choices": (type("Own", (Top2,), {"top_k": 2.0}), r"\.top_k=2\.0: expected an integer"),
    "choices not said": (type("Own", (Gate,), {}), r"^GATES\['own'\]\.top_k=None: expected an integer"),
}


@pytest.mark.parametrize("kind", NO_GATES)
def test_what_makes_no_gate_is_told(kind, monkeypatch):
    entered, said = NO_GATES[kind]
    monkeypatch.setitem(GATES, "own", entered)
    with pytest.raises(ValueError, match=said):
        moekit.load("demo", 1, "cpu", **HOW)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_branchs_gates_are_not_replaced(world_size, monkeypatch):
    """Ranks in processes of their own would compute the branch's all the same."""
    monkeypatch.setitem(GATES, "top2", type("Own", (Top2,), {}))
    with pytest.raises(
        ValueError, match=r"^GATES\['top2'\]=.*Own.*: expected the branch's gate, .* a name of its own$"
    ):
        moekit.load("demo", world_size, "cpu", progress=False)


def test_a_gate_is_tried_in_the_type_of_the_model(monkeypatch):
    """The demo's softmax is in float32, and a gate gets logits of the model's type all the same. NumPy has no bfloat16."""

    def by_numpy(self, logits, *more):
        return Top2.choose(self, torch.from_numpy(logits.numpy()), *more)

    monkeypatch.setitem(GATES, "own", type("Own", (Top2,), {"choose": by_numpy}))
    with moekit.load("demo", 1, "cpu", **HOW) as model, moekit.load("demo", 1, "cpu", progress=False) as top2:
        assert model.config.gate_fp32
        assert model.score("def main").equals(top2.score("def main"))
    with pytest.raises(
        ValueError, match=r"^the gate 'own' fails on a few tokens in torch.bfloat16 on rank 0 \(TypeError"
    ):
        moekit.load("demo", 1, "cpu", "bfloat16", **HOW)
    monkeypatch.setitem(GATES, "own", type("Own", (Top2,), {"choose": raising_for(torch.float16)}))
    with pytest.raises(
        ValueError, match=r"in torch.float16 on rank 0 \(KeyError: 'mine'\); .* load the model again$"
    ):
        moekit.load("demo", 1, "cpu", "float16", **HOW)
    # A dense model asks no gate.
    moekit.load("demo-dense", 1, "cpu", "float16", **HOW).close()


def test_a_gate_that_does_not_work_costs_no_rank(monkeypatch):
    monkeypatch.setitem(GATES, "own", Top2)

    def enter(rank):
        moekit.nn.gates.GATES["own"] = type("Own", (Top2,), {"choose": raising} if rank.rank == 1 else {})

    with start(2, "cpu") as pool:
        with pytest.raises(
            ValueError, match=r"^the gate 'own' is not on rank 0, which has top1, top2, .* world_size=1$"
        ):
            moekit.load("demo", ranks=pool, **HOW)
        pool.call(enter)
        with pytest.raises(ValueError, match=r"^the gate 'own' fails .* on rank 1 \(KeyError: 'mine'\);"):
            moekit.load("demo", ranks=pool, **HOW)
        with moekit.load("demo", ranks=pool, progress=False) as model:
            assert len(model.score("def main"))
