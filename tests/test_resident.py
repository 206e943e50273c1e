"""Experts that are fetched: no policy changes a result, hits are those of the simulator, and a plan is what is measured."""

import copy
import mmap
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

INTERPRET = "TRITON_INTERPRET"
if not torch.cuda.is_available():
    # The kernels read it when they are defined: by the imports that follow.
    os.environ[INTERPRET] = "1"

pytest.importorskip("triton")
import moekit
from moekit import ranks
from moekit.bench import shapes
from moekit.likelihood import Text, score_texts
from moekit.nn import graphs, resident
from moekit.nn.cache import Cache
from moekit.nn.dispatch import owned
from moekit.nn.gate import Gate
from moekit.nn.kernels import batch_step, short_step
from moekit.nn.memory import Sizes
from moekit.nn.passes import Pass
from moekit.nn.pinning import paged
from moekit.nn.policies import POLICIES, Hottest
from moekit.nn.resident import Residence, install
from moekit.nn.slots import CHUNK
from moekit.nn.transformer import empty
from moekit.planning.fitting import SPARE, advice, cached_tokens, chosen, fitting, most_resident
from moekit.planning.runs import CUBLAS, Room, Run, unknown
from moekit.planning.table import described
from moekit.ranks import ThisProcess
from moekit.routing import expert_caches
from moekit.units import GIB

os.environ.pop(INTERPRET, None)

CPU = torch.device("cpu")
QUIET = {"progress": False, "verify": False}
SIMULATED = {"lru": expert_caches.lru_distance, "lfu": expert_caches.lfu_rank}
# Two layers with 16 experts each; random weights.
TINY = shapes.SHAPES["tiny"]
MANY = replace(TINY, experts=512, dim=32, ffn_dim=32, input_dim=32, output_dim=32)


def written(config, folder: Path, files: int) -> Path:
    folder.mkdir()
    shapes.write(config, folder, files, CPU, torch.float32)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A checkpoint with 512 experts a layer."""
    return written(MANY, tmp_path_factory.mktemp("many") / "checkpoint", 4)


def texts(vocab=500, count=3, length=60):
    return [np.random.default_rng(i).integers(4, vocab, length).tolist() for i in range(count)]


def outputs(model):
    """What score, trace, route and generate give: passes of many and of few tokens, with and without a capacity."""
    ids = texts(min(500, model.vocab))
    scores = [model.score(ids, capacity_token_fraction=f)["logprob"].to_numpy() for f in (None, 0.1)]
    layer = model.config.moe_layers[0]
    with model.route(mask={layer: [0, 3]}, drop_second=True):
        scores.append(model.score(ids[:1])["logprob"].to_numpy())
    trace = model.trace(ids, progress=False, batch_size=3)
    one, three = (model.generate(ids[:n], max_new_tokens=8, progress=False) for n in (1, 3))
    beams = model.generate(ids[:1], max_new_tokens=4, beam_size=3, progress=False)
    written = [(text.ids, np.asarray(text.logprobs).tolist()) for text in (*one, *three, *beams)]
    return [*scores, trace.probs, trace.logprob, trace.kept], trace.experts, written


def same(found, wanted):
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found[0], wanted[0], strict=True))
    assert np.array_equal(found[1], wanted[1])
    assert found[2] == wanted[2]


# --------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("policy", SIMULATED)
def test_a_policy_is_what_is_simulated(policy):
    """Requests in parts of any length, also with what a policy foresees of its own."""
    random = np.random.default_rng(1)
    for experts, requests in ((1, 50), (5, 400), (16, 3000), (512, 3000)):
        stream = np.minimum(random.zipf(1.3, requests) - 1, experts - 1)
        stream[::3] = random.integers(0, experts, len(stream[::3]))
        for slots in {1, 2, 7, experts - 1, experts} - {0}:
            mine, hits = POLICIES[policy](experts, slots), 0
            for part in np.array_split(stream, 13):
                foreseen = mine.after(part)
                hits += mine.take(part.tolist())
                assert foreseen == set(mine.kept)
                assert len(mine.kept) <= slots
            assert hits == expert_caches.hits(SIMULATED[policy](stream), np.array([slots]))[0]
            mine.clear()
            assert mine.take(stream[:1].tolist()) == 0


def test_the_hottest_stay():
    mine = Hottest(4, 2, np.array([1, 7, 0, 7]))
    assert mine.kept == {1, 3} and mine.take([0, 1, 1, 2, 3]) == 3 and mine.after(np.array([0])) == {1, 3}


# -------------------------------------------------------------------------------------------- equal results


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_no_policy_changes_a_result(world_size):
    """To the bit, for N = 1, 2, 7 and all of the demo's experts; all calls one after the other on the same slots."""
    with ranks.start(world_size, "cpu") as pool:
        with moekit.load("demo", ranks=pool, **QUIET) as model:
            wanted = outputs(model)
            trace = model.trace(texts(), progress=False)
        for number, policy in ((1, "lru"), (2, trace), (7, "lfu"), (16, "lru")):
            with moekit.load("demo", ranks=pool, resident=number, policy=policy, **QUIET) as model:
                everything = number >= 16 // world_size
                assert [part["resident"] for part in model.parts] == [
                    None if everything else number
                ] * world_size
                same(outputs(model), wanted)
                if not everything:
                    assert (model.residency()["copied"] > 0).all()


