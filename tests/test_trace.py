"""Traces say what ran: on every execution path the layer's output follows from what was recorded of it."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from branch_cases import CASES, build
from synthetic_traces import synthetic

import moekit
from moekit import checkpoint
from moekit.batches import shares
from moekit.handle import fingerprint
from moekit.nn.cache import Cache
from moekit.nn.ffn import activation_fn
from moekit.nn.record import Options, Recorder
from moekit.nn.transformer import MoE, Pass, Transformer
from moekit.notebook import report
from moekit.routing import pairs, trace
from moekit.routing.compare import compare
from moekit.routing.domains import domains_of
from moekit.routing.pairs import align
from moekit.routing.trace import Trace, join
from moekit.symbols import PAD
from moekit.worker import scoring as worker

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the ranks run functions of this file
REFERENCE = sorted((Path(__file__).parent / "data" / "reference").glob("base_*_routing.npz"))
COLUMNS = [*trace.TOKEN_COLUMNS, *trace.CHOICE_COLUMNS, "entropy"]


def settings(path: Path) -> dict:
    fraction, batch_size = re.fullmatch(r"base_frac(.+)_bsz(\d)_routing", path.stem).groups()
    return {
        "capacity_token_fraction": float(fraction),
        "batch_size": int(batch_size),
        "tokens_per_sample": 64,
    }


@pytest.fixture(scope="module", params=[1, 2])
def model(request, reference):
    with moekit.load(reference / "checkpoint", request.param, "cpu", progress=False) as model:
        yield model


@pytest.fixture(scope="module")
def whole(reference) -> Transformer:
    """The model with all its experts, here."""
    plan = checkpoint.survey(checkpoint.find(reference / "checkpoint"))
    model = Transformer(plan.config).float().eval().requires_grad_(False)
    checkpoint.fill(model, plan, range(plan.config.experts))
    return model


def same(one: Trace, other: Trace, atol: float = 0) -> None:
    assert one.layers == other.layers and one.num_experts == other.num_experts
    for name in COLUMNS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
    assert one.full.keys() == other.full.keys()
    for layer in one.full:
        np.testing.assert_allclose(one.full[layer], other.full[layer], rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------ against the branch


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.stem)
def test_recordings_of_the_branch(model, reference, path):
    found = model.trace(reference / "data-bin", progress=False, **settings(path))
    recorded = np.load(path)
    batches = [name for name in recorded if name.endswith("_ids")]
    assert set(np.unique(found.sample)) == set(np.concatenate([recorded[name] for name in batches]))
    compared = 0
    for batch in batches:
        ids = recorded[batch]
        for place in range(len(found.layers)):
            combine = recorded[batch.replace("ids", f"moe{place}")].reshape(len(ids), -1, 8)
            for sample, want in zip(ids, combine, strict=True):
                part = found.select(samples=int(sample))
                want = want[part.position]  # the recording goes on with padding
                got = np.zeros_like(want)
                np.put_along_axis(got, part.experts[:, place].astype(int), part.weights[:, place], axis=1)
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
                assert np.array_equal((want > 0).sum(axis=1), part.kept[:, place].sum(axis=1))
                compared += len(part)
    assert compared == len(found) * len(found.layers)
    assert found.kept.all() == (float(path.stem.split("frac")[1].split("_")[0]) == 1)


def test_another_gate(reference, tmp_path):
    """Top-1, and padding that is not routed."""
    name = "top1_mask_padding"
    build(name, tmp_path)
    found = []
    for world_size in (1, 2):
        with moekit.load(tmp_path, world_size, "cpu", progress=False) as model:
            found.append(
                model.trace(reference / "data-bin", full=[1], progress=False, **CASES[name].evaluate)
            )
    same(*found, atol=1e-5)
    assert found[0].top_k == 1 and not found[0].kept.all()


def test_world_size_and_packing_change_nothing(reference, monkeypatch):
    """Batches alone in a forward pass, packed, and spread over ranks with too few batches for all."""
    found = []
    for world_size, tokens in ((1, 1), (1, 10_000), (3, 200)):
        monkeypatch.setattr("moekit.scoring.TOKENS_A_PASS", {"cpu": tokens})
        with moekit.load(reference / "checkpoint", world_size, "cpu", progress=False) as model:
            found.append(
                model.trace(
                    reference / "data-bin",
                    tokens_per_sample=50,
                    batch_size=3,
                    capacity_token_fraction=0.05,
                    full=[3],
                    predicted=True,
                    progress=False,
                )
            )
    for other in found[1:]:
        same(found[0], other, atol=1e-5)
    order = found[0].sample.astype(np.int64) * 1000 + found[0].position
    assert (np.diff(order) > 0).all()


def test_evaluate_traces_what_it_scores(model, reference):
    options = {"tokens_per_sample": 64, "batch_size": 2, "capacity_token_fraction": 0.25, "progress": False}
    result = model.evaluate(reference / "data-bin", trace=Options(layers=(3,), full=(3,)), **options)
    same(result.trace, model.trace(reference / "data-bin", layers=[3], full=[3], **options))
    known = result.trace.target != PAD
    assert np.array_equal(result.trace.logprob[known], result.tokens["logprob"])
    assert np.array_equal(result.trace.target[known], result.tokens["target"])
    assert np.array_equal(result.trace.sample[known], result.tokens["sample"])
    assert np.array_equal(result.trace.token[known], result.tokens["token"])
    assert np.array_equal(result.trace.position[known], result.tokens["position"])
    assert model.evaluate(reference / "data-bin", **options).trace is None


# ----------------------------------------------------------------- on each path: the output follows from the record


def expected(whole: Transformer, layer: int, x: np.ndarray, experts: np.ndarray, weights: np.ndarray):
    """[n, K, D]: what each expert of a token makes of x [n, D], weighted, from [n, K] experts and weights."""
    moe, x, experts = whole.layers[layer].moe.experts, torch.from_numpy(x), torch.from_numpy(experts).long()
    act = activation_fn(whole.config.activation)
    hidden = torch.einsum("nkfd,nd->nkf", moe.w1[experts], x) + moe.b1[experts]
    out = torch.einsum("nkdf,nkf->nkd", moe.w2[experts], act(hidden)) + moe.b2[experts]
    return (out * torch.from_numpy(weights)[..., None]).numpy()


def score_observed(rank, steps, options, fraction):
    """``worker.scores_of`` with what its MoE layers read and returned: a list a layer of [N, D] and [N, K, D], and the trace's parts."""
    seen = {}

    def hook(module, args, output):
        pair = args[0].flatten(0, 1).numpy(), output.flatten(0, 1).numpy()
        seen.setdefault(module.index, []).append(pair)

    modules = [m for m in rank.state["model"].modules() if isinstance(m, MoE)]
    hooks = [module.register_forward_hook(hook) for module in modules]
    try:
        mine = [shares(step, rank.world_size)[rank.rank] for step in steps]
        _, parts = worker.scores_of(rank, mine, fraction=fraction, vocab=200, seed=1, trace=options)
    finally:
        for one in hooks:
            one.remove()
    return seen, parts


