"""The model beyond the recordings: caches, packing, precision, and randomness that does not know the world size."""

import itertools
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from branch_cases import BASE, build

import moekit
from moekit import checkpoint, ranks
from moekit.batches import Batch, shares, text_batches
from moekit.fairseq_data import open_data
from moekit.nn.cache import Cache
from moekit.nn.config import ModelConfig
from moekit.nn.copies import Copy, Feed, on_device
from moekit.nn.dispatch import AllToAll, Local, owned
from moekit.nn.experts import Assignment
from moekit.nn.noise import Noise, uniform
from moekit.nn.operations import use
from moekit.nn.passes import Pass
from moekit.nn.transformer import AddNorm, Attention, MoE, Transformer
from moekit.ranks import Rank
from moekit.scoring import plan_steps
from moekit.symbols import PAD
from moekit.worker.scoring import collected


def load(folder) -> Transformer:
    plan = checkpoint.survey(checkpoint.find(folder))
    model = Transformer(plan.config).eval()
    checkpoint.fill(model, plan, range(plan.config.experts))
    return model


def test_a_layer_alone_computes_without_being_told_how():
    config = ModelConfig(**vars(BASE))
    x = torch.randn(2, 5, config.dim, generator=torch.Generator().manual_seed(1))
    moe = MoE(config, config.moe_layers[0], config.experts, Local())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    with torch.inference_mode():
        found = moe(x, Pass())
        assert found.shape == (2, 5, 2, config.dim)
        routing = moe.route(x.flatten(0, 1), Pass())
        w1, b1, w2, b2 = moe.experts.expert(int(routing.experts[0, 0, 0]))
        wanted = (
            torch.relu(x[0, 0] @ w1.T + b1) if config.activation == "relu" else F.gelu(x[0, 0] @ w1.T + b1)
        )
        wanted = (wanted @ w2.T + b2) * routing.weights[0, 0, 0]
        torch.testing.assert_close(found[0, 0, 0], wanted, rtol=1e-5, atol=1e-6)
        use(moe, "grouped_mm")
        torch.testing.assert_close(moe(x, Pass()), found, rtol=1e-5, atol=1e-6)
        assert AddNorm(config.dim)(x)[1].shape == Attention(config, 0)(x, None, None).shape == x.shape


def test_what_a_model_is_made_of_computes_with_the_same_back_end():
    with torch.device("meta"):
        model = Transformer(ModelConfig(**vars(BASE)))
    assert model.backend == "loop"
    for backend in ("loop", "grouped_mm"):
        model.use(backend)
        tables = {part.operations.backend for part in model.modules() if hasattr(part, "operations")}
        assert tables == {backend} == {model.backend}