def test_of_many_experts_by_another_back_end(many):
    """Torch's grouped product takes the slots for experts, most of which have no rows."""
    found = []
    for number in (None, 100):
        with moekit.load(many, 1, "cpu", backend="grouped_mm", resident=number, **QUIET) as model:
            written = model.generate(texts(count=2), max_new_tokens=6, progress=False)
            found.append((model.score(texts()), [text.ids for text in written]))
    assert found[0][0].equals(found[1][0]) and found[0][1] == found[1][1]


def test_large_passes_fetch_each_expert_once(many, monkeypatch):
    """Where copies begin before hits are counted, and rounds are cut by their choices."""
    ids = [np.random.default_rng(9).integers(4, 500, 250).tolist()]
    with moekit.load(many, 1, "cpu", **QUIET) as model:
        wanted = model.trace(ids, progress=False)
    monkeypatch.setattr(resident, "MANY", 16)
    monkeypatch.setattr(resident, "ROUND", 20)
    for policy in SIMULATED:
        with moekit.load(many, 1, "cpu", resident=7, policy=policy, **QUIET) as model:
            found = model.trace(ids, progress=False)
            assert np.array_equal(found.logprob, wanted.logprob, equal_nan=True)
            table = model.residency()
            distinct = [len(np.unique(wanted.experts[:, layer])) for layer in range(len(wanted.layers))]
            assert table["copied"].tolist() == distinct
            assert table["hits"].tolist() == simulated(wanted, policy, 7)


@pytest.fixture
def interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv(INTERPRET, "1")