@pytest.mark.parametrize("fraction", [None, 0.05])
def test_scoring_follows_from_the_trace(model, whole, reference, fraction):
    """The local path and the all-to-all one, with several routing groups in a pass, and with padding."""
    batches = list(model.open_data(reference / "data-bin", "valid", 50, 2, "none", 0))
    alike = [b for b in batches if b.tokens.shape == batches[0].tokens.shape]
    assert len(alike) > 3 and any(b.padded() for b in batches)
    padded = [[b] for b in batches if b.padded()]
    steps = [[b for b in alike if not b.padded()], *padded]
    found = model.ranks.call(score_observed, steps, Options().of(model.config), fraction)
    compared = 0
    for rank, (seen, parts) in enumerate(found):
        mine = [step[rank :: model.world_size] for step in steps]
        mine = [part for part in mine if part]
        assert len(mine) == len(parts)
        for number, (some, part) in enumerate(zip(mine, parts, strict=True)):
            real = np.concatenate([b.tokens for b in some]).ravel() != PAD
            for place, layer in enumerate(model.config.moe_layers):
                x, y = (tensor[real] for tensor in seen[layer][number])
                experts, weights = part["experts"][:, place], part["weights"][:, place]
                np.testing.assert_allclose(expected(whole, layer, x, experts, weights), y, atol=1e-5)
                assert (weights[~part["kept"][:, place]] == 0).all()
                other = expected(whole, layer, x, (experts + 1) % 8, weights)
                assert np.abs(other - y).max() > 1e-3  # the comparison can fail
                compared += len(x)
    assert compared == 2 * sum((b.tokens != PAD).sum() for step in steps for b in step)


