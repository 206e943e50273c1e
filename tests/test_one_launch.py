"""A decode step in one launch, under Triton's interpreter: its arithmetic, and how programs divide the work.

The interpreter runs one program after the other, so there each phase is a launch of its own, and no barrier is tested.
"""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = "TRITON_INTERPRET"
if DEVICE == "cpu":
    os.environ[INTERPRET] = "1"  # read when a kernel is defined: by the imports that follow

triton = pytest.importorskip("triton")
import triton.language as tl
from branch_cases import BASE, CASES
from steps import VOCAB, against_slow

from moekit.nn.cache import Cache
from moekit.nn.dispatch import Local
from moekit.nn.experts import QuantisedExperts
from moekit.nn.gates import GATES, Top2
from moekit.nn.kernels import grid_barrier, one_launch, one_peers, operations
from moekit.nn.kernels.fixed_point import fixed, floating
from moekit.nn.kernels.peer_dispatch import PeerDispatch
from moekit.nn.passes import Pass
from moekit.nn.quantise import KINDS
from moekit.nn.transformer import Transformer, empty


@triton.jit
def _fix(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, fixed(tl.load(x + at)))


@triton.jit
def _float(units, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, floating(tl.load(units + at)))


os.environ.pop(INTERPRET, None)  # other tests know nothing of it
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv(INTERPRET, "1")