@torch.inference_mode()
def test_with_the_kernels(interpreted):
    """Grouped products in rounds, and a step of few sequences in parts, against models with all experts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(TINY, layers=2, dim=16, ffn_dim=16, input_dim=16, output_dim=16, vocab_rows=64)
    models = []
    for residence in (None, Residence(1, "lru"), Residence(7, "lfu")):
        rank = ranks.Rank(0, 1, device)
        shapes.build(rank, config, torch.float16, "triton", residence=residence, zipf=1.0)
        models.append(rank.state["model"])
    tokens = torch.randint(4, 64, (2, 6), device=device, generator=torch.Generator(device).manual_seed(1))
    whole, *fetched = [model(tokens) for model in models]
    assert all(torch.equal(one, whole) for one in fetched)
    caches = [Cache(config, 2, 64, device, torch.float16) for _ in models]
    for token in tokens.T[:2]:
        whole, *fetched = [
            short_step.read_on(model, token, cache, 64) for model, cache in zip(models, caches, strict=True)
        ]
        assert all(torch.equal(one, whole) for one in fetched)
        for cache in caches:
            cache.advance(1)
    for model in models[1:]:
        counts = model.slots.layers[0].counts
        assert counts.requests == 2 * 2 * (6 + 2) and 0 < counts.copied < counts.requests
    # All choices of a step have slots at once.
    most = max(short_step.FEW.values())
    assert most * 2 <= CHUNK and short_step.fits(models[1], most)


@pytest.mark.parametrize(("sequences", "top_k"), [(9, 2), (9, 1)])
@torch.inference_mode()
def test_a_step_of_many_sequences_asks_for_the_experts_of_a_few_at_a_time(
    interpreted, monkeypatch, sequences, top_k
):
    """Against a model with all experts; the policies see the requests in the order of the sequences."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # One head, since the interpreter takes as long for each as for the experts.
    sizes = {"layers": 4, "dim": 32, "ffn_dim": 16, "heads": 1, "input_dim": 32, "output_dim": 32}
    sizes["vocab_rows"] = 64
    config = replace(TINY, gate="top2" if top_k == 2 else "top1", **sizes)
    models = []
    for residence in (None, Residence(2, "lru"), Residence(7, "lfu")):
        rank = ranks.Rank(0, 1, device)
        shapes.build(rank, config, torch.float16, "triton", residence=residence, zipf=1.0)
        models.append(rank.state["model"])
    tokens = torch.randint(4, 64, (sequences, 2), generator=torch.Generator().manual_seed(1)).to(device)
    caches = [Cache(config, sequences, 64, device, torch.float16) for _ in models]
    seen: dict[int, list[int]] = {layer: [] for layer in config.moe_layers}
    asked: list[tuple[int, int]] = []
    ask = resident.Resident.ask

    def noted(self, chosen, *how, **more):
        asked.append((self.layer, chosen.numel()))
        return ask(self, chosen, *how, **more)

    monkeypatch.setattr(resident.Resident, "ask", noted)

    def note(layer, routing):
        assert routing.experts.shape[-1] == top_k
        seen[layer] += routing.experts.flatten().tolist()

    for token in tokens.T:
        models[0](token[:, None], Pass(groups=sequences, cache=copy.deepcopy(caches[0]), record=note))
        passes = [Pass(groups=sequences, cache=cache) for cache in caches]
        assert batch_step.fits(models[1], sequences)
        assert short_step.fits(models[1], sequences) is False
        whole, *fetched = [
            batch_step.read_on(model, token, one, 64) for model, one in zip(models, passes, strict=True)
        ]
        assert torch.equal(*fetched)
        torch.testing.assert_close(fetched[0], whole, rtol=1e-2, atol=1e-2)
        for cache in caches:
            cache.advance(1)
    few = CHUNK // top_k
    rest = [few * top_k] * (sequences // few) + [sequences % few * top_k] * (sequences % few > 0)
    assert asked == [(layer, count) for layer in config.moe_layers for count in rest] * len(tokens.T) * 2
    for model in models[1:]:
        model.slots.settle()
        for layer, requests in zip(model.slots.layers, seen.values(), strict=True):
            policy = type(layer.policy)(config.experts, layer.policy.slots)
            assert (layer.counts.requests, layer.counts.hits) == (len(requests), policy.take(requests))
            assert 0 < layer.counts.copied < len(requests) and layer.counts.ahead == 0


@torch.inference_mode()
def test_steps_take_only_as_many_choices_as_their_kernels(interpreted):
    """Three of a row are no power of two, and nine experts are more than the host brings at a time."""
    config = replace(TINY, layers=2, dim=32, ffn_dim=16, input_dim=32, output_dim=32, vocab_rows=64)
    rank = ranks.Rank(0, 1, CPU)
    shapes.build(rank, config, torch.float16, "triton", residence=Residence(2, "lru"))
    model = rank.state["model"]
    for sequences in (1, 4, 5, 64):
        with pytest.MonkeyPatch.context() as changed:
            assert short_step.fits(model, sequences) or batch_step.fits(model, sequences)
            for top_k in (3, 9, 16):
                gate = type("Own", (Gate,), {"top_k": top_k})(config)
                for kernels in (short_step, batch_step):
                    changed.setattr(kernels, "gate_of", lambda config, gate=gate: gate)
                    assert not kernels.fits(model, sequences)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the calls of a step that is no graph")
def test_a_step_in_parts_takes_the_kernels_that_fit(interpreted, monkeypatch):
    config = replace(TINY, layers=2, dim=32, ffn_dim=16, input_dim=32, output_dim=32, vocab_rows=64)
    rank = ranks.Rank(0, 1, CPU)
    shapes.build(rank, config, torch.float16, "triton", residence=Residence(2, "lru"))
    model = rank.state["model"]
    monkeypatch.setattr(graphs, "InParts", lambda work, tokens: graphs.whole(work, tokens))
    taken = []
    for kernels in (short_step, batch_step):
        whole = kernels.in_parts

        def noted(*args, kernels=kernels, whole=whole):
            taken.append(kernels)
            return whole(*args)

        monkeypatch.setattr(kernels, "in_parts", noted)
    with torch.inference_mode():
        for sequences in (1, 4, 5):
            cache = Cache(config, sequences, 64, CPU, torch.float16)
            assert graphs.of_step(model, cache, 64, None).shape == (sequences, 64)
    assert taken == [short_step, short_step, batch_step]


# ---------------------------------------------------------------------------------------------------- hits


def simulated(trace, policy: str, size: int, experts: range | None = None) -> list[int]:
    """Hits of the requests for ``experts``, as :func:`moekit.metrics.cache_hits` has them."""
    table = moekit.metrics.cache_hits(trace, sizes=[size], prompt=True)
    if experts is None:
        of = table[table["policy"] == policy]
        return (of["value"] * of["requests"]).round().astype(int).tolist()
    found = []
    for layer in range(len(trace.layers)):
        stream = np.where(trace.kept[:, layer], trace.experts[:, layer], -1).ravel()
        stream = stream[(stream >= experts.start) & (stream < experts.stop)].astype(int) - experts.start
        found.append(int(expert_caches.hits(SIMULATED[policy](stream), np.array([size]))[0]))
    return found


@pytest.mark.parametrize("policy", SIMULATED)
@pytest.mark.parametrize("which", ["demo", "many"])
def test_hits_are_those_of_the_simulator(which, policy, request):
    """For texts, with a capacity that drops, and for tokens that are generated one by one, where a miss is a copy."""
    checkpoint = "demo" if which == "demo" else request.getfixturevalue("many")
    ids = texts()
    for size in (1, 7):
        with moekit.load(
            checkpoint, 1, "cpu", resident=size, policy=policy, prefetch=False, **QUIET
        ) as model:
            for fraction in (None, 0.1):
                model.residency(clear=True)
                trace = model.trace(ids, capacity_token_fraction=fraction, progress=False)
                table = model.residency(clear=True)
                assert table["hits"].tolist() == simulated(trace, policy, size)
                assert table["requests"].tolist() == trace.kept.sum(axis=(0, 2)).tolist()
            trace = model.generate(ids[0][:1], max_new_tokens=40, trace=True, progress=False)[0].trace
            table = model.residency()
            assert table["hits"].tolist() == simulated(trace, policy, size)
            # The first pass reads two tokens, each other pass one.
            ends = [2, *range(3, len(trace) + 1)]
            for layer, copied in enumerate(table["copied"]):
                passes = np.split(trace.experts[:, layer], ends[:-1])
                assert sum(map(len, passes)) == len(trace)
                assert copied == copies(passes, policy, size)


def test_rows_of_padding_request_experts_as_others_do():
    ids = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15, 16, 17]]
    with moekit.load("demo", 1, "cpu", resident=3, prefetch=False, **QUIET) as model:
        for size, rows in ((1, 9 + 3 + 4), (3, 3 * 9)):
            model.residency(clear=True)
            trace = model.trace(ids, batch_size=size, progress=False)
            table = model.residency()
            assert (table["requests"] == 2 * rows).all() and len(trace) == 16
            assert (table["hits"].tolist() == simulated(trace, "lru", 3)) == (size == 1)