def test_decoding_follows_from_the_record(whole):
    """With a key/value cache, sequences of different lengths: the prompts, then token by token."""
    config = whole.config
    lengths, generator = torch.tensor([7, 3]), torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 200, (2, 12), generator=generator)
    cache = Cache(config, 2, 12, torch.device("cpu"), torch.float32)
    seen = {}
    hooks = [
        whole.layers[n].moe.register_forward_hook(
            lambda module, args, output: seen.update({module.index: (args[0], output)})
        )
        for n in config.moe_layers
    ]
    try:
        with torch.inference_mode():
            for step in range(5):
                some = tokens[:, :7] if step == 0 else tokens.gather(1, cache.lengths[:, None])
                real = torch.arange(some.shape[1]) < (lengths if step == 0 else torch.ones(2))[:, None]
                recorder = Recorder(Options().of(config))
                whole(some, Pass(fraction=0.5, groups=2, cache=cache, record=recorder))
                cache.advance(lengths if step == 0 else 1)
                rows = recorder.rows(real)
                for place, layer in enumerate(config.moe_layers):
                    x, y = (t[real].numpy() for t in seen[layer])
                    got = expected(whole, layer, x, rows["experts"][:, place], rows["weights"][:, place])
                    np.testing.assert_allclose(got, y, atol=1e-5)
    finally:
        for hook in hooks:
            hook.remove()


def test_generation_hands_out_its_routing(reference, whole):
    """The public way to generate, at world size 1, where the recorder sits in this process."""
    with moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as model:
        net = model.ranks.call(lambda rank: rank.state["model"])[0]
        seen, recorded = [], []
        hooks = [
            module.register_forward_hook(
                lambda module, args, output: seen.append((module.index, args[0], output))
            )
            for module in net.modules()
            if isinstance(module, MoE)
        ]
        model.generate(
            [[5, 6, 7], [8]],
            max_new_tokens=4,
            record=lambda layer, routing: recorded.append((layer, routing)),
            progress=False,
        )
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(recorded) == 2 * 4  # layers x (prompts and three tokens read)
    for (layer, x, y), (also, routing) in zip(seen, recorded, strict=True):
        assert layer == also
        experts, weights = (t.flatten(0, 1).numpy() for t in (routing.experts, routing.weights))
        got = expected(whole, layer, x.flatten(0, 1).numpy(), experts, weights)
        np.testing.assert_allclose(got, y.flatten(0, 1).numpy(), atol=1e-5)