def test_triton_is_imported_only_where_it_is_asked_for():
    code = (
        "import sys, torch, moekit.worker.scoring, moekit.worker.decoding\n"
        "from moekit.nn.operations import BACKENDS, choose_backend\n"
        "BACKENDS[choose_backend('auto', torch.device('cpu'), torch.float16)]()\n"
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("name", ["before_dropping", "learned_positions", "mixture", "no_positions"])
def test_the_cache_gives_what_the_whole_text_gives(name, tmp_path):
    """Prompts of three lengths in one batch, then token by token, against one pass over the finished texts."""
    build(name, tmp_path)
    model = load(tmp_path)
    tokens = torch.randint(4, 190, (3, 20), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([5, 9, 12])
    prompts = torch.where(torch.arange(12) < lengths[:, None], tokens[:, :12], PAD)
    with torch.inference_mode():
        whole = model(tokens)
        cache = Cache(model.config, 3, 20, torch.device("cpu"), torch.float32)
        features = model(prompts, Pass(cache=cache))
        cache.advance(lengths)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(features[row, :length], whole[row, :length], rtol=1e-4, atol=1e-5)
        cache.select(torch.tensor([2, 0, 1]))
        tokens, whole = tokens[[2, 0, 1]], whole[[2, 0, 1]]
        for _ in range(8):
            features = model(tokens.gather(1, cache.lengths[:, None]), Pass(cache=cache))
            torch.testing.assert_close(features[:, 0], whole[range(3), cache.lengths], rtol=1e-4, atol=1e-5)
            cache.advance(1)


def test_a_cache_beyond_the_learned_positions_is_an_error(tmp_path):
    """Where nobody says that it is padding."""
    build("learned_positions", tmp_path)
    model = load(tmp_path)
    cache = Cache(model.config, 1, 2 * model.config.max_positions, torch.device("cpu"), torch.float32)
    cache.advance(model.config.max_positions - 1)
    with torch.inference_mode():
        assert model(torch.tensor([[5]]), Pass(cache=cache)).isfinite().all()
        with pytest.raises(IndexError):
            model(torch.tensor([[5, 6]]), Pass(cache=cache))


def test_packed_batches_are_routed_each_for_itself(tmp_path, reference):
    """Many batches in one forward pass, capacity counted batch by batch: the same as one pass a batch."""
    build("prioritized_before", tmp_path)
    model = load(tmp_path)
    data = open_data(reference / "data-bin", "valid", tokens_per_sample=24, batch_size=2, max_positions=64)
    batches = [batch for batch in data if not batch.padded()][:9]
    tokens = torch.from_numpy(np.concatenate([b.tokens for b in batches])).long()
    with torch.inference_mode():
        packed = model(tokens, Pass(fraction=0.05, groups=len(batches)))
        alone = torch.cat([model(part, Pass(fraction=0.05)) for part in tokens.split(2)])
        together = model(tokens, Pass(fraction=0.05))
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, together, atol=1e-3), (
        "the capacity makes no difference: nothing is tested"
    )


@pytest.mark.parametrize("name", ["before_dropping", "mask_padding"])
def test_padding_behind_the_text_needs_no_mask_where_nobody_is_dropped(
    name, tmp_path, reference, monkeypatch
):
    build(name, tmp_path)
    how = {"tokens_per_sample": 64, "batch_size": 4, "sample_break_mode": "eos", "progress": False}
    masked = []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, tokens, asked: masked.append(asked.padding is not None) or forward(self, tokens, asked),
    )
    with moekit.load(tmp_path, 1, "cpu", progress=False) as model:
        found = model.evaluate(reference / "data-bin", **how)
        assert not any(masked)
        model.evaluate(reference / "data-bin", capacity_token_fraction=9.0, **how)
        assert any(masked)
        exact = model.evaluate(reference / "data-bin", **how | {"batch_size": 1})
    pd.testing.assert_frame_equal(found.tokens, exact.tokens, atol=1e-5, rtol=0)


def test_steps_hold_batches_of_one_shape_and_lose_none():
    shapes = [(2, 8)] * 7 + [(1, 8)] + [(2, 8)] * 2
    batches = [
        Batch(i, np.arange(b), np.full((b, t), 5), np.full((b, t), 5), np.zeros(b))
        for i, (b, t) in enumerate(shapes)
    ]
    steps = list(plan_steps(batches, world_size=2, tokens=32))
    assert [[b.index for b in step] for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 8], [9], [7]]


def test_experts_are_dealt_evenly():
    for experts, world_size in [(512, 64), (512, 3), (8, 5), (2, 7)]:
        deal = [owned(experts, world_size, rank) for rank in range(world_size)]
        assert [e for part in deal for e in part] == list(range(experts))
        assert max(map(len, deal)) - min(map(len, deal)) <= 1