def copies(passes: list[np.ndarray], policy: str, size: int) -> int:
    """Experts that are needed and not there, pass by pass; after a pass those are there that the policy's words say."""
    there, before, count = set(), [], 0
    for one in passes:
        needed = one.ravel().tolist()
        count += len(set(needed) - there)
        before += needed
        last = {expert: time for time, expert in enumerate(before)}
        rank = {
            expert: (before.count(expert) if policy == "lfu" else 0, time) for expert, time in last.items()
        }
        there = set(sorted(rank, key=rank.get)[-size:])
    return count


def test_hits_over_ranks():
    with ranks.start(2, "cpu") as pool:
        with moekit.load("demo", ranks=pool, resident=2, prefetch=False, **QUIET) as model:
            trace = model.generate(texts()[0][:2], max_new_tokens=30, trace=True, progress=False)[0].trace
            found = model.residency()["hits"].tolist()
        parts = [simulated(trace, "lru", 2, owned(16, 2, rank)) for rank in range(2)]
        assert found == [sum(layer) for layer in zip(*parts, strict=True)]


# ---------------------------------------------------------------------------------------------- fetching ahead


def test_what_follows_is_fetched_ahead():
    """A model whose second layer of experts follows its first: after a few tokens nothing is fetched late."""
    model = empty(replace(TINY, layers=4, experts=32), CPU, held=32, at_home=True)
    for parameter in model.parameters():
        parameter.data.zero_()
    install(model, Residence(1, "lru"), range(32), CPU)
    one, two = model.slots.layers
    for turn in range(40):
        expert = turn % 3
        list(one.rounds([expert]))
        assert (expert + 10 in two.ahead) == (turn >= 3 * 2)
        list(two.rounds([expert + 10]))
    assert one.counts.ahead == 0 and two.counts.ahead == two.counts.used == 34
    assert two.counts.hits == 0 and two.counts.copied == 40
    resident.begin(model)
    assert not any(one.successors.of) and two.counts.copied == 0


def test_memory_in_pages_of_its_own():
    for dtype in (torch.float16, torch.int8, torch.float8_e4m3fn):
        one, two = (paged(torch.empty(3, 5, dtype=dtype, device="meta")) for _ in range(2))
        assert one.shape == (3, 5) and one.dtype == dtype and one.data_ptr() % mmap.PAGESIZE == 0
        assert one.data_ptr() != two.data_ptr()
    assert paged(torch.empty(0, 5, device="meta")).shape == (0, 5)