def test_generation_traced(model, whole):
    """Prompts of different lengths, several draws each: as one pass over the whole sequence would be routed."""
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12]]
    found = model.generate(
        prompts,
        max_new_tokens=6,
        temperature=1.0,
        num_return_sequences=2,
        trace=Options(full=(3,)),
        progress=False,
    )
    assert len(found) == 6 and all(one.trace is not None for one in found)
    for number, one in enumerate(found):
        prompt = [2, *prompts[number // 2]]
        part, ids = one.trace, [*prompt, *one.ids]
        assert (part.sample == number).all() and part.token.tolist() == ids[:-1]
        assert part.target.tolist() == ids[1:] and part.position.tolist() == list(range(len(ids) - 1))
        assert part.generated.tolist() == [False] * len(prompt) + [True] * 5
        assert np.isnan(part.logprob[: len(prompt) - 1]).all()
        np.testing.assert_array_equal(part.logprob[len(prompt) - 1 :], one.logprobs)
        recorder = Recorder(Options(full=(3,)).of(whole.config))
        with torch.inference_mode():
            whole(torch.tensor([ids[:-1]]), Pass(record=recorder))
        rows = recorder.rows(torch.ones(1, len(ids) - 1, dtype=torch.bool))
        for name, atol in (("experts", 0), ("kept", 0), ("weights", 1e-5), ("entropy", 1e-4)):
            np.testing.assert_allclose(getattr(part, name), rows[name], rtol=0, atol=atol)
        np.testing.assert_allclose(part.full[3], rows["full.3"], atol=1e-3)
    joined = trace.join(one.trace for one in found)
    assert len(joined) == sum(len(one.trace) for one in found)
    same(joined.select(samples=4), found[4].trace)
    with pytest.raises(ValueError, match="a sample in common"):
        trace.join([joined, found[0].trace])
    assert model.generate([[5]], max_new_tokens=2, progress=False)[0].trace is None
    with pytest.raises(ValueError, match="leave out trace"):
        model.generate([[5]], beam_size=2, trace=True, progress=False)


def test_a_bypassed_recorder_fails(reference, monkeypatch):
    """A path that forgets to record, in one layer of one pass, ends the trace with an error."""
    routes = MoE.forward

    def forgetful(self, x, step):
        return routes(self, x, Pass(step.fraction, step.groups, step.padding) if self.index == 3 else step)

    monkeypatch.setattr(MoE, "forward", forgetful)
    with moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as model:
        with pytest.raises(moekit.RankError, match=r"layers \[3\] took part .* recorded nothing"):
            model.trace(reference / "data-bin", progress=False)
        model.trace(reference / "data-bin", layers=[1], progress=False)


def test_nothing_is_recorded_unless_asked(reference, monkeypatch):
    def no_recorder(*_):
        raise AssertionError("recorded")

    monkeypatch.setattr(worker, "Recorder", no_recorder)
    with moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as model:
        model.evaluate(reference / "data-bin", max_batches=1, progress=False)


# ------------------------------------------------------------------------------------------------------- contents


def test_contents(model, whole, reference):
    found = model.trace(
        reference / "data-bin", tokens_per_sample=64, full=[1, 3], predicted=True, progress=False
    )
    experts = found.experts.astype(int)
    for place, layer in enumerate(found.layers):
        probs = found.full[layer].astype(np.float32)
        np.testing.assert_allclose(probs.sum(axis=1), 1, atol=5e-3)
        np.testing.assert_allclose(
            np.take_along_axis(probs, experts[:, place], axis=1), found.probs[:, place], atol=1e-3
        )
        entropy = -(probs * np.log(np.maximum(probs, 1e-9))).sum(axis=1)
        np.testing.assert_allclose(entropy, found.entropy[:, place], atol=1e-2)
    np.testing.assert_allclose(found.weights.sum(axis=2), 1, atol=1e-5)  # nothing was dropped
    assert (found.probs[..., 0] >= found.probs[..., 1]).all() and not found.generated.any()
    assert (found.target[:-1] == found.token[1:]).all()  # the data is one text

    sample = found.select(samples=2)
    with torch.inference_mode():
        logits = whole.logits(whole(torch.from_numpy(sample.token)[None].long()), 200)[0]
    assert np.array_equal(sample.predicted, logits.argmax(dim=-1))
    want = F.log_softmax(logits, dim=-1).gather(1, torch.from_numpy(sample.target)[:, None].long())
    np.testing.assert_allclose(sample.logprob, want[:, 0], atol=1e-4)


def test_texts_are_samples(model):
    texts = [[5, 6, 7, 8], [9], [10, 11]]
    found = model.trace(texts, batch_size=2, progress=False)
    assert found.sample.tolist() == [0] * 5 + [1] * 2 + [2] * 3
    assert found.token.tolist() == [2, 5, 6, 7, 8, 2, 9, 2, 10, 11]
    assert found.target.tolist() == [5, 6, 7, 8, 1, 9, 1, 10, 11, 1]
    assert np.array_equal(np.isnan(found.logprob), found.target == PAD)
    assert found.meta["groups"] == [[1, 3, 1], [2, 5, 1]] and (found.predicted == -1).all()
    alone = model.trace(texts[1:2], progress=False)
    np.testing.assert_allclose(alone.logprob, found.select(samples=1).logprob, atol=1e-5)


def test_max_tokens_takes_whole_batches(model, reference):
    batches = list(model.open_data(reference / "data-bin", "valid", 64, 2, "none", 0))
    sizes = np.cumsum([(b.tokens != PAD).sum() for b in batches])
    options = {"tokens_per_sample": 64, "batch_size": 2, "progress": False}
    for most, took in ((int(sizes[1]), sizes[1]), (int(sizes[2]) - 1, sizes[1]), (1, sizes[0])):
        assert len(model.trace(reference / "data-bin", max_tokens=most, **options)) == took


def test_meta_tells_what_ran(model, reference):
    meta = model.trace(
        reference / "data-bin", tokens_per_sample=64, capacity_token_fraction=0.05, progress=False
    ).meta
    told = {
        "subset": "valid",
        "tokens_per_sample": 64,
        "batch_size": 1,
        "capacity_token_fraction": 0.05,
        "dtype": "float32",
        "device": "cpu",
        "world_size": model.world_size,
        "intervention": None,
    }
    assert {name: meta[name] for name in told} == told
    assert meta["versions"]["torch"] == torch.__version__
    assert [f["name"] for f in meta["checkpoint"]["files"]][:2] == ["model-shared.pt", "model-rank-0.pt"]


def test_a_trace_names_what_was_loaded(reference, tmp_path):
    """Whatever became of the files since: a run that has ended is not lost, and not told of others."""
    folder = shutil.copytree(reference / "checkpoint", tmp_path / "checkpoint")
    how = {"world_size": 1, "device": "cpu", "progress": False}
    with moekit.load(folder, **how) as model:
        loaded = model.trace([5, 6, 7], progress=False).meta["checkpoint"]
        assert loaded["path"] == str(folder) and loaded["fingerprint"] == fingerprint(model.files.all)
        other = folder / "model-rank-0.pt"
        other.with_suffix(".new").write_bytes(other.read_bytes() + b"0")
        other.with_suffix(".new").replace(other)
        assert model.trace([5, 6, 7], progress=False).meta["checkpoint"] == loaded
        folder.rename(tmp_path / "elsewhere")
        assert model.trace([5, 6, 7], progress=False).meta["checkpoint"] == loaded
        [written] = model.generate([[5, 6]], 2, trace=True, progress=False)
        assert written.trace.meta["checkpoint"] == loaded


def test_the_meta_of_a_trace_is_its_own(reference):
    """What a user changes in it, such as a path before the trace is passed on, is not in other traces of the model."""
    how = {"world_size": 1, "device": "cpu", "config": {"second_expert": "random"}, "progress": False}
    with moekit.load(reference / "checkpoint", **how) as model:
        first, second = (model.trace([5, 6, 7], progress=False).meta for _ in range(2))
        first["checkpoint"]["path"] = first["config"]["second_expert"] = "left out"
        first["checkpoint"]["files"].clear()
        third = model.trace([5, 6, 7], progress=False).meta
        for meta in (second, third):
            assert meta["checkpoint"]["path"] == str(reference / "checkpoint") and meta["checkpoint"]["files"]
            assert meta["config"] == {"second_expert": "random"}


def test_a_trace_tells_the_fields_that_load_changed(reference, tmp_path):
    how = {"world_size": 1, "device": "cpu", "progress": False}
    own = {"gate_fp32": moekit.module(reference / "checkpoint").config.gate_fp32}
    for asked, told in (
        (
            {"second_expert": "random", "max_positions": np.int64(32), **own},
            {"second_expert": "random", "max_positions": 32},
        ),
        (own, None),
        (None, None),
    ):
        with moekit.load(reference / "checkpoint", config=asked, **how) as model:
            trace = model.trace([5, 6, 7], progress=False)
            trace.save(tmp_path / "trace.parquet")
            read = Trace.load(tmp_path / "trace.parquet")
            assert trace.meta.get("config") == read.meta.get("config") == told
            said = report.model(model)[""].get("changed in its config")
            assert (said is None) == (told is None) and (told is None or "second_expert='random'" in said)


def test_fingerprint_changes_with_the_files(tmp_path):
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in paths:
        path.write_bytes(b"0" * 500)
    marks = {fingerprint(paths, edge=100)}
    for change in (b"1" + b"0" * 499, b"0" * 499 + b"1", b"0" * 501):
        paths[1].write_bytes(change)
        marks.add(fingerprint(paths, edge=100))
    assert len(marks) == 4


@pytest.mark.parametrize(
    "options, told",
    [
        ({"layers": [0]}, r"^layers: layer 0 holds no experts; those that do are \[1, 3\]"),
        ({"full": [2]}, "^full: layer 2 holds no experts"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"data_or_texts": "no/such/folder"}, "there is no folder no/such/folder"),
        ({"data_or_texts": [[]]}, "text 0 has 0 tokens"),
        ({"data_or_texts": [[4] * 200]}, "text 0 has 200 tokens; expected 1 to"),
    ],
)
def test_mistakes_are_told_before_anything_runs(model, reference, options, told):
    with pytest.raises(ValueError, match=told):
        model.trace(**({"data_or_texts": reference / "data-bin", "progress": False} | options))


# ------------------------------------------------------------------------------------------------ files and tables


@pytest.fixture
def made():
    made, _ = synthetic(tokens=300, layers=(1, 3, 9), experts=300, block=64)
    probs = np.random.default_rng(0).dirichlet(np.ones(300), 300).astype(np.float16)
    meta = {"subset": "valid", "checkpoint": {"files": [{"name": "é", "bytes": 1}]}}
    columns = {name: getattr(made, name) for name in COLUMNS}
    return Trace(**columns, layers=made.layers, full={3: probs}, num_experts=300, meta=meta)


def test_saved_and_loaded(made, tmp_path):
    made.save(tmp_path / "t.parquet")
    back = Trace.load(tmp_path / "t.parquet")
    same(back, made)
    assert back.meta == made.meta and back.top_k == 2 and dict(back.full).keys() == {3}
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]
    same(back.select(layers=[9, 1]), made.select(layers=[9, 1]))
    back.save(tmp_path / "t.parquet")  # onto itself
    same(Trace.load(tmp_path / "t.parquet"), made)


