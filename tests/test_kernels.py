"""The Triton kernels against their plain counterparts; on machines without a GPU under Triton's interpreter."""

import functools
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = "TRITON_INTERPRET"
if DEVICE == "cpu":
    os.environ[INTERPRET] = "1"  # read when a kernel is defined: by the imports that follow

triton = pytest.importorskip("triton")
import torch.nn.functional as F
import triton.language as tl
from branch_cases import BASE, CASES, build
from steps import VOCAB, against_slow
from triton_interpreter import replace_once

import moekit
from moekit import checkpoint
from moekit.batches import shares
from moekit.bench.gelu import gelu
from moekit.bench.score import random_batch
from moekit.checkpoint import copying
from moekit.nn import gate, gates, transformer
from moekit.nn import graphs as graph
from moekit.nn.cache import Cache
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import owned
from moekit.nn.experts import Assignment, Experts, QuantisedExperts
from moekit.nn.gates import Top2, gate_of
from moekit.nn.graphs import Graph
from moekit.nn.kernels import (
    attention,
    batch_step,
    counting,
    dense,
    flash,
    grid_barrier,
    logprobs,
    narrow,
    ordered,
    output,
    rounding,
    short_step,
    specialised,
    streamed,
    tiles,
    vectors,
)
from moekit.nn.kernels import gate as fused_gate
from moekit.nn.kernels.activations import ACTIVATIONS
from moekit.nn.kernels.cuts import ANY, CUTS, ONE_BYTE_CUTS, SPECIALISED, Blocks, Cut
from moekit.nn.kernels.gpu import is_hopper
from moekit.nn.kernels.grouped import gathered_ffn, grouped_ffn, planned_ffn
from moekit.nn.kernels.logprobs import best, target_log_probs
from moekit.nn.kernels.operations import TRITON
from moekit.nn.kernels.peer_dispatch import PeerDispatch
from moekit.nn.kernels.peers import Mailbox, publish
from moekit.nn.logprobs import log_probs
from moekit.nn.operations import BACKENDS, attend, choose_backend, linear, use
from moekit.nn.passes import Pass
from moekit.nn.quantise import KINDS, quantise
from moekit.nn.transformer import AddNorm, Transformer
from moekit.symbols import PAD
from moekit.worker import decoding as decode
from moekit.worker import scoring as worker
from moekit.worker.prompts import dealt
from moekit.worker.sampling import Settings


@triton.jit
def _gelu_of(x, out, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, gelu(tl.load(x + at)))


os.environ.pop(INTERPRET, None)  # other tests know nothing of it


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv(INTERPRET, "1")


BFLOAT = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cannot multiply bfloat16"),
)
# Where a kernel is for numbers of two bytes on a GPU, the interpreter checks its arithmetic.
FLOAT = pytest.param(
    torch.float32, marks=pytest.mark.skipif(DEVICE == "cuda", reason="GPUs take torch's attention")
)
on_hopper = pytest.mark.skipif(
    DEVICE == "cpu" or not is_hopper(torch.device("cuda")), reason="needs a GPU of Hopper"
)
KEY = -1  # of a generation that is none of the driver's
ONE_BYTE = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
TINY = Cut(ANY, ANY, Blocks(16, 32, 16, 4, 2), Blocks(16, 16, 32, 4, 2))
# The same, with the weights as the left operand.
SWAPPED = Cut(ANY, ANY, replace(TINY.up, swapped=True), replace(TINY.down, swapped=True))


def experts_of(count=5, dim=24, width=40, activation="gelu", dtype=torch.float32) -> Experts:
    torch.manual_seed(count)
    experts = Experts(count, dim, width, activation)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(DEVICE, dtype).requires_grad_(False)