class Stamp:
    """Experts that add their number, counted overall, to their rows."""

    def __init__(self, first: int):
        self.first = first

    def __call__(self, x, assignment):
        order, counts, choices = assignment.order, assignment.counts, assignment.choices
        assert len(order) == len(x) * choices and assignment.weights is None
        number = torch.arange(self.first, self.first + len(counts)).repeat_interleave(counts)
        order = order[: len(number)]
        out = x.new_zeros(len(x) * choices, x.shape[1])
        return out.index_copy_(0, order, x[order // choices] + number[:, None])


def there_and_back(rank, experts, expected):
    """Two choices a row, some of them not kept; rank 1 has no row at all."""
    generator = torch.Generator().manual_seed(rank.rank)
    rows = 0 if rank.rank == 1 else 6
    x = torch.rand(rows, 3, generator=generator)
    expert = torch.randint(0, experts + 1, (2 * rows,), generator=generator)  # ``experts`` is none
    weights = torch.rand(2 * rows, generator=generator)
    counts = torch.bincount(expert, minlength=experts + 1)[:experts]
    stamp = Stamp(owned(experts, rank.world_size, rank.rank).start)
    dispatch = AllToAll(experts)
    done = dispatch(stamp, x, Assignment(expert.argsort(stable=True), counts, 2, weights), expected)
    wanted = (x.repeat_interleave(2, dim=0) + expert[:, None]) * weights[:, None]
    return done, wanted * (expert < experts)[:, None], int(counts.sum())


@pytest.fixture(scope="module")
def pool_of_three():
    with ranks.start(3, "cpu") as pool:
        yield pool


@pytest.mark.parametrize("expected", [None, 6, 9])
@pytest.mark.parametrize("experts", [7, 2])
def test_rows_travel_to_their_experts_and_home(pool_of_three, experts, expected):
    """To their owners alone, or where all know how many to expect, to everybody."""
    found = pool_of_three.call(there_and_back, experts, expected)
    for done, wanted, _ in found:
        torch.testing.assert_close(done, wanted, rtol=0, atol=0)
    assert found[1][2] == 0 < found[0][2] < 12, "nothing is tested where all or nothing travels"


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_randomness_depends_on_the_seed_alone(policy, tmp_path, reference):
    build("before_dropping", tmp_path)
    for path in tmp_path.iterdir():
        state = torch.load(path, weights_only=True)
        state["cfg"]["model"]["moe_second_expert_policy"] = policy
        torch.save(state, path)
    found = {}
    for world_size in (1, 2):
        with moekit.load(tmp_path, world_size, "cpu", progress=False) as model:
            for seed in (1, 2):
                result = model.evaluate(
                    reference / "data-bin", tokens_per_sample=64, batch_size=3, seed=seed, progress=False
                )
                found[world_size, seed] = result.tokens["logprob"].to_numpy()
    np.testing.assert_allclose(found[1, 1], found[2, 1], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[1, 2], found[2, 2], atol=1e-4, rtol=0)
    assert abs(found[1, 1] - found[1, 2]).max() > 0.01


def test_noise_is_independent_for_each_key():
    """Of a generation, a batch is the number of a sequence, shifted by 32 bits, and that of a step."""
    like, short = torch.empty(1, 50), [0, 1, 3, 5, 2**32 - 1]
    numbers = [*short, *(high << 32 | low for high in (1, 3, 5, 2**31 - 1) for low in short[:-1])]
    seeds = [0, 1, 3, 2**32, 1 | 3 << 32, 2**63 - 1]
    found = [
        Noise(seed, [number])(layer, "uniform", like).numpy().tobytes()
        for seed in seeds
        for number in numbers
        for layer in short
    ]
    assert len(set(found)) == len(found)
    keys = list(itertools.product(seeds, short, short))
    assert len({row.tobytes() for row in uniform(keys, 8, torch.device("cpu")).numpy()}) == len(keys)


def test_noise_is_distributed_as_it_says():
    noise = Noise(seed=3, batches=[0, 1])
    like = torch.empty(2, 500, 100)
    flat, gumbel = noise(1, "uniform", like), noise(1, "gumbel", like)
    assert 0 <= flat.min() < flat.max() < 1
    assert float(flat.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(gumbel.mean()) == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert float(gumbel.var()) == pytest.approx(torch.pi**2 / 6, rel=0.03)
    assert not flat[0].equal(flat[1])
    assert not flat.equal(noise(3, "uniform", like))
    assert noise(1, "uniform", like).equal(flat)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close(dtype, reference):
    """The demo's claim in small: perplexity of the half-precision types within a percent of float32's."""
    options = {"tokens_per_sample": 64, "progress": False}
    with moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as model:
        exact = model.evaluate(reference / "data-bin", **options).perplexity
    with moekit.load(reference / "checkpoint", 1, "cpu", dtype, progress=False) as model:
        assert model.evaluate(reference / "data-bin", **options).perplexity == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size=True"),
        ({"max_batches": 0}, "max_batches=0"),
        ({"tokens_per_sample": 65}, "tokens_per_sample=65: expected at most the model's 64 positions"),
        ({"context_window": 64}, "context_window=64 leaves no room"),
        ({"sample_break_mode": "some"}, "sample_break_mode='some': expected one of none, complete"),
        ({"capacity_token_fraction": "0.1"}, "capacity_token_fraction='0.1'"),
        ({"capacity_token_fraction": float("nan")}, "capacity_token_fraction=nan"),
        ({"subset": "nothing"}, r"has no nothing\.bin"),
    ],
)
def test_bad_arguments_are_named(reference, options, said):
    with (
        moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as model,
        pytest.raises(ValueError, match=said),
    ):
        model.evaluate(reference / "data-bin", progress=False, **options)


def test_data_of_another_dictionary_is_refused(reference, tmp_path):
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(300)))
    for name in ("valid.bin", "valid.idx"):
        (tmp_path / name).write_bytes((reference / "data-bin" / name).read_bytes())
    with (
        moekit.load(reference / "checkpoint", 1, "cpu", progress=False) as model,
        pytest.raises(ValueError, match=r"dict\.txt has 304 types, the model knows 200"),
    ):
        model.evaluate(tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"dtype='half': expected one of auto, float32"):
        moekit.load(reference / "checkpoint", 1, "cpu", "half", progress=False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"capacity": 1}, "'capacity': ...} cannot be changed; expected some of max_positions, activation"),
        ({"layers": 3}, "'layers': ...} cannot be changed"),
        ({"second_expert": "both"}, "'both': expected one of all, sampling, random"),
        ({"max_positions": 0}, "expected a whole number of at least 1"),
        ({"gate": "top3"}, "'top3': expected one of top1, top2"),
        ({"gate_fp32": 1}, "expected True or False"),
        ({"pre_norm": False}, "on which the final norm depends"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_before_ranks_start(reference, config, said):
    with pytest.raises(ValueError, match=said):
        moekit.load(reference / "checkpoint", 1, "cpu", config=config, progress=False)


def test_a_gpu_is_warmed_up_once_for_what_is_alike(reference, monkeypatch):
    """The pass that compiles kernels is not timed, and changes nothing; ranks on the CPU stand in for GPUs."""
    with moekit.load(reference / "checkpoint", device="cpu", progress=False) as model:
        how = {"tokens_per_sample": 64, "progress": False}
        wanted = model.evaluate(reference / "data-bin", **how)
        monkeypatch.setattr(type(model), "device", "cuda")
        calls, call = [], model.ranks.call
        monkeypatch.setattr(model.ranks, "call", lambda fn, *a, **k: calls.append(fn) or call(fn, *a, **k))
        model.evaluate(reference / "data-bin", **how)
        first = len(calls)  # whole blocks and the padded last one are two shapes
        assert first == 3
        assert model.evaluate(reference / "data-bin", **how).tokens.equals(wanted.tokens)
        assert len(calls) == first + 1, "it is warm"
        model.evaluate(reference / "data-bin", capacity_token_fraction=0.05, **how)
        assert len(calls) == 2 * first + 1, "a capacity is another path"


def test_tables_of_positions_are_as_long_as_a_pass_needs_and_stay_where_they_are():
    from moekit.nn.positions import Positions, sinusoids

    positions = Positions(ModelConfig(2, 8, 8, 2, 10, 8, 8, max_positions=1_000_000))
    whole = sinusoids(5000, 8, torch.device("cpu"))
    before = []
    for length in (3, 100, 62, 4000) * 2:
        assert positions(length, torch.device("cpu"), Pass()).equal(whole[2 : 2 + length])
        before.append({rows: table.data_ptr() for (rows, _), table in positions.tables.items()})
    assert sorted(before[3]) == [8, 64, 128, 4096]
    assert all(places.items() <= before[-1].items() for places in before)
    with pytest.raises(ValueError, match="dim 3 are not defined; expected a dim of 4 or more"):
        sinusoids(4, 3, torch.device("cpu"))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_share_arrives_as_it_was_sent(count):
    step = text_batches([list(range(5, 8 + n % 2)) for n in range(2 * count)], 2, 64)
    for share in shares(step, 2):
        found = pickle.loads(pickle.dumps(share))
        assert (found.count, found.shape, found.padded, found.trailing) == (count, (2, 5), True, True)
        assert [b.index for b in found.batches] == [b.index for b in share.batches]
        for one, other in zip(found.batches, share.batches, strict=True):
            for name in ("ids", "tokens", "targets", "starts"):
                assert getattr(one, name).tolist() == getattr(other, name).tolist()
                assert getattr(one, name).dtype == getattr(other, name).dtype


def test_a_step_is_collected_while_the_next_one_runs():
    """In both ways to score: what a step gives is waited for once the next step is launched."""
    done = []

    def launched():
        for number in range(3):
            done.append(f"launch {number}")
            yield lambda number=number: done.append(f"collect {number}") or number

    checks = SimpleNamespace(operations=SimpleNamespace(check=lambda model: done.append("check")))
    rank = Rank(0, 1, torch.device("cpu"), state={"model": checks})
    assert list(collected(rank, launched())) == [0, 1, 2]
    assert done == ["launch 0", "launch 1", "collect 0", "launch 2", "collect 1", "collect 2", "check"]
    assert list(collected(rank, iter(()))) == [] and done[-1] == "check"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_wait_for_their_own_work_alone():
    """The host launches a step while the device is at work, and gets the numbers of a step while the next one runs."""
    device = torch.device("cuda")
    # Pinned memory is found once.
    assert Copy(*on_device(device, np.arange(9))).array().tolist() == list(range(9))
    before, later = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(10**9)
    before.record()
    [ids] = on_device(device, np.arange(9))
    assert not before.query(), "the copy to the device waited"
    copy = Copy(ids + 1)
    torch.cuda._sleep(10**9)
    later.record()
    assert copy.array().tolist() == list(range(1, 10))
    assert not later.query(), "the copy to the host waited"


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_arrays_of_ids_travel_together_and_keep_their_shapes(device):
    """Each begins where kernels read 16 bytes at once, after others with an odd number of ids, too."""
    given = [
        np.array([7], np.int64),
        np.arange(15, dtype=np.int32).reshape(3, 5),
        np.zeros((0, 4), np.int32),
        np.arange(2),
    ]
    found = on_device(torch.device(device), *given)
    for one, other in zip(found, given, strict=True):
        assert (one.dtype, one.device.type, tuple(one.shape)) == (torch.long, device, other.shape)
        assert one.tolist() == other.tolist()
        assert one.is_contiguous() and (device == "cpu" or one.data_ptr() % 16 == 0)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_tensors_that_are_filled_again_stay_where_they_are(device):
    feed, seen = Feed(torch.device(device), (3,), (2, 2)), []
    places = [tensor.data_ptr() for tensor in feed.tensors]
    for turn in range(3):
        if device == "cuda":
            # The copies are made later than the host asks for them.
            torch.cuda._sleep(10**8)
        own, other = np.full(3, turn, np.int32), np.full((2, 2), -turn)
        seen.append([tensor.clone() for tensor in feed(own, other)])
        own[:] = other[:] = 99
    assert [tensor.data_ptr() for tensor in feed.tensors] == places
    assert [[tensor.unique().tolist() for tensor in one] for one in seen] == [[[r], [-r]] for r in range(3)]