def test_any_parquet_reader_can_read_it(made, tmp_path):
    made.save(tmp_path / "t.parquet")
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert len(table) == 300 and table["experts.3.1"].dtype == np.int16
    assert np.array_equal(table["experts.9.1"], made.experts[:, 2, 1])
    assert np.array_equal(table["kept.1.0"], made.kept[:, 0, 0])
    assert np.array_equal(np.frombuffer(table["full.3"][7], np.float16), made.full[3][7])


def test_select(made):
    some = made.select(samples=[1, 3], layers=9, mask=made.position < 5)
    assert some.sample.tolist() == [1] * 5 + [3] * 5 and some.layers == (9,) and not some.full
    assert np.array_equal(some.experts[:5, 0], made.experts[64:69, 2])
    assert some.meta is made.meta
    with pytest.raises(ValueError, match="layer 2 is not in the trace"):
        made.select(layers=2)
    with pytest.raises(ValueError, match="mask is int64"):
        made.select(mask=np.arange(300))


def test_to_pandas(made):
    table = made.to_pandas()
    assert len(table) == 300 * 3
    row = table[(table["sample"] == 2) & (table["position"] == 4) & (table["layer"] == 9)].iloc[0]
    t = 2 * 64 + 4
    assert row["expert_1"] == made.experts[t, 2, 1] and row["weight_0"] == made.weights[t, 2, 0]
    assert row["kept_1"] == made.kept[t, 2, 1] and row["entropy"] == made.entropy[t, 2]
    assert row["token"] == made.token[t]