# ------------------------------------------------------------------------------------------------- after errors


def test_an_error_costs_nothing(monkeypatch):
    with moekit.load("demo", 1, "cpu", resident=2, **QUIET) as model:
        wanted = model.score(texts())
        inner = model.ranks.call(lambda rank: rank.state["model"])[0]
        places = inner.slots
        real, calls = places.layers[1].operations.experts_ffn, []

        def broken(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return real(*arguments)

        for layer in places.layers:
            layer.operations = replace(layer.operations, experts_ffn=broken)
        with pytest.raises(moekit.RankError, match="out of memory"):
            model.score(texts())
        assert len(places.free) == places.count
        assert model.score(texts()).equals(wanted)
        held = sum(len(layer.where) for layer in places.layers)
        assert sorted(slot for slot, _ in places.free) == sorted(
            set(range(places.count)) - {slot for layer in places.layers for slot in layer.where.values()}
        )
        assert held == 2 * len(places.layers)


# -------------------------------------------------------------------------------------------------- the plan


def measured(work) -> int:
    """The most bytes that ``work`` has in memory at a time, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("number", [None, 1, 7])
def test_a_plan_is_what_is_measured(number):
    """Within 5 %, of the demo."""
    with moekit.load("demo", 1, "cpu", resident=number, **QUIET) as model:
        row = moekit.plan("demo", 1, "cpu", resident=number, sequences=0).table.loc[0]
        # Sixteen blocks are the 4,096 tokens of a pass.
        batches = 17
        model.evaluate("demo", max_batches=batches, progress=False)
        peak = measured(lambda: model.evaluate("demo", max_batches=batches, progress=False))
        weights = model.parts[0]["bytes"]
    assert (row["weights"] + row["slots"]) * GIB == pytest.approx(weights, abs=0.001 * GIB)
    assert row["total"] * GIB == pytest.approx(weights + peak, rel=0.05)
    assert row["host"] * GIB == pytest.approx(
        row["total"] * GIB + model.parts[0]["host_bytes"], abs=0.002 * GIB
    )


def run_of(config=TINY, devices=(CPU,), **changes) -> Run:
    return replace(Run.of(config, devices, torch.float32, "loop", None), **changes)


def test_sizes_by_hand():
    sizes = Sizes(TINY, torch.float16)
    assert sizes.expert == 2 * (64 * 128 + 128 + 128 * 64 + 64)
    one = Sizes(TINY, torch.float16, one_byte=True)
    assert one.expert == 2 * 64 * 128 + 2 * (64 + 128) + 4 * (64 + 128)
    total = shapes.parameters(TINY) * 2
    assert sizes.shared + 2 * 16 * sizes.expert == total
    # Layers, keys and values, sequences, slots in whole 64s, dim, bytes.
    assert sizes.cache(3, 70) == 4 * 2 * 3 * 128 * 64 * 2 and sizes.cache(0, 70) == 0
    run = run_of(dtype=torch.float16, devices=(CPU, CPU), resident=3)
    assert run.parts(0)["slots"] == (2 * 3 + 16) * sizes.expert
    assert run.parts(0)["weights"] == sizes.shared and run.home(1) == 2 * 8 * sizes.expert
    assert replace(run, resident=8).parts(0)["slots"] == 0


def test_as_many_as_fit():
    """One more does not fit; less than all is asked for only if all do not fit."""
    run = run_of()
    least, all_of_it = (sum(replace(run, resident=n).parts(0).values()) for n in (1, None))
    for size in np.linspace(least, 1.02 * all_of_it, 9):
        room = Room((size,), 1e12)
        best = most_resident(run, room)
        assert room.takes(best)
        if best.resident is not None:
            more = best.resident + 1
            assert not room.takes(replace(run, resident=None if more == 16 else more))
    assert most_resident(run, Room((0.99 * least,), 1e12)) is None
    assert most_resident(run, Room((1e12,), all_of_it - 1)) is None


def test_the_smallest_change():
    cuda = torch.device("cuda", 0)
    # One GPU that is too small of two.
    run = run_of(devices=(cuda,))
    need = sum(run.parts(0).values())

    def advised(*room) -> str:
        return advice(run, Room(*room), Room(*room))

    assert advised((need - 1e5, 1e12), 1e12).endswith(": resident=15 would fit")
    assert advised((need - 1e5, need), 1e5).endswith(': experts="int8" would fit')
    run = replace(run, one_byte=True)
    need = sum(run.parts(0).values())
    short = advised((need - 1e5, need), 1e5)
    assert f"rank 0 needs {need / GIB:.3g} GiB on cuda:0" in short and short.endswith(
        ": world_size=2 would fit"
    )
    nothing = advised((1e6,), 1e12)
    assert "0.000931 GiB are free" in nothing and "no change" in nothing


def test_no_plan_for_more_tokens_than_positions():
    assert moekit.plan("demo", 1, "cpu", length=257).fits
    with pytest.raises(ValueError, match="length=258: the model has 256 positions"):
        moekit.plan("demo", 1, "cpu", length=258)


@pytest.mark.parametrize("checkpoint", ["demo", "demo-dense"])
def test_the_least_gpu_memory_is_said(checkpoint):
    """What is said fits, and a MiB less does not."""
    for asked in (moekit.plan, lambda *how, **more: moekit.load(*how, **more, progress=False).close()):
        told = None
        try:
            told = asked(checkpoint, 1, "cpu", gpu_memory="1MiB")
            advice = told.advice
        except ValueError as error:
            advice = str(error)
        least = int(re.search(r'gpu_memory="(\d+)MiB" is the least that would fit', advice)[1])
        found = asked(checkpoint, 1, "cpu", gpu_memory=f"{least}MiB")
        if told is None:
            with pytest.raises(ValueError, match=f'gpu_memory="{least}MiB" is the least'):
                asked(checkpoint, 1, "cpu", gpu_memory=f"{least - 1}MiB")
        else:
            assert found.fits and not asked(checkpoint, 1, "cpu", gpu_memory=f"{least - 1}MiB").fits


def test_less_than_the_machine_has_is_not_said_to_be_enough():
    """Where no limit would do, another change is."""
    run = run_of(devices=(torch.device("cuda", 0),))
    need = sum(replace(run, resident=1).parts(0).values())
    free = Room((need - 1, 1e12), 1e12)
    within = Room((2e6, 2e6), 1e12, limited=True)
    assert "gpu_memory=" not in advice(run, free, within) and "would fit" in advice(run, free, within)


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    said = r"the model does not fit: rank 0 needs 0\.\d+ GiB on cpu .*, and gpu_memory leaves 0.00781 GiB: "
    with pytest.raises(ValueError, match=said + 'gpu_memory="[0-9]+MiB" is the least that would fit'):
        moekit.load("demo", 1, "cpu", gpu_memory="8MiB", progress=False)
    monkeypatch.setattr("moekit.planning.runs.host_memory", lambda what: 4.2e7)
    with pytest.raises(
        ValueError, match=r'GiB of host memory, and 0.0391 GiB are free: experts="int8" would fit'
    ):
        moekit.load("demo", 1, "cpu", progress=False)
    plan = moekit.plan("demo", 1, "cpu")
    assert not plan.fits and "Does not fit: " in plan.advice and plan.advice in str(plan)
    assert "Does not fit" in plan._repr_html_()


def test_ranks_of_which_nothing_is_known():
    """What is asked for holds, nothing is refused, and what is free cannot be asked."""
    run, nothing = run_of(devices=(torch.device("cuda", 0),) * 2), unknown(2)
    assert fitting(run, nothing, None, None)[0].resident is None
    assert fitting(run, nothing, 3, None)[0].resident == 3
    assert fitting(run, nothing, None, "1GiB")[0].resident is None
    assert 0 < fitting(run, nothing, None, 0.94 * GIB)[0].resident < 8
    with pytest.raises(ValueError, match="nothing tells what is free"):
        fitting(run, nothing, None, "auto")


def test_a_plan_for_ranks_of_a_cluster():
    plan = moekit.plan("demo", 16, "cuda", ranks="ray", resident=1)
    assert plan.fits and len(plan.table) == 16 and plan.table[["free", "host free"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="ranks='cloud': expected one of local, ray or None"):
        moekit.plan("demo", ranks="cloud")


def test_ranks_on_other_machines_have_memory_of_their_own(monkeypatch):
    """Such as those of a launcher; what this machine has says nothing of them."""
    monkeypatch.setattr("moekit.planning.runs.host_memory", lambda what: 1e6)
    with ThisProcess([CPU]) as pool:
        with pytest.raises(ValueError, match="the model does not fit"):
            moekit.load("demo", ranks=pool, **QUIET)
        pool.nodes = ["elsewhere"]
        moekit.load("demo", ranks=pool, **QUIET).close()


def test_a_gpu_may_have_more_memory_than_the_host():
    free = Room((80 * GIB,), 64 * GIB)
    assert described(run_of(devices=(torch.device("cuda", 0),)), free, free).table.loc[0, "free"] == 80


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"checkpoint": "demo-dense"}, "experts='int8': .* is dense"),
        ({"checkpoint": "demo", "backend": "grouped_mm"}, "has no product with int8 experts"),
    ],
)
def test_a_plan_refuses_what_a_load_refuses(how, said):
    for asked in (moekit.plan, moekit.load):
        with pytest.raises(ValueError, match=said):
            asked(**how, device="cpu", experts="int8")


def test_gpu_memory_chooses():
    plan = moekit.plan("demo", 1, "cpu", gpu_memory="48MiB")
    assert plan.fits and 1 <= plan.resident < 15
    with moekit.load("demo", 1, "cpu", gpu_memory="48MiB", **QUIET) as model:
        assert model.parts[0]["resident"] == plan.resident
    for enough in ("auto", "10 GiB", 1e10, "1e10"):
        assert moekit.plan("demo", 1, "cpu", gpu_memory=enough).resident is None
    quantised = moekit.plan("demo", 1, "cpu", experts="int8").table.loc[0, "weights"]
    assert quantised < moekit.plan("demo", 1, "cpu").table.loc[0, "weights"] / 2


@pytest.mark.parametrize(
    "how, said",
    [
        ({"resident": 0}, r"resident=0: expected a whole number of at least 1"),
        ({"resident": 2, "gpu_memory": "1GiB"}, r"give one of them"),
        ({"gpu_memory": "3 apples"}, r"gpu_memory='3 apples': expected a text such as '14GiB'"),
        ({"gpu_memory": 12}, r"gpu_memory=12: expected"),
        ({"policy": "mru"}, r"policy='mru': expected lru, lfu, a trace"),
        ({"policy": None}, r"policy=None: expected lru, lfu, a trace"),
        ({"policy": "there/is/no.parquet"}, r"there/is/no.parquet"),
        ({"prefetch": "maybe"}, r"prefetch='maybe': expected True or False"),
    ],
)
def test_arguments(how, said):
    with pytest.raises(ValueError, match=said):
        moekit.load("demo", 1, "cpu", **{"resident": 2, **how} if "policy" in how else how, **QUIET)


@pytest.mark.parametrize(
    "how, said",
    [
        ({"policy": "lfu"}, "policy='lfu' says how experts are fetched, and all stay .* give resident or"),
        ({"policy": "a_trace.parquet"}, "policy='a_trace.parquet' says how experts are fetched"),
        ({"prefetch": False}, "prefetch=False says how experts are fetched"),
    ],
)
def test_how_experts_are_fetched_is_asked_only_where_some_are(how, said):
    """A limit that all experts keep within is no contradiction: the same call fetches some on another GPU."""
    with pytest.raises(ValueError, match=said):
        moekit.load("demo", 1, "cpu", **how, **QUIET)
    if "parquet" not in str(how):
        for limit in ({"resident": 16}, {"gpu_memory": "10GiB"}):
            with moekit.load("demo", 1, "cpu", **how, **limit, **QUIET) as model:
                assert model.parts[0]["resident"] is None


def test_a_dense_model_has_no_experts_to_fetch():
    with pytest.raises(ValueError, match="policy='lfu' says how .* and the model is dense, .*: leave it out"):
        moekit.load("demo-dense", 1, "cpu", policy="lfu", **QUIET)


def test_policies_of_other_models(many):
    with moekit.load("demo", 1, "cpu", **QUIET) as model:
        trace = model.trace(texts(), progress=False)
        with pytest.raises(ValueError, match="nothing is fetched"):
            model.residency()
    with pytest.raises(
        ValueError, match=r"policy is a trace of 16 experts and the layers \[1, 3, 5\]; the model has 512"
    ):
        moekit.load(many, 1, "cpu", resident=2, policy=trace, **QUIET)
    with pytest.raises(ValueError, match="resident=3 is a number of experts, and this model has none"):
        chosen(run_of(replace(TINY, moe_freq=0, experts=0)), Room((1e12,), 1e12), 3, None)


def test_the_hottest_of_experts_with_other_numbers():
    """Where experts are placed otherwise, a rank's numbers are those of the dispatch."""
    residence = Residence(1, np.array([[5, 9, 0, 7]]))
    numbers = torch.tensor([2, 0, 3, 1])
    assert residence.of_layer(0, range(2)).kept == {1}
    # Numbers 0 to 3 are the experts 1, 3, 0, 2: the hottest are expert 1 on the first rank, and 0 on the second.
    assert residence.of_layer(0, range(2), numbers).kept == {0}
    assert residence.of_layer(0, range(2, 4), numbers).kept == {0}


# ------------------------------------------------------------------------------------------- one byte a weight


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_experts_of_one_byte_are_fetched_with_their_scales(kind):
    with moekit.load("demo", 1, "cpu", experts=kind, **QUIET) as model:
        wanted = outputs(model)
        told = moekit.plan("demo", 1, "cpu", experts=kind).table.loc[0, "weights"] * GIB
        assert told == pytest.approx(model.parts[0]["bytes"], abs=0.001 * GIB)
    with moekit.load("demo", 1, "cpu", experts=kind, resident=2, policy="lfu", **QUIET) as model:
        same(outputs(model), wanted)
        sizes = Sizes(model.config, torch.float32, one_byte=True)
        table = model.residency()
        assert table["GiB"].tolist() == pytest.approx((table["copied"] * sizes.expert / GIB).tolist())
        assert model.parts[0]["host_bytes"] == 3 * 16 * sizes.expert


def test_what_one_byte_costs_where_experts_are_fetched():
    with moekit.load("demo", 1, "cpu", experts="int8", **QUIET) as model:
        wanted = quantisation_of(model)
    with moekit.load("demo", 1, "cpu", experts="int8", resident=3, **QUIET) as model:
        assert quantisation_of(model) == wanted


def quantisation_of(model) -> str:
    from moekit.notebook import report

    return str(report.quantisation(model, texts(count=2)))


def test_a_dense_model_fetches_nothing():
    with (
        moekit.load("demo-dense", 1, "cpu", **QUIET) as model,
        pytest.raises(ValueError, match="residency: the model is dense, .*; ask it of a model with experts"),
    ):
        model.residency()


def test_a_load_warns_of_passes_that_the_plan_says_do_not_fit(recwarn):
    """It has room for short texts, and evaluate would take more than ``gpu_memory``."""
    plan = moekit.plan("demo", 1, "cpu", gpu_memory="36MiB")
    assert not plan.fits
    moekit.load("demo", 1, "cpu", gpu_memory="36MiB", **QUIET).close()
    [warning] = [one for one in recwarn if "does not fit" in str(one.message)]
    assert warning.filename == __file__
    told = str(warning.message)
    assert told.startswith("a pass of 4,096 tokens, as evaluate makes them, does not fit: rank 0 needs ")
    assert re.search(r'gpu_memory="\d+MiB" is the least that would fit', told)
    assert re.search(r"\d+MiB", told)[0] == re.search(r"\d+MiB", plan.advice)[0]
    moekit.load("demo", 1, "cpu", gpu_memory="48MiB", **QUIET).close()
    assert sum("does not fit" in str(one.message) for one in recwarn) == 1


def test_texts_that_share_beginnings_stay_within_the_plan():
    """A cache of all their tokens takes no more than ``gpu_memory``, and where there is room a pass is as long as any."""
    cuda = torch.device("cuda", 0)
    run = run_of(shapes.SHAPES["15b"], devices=(cuda,), dtype=torch.float16)
    assert cached_tokens(run, Room((80 * GIB,), 1e12)) == run.tokens == 65_536
    for number in (1, 100):
        run = replace(run, resident=number)
        need = sum(run.parts(0).values())
        tight = Room((need / (1 - SPARE) + 1,), 1e12)
        for room in (tight, unknown(1)):
            tokens = cached_tokens(run, room)
            assert 0 < tokens < run.tokens / 2
            parts = run.parts(0)
            sizes = parts["weights"] + parts["slots"] + parts["CUDA"] + CUBLAS
            # The cache of all texts, and that of their beginnings, at most half as many.
            taken = sizes + replace(run, tokens=tokens).workspace(0) + 1.5 * run.sizes.cache(1, tokens)
            assert 0.98 * need < taken <= need + run.sizes.cache(1, 64)
    assert cached_tokens(run, Room((need / 2,), 1e12)) == 0


def test_a_pass_over_texts_takes_what_the_plan_says():
    """Measured, of the demo with a limit: questions whose choices share beginnings of all lengths."""
    limit = "48MiB"
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(16):
        context = (2, *rng.integers(4, 900, rng.integers(12, 180)).tolist())
        for _ in range(4):
            texts.append(Text((*context, *rng.integers(4, 900, rng.integers(2, 60)).tolist()), len(context)))
    how = {"fraction": None, "seed": 1, "progress": False}
    with moekit.load("demo", 1, "cpu", gpu_memory=limit, **QUIET) as model:
        row = moekit.plan("demo", 1, "cpu", gpu_memory=limit).table.loc[0]
        assert 0 < model.cached_tokens < 4096
        found = []
        peak = measured(lambda: found.extend(score_texts(model, texts, **how)))
        weights = model.parts[0]["bytes"]
        model.cached_tokens = 0
        alone = score_texts(model, texts, **how)
    assert weights + peak <= row["free"] * GIB
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
