"""Ranks that repeat work together: nothing that a rank knows alone may decide when, or they wait for one another."""

import contextlib
import functools
import importlib.util
import itertools
import sys
from unittest import mock

import cloudpickle
import numpy as np
import pytest
from branch_cases import CASES, Case, build
from eager_graph import EagerGraph

import moekit
from moekit import ranks
from moekit.batches import Batch, shares
from moekit.nn import graphs as graph
from moekit.ranks import Each
from moekit.symbols import PAD
from moekit.worker import scoring as worker

if importlib.util.find_spec("triton") is None:  # not imported here, or it could not be interpreted elsewhere
    pytest.skip("needs triton", allow_module_level=True)
cloudpickle.register_pickle_by_value(sys.modules[__name__])
QUIET = {"progress": False}
PROMPTS = ["It is", "La table", "def __init__(self", "", "Die Datei"]


def with_stand_ins(rank):
    graph.Graph = EagerGraph
    graph.fits = lambda model, asked, sequences=None: (
        asked.record is None and asked.edit is None and asked.padding is None
    )


def made(rank):
    return graph.Graph.made


@contextlib.contextmanager
def loaded(checkpoint, world_size):
    """One rank, and several that take themselves to have graphs."""
    start = functools.partial(ranks.start, timeout=60)  # of ranks that wait for one another
    with (
        mock.patch.object(ranks, "start", start),
        moekit.load(checkpoint, 1, "cpu", **QUIET) as alone,
        moekit.load(checkpoint, world_size, "cpu", **QUIET) as together,
    ):
        together.ranks.call(with_stand_ins)
        yield alone, together
        once, *others = together.ranks.call(made)
        assert once > 0 and {once} == set(others)


@pytest.mark.parametrize("world_size", [2, 3])
def test_scoring(reference, world_size, monkeypatch):
    """Steps that are full, steps that leave a rank with fewer batches or none, and the padded last one."""
    with loaded(reference / "checkpoint", world_size) as (alone, together):
        for fraction, tokens, most in itertools.product((None, 0.05), (10, 64), (None, 17, 3)):
            monkeypatch.setattr("moekit.scoring.TOKENS_A_PASS", {"cpu": 2 * tokens})
            how = {"tokens_per_sample": tokens, "capacity_token_fraction": fraction, "max_batches": most}
            wanted, found = (
                model.evaluate(reference / "data-bin", **how, **QUIET).tokens for model in (alone, together)
            )
            assert found["token"].equals(wanted["token"])
            np.testing.assert_allclose(found["logprob"], wanted["logprob"], rtol=0, atol=1e-5)


def test_scoring_steps_that_differ_between_ranks(reference):
    """A rank whose padding stands within the text has no graph, so none has; nor has any after a step of one batch."""

    def batch(index, padding=()):
        tokens = np.random.default_rng(index).integers(4, 200, (1, 12))
        tokens[:, list(padding)] = PAD
        targets = np.where(tokens == PAD, PAD, np.roll(tokens, -1, axis=1))
        return Batch(index, np.array([index]), tokens, targets, np.array([0]))

    def scores(model, steps):
        parts = model.ranks.call(
            worker.scores_of,
            Each(list(zip(*(shares(step, model.world_size) for step in steps), strict=True))),
            fraction=None,
            vocab=200,
            seed=1,
        )
        found = {index: logprobs for part, _ in parts for index, logprobs in part}
        return [found[b.index][b.targets != PAD] for step in steps for b in step]

    inside = [[batch(i, [11]), batch(i + 1, [3])] for i in range(0, 12, 2)]
    one_between = [[batch(i), batch(i + 1)] for i in range(20, 32, 2)]
    one_between.insert(3, [batch(32)])
    with loaded(reference / "checkpoint", 2) as (alone, together):
        for steps in (inside, one_between, one_between[4:] * 2):
            for one, other in zip(scores(alone, steps), scores(together, steps), strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_generation(world_size):
    """More sequences than ranks, fewer, and some that end before others."""
    with loaded("demo", world_size) as (alone, together):
        for prompts, stop in itertools.product((PROMPTS, PROMPTS[:1]), ((), ("z", "."))):
            how = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5, "stop": stop}
            wanted, found = (model.generate(prompts, **how, **QUIET) for model in (alone, together))
            assert len(prompts) == 1 or (len({len(one.ids) for one in wanted}) > 1) == bool(stop)
            for one, other in zip(wanted, found, strict=True):
                assert one.ids == other.ids
                # One or two threads add up in another order: numbers of 10 are off by a unit or two in their last place.
                np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-6, atol=1e-5)


def test_generation_up_to_the_last_learned_position(tmp_path, monkeypatch):
    """The runs before a capture go on from one another. The last step of six is captured, and behind it no position is learned."""
    most, new = 60, 6
    monkeypatch.setitem(CASES, "sixty", Case({"learned_positions": True, "max_positions": most}))
    build("sixty", tmp_path)
    prompts = [range(5, 5 + most - new), [7, 8], [9]]
    with loaded(tmp_path, 2) as (alone, together):
        wanted, found = (model.generate(prompts, max_new_tokens=new, **QUIET) for model in (alone, together))
        assert [one.ids for one in found] == [one.ids for one in wanted]


@pytest.mark.parametrize("new", [2, 20])
def test_prompts_of_one_shape(new):
    """Ranks whose prompts have other lengths capture together; with a rank that has none, no rank does. Few tokens count, too."""
    with loaded("demo", 2) as (alone, together):
        for prompts, captured in ((PROMPTS[:3], 1), (PROMPTS[:1], 0)):
            wanted, counts = alone.generate(prompts, max_new_tokens=new, **QUIET), []
            for _ in range(graph.AFTER + 3):
                found = together.generate(prompts, max_new_tokens=new, **QUIET)
                assert [one.ids for one in found] == [one.ids for one in wanted]
                one, other = together.ranks.call(made)
                assert one == other
                counts.append(one)
            # A graph of a step, if there is one, is made by the first of these generations.
            assert counts[: graph.AFTER] == [counts[0]] * graph.AFTER
            assert counts[graph.AFTER :] == [counts[0] + captured] * 3