def test_wrong_columns_are_refused(made):
    columns = {name: getattr(made, name) for name in COLUMNS} | {"layers": made.layers, "full": {}}
    for name, wrong in (("experts", made.experts.astype(np.int8)), ("kept", made.kept[:-1])):
        with pytest.raises(ValueError, match=rf"{name} is .*; expected"):
            Trace(**(columns | {name: wrong}), num_experts=300, meta={})
    for wrong in (-1, 300):
        experts = made.experts.copy()
        experts[7, 1, 1] = wrong
        with pytest.raises(ValueError, match=rf"the experts are .*{wrong}.*; expected 0 to 299"):
            Trace(**(columns | {"experts": experts}), num_experts=300, meta={})
    with pytest.raises(
        ValueError, match=rf"the layers are \[{made.layers[0]}, {made.layers[0]}\]; expected each once"
    ):
        made.select(layers=[made.layers[0]] * 2)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda made: made.at("3"), "layer='3': expected a whole number"),
        (lambda made: made.at(None), "layer=None: expected a whole number"),
        (lambda made: made.labels_of(5), "groups=5: expected a label for each token"),
        (lambda made: made.labels_of(np.array(5)), r"groups=array\(5\): expected a label for each token"),
        (lambda made: made.labelled(x=[[1], [1, 2]]), "x=.*: expected one for each token"),
        (lambda made: made.select(mask=5), "mask=5: expected one for each token"),
        (lambda made: made.save(None), "path=None: expected the path"),
        (lambda made: Trace.load(5), "path=5: expected the path"),
        (lambda made: join(5), "traces=5: expected traces"),
        (lambda made: join([made, None]), "traces.1.=None: expected a trace"),
        (lambda made: join([made], renumber="x"), "renumber='x': expected True or False"),
        (lambda made: align(made, None), "other=None: expected a trace"),
        (lambda made: compare("x", made), "before='x': expected a trace"),
        (lambda made: compare(made, made, by=5), "by=5: expected one for each token"),
        (
            lambda made: compare(made, made, by="block", size=0),
            "size=0: expected a whole number of at least 1",
        ),
    ],
)
def test_arguments_of_other_types_are_named(made, call, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        call(made)


def test_align(made):
    one, other = made.select(mask=made.position > 2), made.select(samples=[0, 2, 9])
    one, other = pairs.align(one, other)
    assert np.array_equal(one.sample, other.sample) and np.array_equal(one.position, other.position)
    assert sorted(set(one.sample)) == [0, 2] and one.position.min() == 3
    with pytest.raises(ValueError, match="no sample and position in common"):
        pairs.align(made.select(samples=1), made.select(samples=2))
    with pytest.raises(ValueError, match="layers differ"):
        pairs.align(made, made.select(layers=[1]))


def test_join(made):
    parts = [made.select(samples=[3, 1]), made.select(samples=[0, 2, 4])]
    same(trace.join(parts), made)
    with pytest.raises(ValueError, match="a sample in common"):
        trace.join([made, parts[0]])
    with pytest.raises(ValueError, match="layers differ"):
        trace.join([parts[0], parts[1].select(layers=[1])])


@pytest.mark.parametrize("add_bos", [False, True])
def test_an_s_within_a_text_has_its_log_probability(reference, add_bos):
    """Only the <s> that begins a sample of data is nobody's target."""
    ids = [[0, 0, 5, 6], [7, 0, 0, 5]]
    how = {"config": {"add_bos": add_bos}, "progress": False}
    with moekit.load(reference / "checkpoint", 1, "cpu", **how) as model:
        found, wanted = model.trace(ids, progress=False), model.score(ids)
    known = found.target != PAD
    np.testing.assert_array_equal(found.logprob[known], wanted["logprob"])


# --------------------------------------------------------------------------------------------------------- domains


def test_domains_of_blocks(model, reference, tmp_path):
    """Against the lines of the text that was binarised."""
    lines = (reference / "raw" / "valid.bpe").read_text().splitlines()
    names = [f"{n}" for n in range(len(lines))]
    side = tmp_path / "valid.domains.txt"
    side.write_text("\n".join(names) + "\n")
    found = model.trace(reference / "data-bin", tokens_per_sample=30, progress=False)
    domains = domains_of(found, reference / "data-bin", domains=side)
    of_text = [name for name, line in zip(names, lines, strict=True) for _ in range(len(line.split()) + 1)]
    assert domains.tolist() == [names[0], *of_text[:-1]]  # the leading </s>; the last token is never read

    # Where samples begin with <s>, all else stands one place later.
    how = {"config": {"add_bos": True}, "progress": False}
    with moekit.load(reference / "checkpoint", 1, "cpu", **how) as begun:
        longer = begun.trace(reference / "data-bin", tokens_per_sample=30, progress=False)
        result = begun.evaluate(reference / "data-bin", tokens_per_sample=30, progress=False)
    known = ~np.isnan(longer.logprob)
    assert known.sum() == result.ntokens and (longer.target[~known & (longer.position == 0)] == 0).all()
    assert -longer.logprob[known].mean(dtype=float) / np.log(2) == pytest.approx(result.loss_base2, abs=1e-6)
    told = domains_of(longer, reference / "data-bin", domains=side)
    first = longer.position == 0
    assert (longer.token[first] == 0).all() and told[~first].tolist() == domains.tolist()
    assert told[first].tolist() == told[np.flatnonzero(first) + 1].tolist()
    part = longer.select(mask=longer.position > 3)
    np.testing.assert_array_equal(
        domains_of(part, reference / "data-bin", domains=side), told[longer.position > 3]
    )
    old = dataclasses.replace(longer, meta={n: v for n, v in longer.meta.items() if n != "add_bos"})
    np.testing.assert_array_equal(domains_of(old, reference / "data-bin", domains=side), told)

    side.write_text("a\n")
    with pytest.raises(ValueError, match="has 1 lines, the text"):
        domains_of(found, reference / "data-bin", domains=side)
    with pytest.raises(ValueError, match=r"there is no file .*valid.domains.txt"):
        domains_of(found, reference / "data-bin")
    side.write_text("\n".join(names) + "\n")
    found.token[5] += 1
    with pytest.raises(ValueError, match=r"1 of \d+ tokens differ"):
        domains_of(found, reference / "data-bin", domains=side)