def choices_of(rows, choices, experts, seed=0, spread=1.0):
    """Random choices, some of them no expert's; ``spread`` < 1 leaves experts without any."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, max(1, int(experts * spread)), (rows * choices,), generator=generator)
    expert[torch.rand(rows * choices, generator=generator) < 0.2] = experts
    counts = torch.bincount(expert, minlength=experts + 1)[:experts]
    return Assignment(expert.argsort(stable=True).to(DEVICE), counts.to(DEVICE), choices)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    experts = experts_of(activation=activation)
    x = torch.randn(30, 24, device=DEVICE)
    some = replace(choices_of(30, 2, 5), weights=torch.rand(60, device=DEVICE))
    torch.testing.assert_close(grouped_ffn(experts, x, some), experts(x, some), rtol=1e-5, atol=1e-5)


def test_the_gelu_that_the_bench_gives_to_a_peer():
    x = torch.linspace(-6, 6, 64, device=DEVICE)
    found = torch.empty_like(x)
    _gelu_of[(1,)](x, found, 64)
    torch.testing.assert_close(found, F.gelu(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 17, 90])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("spread", [0.2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT])
def test_rows_of_any_number_and_spread(rows, choices, spread, dtype):
    """Full and part tiles, experts without rows, sizes that no block divides."""
    experts = experts_of(dtype=dtype)
    x = torch.randn(rows, 24, device=DEVICE).to(dtype)
    some = choices_of(rows, choices, 5, seed=rows, spread=spread)
    found = grouped_ffn(experts, x, some, cut=TINY)
    exact = experts.float()(x.float(), some)
    none = some.order[int(some.counts.sum()) :]
    assert not found[none].any(), "choices of no expert are zero"
    error = (found.float() - exact).norm() / exact.norm().clamp(min=1e-9)
    assert error < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut(cut):
    experts = experts_of(3, 32, 64, dtype=torch.float16)
    x = torch.randn(70, 32, device=DEVICE).half()
    some = replace(choices_of(70, 2, 3), weights=torch.rand(140, device=DEVICE).half())
    found = grouped_ffn(experts, x, some, cut=cut).float()
    exact = experts.float()(x.float(), replace(some, weights=some.weights.float()))
    assert (found - exact).norm() / exact.norm() < 2e-3


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_rows_in_the_order_of_their_choices(choices, spread):
    x = torch.randn(33, 24, device=DEVICE)
    some = choices_of(33, choices, 5, spread=spread)
    found = ordered.in_order(x, some.order, some.counts, choices)
    held = int(some.counts.sum())
    assert found.shape == (33 * choices, 24) and found[:held].equal(x[some.order[:held] // choices])


def test_every_thread_holds_eight_neighbouring_columns():
    """The layout of a tile has each number once, and what a thread stores at a time is 16 bytes."""
    for rows, columns, warps in ((128, 128, 4), (128, 128, 8), (64, 256, 4), (128, 32, 8)):
        layout = specialised.layout(rows, columns, warps)
        assert layout.reg_bases[:3] == [[0, 1], [0, 2], [0, 4]]
        bases = layout.reg_bases + layout.lane_bases + layout.warp_bases
        assert 2 ** len(layout.warp_bases) == warps and len(layout.lane_bases) == 5
        bits = {(2**bit, 0) for bit in range(rows.bit_length() - 1)}
        bits |= {(0, 2**bit) for bit in range(columns.bit_length() - 1)}
        assert len(bases) == len(bits) and {tuple(base) for base in bases} == bits


@pytest.mark.parametrize("warps, registers, each", [(4, 240, 168), (8, 112, 96)])
def test_registers_of_specialised_warps_by_hand(warps, registers, each):
    options, given = specialised.launch(replace(SPECIALISED, warps=warps))
    assert (given, options["maxnreg"]) == (registers, each)
    threads = 32 * (2 * warps + 4)
    assert (
        threads * each <= 65_536
        and 2 * warps * 32 * given + 128 * specialised.LOADER_REGISTERS.value <= threads * each
    )


def test_segments_of_a_dictionary_by_hand():
    """Blocks of rows and of types, programs; the program with the most work has so many pieces of work, of so many blocks."""
    assert output.segment(512, 197, 132) == 22, "35 x 22 = 770, where 2 segments are 8 x 99 = 792"
    assert output.segment(16, 197, 132) == 25, "1 x 25, where 32 segments are 4 x 7 = 28"
    assert output.segment(128, 197, 132) == 197, "each has one piece of all"


def test_segments_are_combined():
    """Parts of a row that another kernel found, one of them without a type that counts."""
    features, weight, targets = torch.randn(11, 40), torch.randn(90, 40), torch.randint(0, 90, (11,))
    logits = features @ weight.T
    parts = torch.full((2, 4, 11), torch.nan)
    for i, some in enumerate((logits[:, :50], logits[:, 50:], torch.full((11, 3), -torch.inf))):
        parts[0, i] = some.amax(1)
        parts[1, i] = (some - some.amax(1, keepdim=True)).exp().nan_to_num(0).sum(1)
    found = torch.empty(11, device=DEVICE)
    given = [x.to(DEVICE) for x in (features, weight, targets, parts[:, :3].contiguous())]
    output._combined[(2,)](*given, found, 11, 3, D=40, ROWS=8, BLOCK=64, SEGMENTS=output.SEGMENTS)
    wanted = logits.log_softmax(1)[torch.arange(11), targets].to(DEVICE)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "activation, rows", [("gelu", 512), ("gelu", 577), ("relu", 16_449), ("linear", 8192)]
)
def test_a_dense_layer(activation, rows, dtype):
    layer = torch.nn.Linear(256, 512).to(DEVICE, dtype).requires_grad_(False)
    x = torch.randn(1, rows, 256, device=DEVICE).to(dtype)
    assert dense.fits(x, layer, activation)
    found = dense.linear(x, layer, activation)
    wanted = linear(x.float(), layer.float(), activation)
    assert found.shape == (1, rows, 512) and found.dtype == dtype
    assert (found - wanted).norm() / wanted.norm() < {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, dims, vocab", [(2048, 768, 50_264), (2125, 128, 1000), (2048, 64, 7)])
def test_log_probabilities_without_logits(rows, dims, vocab, dtype):
    features = torch.randn(rows, dims, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab, dims, device=DEVICE) * dims**-0.5).to(dtype)
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    assert output.fits(features, weight)
    found = output.target_log_probs(features, weight, targets)
    assert found.equal(output.target_log_probs(features, weight, targets))
    wanted = target_log_probs(F.linear(features, weight), targets)
    # A logit of up to 8 may round the other way.
    assert (found - wanted).abs().max() < {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert (found - wanted).abs().mean() < {torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]


def test_the_gelu_of_kernels():
    """Against the formula in float64: its error is 4.4e-7 at most, and float32 adds some; far out it is exact."""
    x = torch.cat([torch.linspace(-12, 12, 2**15 - 3), torch.tensor([-6e4, 6e4, torch.nan])])
    x = x.to(DEVICE)
    found = torch.empty_like(x)
    _gelu_of[(2**5,)](x, found, 2**10)
    assert (found - F.gelu(x.double()))[:-3].abs().max() < 8e-7
    assert found[-3:-1].tolist() == [0, 6e4] and found[-1:].isnan().all()


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("rows, choices", [(1, 1), (333, 2), (2000, 2)])
def test_specialised_warps(rows, choices, warps, dtype):
    """Full and part tiles, experts without rows, choices of no expert, more tiles than programs."""
    experts = experts_of(9, 256, 512, dtype=dtype)
    x = torch.randn(rows, 256, device=DEVICE).to(dtype)
    some = choices_of(rows, choices, 9, seed=rows)
    some = replace(some, weights=torch.rand(rows * choices, device=DEVICE).to(dtype))
    blocks = replace(SPECIALISED, warps=warps)
    found = grouped_ffn(experts, x, some, cut=Cut(ANY, ANY, blocks, blocks))
    assert found.equal(grouped_ffn(experts, x, some, cut=Cut(ANY, ANY, blocks, blocks)))
    assert not found[some.order[int(some.counts.sum()) :]].any(), "choices of no expert are zero"
    exact = experts.float()(x.float(), replace(some, weights=some.weights.float()))
    error = (found.float() - exact).norm() / exact.norm().clamp(min=1e-9)
    assert error < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name, rows, held, dims",
    [
        # A program has several tiles of each product, and blocks of weights go round the ring.
        ("before_dropping", 8, 24, (768, 3072)),
        ("before_dropping", 8, 512, (128, 256)),
        ("before_dropping", 1, 3, (128, 256)),
        ("before_dropping", 8, 1, (128, 256)),
        ("before_dropping", 16, 24, (768, 3072)),
        ("before_dropping", 16, 512, (128, 256)),
        ("before_dropping", 9, 2, (128, 256)),
        # All choices are one expert, which has two tiles.
        ("before_dropping", 16, 1, (128, 256)),
        ("gate_in_weights_dtype", 15, 600, (128, 256)),
        ("gate_in_weights_dtype", 7, 600, (128, 256)),
    ],
)
def test_the_gates_choice_and_the_experts_in_one_kernel(name, rows, held, dims, dtype):
    rule = gate_of(replace(CASES[name].config, experts=held))
    experts = experts_of(held, *dims, dtype=dtype)
    x = torch.randn(rows, dims[0], device=DEVICE).to(dtype)
    model = torch.nn.Module()
    count = grid_barrier.counter(model, x.device)
    logits = torch.randn(rows, held, device=DEVICE).to(dtype)
    # Ties of all experts, and of all but one.
    logits[0] = 0.5
    logits[-1, 1:] = 0.25
    _, chosen, _, weights = fused_gate.choose(rule, logits)
    order, table, weights = tiles.planned(chosen, weights, held, 16, dtype)
    wanted = x.new_empty(rows * rule.top_k, dims[0])
    planned_ffn(experts, x, (order, table), rule.top_k, weights, CUTS[0], wanted)
    assert streamed.fits(rule, experts, x)
    for _ in range(3):
        found = streamed.chosen_ffn(rule, experts, logits, x, count)
        # The last bit of a weight may differ.
        most = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(found, wanted.view_as(found), rtol=most, atol=1e-6)
    grid_barrier.check(model)


@on_hopper
@pytest.mark.parametrize("rows", [8, 16])
def test_a_row_of_nan_is_nan_alone(rows):
    rule = gate_of(replace(CASES["before_dropping"].config, experts=40))
    experts = experts_of(40, 128, 256, dtype=torch.float16)
    count = torch.zeros(1, dtype=torch.long, device=DEVICE)
    x, logits = (torch.randn(rows, width, device=DEVICE).half() for width in (128, 40))
    wanted = streamed.chosen_ffn(rule, experts, logits, x, count)
    logits[3] = torch.nan
    found = streamed.chosen_ffn(rule, experts, logits, x, count)
    others = [row for row in range(rows) if row != 3]
    assert found[3].isnan().all() and found[others].equal(wanted[others])


@on_hopper
@pytest.mark.parametrize("sequences", [7, 8, 9, 16])
def test_seven_to_sixteen_sequences_take_one_kernel(sequences, monkeypatch):
    config = replace(CASES["before_dropping"].config, dim=128, ffn_dim=256)
    torch.manual_seed(sequences)
    model = Transformer(config).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(DEVICE, torch.float16)
    calls, own = [], streamed.chosen_ffn
    monkeypatch.setattr(streamed, "chosen_ffn", lambda *given: calls.append(1) or own(*given))
    few_against_slow(model, sequences, 1e-2)
    assert calls


def test_which_experts_take_one_kernel(monkeypatch):
    config = CASES["before_dropping"].config
    with torch.device("meta"):
        experts, many = (Experts(count, 128, 256, "gelu").half() for count in (9, 1025))
        odd, wide = Experts(9, 128, 192, "gelu").half(), Experts(9, 128, 256, "gelu")
    x = torch.empty(16, 128, dtype=torch.float16, device="meta")
    assert not streamed.fits(gate_of(config), experts, x), "no GPU of Hopper"
    monkeypatch.setattr(streamed, "is_hopper", lambda device: True)
    assert streamed.fits(gate_of(config), experts, x)
    assert not streamed.fits(gate_of(config), experts, torch.cat([x, x[:1]])), "too many rows"
    assert not streamed.fits(gate_of(config), experts, x[:0])
    assert not streamed.fits(gate_of(config), wide, x.float()), "numbers of four bytes"
    assert not any(streamed.fits(gate_of(config), other, x) for other in (odd, wide, many))
    for other in (replace(config, second_expert="sampling"), CASES["top1"].config):
        assert not streamed.fits(gate_of(other), experts, x)


def part_of(experts: Experts, held: range) -> Experts:
    found = Experts(len(held), experts.w1.shape[2], experts.width, experts.activation)
    found = found.to(DEVICE, experts.w1.dtype).requires_grad_(False)
    for name, own in found.tensors.items():
        own.copy_(experts.tensors[name][held.start : held.stop])
    return found


def mailboxes(world_size: int, *of) -> list[Mailbox]:
    """The mailboxes of several ranks in the memory of one device."""
    how = (*of, world_size)
    size = Mailbox.size(*how)
    memory = torch.zeros(world_size * size, dtype=torch.uint8, device=DEVICE)
    gave_up = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    found = []
    for rank in range(world_size):
        reach = torch.tensor([(peer - rank) * size for peer in range(world_size)], device=DEVICE)
        found.append(Mailbox(memory[rank * size : (rank + 1) * size], reach, rank, gave_up, how))
    return found


@pytest.mark.parametrize(
    "cut, dtype, dims",
    [
        (TINY, torch.float32, (9, 24, 40)),
        *(
            pytest.param(Cut(ANY, ANY, blocks, blocks), dtype, (9, 256, 512), marks=on_hopper)
            for blocks in (SPECIALISED, replace(SPECIALISED, warps=8))
            for dtype in (torch.float16, torch.bfloat16)
        ),
    ],
    ids=[
        "plain",
        *(f"specialised, {warps} warps, {kind}" for warps in (4, 8) for kind in ("half", "bfloat")),
    ],
)
def test_experts_write_into_the_memory_of_several_ranks(cut, dtype, dims):
    """Three ranks in one process, one of them without rows; places that no expert writes to keep what they have."""
    experts = experts_of(*dims, dtype=dtype)
    rows = (50, 37, 0) if DEVICE == "cpu" else (1100, 333, 0)
    boxes = mailboxes(3, 64 if DEVICE == "cpu" else 2048, 2, dims[0], dims[1], dtype)
    brought = []
    for box, count in zip(boxes, rows, strict=True):
        some = choices_of(count, 2, dims[0], seed=count)
        weights = torch.rand(2 * count, device=DEVICE)
        weights[some.order[int(some.counts.sum()) :]] = 0.0
        brought.append((torch.randn(count, dims[1], device=DEVICE).to(dtype), replace(some, weights=weights)))
        box.home.fill_(7.0)
        publish(box, *brought[-1])
    for box in boxes:
        held = owned(dims[0], 3, box.rank)
        gathered_ffn(part_of(experts, held), box, held.start, max(rows), cut)
    experts = experts.float()
    for box, (x, some), count in zip(boxes, brought, rows, strict=True):
        exact = experts(x.float(), some)
        found = box.home[:count].flatten(0, 1).float()
        none = some.order[int(some.counts.sum()) :]
        assert not found[none].any() and box.home[count:].eq(7).all()
        error = (found - exact).norm() / exact.norm().clamp(min=1e-9)
        assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def exchanged(rank, rows: list[int], dtype: torch.dtype) -> list[tuple[float, bool]]:
    """How far the experts of all ranks are off all experts here, in passes in which a rank brings fewer rows each time."""
    experts = experts_of(16, 256, 512, dtype=dtype).to(rank.device)
    dispatch = PeerDispatch(16, 2, 256, dtype, rank.device)
    held = owned(16, rank.world_size, rank.rank)
    mine, found = part_of(experts, held).to(rank.device), []
    for most in rows:
        count = max(0, most - 100 * rank.rank)
        some = choices_of(count, 2, 16, seed=rank.rank)
        weights = torch.rand(2 * count, device=DEVICE)
        weights[some.order[int(some.counts.sum()) :]] = 0.0
        x, some = torch.randn(count, 256, device=DEVICE).to(dtype), replace(some, weights=weights)
        off = dispatch(mine, x, some, most).float()
        again = dispatch(mine, x, some, most).float()
        exact = experts.float()(x.float(), some)
        experts.to(dtype)
        found.append(((off - exact).norm().item() / max(exact.norm().item(), 1e-9), off.equal(again)))
    dispatch.check()
    return found


@on_hopper
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_many_rows_over_several_gpus(world_size):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs")
    with moekit.ranks.start(world_size, "cuda") as pool:
        for dtype, most in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
            for found in pool.call(exchanged, [4096, 700, 130], dtype):
                assert all(off < most and same for off, same in found)


@ONE_BYTE
@pytest.mark.parametrize("cut", [TINY, SWAPPED, None], ids=["tiny", "swapped", "own"])
@pytest.mark.parametrize("rows, spread", [(1, 1.0), (17, 0.2), (90, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT])
def test_weights_of_one_byte(kind, cut, rows, spread, dtype):
    """Against the dequantised weights in float64, which nothing rounds."""
    experts = QuantisedExperts.of(experts_of(dtype=dtype), kind)
    x = torch.randn(rows, 24, device=DEVICE).to(dtype)
    weights = torch.rand(rows * 2, device=DEVICE).to(dtype)
    some = replace(choices_of(rows, 2, 5, seed=rows, spread=spread), weights=weights)
    found = grouped_ffn(experts, x, some, cut=cut)
    exact = dequantised(experts)(x.double(), replace(some, weights=weights.double()))
    assert not found[some.order[int(some.counts.sum()) :]].any(), "choices of no expert are zero"
    error = (found.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


def dequantised(experts: QuantisedExperts) -> Experts:
    found = Experts(experts.held, experts.w1.shape[2], experts.width, experts.activation)
    found = found.to(DEVICE, torch.float64).requires_grad_(False)
    found.b1.copy_(experts.b1)
    found.b2.copy_(experts.b2)
    for name, scale in zip(("w1", "w2"), experts.scales, strict=True):
        getattr(found, name).copy_(getattr(experts, name).float().double() * scale[..., None].double())
    return found


@ONE_BYTE
@pytest.mark.parametrize("cut", ONE_BYTE_CUTS, ids=str)
def test_every_cut_of_one_byte(cut, kind):
    experts = QuantisedExperts.of(experts_of(3, 32, 64, dtype=torch.float16), kind)
    x = torch.randn(70, 32, device=DEVICE).half()
    some = replace(choices_of(70, 2, 3), weights=torch.rand(140, device=DEVICE).half())
    found = grouped_ffn(experts, x, some, cut=cut).double()
    exact = dequantised(experts)(x.double(), replace(some, weights=some.weights.double()))
    assert (found - exact).norm() / exact.norm() < 2e-3


@ONE_BYTE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_many_matrices_to_one_byte(dtype, kind):
    """Scales and numbers are those of the plain way, bit for bit: of large and small rows, halves, and what is not finite."""
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for shape in [(1, 1), (6, 24), (40, 300), (3, 768), (7, 3000)]:
        spread = torch.randn(shape[0], 1, generator=generator).mul(3).exp()
        matrices.append(torch.randn(shape, generator=generator) * spread)
    odd = matrices[1]
    odd[1, 0], odd[2, -1], odd[3] = torch.nan, torch.inf, 0.0
    odd[4] *= 1e-30 if dtype != torch.float16 else 1e-6
    # Halves of an integer, and of the steps of a float8.
    odd[5] = torch.arange(24) * 10.5 - 120
    odd[5, 0] = 127.0
    matrices = [matrix.to(DEVICE, dtype) for matrix in matrices]

    def empty():
        shapes = [matrix.shape for matrix in matrices]
        return [
            (torch.empty(s, dtype=kind, device=DEVICE), torch.full(s[:1], -1.0, device=DEVICE))
            for s in shapes
        ]

    wanted, found = empty(), empty()
    for matrix, (numbers, scale) in zip(matrices, wanted, strict=True):
        quantise(matrix, numbers, scale)
    addresses = [matrix.data_ptr() for matrix in matrices]
    listed = rounding.entries([(a, *into) for a, into in zip(addresses, found, strict=True)])
    assert [first for first, *_ in listed] == [0, 1, 7, 47, 50]
    # What is behind the matrices in the table is not read.
    table = torch.full((8, 5), -1, dtype=torch.int64)
    table[: len(listed)] = torch.tensor(listed)
    rounding.quantise(table.to(DEVICE), len(listed), 57, 3000, dtype, kind)
    for number, ((numbers, scale), (own, own_scale)) in enumerate(zip(wanted, found, strict=True)):
        finite = scale.isfinite()
        assert (~finite).sum() == (2 if number == 1 else 0)
        assert torch.equal(scale.isnan(), own_scale.isnan()) and torch.equal(scale.isinf(), own_scale.isinf())
        assert torch.equal(scale[finite], own_scale[finite])
        assert torch.equal(numbers.view(torch.uint8)[finite], own.view(torch.uint8)[finite])
        assert not (own.float() * own_scale[:, None])[~finite].isfinite().any()


@ONE_BYTE
def test_loads_that_one_kernel_quantises(kind, monkeypatch):
    """As :class:`moekit.checkpoint.copying.Pinned` does it, and with more matrices than a load may have."""
    monkeypatch.setattr(copying, "MATRICES", 2)
    monkeypatch.setattr(rounding, "able", lambda *_: True)
    rounded = []
    monkeypatch.setattr(
        rounding, "quantise", lambda *args, own=rounding.quantise: rounded.append(args[1]) or own(*args)
    )
    pieces, wanted = [], []
    for number, shape in enumerate([(7, 300), (5, 24), (40, 24), (1, 300), (64, 100), (3, 7)] * 3):
        source = torch.randn(shape, generator=torch.Generator().manual_seed(number)).half()
        target, scale = torch.zeros(shape, dtype=kind, device=DEVICE), torch.zeros(shape[0], device=DEVICE)
        pieces.append(copying.Piece("w", source, target, scale=scale))
        pieces.append(copying.Piece("b", source[0], torch.zeros(shape[1], device=DEVICE)))
        wanted.append((torch.empty(shape, dtype=kind), torch.empty(shape[0])))
        quantise(source, *wanted[-1])
    sizes = []
    for load in copying.packed(pieces, 4096):
        memory = torch.zeros(4096, dtype=torch.uint8)
        for source in load.sources:
            first = 2 * source.at
            memory.numpy()[first : first + len(source)] = source.memory[source.start : source.stop]
        landed = copying.Landed(memory.to(DEVICE), kernels=True)
        landed.expect(load)
        landed.arrived(load)
        sizes.append(len(load.matrices))
    assert max(sizes) == 2 and rounded == [size for size in sizes if size]
    for piece, other, (numbers, scale) in zip(pieces[::2], pieces[1::2], wanted, strict=True):
        assert torch.equal(piece.target.cpu().view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(piece.scale.cpu(), scale) and torch.equal(other.target.cpu(), other.source.float())


@ONE_BYTE
def test_every_number_of_one_byte_is_converted_without_a_loss(kind):
    """All 255 numbers of a byte that are used, as weights that multiply a one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(kind)
    numbers = numbers[numbers.float().isfinite() & (numbers.float() != -128)]
    experts = QuantisedExperts(Experts(1, 16, 256, "linear").to(DEVICE).half().requires_grad_(False), kind)
    for tensor in experts.state_dict().values():
        tensor.view(torch.uint8).zero_()
    for scale in experts.scales:
        scale.fill_(1.0)
    experts.w1.data[0, : len(numbers), 3] = numbers.to(DEVICE)
    x = torch.zeros(1, 16, device=DEVICE).half()
    x[0, 3] = 1
    # The second layer gives one of the 256 at a time.
    for first in range(0, len(numbers), 16):
        experts.w2.data.view(torch.uint8).zero_()
        for column in range(min(16, len(numbers) - first)):
            experts.w2.data[0, column, first + column] = 1
        order = torch.zeros(1, dtype=torch.long, device=DEVICE)
        found = grouped_ffn(experts, x, Assignment(order, order + 1))[0].float().cpu()
        wanted = numbers[first : first + 16].float()
        assert found[: len(wanted)].equal(wanted)