def model_of(config, kind: torch.dtype | None = None) -> Transformer:
    """A model whose biases, norms and gates matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.device("cpu"):
        model = empty(config, torch.device("cpu"), torch.float32)
    for name, p in model.named_parameters():
        std = 0.3 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
        p.data.normal_(float(name.endswith("norm.weight")), std, generator=generator)
    for layer in model.layers:
        if layer.moe is not None and kind is not None:
            layer.moe.experts = QuantisedExperts.of(layer.moe.experts, kind)
    return model.to(DEVICE)


def in_one_launch_against_slow(
    model: Transformer, programs: int | None, tolerance: float = 1e-5, steps: int = 2
) -> None:
    # A GPU has the programs that it has room for.
    programs = programs if DEVICE == "cpu" else None

    def read_on(read, asked):
        return one_launch.read_on(model, read.contiguous(), asked.cache, VOCAB, programs)

    against_slow(model, 1, read_on, tolerance, "loop", steps)
    grid_barrier.check(model)


@pytest.mark.parametrize(
    "name, programs",
    [
        ("before_dropping", 1),
        ("before_dropping", 3),
        ("top1", 7),
        ("every_layer", 5),
        ("every_third_layer", 2),
        ("twelve_experts", 4),
        ("gate_in_weights_dtype", 11),
        ("relu", 3),
        ("tanh", 4),
        ("no_final_norm", 2),
        ("learned_positions", 3),
        ("no_positions", 4),
        ("own_output", 2),
    ],
)
def test_programs_together_are_the_slow_model(name, programs):
    config = CASES[name].config
    # With four layers, each buffer of the residual stream is used again.
    config = replace(
        config, layers=4 if name == "before_dropping" and programs == 3 else max(2, config.moe_freq)
    )
    in_one_launch_against_slow(model_of(config), programs)


@pytest.mark.skipif(DEVICE == "cuda", reason="these sizes are for few programs")
def test_a_dense_model_and_more_chunks_and_slots_than_one(monkeypatch):
    monkeypatch.setattr(
        one_launch, "FORM", one_launch.FORM | {"chunk": 16, "slots": 2, "outputs": 8, "rows": 2}
    )
    in_one_launch_against_slow(model_of(replace(BASE, layers=2, moe_freq=0, experts=0)), 5)


@pytest.mark.parametrize("name, programs", [("every_layer", 3), ("top1", 4)])
def test_all_programs_take_turns_at_each_choice(name, programs, monkeypatch):
    """So it is in models that are too wide for half of the programs."""
    monkeypatch.setattr(one_launch, "MOST", 1)
    in_one_launch_against_slow(model_of(replace(CASES[name].config, layers=2)), programs)


@pytest.mark.parametrize("kind, programs", [("int8", 3), ("fp8", 4)])
def test_experts_of_one_byte(kind, programs):
    in_one_launch_against_slow(model_of(replace(BASE, layers=2), KINDS[kind]), programs)


def test_half_precision():
    in_one_launch_against_slow(model_of(replace(BASE, layers=2)).half(), 3, 2e-3)


def test_a_sum_is_the_same_in_any_order():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(3)).to(DEVICE) * 100
    units = torch.empty(4096, dtype=torch.long, device=DEVICE)
    _fix[(1,)](x, units, N=4096)
    assert (units.double() / 2**32 - x.double()).abs().max() <= 2**-32
    back = torch.empty_like(x)
    _float[(1,)](units, back, N=4096)
    assert torch.allclose(back, x, rtol=2e-7, atol=2**-31)
    total, exact = units.sum().item() / 2**32, x.double().sum().item()
    assert abs(total - exact) < 4096 * 2**-32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 6e5, -6e5])
@pytest.mark.parametrize("times", [1, 2, 256, 2000])
def test_what_is_not_finite_or_too_large_makes_a_sum_nan(bad, times):
    x = torch.tensor([bad, 65504.0], device=DEVICE)
    units = torch.empty(2, dtype=torch.long, device=DEVICE)
    _fix[(1,)](x, units, N=2)
    sums = torch.stack([units[0] * times + units[1] * 3, units[1] * 3])
    back = torch.empty(2, device=DEVICE)
    _float[(1,)](sums, back, N=2)
    assert back[0].isnan() and back[1] == 3 * 65504


def test_a_wait_that_gave_up_is_an_error_once():
    model = torch.nn.Module()
    count = grid_barrier.counter(model, torch.device(DEVICE))
    grid_barrier.check(model)
    count += grid_barrier.GAVE_UP + 17
    with pytest.raises(RuntimeError, match="did not all run at the same time"):
        grid_barrier.check(model)
    grid_barrier.check(model)
    assert count.item() == 0


def test_what_the_kernel_is_not_made_for_takes_the_others(monkeypatch):
    monkeypatch.setattr(one_launch, "since_hopper", lambda device: True)
    monkeypatch.setattr(one_launch, "multiprocessors", lambda device: 132)

    def fits(sequences: int = 1, **options) -> bool:
        with torch.device("meta"):
            return one_launch.fits(Transformer(replace(BASE, **options)).half(), sequences)

    assert fits() and fits(one_launch.FEW) and fits(gate="top1") and fits(moe_freq=0, experts=0)
    assert not fits(one_launch.FEW + 1)
    dropping = {"dispatched": lambda self, *chosen: None, "softmax_top_k": True}
    monkeypatch.setitem(GATES, "own", type("Own", (Top2,), dropping))
    for options in (
        {"gate": "own"},
        {"pre_norm": False},
        {"embedding_norm": True},
        {"input_dim": 16},
        {"output_dim": 16},
        {"alternate_ffn_dim": 24},
        {"second_expert": "sampling"},
        {"ffn_dim": 40},
        {"ffn_dim": 200_000},
        # 40 units a program, and not the 38.3 of a fair share, would be too many.
        {"dim": 960, "input_dim": 960, "output_dim": 960, "ffn_dim": 5_056, "heads": 4},
        {"dim": 36, "input_dim": 36, "output_dim": 36},
    ):
        assert not fits(**options), options
    with torch.device("meta"):
        assert not one_launch.fits(Transformer(BASE), 1)
        monkeypatch.undo()
        assert not one_launch.fits(Transformer(BASE).half(), 1)


def test_a_model_whose_tensors_move_gets_a_new_table():
    model = model_of(replace(BASE, layers=2))
    first = one_launch.plan_of(model)
    assert one_launch.plan_of(model) is first
    weight = model.layers[1].attn.out.weight
    weight.data = weight.data.clone()
    assert one_launch.plan_of(model).addresses != first.addresses
    in_one_launch_against_slow(model, 2, steps=1)


@on_gpu
def test_all_programs_of_a_gpu_and_the_same_bits_again():
    from moekit.nn.graphs import Graph

    model = model_of(replace(BASE, dim=256, input_dim=256, output_dim=256, ffn_dim=512)).half()
    assert one_launch.fits(model, 1)
    in_one_launch_against_slow(model, None, 1e-2)
    model.use("triton")
    cache = Cache(model.config, 1, 64, torch.device(DEVICE), torch.float16)
    cache.advance(20)
    with torch.inference_mode():
        tokens = torch.tensor([4], device=DEVICE)
        first = operations.read_on(model, tokens, Pass(cache=cache), 150).clone()
        graph = Graph(lambda read: operations.read_on(model, read, Pass(cache=cache), 150), tokens)
        assert all(graph(tokens).equal(first) for _ in range(50))
    model.operations.check(model)


@torch.inference_mode()
def compared(rank, sequences: list[int], dim: int) -> tuple[bool, list[tuple[float, torch.Tensor, bool]]]:
    """Whether a step in one launch is for this model, and of some steps the distance from the one in several kernels.

    Besides, its logits, and whether the same step gives the same bits each time. ``sequences`` of each rank: 1 or 0.
    """
    from moekit.nn.dispatch import owned
    from moekit.nn.kernels import short_step
    from moekit.nn.kernels.peer_dispatch import PeerDispatch

    config = replace(BASE, dim=dim, input_dim=dim, output_dim=dim, ffn_dim=512, heads=4, experts=16, layers=4)
    held, count, device = owned(16, rank.world_size, rank.rank), sequences[rank.rank], rank.device
    dispatch = PeerDispatch(16, 2, dim, torch.float16, device)
    model = Transformer(config, len(held), dispatch)
    for n, (name, p) in enumerate(model.named_parameters()):
        # Each rank draws what the others draw, and takes its own experts.
        whole = (16, *p.shape[1:]) if ".experts." in name else p.shape
        drawn = torch.randn(whole, generator=torch.Generator().manual_seed(n)) * 1.5 * p.shape[-1] ** -0.5
        p.data.copy_(drawn[held.start : held.stop] if ".experts." in name else drawn)
    model = model.requires_grad_(False).to(device).half().use("triton")
    cache, found = Cache(config, count, 64, device, torch.float16), []
    cache.advance(7)
    fits = one_launch.fits(model, 1)
    for step in range(5):
        tokens = torch.full((count,), 5 + step, device=device)
        kept = cache.kv.clone()
        slow = short_step.read_on(model, tokens, cache, VOCAB, 1)
        cache.kv.copy_(kept)
        fast = one_launch.read_on(model, tokens, cache, VOCAB)
        again = [one_launch.read_on(model, tokens, cache, VOCAB) for _ in range(20)]
        cache.advance(1)
        if count:
            off = (fast.float() - slow.float()).norm() / slow.float().norm()
            found.append((off.item(), fast.cpu(), all(torch.equal(fast, one) for one in again)))
    model.operations.check(model)
    return fits, found


# Rows of 128 words have fewer than a program of eight warps has threads.
@pytest.mark.parametrize("dim", [128, 256, 640])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_several_gpus(world_size, dim):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    from moekit import ranks

    with ranks.start(world_size, "cuda") as pool:
        for sequences in ([1] * world_size, [0] * (world_size - 1) + [1], [1, 0] * (world_size // 2)):
            logits = []
            for (fits, found), count in zip(pool.call(compared, sequences, dim), sequences, strict=True):
                assert fits and len(found) == 5 * count
                assert all(off < 1e-2 and same for off, _, same in found)
                logits += [torch.cat([step for _, step, _ in found])] if count else []
            # All of them read the same.
            assert all(one.equal(logits[0]) for one in logits)


def test_no_two_warps_look_at_one_word_of_a_row():
    """They may see it at different times, and then a program would compute with a word that is not there yet."""
    several = PeerDispatch.__new__(PeerDispatch)
    several.world_size = 2
    for dim, chunk, warps in ((48, 16, 1), (160, 32, 1), (192, 64, 2), (640, 128, 4), (768, 256, 8)):
        model = SimpleNamespace(config=replace(BASE, dim=dim), dispatch=several)
        form = one_launch.form_of(model)
        assert (form["chunk"], form["warps"]) == (chunk, warps)
        model.dispatch = Local()
        assert one_launch.form_of(model)["warps"] == 8, "no other rank writes words"
    # A program of fewer warps has fewer registers, for its share of an expert, too.
    for dispatch, programs in ((Local(), 66), (several, 132)):
        model = SimpleNamespace(config=replace(BASE, dim=192, ffn_dim=4000), dispatch=dispatch)
        assert one_launch._of_a_choice(model, 132, 2) == programs
    for top_k, ranks, fits in ((2, 16, True), (1, 32, True), (2, 17, False)):
        assert one_peers.fits(SimpleNamespace(of=(top_k, 64, 128, torch.float16, ranks))) == fits