@pytest.mark.parametrize("rows, choices", [(1, 1), (40, 2)])
@pytest.mark.parametrize("dim, ffn_dim", [(32, 48), (30, 48), (32, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torchs_grouped_product(rows, choices, dim, ffn_dim, dtype):
    """Also with matrices whose rows are no multiple of 16 bytes, which torch's product refuses."""
    experts = experts_of(3, dim, ffn_dim, dtype=dtype)
    x = torch.randn(rows, dim, device=DEVICE).to(dtype)
    weights = torch.rand(rows * choices, device=DEVICE).to(dtype)
    some = replace(choices_of(rows, choices, 3, seed=rows, spread=0.7), weights=weights)
    wanted = experts(x, some)
    use(experts, "grouped_mm")
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    found = experts(x, some)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_no_rows():
    experts = experts_of()
    nothing = torch.zeros(0, dtype=torch.long, device=DEVICE)
    zero = torch.zeros(5, dtype=torch.long, device=DEVICE)
    assert grouped_ffn(experts, torch.zeros(0, 24, device=DEVICE), Assignment(nothing, zero)).shape == (0, 24)
    order = torch.arange(4, device=DEVICE)  # all of them no expert's
    assert not grouped_ffn(experts, torch.ones(4, 24, device=DEVICE), Assignment(order, zero)).any()


@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_choices_of_no_expert_are_zero_whatever_was_there(spread, monkeypatch):
    """There are more of them than a tile has."""
    empty = torch.Tensor.new_empty

    def anything(x, *shape, **how):
        found = empty(x, *shape, **how)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", anything)
    experts, some = experts_of(), choices_of(90, 2, 5, spread=spread)
    found = grouped_ffn(experts, torch.ones(90, 24, device=DEVICE), some, cut=TINY)
    held = int(some.counts.sum())
    assert 16 < held < 180 - 16
    assert not found[some.order[held:]].any() and found[some.order[:held]].any(dim=1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_experts(backend):
    """More ranks than experts: one has none, and gets everybody's rows."""
    experts = experts_of(0)
    use(experts, backend)
    counts = torch.zeros(0, dtype=torch.long, device=DEVICE)
    some = Assignment(torch.arange(6, device=DEVICE), counts, 2)
    found = experts(torch.ones(3, 24, device=DEVICE), some)
    assert found.shape == (6, 24) and not found.any()


def test_tiles():
    counts = torch.tensor([0, 33, 16, 0, 1, 0], device=DEVICE)
    table = tiles.tiles(counts, 68, 16).cpu()  # of 68 places, 18 are no expert's
    assert table[:, :5].T.tolist() == [[1, 0, 16], [1, 16, 32], [1, 32, 33], [2, 33, 49], [4, 49, 50]]
    assert table[:, 5:].T.tolist() == [[6, 50, 66], [6, 66, 68]] + [[6, 0, 0]] * 4
    assert tiles.most_tiles(2, 512, 16) == 2 and tiles.most_tiles(4096, 512, 16) == 256 + 513


def test_there_are_tiles_enough_for_any_counts():
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        experts, rows = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(2))
        counts = torch.randint(0, 30, (experts + 1,), generator=generator)
        counts *= torch.rand(experts + 1, generator=generator) < 0.5  # the last ones are no expert's
        assert int((-(-counts // rows)).sum()) <= tiles.most_tiles(int(counts.sum()), experts, rows)


@pytest.mark.parametrize("tokens, experts", [(1, 512), (5, 3), (64, 40), (65, 512), (300, 7), (2000, 40)])
def test_choices_are_sorted_without_a_sort(tokens, experts, monkeypatch):
    monkeypatch.setattr(counting, "CHUNKS", 16)
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randint(0, experts, (1, tokens, 2), generator=generator).to(DEVICE)
    kept = (torch.rand(1, tokens, 2, generator=generator) < 0.8).to(DEVICE)
    routing = gate.Routing(None, chosen, None, kept, None, None)
    for found, wanted in zip(
        tiles.by_expert(routing, experts), gate.by_expert(routing, experts), strict=True
    ):
        assert found.equal(wanted)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups, tokens, experts", [(1, 128, 5), (3, 300, 7), (5, 100, 40), (1, 300, 160)])
def test_buffers_are_filled_without_a_sort(groups, tokens, experts, before, top_k, monkeypatch):
    """The bits of the plain way, where the capacity drops many, a few, and none; chunks and groups two at a time."""
    monkeypatch.setattr(counting, "CHUNKS", 4)
    rule = gate_of(config(experts=experts, gate=f"top{top_k}", normalize_before_dropping=before))
    logits = torch.randn(groups, tokens, experts, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    shares = []
    for fraction, dtype in (
        (0.5 / experts, torch.float32),
        (0.9 / experts, torch.float16),
        (1.0, torch.float16),
    ):
        slow = rule.route(logits.to(dtype), fraction=fraction)
        fast = rule.route(logits.to(dtype), fraction=fraction, fill=counting.fill)
        assert slow.kept.equal(fast.kept) and slow.weights.equal(fast.weights) and slow.sorted is None
        for found, wanted in zip(fast.sorted, gate.by_expert(slow, experts), strict=True):
            assert found.equal(wanted)
        shares.append(fast.kept.float().mean())
    assert 0 < shares[0] < shares[1] < shares[2] == 1


def test_what_counting_leaves_to_the_plain_way(monkeypatch):
    """Short groups, padding, choices dropped before, gates in another order or of the user's."""
    monkeypatch.setattr(counting, "_place", None)
    options = {"gate": "top2", "second_expert": "all", "experts": 5}

    def route(tokens: int, rule: gate.Gate | None = None, **more) -> gate.Routing:
        rule = rule or gate_of(config(**options, **more))
        logits = torch.randn(1, tokens, 5).to(DEVICE)
        padding = torch.rand(1, tokens).to(DEVICE) < 0.5 if more.get("mask_padding") else None
        return rule.route(logits, fraction=0.1, padding=padding, fill=counting.fill)

    class Own(type(gate_of(config(**options)))):
        pass

    for found in (
        route(63),
        route(200, batch_prioritized=True),
        route(200, mask_padding=True),
        route(200, Own(config(**options))),
    ):
        assert 0 < found.kept.float().mean() < 1
    with pytest.raises(TypeError):
        route(200)


def config(**options) -> ModelConfig:
    return ModelConfig(**{**vars(BASE), **options})


@pytest.mark.parametrize("options", [{}, {"gate": "top1"}, {"gate_fp32": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("experts", [8, 12, 512])
def test_the_gates_choice(options, dtype, experts, monkeypatch):
    monkeypatch.setattr(fused_gate, "FEW", 40)
    logits = 3 * torch.randn(3, 25, experts, generator=torch.Generator().manual_seed(experts))
    logits = logits.to(DEVICE, dtype)
    rule = gate_of(config(experts=experts, **options))
    slow, fast = rule.choose(logits), fused_gate.choose(rule, logits)
    assert [t.dtype for t in slow] == [t.dtype for t in fast]
    if torch.float32 in (dtype, slow[0].dtype) and dtype != torch.bfloat16:
        assert slow[1].equal(fast[1])
    else:  # a last bit of a rounded probability may fall otherwise, and with it a tie
        assert (slow[1] == fast[1]).float().mean() > 0.95
    same = slow[1] == fast[1]
    tolerance = 1e-6 if slow[0].dtype == torch.float32 else 1e-2
    torch.testing.assert_close(slow[0], fast[0], rtol=tolerance, atol=tolerance)
    for column in (2, 3):
        torch.testing.assert_close(slow[column][same], fast[column][same], rtol=tolerance, atol=tolerance)


def test_ties_go_to_the_first_expert():
    logits = torch.zeros(1, 3, 12, device=DEVICE)
    logits[0, 1, [4, 9]] = 2.0
    logits[0, 2, 7] = 1.0
    _, experts, probs, _ = fused_gate.choose(gate_of(config(experts=12)), logits)
    assert experts[0].tolist() == [[0, 1], [4, 9], [7, 0]]
    assert probs[0, 0].tolist() == pytest.approx([1 / 12, 1 / 12])


@pytest.mark.parametrize("kind", [gates.Top1, Top2])
def test_no_kernel_takes_the_place_of_a_users_choice(kind):
    """What the class above says of its own choice is not true of this one."""

    def choose(self, logits, noise=None, edit=None):
        return kind.choose(self, -logits, noise, edit)

    logits = torch.randn(1, 5, 8)
    top = replace(BASE, gate=kind.__name__.lower(), experts=8)
    words = {"softmax_top_k": True, "repeats": True}
    mixin, telling = type("Mixin", (), {"choose": choose}), type("Telling", (), {"choose": choose, **words})
    for same in (
        kind,
        type("Named", (kind,), {"describe": gate.Gate.describe}),
        type("Both", (telling, kind), {}),
    ):
        assert said_by(same(top)) == ["softmax_top_k", "repeats"] and fused_gate.chooses(same(top))
    own = type("Own", (kind,), {"choose": choose})(top)
    late, inner = type("Late", (kind,), {}), kind(top)
    late.choose = choose
    inner.choose = functools.partial(choose, inner)
    above = type("Above", (mixin, type("Told", (kind,), words)), {})(top)
    for other in (own, late(top), inner, above, type("Beside", (mixin, kind), {})(top)):
        assert said_by(other) == [] and not fused_gate.chooses(other)
        found, wanted = other.route(logits, fraction=None).experts, kind(top).choose(-logits)[1]
        assert found.equal(wanted) and fused_gate.choose(other, logits)[1].equal(wanted)
    dropping = type("Dropping", (kind,), {"weigh": Top2.weigh, "order": lambda self, probs: None})(top)
    assert said_by(dropping) == ["softmax_top_k"]
    assert said_by(type("Told", (kind,), {"choose": choose, "repeats": True})(top)) == ["repeats"]


def said_by(rule):
    return [word for word in ("softmax_top_k", "repeats") if rule.says(word)]


def test_a_step_does_without_what_a_gate_drops_by_itself():
    kept = Top2(BASE)
    assert fused_gate.keeps(kept)
    dropping = Top2(BASE)
    dropping.dispatched = lambda *chosen: None
    for other in (dropping, type("Own", (Top2,), {"route": lambda *given, **how: None})(BASE)):
        assert not fused_gate.keeps(other)


def test_a_gate_that_the_kernel_cannot_compute():
    """A gate with a rule of its own, or with more choices than the kernel writes, computes them itself."""
    logits = torch.zeros(1, 2, BASE.experts, device=DEVICE)

    class Own(gate.Gate):
        def choose(self, logits, noise=None, edit=None):
            return "own", logits.argmin(dim=-1, keepdim=True).int(), None, None

    class Three(Own):
        top_k, softmax_top_k = 3, True

    assert fused_gate.choose(Three(config()), logits)[0] == "own"
    probs, experts, *_ = fused_gate.choose(Own(config()), logits)
    # Kernels read the numbers of experts as eight bytes.
    assert probs == "own" and experts.dtype == torch.long


@pytest.mark.parametrize("vocab", [3, 190, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_log_probabilities(vocab, dtype):
    logits = 20 * torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0, 1:] = -torch.inf
    logits = logits.to(DEVICE, dtype)
    targets = torch.arange(9, device=DEVICE) % vocab
    targets[0] = 0
    found = target_log_probs(logits, targets)
    wanted = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    assert found[0] == 0
    wide = torch.cat([logits, logits], dim=1)[:, :vocab]  # rows that do not lie one behind the other
    assert wide.stride() != logits.stride()
    if DEVICE == "cpu":
        assert target_log_probs(wide, targets).equal(found)
    else:  # another stride is another layout of the same sum
        torch.testing.assert_close(target_log_probs(wide, targets), found, rtol=1e-6, atol=1e-6)


def few_parts(monkeypatch) -> None:
    """Some parts of a row have nothing where its dictionary is small, and the last one has less than the others."""
    if DEVICE == "cpu":
        monkeypatch.setattr(logprobs, "PARTS", 8)


@pytest.mark.parametrize("vocab", [3, 190, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_best_token(vocab, dtype, monkeypatch):
    few_parts(monkeypatch)
    logits = 5 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0, PAD] = logits[0].max() + 3  # never chosen, but it has its share of the probability
    logits[1] = torch.tensor([-torch.inf, 1.0, 2.0])[torch.arange(vocab) % 3]  # ties go to the first
    logits = logits.to(DEVICE, dtype)
    wanted = logits.float().log_softmax(-1)
    tokens = logits.index_fill(1, torch.tensor([PAD], device=DEVICE), -torch.inf).argmax(-1)
    found, logprobs = best(logits)
    assert found.equal(tokens) and tokens[1] == 2
    torch.testing.assert_close(logprobs, wanted.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_best_token_is_fed_back(rows, monkeypatch):
    """Steps of which three have room, the last one in the last slot of a cache, by the kernels and as plain operations."""
    few_parts(monkeypatch)
    vocab, slots, steps = 190, 13, 5
    logits = 5 * torch.randn(steps, rows, vocab, generator=torch.Generator().manual_seed(1))
    logits[2, 0] = torch.nan
    logits[..., PAD] = 50.0
    logits[3, -1, 7:9] = 40.0
    logits = logits.to(DEVICE, torch.float16)
    before = torch.arange(rows, device=DEVICE) + 3
    found = {}
    for name, back_end in ((name, BACKENDS[name]()) for name in ("loop", "triton")):
        read, lengths = torch.zeros_like(before), before.clone()
        words = torch.zeros(3, rows, dtype=torch.long, device=DEVICE)
        tokens = []
        for step in range(steps):
            back_end.feed_back(logits[step], read, lengths, before, words, slots)
            tokens.append(read.clone())
            logprobs = (words[step % 3] & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
            wanted, exact = back_end.best(logits[step])
            assert (words[step % 3] >> 32).equal(read) and read.equal(wanted)
            torch.testing.assert_close(logprobs, exact, rtol=0, atol=0, equal_nan=True)
        assert lengths.tolist() == [min(n + steps, slots - 1) for n in before.tolist()]
        found[name] = torch.stack(tokens)
    assert found["loop"][3, -1] == 7 and (found["loop"] != PAD).all()
    found["loop"][2, 0] = found["triton"][2, 0]
    assert found["loop"].equal(found["triton"])


@pytest.mark.parametrize("parts", [None, 0, 1, 2])
@pytest.mark.parametrize("dim", [13, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_norm_takes_in_what_is_pending(parts, dim, dtype):
    """What an attention or one or two experts a token gave; seven tokens are no multiple of a program's."""
    generator = torch.Generator().manual_seed(dim)
    x = 3 + torch.randn(7, 1, dim, generator=generator).to(DEVICE, dtype)
    shape = (7, 1, dim) if parts == 0 else (7, 1, parts, dim)
    pending = None if parts is None else torch.randn(shape, generator=generator).to(DEVICE, dtype)
    norm = AddNorm(dim).to(DEVICE, dtype).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(dim, generator=generator))
    slow = norm(x, pending)
    use(norm, "triton")
    fast = norm(x, pending)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts bits off
        torch.testing.assert_close(slow[0], fast[0], rtol=tolerance, atol=tolerance)
    else:
        assert slow[0].equal(fast[0]), "the sum is rounded alike"
    torch.testing.assert_close(slow[1], fast[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("blocks", [attention.MANY, *attention.BLOCKS.values()][:2], ids=["many", "few"])
@pytest.mark.parametrize("dim", [11, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_of_one_token(blocks, dim, dtype, monkeypatch):
    """Sequences without, with a few and with more past tokens than fit at a time; slots beyond hold rubbish."""
    monkeypatch.setattr(attention, "BLOCKS", {8: blocks})
    generator = torch.Generator().manual_seed(dim)
    lengths = torch.tensor([0, 5, 600, 256])
    qkv = torch.randn(4, 3, 2, dim, generator=generator).to(dtype)
    kv = torch.randn(2, 4, 2, 601, dim, generator=generator).to(dtype)
    wanted = []
    for b, length in enumerate(lengths.tolist()):
        kv[:, b, :, length:] = torch.nan
        k, v = (torch.cat([kv[i, b, :, :length], qkv[b, 1 + i][:, None]], dim=1).double() for i in range(2))
        share = (qkv[b, 0][:, None].double() @ k.transpose(1, 2) / dim**0.5).softmax(-1)
        wanted.append((share @ v).flatten())
    qkv, kv, lengths = qkv.to(DEVICE), kv.to(DEVICE), lengths.to(DEVICE)
    found = attention.attend_one(qkv, kv, lengths)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(found.cpu().double(), torch.stack(wanted), rtol=tolerance, atol=tolerance)
    for b, length in enumerate(lengths.tolist()):
        assert kv[:, b, :, length].equal(qkv[b, 1:]), "the new key and value are kept"


# Lengths of less than a block, of a block and a token, and of many blocks.
@pytest.mark.parametrize("tokens", [1, 7, 129, 2048 if DEVICE == "cuda" else 640])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [FLOAT, torch.float16, BFLOAT])
def test_attention_over_blocks(tokens, dim, dtype):
    """Memory behind the sequences is not read: a NaN there would show."""
    batch, heads = (1, 1) if tokens > 129 else (3, 2)
    memory = torch.full((batch + 1, tokens, 3, heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    generator = torch.Generator().manual_seed(tokens)
    memory[:batch] = torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype)
    found = flash.attend_blocks(memory[:batch]).double()
    wanted = attend(memory[:batch].double(), None, None, 0)
    assert found.shape == wanted.shape == (batch, tokens, heads * dim)
    limit = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert (found - wanted).norm() < limit * wanted.norm()
    torch.testing.assert_close(found, wanted, rtol=8 * limit, atol=4 * limit)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("dim", [64, 128])
def test_a_sequence_attends_to_itself_alone(dim, monkeypatch):
    """Bit for bit the same, alone and between sequences of NaN; 70 tokens leave the second block of keys half full."""
    qkv = torch.full((3, 70, 3, 2, dim), torch.nan, dtype=torch.float16)
    qkv[1] = torch.randn(70, 3, 2, dim, generator=torch.Generator().manual_seed(1))
    qkv = qkv.to(DEVICE)
    alone = flash.attend_blocks(qkv[1:2].clone())
    room = torch.full((4, 70, 2 * dim), 7.0, dtype=torch.float16, device=DEVICE)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *shape, **how: room[:3])
        together = flash.attend_blocks(qkv)
    assert together[1].equal(alone[0]) and not alone.isnan().any()
    assert together[[0, 2]].isnan().all()
    assert (room[3] == 7).all(), "nothing is written behind the output"
    # Tokens do not look ahead.
    later = qkv[1:2].clone()
    later[:, 40:] = 3.0
    assert flash.attend_blocks(later)[0, :40].equal(alone[0, :40])


def test_no_sequences_and_no_tokens():
    for shape in ((0, 5), (2, 0)):
        qkv = torch.empty(*shape, 3, 2, 64, dtype=torch.float16, device=DEVICE)
        assert flash.attend_blocks(qkv).shape == (*shape, 128)


def test_where_blocks_take_the_kernel(monkeypatch):
    """Whole sequences do, and prompts, whose keys and values also go to the cache; torch has the rest."""
    config = replace(CASES["before_dropping"].config, heads=1, dim=64)
    qkv = torch.randn(2, 9, 3, 1, 64, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    table, plain, kernel = BACKENDS["triton"](), BACKENDS["loop"](), flash.attend_blocks
    taken = []
    monkeypatch.setattr(flash, "attend_blocks", lambda x: taken.append(x) or kernel(x))
    monkeypatch.setattr(flash, "is_hopper", lambda device: True)
    found, caches = [], []
    for operations in (plain, table):
        cache = Cache(config, 2, 64, torch.device(DEVICE), torch.float16)
        found.append(operations.attend(qkv, cache.open(9), cache, 0))
        caches.append(cache)
    assert len(taken) == 1 and caches[0].kv.equal(caches[1].kv) and caches[0].kv[0, :, :, :, :9].any()
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=2e-3)
    assert table.attend(qkv, None, None, 0).equal(found[1]) and len(taken) == 2
    caches[1].advance(9)
    padding = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    table.attend(qkv[:, :2].contiguous(), caches[1].open(2), caches[1], 0)
    table.attend(qkv, transformer.attention_mask(padding), None, 0)
    table.attend(qkv.float(), None, None, 0)
    table.attend(qkv[..., :32].contiguous(), None, None, 0)
    table.attend(qkv.transpose(0, 1), None, None, 0)
    assert len(taken) == 2
    monkeypatch.setattr(flash, "is_hopper", lambda device: False)
    table.attend(qkv, None, None, 0)
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["before_dropping", "odd_dim", "learned_positions", "alternate_ffn"])
def test_the_fast_model_reads_on_as_the_slow_one(name, tmp_path):
    model = load(name, tmp_path)
    tokens = torch.randint(4, 190, (3, 9), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    lengths = torch.tensor([5, 2, 3], device=DEVICE)
    found = {}
    for backend in ("loop", "triton"):
        cache = Cache(model.config, 3, 16, torch.device(DEVICE), torch.float32)
        with torch.inference_mode():
            features = [model.use(backend)(tokens[:, :5], Pass(cache=cache))[range(3), lengths - 1]]
            cache.advance(lengths)
            for step in range(5, 7):
                features.append(model(tokens[:, step, None], Pass(cache=cache, groups=3))[:, 0])
                cache.advance(1)
        found[backend] = torch.stack(features)
    torch.testing.assert_close(found["loop"], found["triton"], rtol=1e-4, atol=1e-5)


# What does not depend on the number of sequences is tried with one.
@pytest.mark.parametrize(
    "name, sequences",
    [
        *itertools.product(("before_dropping", "odd_dim", "top1", "every_layer"), (1, 4)),
        ("learned_positions", 4),
        ("projections", 4),
        ("gate_in_weights_dtype", 4),
        ("twelve_experts", 3),
        ("own_output", 1),
        ("no_final_norm", 1),
        ("alternate_ffn", 1),
        ("relu", 1),
        ("tanh", 1),
    ],
)
def test_a_few_sequences_read_on_as_many_would(name, sequences, tmp_path):
    """Fused kernels for a few rows against the slow model, with different lengths; logits, and what the cache keeps."""
    few_against_slow(load(name, tmp_path), sequences, 1e-5)


@pytest.mark.parametrize(
    "name, dtype", [("before_dropping", torch.float16), ("odd_dim", torch.float32), ("top1", torch.float16)]
)
def test_sums_in_parts_and_programs_of_one_column(name, dtype, tmp_path, monkeypatch):
    """What the sizes of real models take: more terms than a program has at a time, and rounding in between."""
    monkeypatch.setattr(vectors, "LONGEST", 16)
    monkeypatch.setattr(vectors, "NUMBERS", 128)
    few_against_slow(load(name, tmp_path).to(dtype), 2, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    "name, sequences, kind",
    [
        ("before_dropping", 2, "int8"),
        ("odd_dim", 1, "int8"),
        ("top1", 3, "int8"),
        ("tanh", 1, "int8"),
        ("every_layer", 1, "fp8"),
    ],
)
def test_a_few_sequences_with_experts_of_one_byte(name, sequences, kind, tmp_path):
    few_against_slow(load(name, tmp_path, KINDS[kind]), sequences, 1e-5)


# On a GPU, the kernels of many sequences are for numbers of two bytes.
MANY = (torch.float32, 1e-5) if DEVICE == "cpu" else (torch.float16, 1e-2)


@pytest.mark.parametrize(
    "name, sequences",
    [
        ("before_dropping", 7),
        ("odd_dim", 6),
        ("projections", 5),
        ("no_final_norm", 5),
        # More rows than a tile has.
        ("top1", 17),
        ("alternate_ffn", 5),
    ],
)
def test_many_sequences_read_on_with_fewer_kernels(name, sequences, tmp_path):
    dtype, tolerance = MANY
    few_against_slow(load(name, tmp_path, dtype=dtype), sequences, tolerance)


@pytest.mark.parametrize("name, kind", [("odd_dim", "int8"), ("every_layer", "fp8")])
def test_many_sequences_with_experts_of_one_byte(name, kind, tmp_path):
    dtype, tolerance = MANY
    few_against_slow(load(name, tmp_path, KINDS[kind], dtype), 6, tolerance)


def test_many_sequences_with_parts_of_sums_and_few_terms_at_a_time(tmp_path, monkeypatch):
    """What the sizes of real models take: parts of sums, and rounding in between."""
    own = narrow.Division(16, 16, 2)
    monkeypatch.setattr(
        narrow, "division_for", lambda rows, n, k, split: replace(own, parts=2) if split else own
    )
    few_against_slow(load("before_dropping", tmp_path).half(), 6, 1e-2)


def test_a_users_gate_that_drops_takes_no_fused_step(monkeypatch):
    """Their kernels compute all that is chosen."""

    def dispatched(self, gate_probs, weights, noise, edit):
        return gate_probs > gate_probs.amin(-1, keepdim=True)

    monkeypatch.setitem(
        gates.GATES, "own", type("Own", (Top2,), {"dispatched": dispatched, "softmax_top_k": True})
    )
    torch.manual_seed(0)
    model = Transformer(replace(CASES["before_dropping"].config, gate="own")).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for sequences in (1, 3, 6):
        assert not short_step.fits(model, sequences) and not batch_step.fits(model, sequences)
        against_slow(
            model.to(DEVICE),
            sequences,
            lambda read, asked: TRITON.read_on(model, read, asked, VOCAB),
            1e-5,
            "triton",
            2,
        )


def few_against_slow(model: Transformer, sequences: int, tolerance: float) -> None:
    kernels = short_step if sequences <= 4 else batch_step
    assert kernels.fits(model, sequences)

    def read_on(read, asked):
        return kernels.read_on(model, read, asked.cache if kernels is short_step else asked, VOCAB)

    against_slow(model, sequences, read_on, tolerance, "triton", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "division",
    [
        narrow.Division(16, 64, 4),
        narrow.Division(32, 16, 2),
        narrow.Division(16, 32, 2, shared=False),
        narrow.Division(16, 16, 1, parts=3),
        narrow.Division(32, 32, 4, parts=2),
    ],
)
@pytest.mark.parametrize("rows, n, k", [(5, 150, 48), (16, 64, 64), (40, 48, 40)])
def test_linear_layers_of_few_rows(rows, n, k, division, dtype):
    """Whole sums and parts of them, with bias and activation; columns, rows and terms that do not fill a block."""
    torch.manual_seed(k)
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    x, weight, bias = (tensor.to(DEVICE, dtype) for tensor in (x, weight, bias))
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    if division.parts > 1:
        parts = narrow.linear(x, weight, bias, split=True, division=division)
        assert parts.shape == (rows, division.parts, n) and parts.dtype == torch.float32
        torch.testing.assert_close(parts.sum(dim=1), F.linear(x, weight, bias).float(), **near)
        return
    found = narrow.linear(x, weight, bias, activation="gelu", division=division)
    torch.testing.assert_close(found, F.gelu(F.linear(x, weight, bias)), **near)
    found = narrow.linear(x, weight, split=True, division=division)
    torch.testing.assert_close(found[:, 0], F.linear(x, weight), **near)


@pytest.mark.parametrize("tokens", [1, 5, 16, 37, 64])
@pytest.mark.parametrize(
    "name, experts", [("before_dropping", 3), ("top1", 5), ("gate_in_weights_dtype", 40)]
)
def test_choices_in_tiles(name, experts, tokens):
    """One kernel for the sorting and the tiles against the ones for each; experts have more than a tile."""
    rule = gate_of(replace(CASES[name].config, experts=experts))
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    logits[0] = 0.5
    routing = rule.route(logits[:, None], fraction=None)
    order, counts = gate.by_expert(routing, experts)
    found, table, weights = tiles.planned(routing.experts, routing.weights, experts, 16, torch.float32)
    assert found.equal(order) and weights.equal(routing.weights.flatten())
    table = table[:, table[1].argsort(stable=True)]
    table = table[:, table[0] < experts]
    wanted = tiles.tiles(counts, len(order), 16)
    assert table.equal(wanted[:, wanted[0] < experts])


def test_how_many_sequences_take_fewer_kernels():
    with torch.device("meta"):
        pre, post = (Transformer(CASES[name].config) for name in ("relu", "post_norm"))
    assert [batch_step.fits(pre, count) for count in (1, 2, 64, 65)] == [False, True, True, False]
    assert not batch_step.fits(post, 8)
    pre.config = replace(pre.config, dim=2048)
    assert not batch_step.fits(pre, 8), "torch's products are faster"


def test_who_is_too_many_too_wide_or_normalised_afterwards_takes_the_general_path():
    with torch.device("meta"):
        pre, post = (Transformer(CASES[name].config) for name in ("relu", "post_norm"))
    assert short_step.fits(pre, 4) and not short_step.fits(pre, 5) and not short_step.fits(post, 1)
    with torch.device("meta"):
        wide, wider = (
            Transformer(replace(CASES["relu"].config, layers=1, dim=dim, input_dim=dim, output_dim=dim))
            for dim in (2048, 2560)
        )
    assert short_step.fits(wide, 1) and not short_step.fits(wide, 2) and not short_step.fits(wider, 1)


GATES = [
    "top1",
    "before_dropping",
    "prioritized",
    "prioritized_before",
    "mask_padding",
    "gate_in_weights_dtype",
]


@pytest.mark.parametrize(
    "name, fraction",
    [
        *((name, 0.05) for name in (*GATES, "twelve_experts", "odd_dim")),
        *((name, 0.05) for name in ("relu", "gelu_accurate", "tanh", "linear", "alternate_ffn")),
        # An order and the rounding of a gate do nothing where nothing is dropped.
        *((name, None) for name in ("top1", "before_dropping", "mask_padding")),
        *((name, -1.0) for name in ("top1", "prioritized_before")),
    ],
)
def test_the_fast_model_is_the_slow_one(name, fraction, tmp_path):
    """Logits and routing of both paths on fresh inputs, groups and padding included."""
    fast_against_slow(load(name, tmp_path), fraction)


@pytest.mark.parametrize(
    "name, kind",
    [(name, "int8") for name in ("before_dropping", "mask_padding", "odd_dim", "gelu_accurate")]
    + [("top1", "fp8")],
)
def test_the_fast_model_is_the_slow_one_with_experts_of_one_byte(name, kind, tmp_path):
    fast_against_slow(load(name, tmp_path, KINDS[kind]), 0.05)


def fast_against_slow(model: Transformer, fraction: float | None) -> None:
    tokens = torch.randint(4, 190, (6, 9), generator=torch.Generator().manual_seed(7))
    tokens[1::2, 7:] = PAD
    tokens = tokens.to(DEVICE)
    found = {}
    for backend in ("loop", "triton"):
        routings = {}
        step = Pass(fraction, groups=3, padding=tokens == PAD, record=routings.__setitem__)
        with torch.inference_mode():
            features = model.use(backend)(tokens, step)
            found[backend] = model.logits(features), routings
    slow, fast = (found[backend][0] for backend in ("loop", "triton"))
    assert (slow - fast).norm() / slow.norm() < 1e-5
    assert found["loop"][1].keys() == found["triton"][1].keys() == set(model.config.moe_layers)
    for layer, slow in found["loop"][1].items():
        fast = found["triton"][1][layer]
        assert slow.experts.equal(fast.experts) and slow.kept.equal(fast.kept)
        torch.testing.assert_close(slow.weights, fast.weights)


class NotLaunched:
    def __getitem__(self, grid):
        return lambda *args, **options: None


@pytest.mark.parametrize("name", [*GATES, "post_norm", "learned_positions", "alternate_ffn"])
def test_no_pass_asks_the_device_for_a_number(name, monkeypatch):
    """On a device that has no numbers. The kernels themselves run on the device and are not launched."""
    for kernel in (
        "grouped._grouped_linear",
        "tiles._tiles",
        "tiles._by_expert",
        "counting._count",
        "counting._add_up",
        "counting._place",
        "gate._choose",
        "logprobs._target_log_probs",
        "attention._attend_one",
        "flash._attend_blocks",
        "norm._add_norm",
        "vectors._linear",
        "narrow._linear",
        "tiles._planned",
        "embedding._embedded",
        "vectors._experts_up",
        "vectors._experts_down",
        "logprobs._best_of_part",
        "logprobs._best_of_row",
    ):
        monkeypatch.setattr(f"moekit.nn.kernels.{kernel}", NotLaunched())
    with torch.device("meta"), torch.inference_mode():
        model = Transformer(CASES[name].config).use("triton")
        tokens = torch.empty(4, 16, dtype=torch.long)
        features = model(tokens, Pass(0.05, groups=2))
        assert log_probs(model, features, tokens, 190).shape == (4, 16)
        cache = Cache(model.config, 1, 16, torch.device("meta"), torch.float32)
        assert model(tokens[:1], Pass(cache=cache)).shape == (1, 16, 32)
        cache.advance(3)
        assert model(tokens[:1, :1], Pass(cache=cache)).shape == (1, 1, 32)
        if short_step.fits(model, 1):
            assert best(short_step.read_on(model, tokens[0, :1], cache, 190))[0].shape == (1,)
        if batch_step.fits(model, 4):
            cache = Cache(model.config, 4, 16, torch.device("meta"), torch.float32)
            logits = batch_step.read_on(model, tokens[:, 0], Pass(groups=4, cache=cache), 190)
            assert best(logits)[0].shape == (4,)
        assert model(tokens, Pass(0.05, groups=2, padding=tokens == PAD)).shape == (4, 16, 32)
        if model.config.moe_layers:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                model.use("loop")(tokens)


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@on_gpu
def test_the_driver_sees_no_question_either(tmp_path):
    """What the device without numbers cannot show: copies from the host that wait."""
    model = load("before_dropping", tmp_path).half().use("triton")
    tokens = torch.randint(4, 190, (4, 16), device=DEVICE)
    with torch.inference_mode():
        for mode in ("default", "error"):  # the first time, kernels are compiled and tables made
            torch.cuda.set_sync_debug_mode(mode)
            try:
                log_probs(model, model(tokens, Pass(0.05, groups=2)), tokens, 190)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_graph_scores_what_single_kernels_do(reference, monkeypatch):
    """Calls of one shape with other tokens each time, capacity included; the graph is there from the fifth on."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(4, 190, (4, 40), generator=generator).tolist() for _ in range(graph.AFTER + 4)]
    how = {"batch_size": 2, "capacity_token_fraction": 0.05}
    captured = []
    with moekit.load(reference / "checkpoint", 1, "cuda", "float32", progress=False) as model:
        monkeypatch.setattr(graph, "Graph", lambda *args: captured.append(args) or Graph(*args))
        found = [model.score(text, **how)["logprob"] for text in texts]
        assert len(captured) == 1
        monkeypatch.setattr(graph, "MOST_TOKENS", 0)
        single = [model.score(text, **how)["logprob"] for text in texts]
    assert len(captured) == 1
    for one, other in zip(found, single, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert len({tuple(one) for one in found}) == len(texts)


@pytest.mark.parametrize("dense", [True, False])
def test_a_dense_model_is_captured_whatever_gate_its_config_names(dense):
    """Of a training without experts the config may still say that the second expert is drawn."""
    config = replace(BASE, second_expert="sampling", **({"moe_freq": 0, "experts": 0} if dense else {}))
    seen = SimpleNamespace(
        config=config,
        backend="triton",
        slots=None,
        embed=SimpleNamespace(weight=SimpleNamespace(is_cuda=True)),
    )
    assert graph.fits(seen, Pass()) == dense


@pytest.mark.parametrize("told", [{}, {"repeats": True}, {"repeats": True, "draws": True}])
def test_a_users_gate_is_captured_if_it_says_that_it_repeats(told, monkeypatch):
    """What it does on the host would run once, at the capture, or fail there."""
    monkeypatch.setitem(gates.GATES, "own", type("Own", (Top2,), {"order": lambda self, probs: None, **told}))
    seen = SimpleNamespace(
        config=replace(BASE, gate="own"),
        backend="triton",
        slots=None,
        embed=SimpleNamespace(weight=SimpleNamespace(is_cuda=True)),
    )
    assert graph.fits(seen, Pass()) == (told == {"repeats": True})


def test_what_comes_again_is_captured_once(monkeypatch):
    made = []

    class Fake:
        def __init__(self, work, *inputs):
            made.append(work)
            self.work, self.output = work, torch.empty(2)

        def __call__(self, *inputs):
            return self.output.copy_(self.work(*inputs))

    monkeypatch.setattr(graph, "Graph", Fake)
    repeated, one, found = graph.Repeated(torch.device("cpu"), alone=True), np.ones(2, np.int32), []
    for times in range(1, 9):
        # The next call of a graph overwrites what it gives.
        found.append(repeated("a", torch.add, one, one * times).tolist())
        assert len(made) == (times > graph.AFTER)
    assert found == [[1 + times] * 2 for times in range(1, 9)]
    for _ in range(graph.AFTER):
        repeated("b", torch.mul, one, one)
    assert made == [torch.add]
    repeated("b", torch.mul, one, one)
    assert made == [torch.add, torch.mul]


def test_without_memory_for_a_graph_the_work_is_done_all_the_same(monkeypatch):
    tried = []

    def full(work, *inputs):
        tried.append(work)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graph, "Graph", full)
    repeated, one = graph.Repeated(torch.device("cpu"), alone=True), np.ones(2, np.int32)
    for _ in range(graph.AFTER + 5):
        assert repeated("a", torch.add, one, one).tolist() == [2, 2]
    assert len(tried) == 1


@on_gpu
def test_a_graph_decodes_what_single_kernels_do(reference, monkeypatch):
    how = {"max_new_tokens": 20, "progress": False}
    prompts = [[5, 6, 7], [8], list(range(9, 30))]
    with moekit.load(reference / "checkpoint", 1, "cuda", "float32", progress=False) as model:
        captured = []
        monkeypatch.setattr(graph, "Graph", lambda *args: captured.append(args) or Graph(*args))
        found = model.generate(prompts, **how)
        assert captured, "no graph was made"
        monkeypatch.setattr(graph, "fits", lambda *args: False)
        for one, other in zip(found, model.generate(prompts, **how), strict=True):
            assert one.ids == other.ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def repeated(rank, steps):
    """Whether the rank scores ``steps``, which are alike, with a graph in the end; and its (index, scores)."""
    mine = [shares(step, rank.world_size)[rank.rank] for step in steps]
    scores, _ = worker.scores_of(rank, mine, fraction=0.3, vocab=200, seed=1)
    return rank.state["repeated"].graph is not None if "repeated" in rank.state else False, scores


def decoded(rank, prompts, steps):
    """Whether the rank decodes the sequences of ``prompts`` ([n] ids a sequence, a list a rank) with a graph; and them."""
    numbers = itertools.count()
    mine = dealt([[next(numbers) for _ in part] for part in prompts], prompts)[rank.rank]
    vocab = rank.state["model"].config.vocab_rows
    first = decode.begin(rank, KEY, mine, Settings(vocab), 64)
    read = [[0] * len(part) for part in prompts]  # others' are not looked at
    if first is not None:
        read[rank.rank] = first.tokens[:, -1].tolist()
    rest = decode.run(rank, KEY, [list(range(len(part))) for part in prompts], read, steps)
    captured = rank.state[KEY].graph is not None
    decode.end(rank, KEY)
    assert (first is None) == (rest is None) == (not prompts[rank.rank])
    return captured, [] if first is None else np.hstack([first.tokens, rest.tokens]).tolist()


def test_ranks_that_compute_with_kernels(reference):
    """Two ranks with kernels against one with the loop, from the same files, and generation beside scoring."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs, or none and Triton's interpreter")
    found = {}
    # On GPUs, the last ones are those of a graph.
    often = graph.AFTER + 3 if DEVICE == "cuda" else 2
    steps = [[random_batch(2 * i + r, 12, 200) for r in range(2)] for i in range(often)]
    device = "auto" if DEVICE == "cuda" else "cpu"
    for world_size, backend in ((1, "loop"), (2, "triton")):
        with moekit.load(
            reference / "checkpoint", world_size, device, "float32", backend=backend, progress=False
        ) as model:
            assert {part["backend"] for part in model.parts} == {backend}
            if DEVICE == "cpu":
                model.ranks.call(replace_once)
            result = model.evaluate(
                reference / "data-bin",
                tokens_per_sample=24,
                capacity_token_fraction=0.05,
                max_batches=3,
                progress=False,
            )
            scoring = model.ranks.call(repeated, steps)
            assert {captured for captured, _ in scoring} == {DEVICE == "cuda" and backend == "triton"}
            blocks = dict(pair for _, pairs in scoring for pair in pairs)
            ids = [one.ids for one in model.generate([[5, 6], [7]], max_new_tokens=4, progress=False)]
            # As many on each rank, not as many, and none on the second, which only serves.
            for there in ([[[2, 5]], [[2, 6]]], [[[2, 5], [2, 7]], [[2, 6]]], [[[2, 5]], []]):
                parts = [list(itertools.chain(*there))] if world_size == 1 else there
                decoding = model.ranks.call(decoded, parts, often)
                assert {captured for captured, _ in decoding} == {DEVICE == "cuda" and backend == "triton"}
                ids.append([tokens for _, part in decoding for tokens in part])
            found[backend] = result.tokens, ids, [blocks[i] for i in sorted(blocks)]
    np.testing.assert_allclose(found["loop"][2], found["triton"][2], atol=1e-4)
    np.testing.assert_allclose(found["loop"][0]["logprob"], found["triton"][0]["logprob"], atol=1e-4)
    assert found["loop"][1] == found["triton"][1]


def test_ranks_that_compute_a_dense_model_with_kernels(tmp_path):
    """Each of two ranks has the whole model, and exchanges nothing with the other."""
    if torch.cuda.device_count() == 1:
        pytest.skip("two ranks need two GPUs, or none and Triton's interpreter")
    build("alternate_ffn", tmp_path)
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(4, 190, (n,), generator=generator).tolist() for n in (9, 4, 9, 1, 12)]
    found = {}
    for world_size, backend in ((1, "loop"), (2, "triton")):
        device = "auto" if DEVICE == "cuda" else "cpu"
        how = {"backend": backend, "progress": False}
        with moekit.load(tmp_path, world_size, device, "float32", **how) as model:
            if DEVICE == "cpu":
                model.ranks.call(replace_once)
            written = model.generate(texts[:3], max_new_tokens=4, progress=False)
            found[backend] = model.score(texts, batch_size=2)["logprob"], [one.ids for one in written]
    np.testing.assert_allclose(found["loop"][0], found["triton"][0], atol=1e-4)
    assert found["loop"][1] == found["triton"][1]


@pytest.mark.slow
def test_they_compile_for_all_gpus_since_turing(tmp_path):
    """No GPU is needed for that. Large tiles have to become the matrix instructions of Hopper and of Blackwell."""
    env = {k: v for k, v in os.environ.items() if k != INTERPRET} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    # Two processes, for the two cores that tests have. Hopper takes as long as the others.
    parts = [("90",), ("75", "80", "89", "100", "120")]
    running = [
        subprocess.Popen(
            [sys.executable, script, *part],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=script.parent.parent,
        )
        for part in parts
    ]
    lines = []
    for process in running:
        try:
            out, error = process.communicate(timeout=900)
        finally:
            process.kill()
        assert process.returncode == 0, error
        lines += out.splitlines()
    units: dict[str, dict[int, set[str]]] = {gpu: {} for part in parts for gpu in part}
    for line in lines:
        gpu, kernel, *_ = line.split(" ", 2)
        if kernel in ("_specialised_linear", "_streamed_ffn", "_output"):
            assert line.endswith("wgmma.mma_async"), line
        if kernel == "_grouped_linear" and "'EXACT': False" in line:
            rows = int(line.split("'ROWS': ")[1].split(",")[0])
            units[gpu].setdefault(rows, set()).add(line.rsplit(" ", 1)[1])
    assert sum("_specialised_linear" in line for line in lines) == 8
    assert sum("_streamed_ffn" in line for line in lines) == 4
    # Triton has no matrix instructions for Turing.
    assert set().union(*units["75"].values()) == {"-"}
    for gpu in ("80", "89", "120"):
        assert set().union(*units[gpu].values()) == {"mma.sync"}
    assert units["90"] == {n: {"mma.sync" if n < 64 else "wgmma.mma_async"} for n in (16, 32, 64, 128)}
    assert units["100"][128] == {"tcgen05.mma"}
    # Several sequences' linear layers have matrix instructions of their own.
    assert sum(line.startswith("100 _linear ") and "mma" in line for line in lines) == 3
    attends = {line.rsplit(" ", 1)[1] for line in lines if line.startswith("90 _attend_blocks ")}
    assert attends == {"wgmma.mma_async"}


def test_kernels_that_are_not_there(reference, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu, torch.float16) == "loop"
    assert choose_backend("auto", cuda, torch.float16) == "triton"
    with pytest.raises(ValueError, match="backend='cublas': expected one of auto, loop, grouped_mm, triton"):
        choose_backend("cublas", cpu, torch.float16)
    monkeypatch.delenv(INTERPRET, raising=False)
    with pytest.raises(
        ValueError,
        match="needs the package triton and a GPU of compute capability 7.5 or more, and this is a cpu",
    ):
        moekit.load(reference / "checkpoint", device="cpu", backend="triton")


def test_a_gpu_that_triton_does_not_compile_for_takes_the_loop(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.delenv(INTERPRET, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert choose_backend("auto", cuda, torch.float16) == "loop"
    with pytest.raises(ValueError, match=r"and this is a Tesla V100 \(7\.0\)"):
        choose_backend("triton", cuda, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend("auto", cuda, torch.float16) == "triton"


def test_the_back_end_of_experts_of_one_byte(monkeypatch):
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, torch.bfloat16, torch.int8) == "triton"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend("auto", cuda, torch.bfloat16) == "grouped_mm"
    assert choose_backend("auto", cuda, torch.bfloat16, torch.int8) == "loop"
    with pytest.raises(ValueError, match="backend='grouped_mm' has no product with fp8 experts"):
        choose_backend("grouped_mm", cuda, torch.bfloat16, torch.float8_e4m3fn)


def load(name, folder, kind: torch.dtype | None = None, dtype: torch.dtype = torch.float32) -> Transformer:
    build(name, folder)
    plan = checkpoint.survey(checkpoint.find(folder))
    model = transformer.empty(plan.config, torch.device(DEVICE), dtype, kind=kind)
    checkpoint.fill(model, plan, range(plan.config.experts))
    return model.requires_grad_(False)


def test_a_model_of_transformers_computes_with_the_kernels():
    """Padding in front, a cache that is not moekit's, a gate's logits: as on the plain path."""
    pytest.importorskip("transformers")
    from moekit.hf import FairseqMoeConfig, FairseqMoeForCausalLM

    torch.manual_seed(0)
    config = FairseqMoeConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        vocab_size=60,
        num_experts=8,
        initializer_range=0.3,
        eos_token_id=None,
    )
    model = FairseqMoeForCausalLM(config).to(DEVICE).eval()
    tokens = torch.tensor([[1, 1, 2, 5, 6, 7], [2, 8, 9, 10, 11, 12]], device=DEVICE)
    mask = (tokens != 1).long()
    found = {}
    for backend in ("loop", "triton"):
        model.model.backend = backend
        with torch.no_grad():
            one = model(tokens, attention_mask=mask, output_router_logits=True)
        made = model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False)
        assert model.model.decoder.backend == backend
        found[backend] = one.logits[mask == 1], one.aux_loss, made
    for expected, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
    loss = model(tokens, attention_mask=mask, labels=tokens).loss
    loss.backward()
    assert model.model.decoder.backend == "loop"
    assert all(parameter.grad is not None for parameter in model.parameters())
