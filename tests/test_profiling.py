"""Profiles: the parts of a step by hand, on made-up events of GPUs, and what must hold of real ones."""

import contextlib
import copy
import gzip
import json
import os
import re
import sys
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import trace_format
from made_up_profile import made_up
from test_project import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import moekit
from moekit.bench import shapes
from moekit.nn import parts
from moekit.nn.config import ModelConfig
from moekit.nn.cost import flop_per_token
from moekit.nn.passes import Pass as ModelPass
from moekit.nn.transformer import Transformer
from moekit.profiling import PARTS, Profile, events, naming, run
from moekit.profiling.events import Kernel, Ranges, Seen, rows_of
from moekit.profiling.least import Cost, Pass, least, routed
from moekit.profiling.naming import OUTSIDE, Name, named, named_of_graphs
from moekit.profiling.perfetto import trace_of
from moekit.profiling.table import COLUMNS, by_part, table
from moekit.profiling.work import DECODED, MODES, Size, work_of
from moekit.worker import profiling as worker
from moekit.worker.steps import DOING, STEPS_BEFORE, Score, Work

LAYER = ("call", "step 0", "layer 1")


def kernels(*told: tuple, ranges=LAYER) -> list[Kernel]:
    """(name, innermost range) or (name, innermost range, duration), one after the other from 0, launched at once."""
    found, now = [], 0
    for name, inside, *duration in told:
        own = ranges + ((inside,) if isinstance(inside, str) else inside)
        end = now + (duration[0] if duration else 10)
        found.append(Kernel(name, now, end, own, 0))
        now = end
    return found


def parts_of(*told: tuple) -> list[str]:
    return [name.part for name in named(kernels(*told))]


# ----------------------------------------------------------------------------------------------- names of kernels


def test_a_layer_on_one_gpu_by_hand():
    assert parts_of(
        ("_add_norm", "norm"),
        ("nvjet_hsh_128", "attention"),
        ("flash_fwd_kernel", "attention"),
        ("nvjet_hsh_64", "gate"),
        ("_choose", "gate"),
        ("radix_sort", "plan"),
        ("fill", ("dispatch", "experts")),
        ("_tiles", ("dispatch", "experts")),
        ("_grouped_linear", ("dispatch", "experts")),
        ("_grouped_linear", ("dispatch", "experts")),
    ) == [
        "norm",
        "attention",
        "attention",
        "gate",
        "gate",
        "plan",
        "experts up",
        "plan",
        "experts up",
        "experts down",
    ]


def test_experts_of_specialised_warps_by_hand():
    inside = [("_tiles", "plan"), ("_in_order", "experts up"), ("_specialised_linear", "experts up")]
    inside += [("_specialised_linear", "experts down")]
    assert parts_of(*((name, ("dispatch", "experts")) for name, _ in inside)) == [part for _, part in inside]


def test_experts_of_one_kernel_by_hand():
    assert parts_of(("_linear", "gate"), ("_streamed_ffn", "experts"), ("_add_norm", "norm")) == [
        "gate",
        "experts",
        "norm",
    ]


def test_a_layer_through_the_peers_memory_by_hand():
    names = [
        "_publish",
        "_meet",
        "_merge",
        "_pull",
        "_grouped_linear",
        "_grouped_linear",
        "_meet",
    ]
    assert parts_of(*((name, "dispatch") for name in names)) == [
        *["dispatch"] * 4,
        "experts up",
        "experts down",
        "combine",
    ]
    few = [("_send", "dispatch"), ("_meet_and_plan", "dispatch"), ("_grouped_linear", "dispatch")]
    few += [("_grouped_linear", "dispatch"), ("_collect_norm", "norm")]
    # Most of the second one is a wait for the other ranks.
    assert parts_of(*few) == ["dispatch", "dispatch", "experts up", "experts down", "norm"]
    short = ["_hand_out", "_up", "_down", "_collect"]
    assert parts_of(*((name, "dispatch") for name in short)) == [
        "dispatch",
        "experts up",
        "experts down",
        "combine",
    ]


def test_a_layer_through_collectives_by_hand():
    inside = ("dispatch", "experts")
    loop = [
        "aten::index",
        "aten::linear",
        "aten::gelu",
        "aten::linear",
        "aten::linear",
        "aten::gelu",
        "aten::linear",
        "aten::cat",
    ]
    found = parts_of(
        ("exchange", "dispatch"), ("exchange", "dispatch"), *((name, inside) for name in loop), ("exchange", "dispatch"),
        ("aten::index_copy", "dispatch"),
    )  # fmt: skip
    up, down = "experts up", "experts down"
    assert found == ["dispatch", "dispatch", up, up, up, down, up, up, down, down, "combine", "combine"]
    # A rank that gets no row makes no product.
    assert parts_of(("exchange", "dispatch"), ("aten::index", inside), ("exchange", "dispatch")) == [
        "dispatch",
        up,
        "combine",
    ]


def test_each_layer_and_step_begins_anew():
    one = kernels(("_grouped_linear", "experts"))
    two = [replace(k, ranges=("call", "step 0", "layer 3", "experts")) for k in one]
    three = [replace(k, ranges=("call", "step 1", "layer 3", "experts")) for k in one]
    assert named([*one, *two, *three]) == [
        Name(0, 1, "experts up"),
        Name(0, 3, "experts up"),
        Name(1, 3, "experts up"),
    ]
    # A copy of the results, after a step, is still the step's.
    copies = kernels(("gemm", "output"), ranges=("call", "step 2")) + kernels(
        ("memcpy", ()), ranges=("call",)
    )
    assert named(copies) == [Name(2, -1, "output"), Name(2, -1, "other")]


def test_the_kernels_that_are_known_by_name_are_there():
    """A kernel that gets another name would be told as another part."""
    # They are not imported: how Triton runs is decided then, for all tests.
    sources = [path.read_text() for path in (ROOT / "moekit/nn/kernels").glob("*.py")]
    there = {name for text in sources for name in re.findall(r"@(?:triton|gluon)\.jit.*\ndef (\w+)", text)}
    assert {*naming.BY_NAME, *naming.GROUPED, *run.HOMEWARD, *naming.EXCHANGES[2:]} <= there


def test_kernels_of_a_graph_are_named_by_their_order():
    template = kernels(("a", "attention"), ("gemm", "dense"), ranges=("layer 0",))
    template += kernels(("a", "attention"), ("b", "gate"), ranges=("layer 1",))
    template += kernels(("gemm", "output"), ranges=())
    # The graph lacks b, and has c, which nothing names, and one more a.
    order = ["a", "gemm", "a", "c", "gemm", "a"]
    replayed = [Kernel(name, 10 * i, 10 * i + 5, ("call", "step 3"), 7, True) for i, name in enumerate(order)]
    before = Kernel("copy", -5, -1, ("call", "step 3", "sampling"), 6)
    assert named_of_graphs([before, *replayed], template) == [
        Name(3, -1, "sampling"),
        Name(3, 0, "attention"),
        Name(3, 0, "dense"),
        Name(3, 1, "attention"),
        Name(3, -1, "other"),
        Name(3, -1, "output"),
        Name(3, -1, "attention"),
    ]


def test_graphs_of_a_step_in_parts_are_named_in_turns():
    """Where experts are fetched, a step is several graphs, and those of layers that are alike have the same kernels."""
    template = kernels(("a", "attention"), ("g", "gate"), ranges=("layer 0",))
    for layer in (1, 2):
        template += kernels(("e", "experts down"), ranges=(f"layer {layer - 1}",))
        template += kernels(("a", "attention"), ("g", "gate"), ranges=(f"layer {layer}",))
    template += kernels(("e", "experts down"), ranges=("layer 2",)) + kernels(("gemm", "output"), ranges=())
    replayed = []
    for step in (0, 1):
        for number, order in enumerate(("ag", "eag", "eag", ["e", "gemm"])):
            launched = 100 * step + 10 * number
            ranges = ("call", f"step {step}")
            replayed += [
                Kernel(name, launched + i, launched + i + 1, ranges, launched, True)
                for i, name in enumerate(order)
            ]
    wanted = [(0, "attention"), (0, "gate"), (0, "experts down"), (1, "attention"), (1, "gate")]
    wanted += [(1, "experts down"), (2, "attention"), (2, "gate"), (2, "experts down"), (-1, "output")]
    found = named_of_graphs(replayed, template)
    assert [(name.layer, name.part) for name in found] == 2 * wanted
    assert [name.step for name in found] == [0] * 10 + [1] * 10


# ------------------------------------------------------------------------------------------------ times by hand


def test_ranges_around_a_moment():
    found = Ranges([(0, 100, "call"), (10, 40, "layer 0"), (10, 20, "norm"), (50, 60, "output")])
    around = {
        5: ("call",),
        10: ("call", "layer 0", "norm"),
        25: ("call", "layer 0"),
        45: ("call",),
        55: ("call", "output"),
    }
    assert {moment: found.around(moment) for moment in around} == around
    assert found.around(-1) == found.around(100) == ()


def test_every_moment_of_a_call_belongs_to_one_row():
    # b starts before a ends; c was launched before b ended; d after c ended.
    some = [
        Kernel("a", 10, 30, (), 2),
        Kernel("b", 25, 40, (), 3),
        Kernel("c", 50, 60, (), 35),
        Kernel("d", 80, 90, (), 70),
    ]
    rows = rows_of(0, 0, 100, some, on_device=True)
    assert [(row.kernel.name or row.waits, row.start, row.exclusive) for row in rows] == [
        ("host", 0, 10),
        ("a", 10, 20),
        ("b", 25, 10),
        ("idle", 40, 10),
        ("c", 50, 10),
        ("host", 60, 20),
        ("d", 80, 10),
        ("host", 90, 10),
    ]
    assert sum(row.exclusive for row in rows) == 100


def rank_of(*starts: int) -> Seen:
    """A rank with kernels of 10 that start as told, two exchanges among them: the second and the fourth."""
    names = [
        ("gemm", "attention"),
        ("_meet", "dispatch"),
        ("_grouped_linear", "dispatch"),
        ("_meet", "dispatch"),
    ]
    own = [
        Kernel(name, at, at + 10, (*LAYER, inside), 0)
        for (name, inside), at in zip(names, starts, strict=True)
    ]
    return Seen([(0, 60)], own, [])


def test_an_exchange_begins_when_the_last_rank_comes():
    # Rank 0 comes to the first exchange 6 earlier, and rank 1 to the second one by more than it takes.
    frame = table([rank_of(0, 10, 20, 50), rank_of(6, 16, 26, 36)], True, [{}, {}])
    meets = frame[frame["kernel"] == "_meet"]
    told = [(r.rank, r.part, round(1e9 * r.start), round(1e9 * r.exclusive)) for r in meets.itertuples()]
    assert told == [
        (0, "waiting", 10, 6), (0, "dispatch", 16, 4), (0, "combine", 50, 10),
        (1, "dispatch", 16, 10), (1, "waiting", 36, 10),
    ]  # fmt: skip
    assert (1e9 * frame.groupby("rank")["exclusive"].sum()).round().tolist() == [60, 60]


def test_kernels_share_the_cost_of_their_part():
    one = Seen([(0, 40)], kernels(("x", "attention", 10), ("y", "attention", 30)), [])
    frame = table([one], True, [{0: {(1, "attention"): Cost(400.0, 8000.0)}}])
    assert frame["bytes"].tolist() == [100, 300] and frame["flop"].tolist() == [2000, 6000]
    [row] = by_part(frame, copy=100e9, matmul=400e9).itertuples()
    assert row.least == pytest.approx(20e-9) and row.of_limit == pytest.approx(0.5) and row.share == 1


def test_a_step_in_one_kernel_costs_what_its_parts_do():
    own = kernels(("_step", "whole step", 30), ("_best_of_row", "sampling", 10), ranges=("call", "step 0"))
    parts = {(0, "attention"): Cost(300.0, 10.0), (1, "experts up"): Cost(500.0, 20.0)}
    parts |= {(-1, "output"): Cost(200.0, 30.0), (-1, "sampling"): Cost(70.0)}
    frame = table([Seen([(0, 40)], own, [])], True, [{0: parts}])
    assert frame["part"].tolist() == ["whole step", "sampling"]
    assert frame["bytes"].tolist() == [1000, 70] and frame["flop"].tolist() == [60, 0]


def test_both_products_in_one_kernel_have_the_cost_of_both():
    own = kernels(("_streamed_ffn", "experts", 30), ranges=("call", "step 0", "layer 1"))
    costs = {
        (1, "experts up"): Cost(500.0, 20.0),
        (1, "experts down"): Cost(70.0, 3.0),
        (2, "experts up"): Cost(9.0, 9.0),
    }
    frame = table([Seen([(0, 40)], own, [], [])], True, [{0: costs}])
    first = frame.iloc[0]
    assert (first["part"], first["layer"], first["bytes"], first["flop"]) == ("experts", 1, 570, 23)


def copy_of(start: int, end: int, nbytes: int, layer: int = 1, launched: int = 0) -> Kernel:
    """Experts that are fetched for ``layer`` while the host is in layer 1."""
    return Kernel("Memcpy", start, end, (*LAYER, "dispatch", f"layer {layer}", f"fetch {nbytes}"), launched)


def fetching(*kernels: Kernel, end: int) -> Seen:
    """A rank with one call, in which each copy among ``kernels`` was asked for alone."""
    asked = [(k.launched, k.ranges) for k in kernels if k.fetches]
    return Seen([(0, end)], list(kernels), [], asked)


def test_a_copy_of_experts_counts_while_nothing_else_runs():
    one = fetching(
        Kernel("gemv", 0, 10, (*LAYER, "gate"), 0),
        copy_of(10, 40, 600, launched=8),
        Kernel("_grouped_linear", 20, 30, (*LAYER, "dispatch", "experts"), 9),
        Kernel("_grouped_linear", 45, 55, (*LAYER, "dispatch", "experts"), 12),
        end=60,
    )
    frame = table([one], True, [{0: {(1, "experts up"): Cost(50.0, 0.0)}}])
    told = [
        (r.part, round(1e9 * r.start), round(1e9 * r.duration), round(1e9 * r.exclusive), round(r.bytes))
        for r in frame.itertuples()
    ]
    assert told == [
        ("gate", 0, 10, 10, 0),
        ("fetch", 10, 10, 10, 300),
        ("fetch", 20, 10, 0, 0),
        ("experts up", 20, 10, 10, 50),
        ("fetch", 30, 10, 10, 300),
        ("idle", 40, 5, 5, 0),
        ("experts down", 45, 10, 10, 0),
        ("host", 55, 5, 5, 0),
    ]
    parts = by_part(frame, copy=10e9, matmul=1e12, link=24e9).set_index("part")
    # 600 bytes at 24 a nanosecond, of 30 nanoseconds in which they moved and 20 in which nothing else ran.
    assert parts.loc["fetch", ["seconds", "least", "of_limit"]].tolist() == pytest.approx(
        [20e-9, 25e-9, 25 / 30]
    )
    assert parts.loc["experts up", ["least", "of_limit"]].tolist() == pytest.approx([5e-9, 0.5])
    found = Profile(frame, *2 * [np.ones((1, 1))], frame, {"copy": 10e9, "matmul": 1e12, "link": 24e9})
    # The link needs longer than all else together; a faster one would not.
    assert found.limit == pytest.approx(25e-9)
    assert replace(found, meta=found.meta | {"link": 600e9}).limit == pytest.approx(5e-9)


def test_copies_that_are_hidden_keep_their_bytes():
    """Experts of the next layer come while this one computes: its parts are named as without them."""
    inside = (*LAYER, "dispatch", "experts")
    one = fetching(
        Kernel("_grouped_linear", 0, 30, inside, 0),
        copy_of(5, 10, 100, layer=3),
        copy_of(10, 25, 200, layer=3),
        Kernel("_grouped_linear", 30, 40, inside, 0),
        end=40,
    )
    frame = table([one], True, [{}])
    told = [(r.layer, r.part, round(1e9 * r.exclusive), round(r.bytes)) for r in frame.itertuples()]
    assert told == [
        (1, "experts up", 30, 0), (3, "fetch", 0, 75), (3, "fetch", 0, 225), (1, "experts down", 10, 0),
    ]  # fmt: skip
    fetch = by_part(frame, copy=1e9, matmul=1e9, link=30e9).set_index("part").loc["fetch"]
    assert fetch["seconds"] == fetch["share"] == 0
    assert fetch["least"] == pytest.approx(10e-9) and fetch["of_limit"] == pytest.approx(0.5)


def test_copies_of_experts_between_the_kernels_of_a_graph():
    template = [*kernels(("a", "attention"), ("e", "experts down"), ranges=("layer 1",))]
    template.insert(1, replace(copy_of(3, 9, 100), ranges=("layer 1", "layer 3", "fetch 100")))
    replayed = [Kernel(name, 10 * i, 10 * i + 5, ("call", "step 2"), 7, True) for i, name in enumerate("ae")]
    ahead = Kernel("Memcpy", 4, 12, ("call", "step 2", "layer 3", "fetch 100"), 5)
    assert named_of_graphs([replayed[0], ahead, replayed[1]], template) == [
        Name(2, 1, "attention"),
        Name(2, 3, "fetch"),
        Name(2, 1, "experts down"),
    ]


def test_events_of_a_gpu():
    def x(cat, name, ts, dur, tid=1, **args):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 5, "tid": tid, "args": args}

    found = [
        x("user_annotation", "moekit: template", 0, 2),
        x("user_annotation", "moekit: layer 4", 0, 1.5),
        x("user_annotation", "moekit: attention", 0, 1),
        x("cuda_runtime", "cudaLaunchKernel", 0.5, 0.2, correlation=1),
        x("kernel", "flash", 3, 2, tid=7, correlation=1),
        x("user_annotation", "moekit: call", 10, 20),
        x("user_annotation", "moekit: step 0", 10, 20),
        x("cuda_runtime", "cudaGraphLaunch", 11, 1, correlation=2),
        x("kernel", "flash", 14, 4, tid=7, correlation=2),
        x("gpu_memcpy", "Memcpy DtoH", 20, 1, tid=7, correlation=3),
        x("cuda_runtime", "cudaMemcpyAsync", 19, 3, correlation=3),
        x("user_annotation", "not ours", 12, 1),
        x("user_annotation", "moekit: layer 5", 24, 2),
        x("user_annotation", "moekit: fetch 640", 24, 1),
        x("cuda_runtime", "cudaMemcpyAsync", 24.5, 0.1, correlation=4),
        x("gpu_memcpy", "Memcpy HtoD", 25, 3, tid=8, correlation=4),
    ]
    recorded = worker.Recorded(
        events.zlib.compress(json.dumps(found).encode()), 1_000_000, 500, 0, [], [], np.zeros((1, 0, 0))
    )
    seen = events.seen(events.events_of(recorded), True)
    assert seen.calls == [(1_010_500, 1_030_500)]
    assert [(k.name, k.start, k.graph, k.fetches) for k in seen.kernels] == [
        ("flash", 1_014_500, True, False), ("Memcpy DtoH", 1_020_500, False, False), ("Memcpy HtoD", 1_025_500, False, True)
    ]  # fmt: skip
    assert seen.fetches == [(1_024_500, ("call", "step 0", "layer 5", "fetch 640"))]
    assert named_of_graphs(seen.kernels, seen.template) == [
        Name(0, 4, "attention"),
        Name(0, -1, "other"),
        Name(0, 5, "fetch"),
    ]


def test_the_clock_is_read_where_it_took_least_time():
    marks = [
        {"name": "moekit: clock", "cat": "user_annotation", "ts": 100.0, "dur": 50.0},
        {"name": "moekit: clock", "cat": "user_annotation", "ts": 200.0, "dur": 2.0},
    ]
    # The second reading, 1_201_300, was taken at 1_000_000 + 201_000 by the profiler's clock.
    assert worker.clock_of(marks, 1_000_000, [9, 1_201_300]) == 300


# ------------------------------------------------------------------------------------------------ the least cost


TINY = replace(shapes.SHAPES["tiny"], vocab_rows=300)


def scored(blocks=2, length=8, experts=16) -> Pass:
    tokens = blocks * length
    received = np.zeros((2, experts))
    received[:, :4] = tokens * 2 / 4
    return Pass(
        tokens,
        blocks * length * (length + 1) / 2,
        0,
        tokens,
        True,
        300,
        4,
        received,
        np.zeros(2),
        np.zeros(2),
    )


def test_operations_add_up_to_those_of_a_token():
    costs = least(TINY, scored())
    assert sum(cost.flop for cost in costs.values()) == pytest.approx(16 * flop_per_token(TINY, 8))


def test_weights_are_read_once_by_hand():
    many, one = (sum(c.bytes for c in least(TINY, scored(blocks)).values()) for blocks in (2, 1))
    # What does not grow with the tokens: the layers, the output matrix, and four experts in each of two layers.
    fixed = 2 * one - many
    d, f = TINY.dim, TINY.ffn_dim
    weights = (
        4 * (4 * d * d + 4 * d)
        + 2 * (2 * d * f + f + d)
        + 2 * d * 16
        + 2 * 4 * (d * f + f + f * d + d)
        + 300 * d
    )
    assert fixed == pytest.approx(4 * weights + 2 * 16 * 8)
    down = least(TINY, scored())[1, "experts down"]
    assert down == Cost(4 * (4 * (d * f + d) + 32 * (f + d)), 2 * 32 * d * f)


def test_logits_that_need_not_exist_cost_nothing():
    """Scoring may make them and their sums in one kernel; the choice of a token reads them."""
    first, once = scored(), replace(scored(), scored=False)
    table, rows = 4 * 300 * TINY.dim, 16
    assert least(TINY, first)[OUTSIDE, "output"].bytes == table + 4 * rows * TINY.dim
    assert least(TINY, first)[OUTSIDE, "log-probabilities"].bytes == rows * (8 + 4)
    logits = 4 * rows * 300
    assert least(TINY, once)[OUTSIDE, "output"].bytes == table + 4 * rows * TINY.dim + logits
    assert least(TINY, once)[OUTSIDE, "sampling"].bytes == logits + rows * (8 + 4)


def test_results_that_the_experts_write_home_by_hand():
    one = replace(scored(), sent=np.array([3.0, 0.0]), taken=np.array([5.0, 1.0]))
    row = 4 * TINY.dim
    apart, home = (least(TINY, replace(one, homeward=homeward)) for homeward in (False, True))
    assert apart[1, "combine"].bytes == apart[1, "dispatch"].bytes == home[1, "dispatch"].bytes == 8 * row
    assert home[1, "combine"].bytes == 0
    assert home[1, "experts down"].bytes - apart[1, "experts down"].bytes == 3 * row


def test_rows_between_ranks_by_hand():
    # Rank 0's tokens chose experts 0 and 2, rank 1's expert 2 and 3; rank 1 holds 2 and 3.
    counts = np.array([[[3, 0, 1, 0]], [[0, 0, 2, 5]]])
    holders = [np.array([0, 0, 1, 1])]
    received, sent, taken = routed(counts, holders, 1)
    assert received.tolist() == [[3, 5]] and sent.tolist() == [0] and taken.tolist() == [1]
    received, sent, taken = routed(counts, holders, 0)
    assert received.tolist() == [[3, 0]] and sent.tolist() == [1] and taken.tolist() == [0]


# ---------------------------------------------------------------------------------------------------- ranges


def test_no_range_is_made_while_nobody_looks(monkeypatch):
    def never(name):
        raise AssertionError(name)

    monkeypatch.setattr(torch.profiler, "record_function", never)
    assert parts.part("gate") is parts.NOTHING
    model = Transformer(replace(TINY, max_positions=16)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    tokens = torch.arange(4, 12)[None]
    quiet = model(tokens, ModelPass())
    with pytest.raises(AssertionError), parts.shown():
        model(tokens, ModelPass())
    monkeypatch.undo()
    with parts.shown():
        assert torch.equal(model(tokens, ModelPass()), quiet)
    assert not parts._shown[0]


def test_the_parts_of_a_tiny_model_by_hand():
    """Every operation of a pass through two layers, one of them with experts, on one rank."""
    model = Transformer(replace(TINY, layers=2, max_positions=16, vocab_rows=20)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.1)
    tokens = torch.arange(4, 12)[None]
    model(tokens, ModelPass())
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
        parts.shown(),
        parts.part("call"),
    ):
        with parts.part("step 0"):
            model.logits(model(tokens, ModelPass()))
    found = [
        {"ph": "X", "cat": "user_annotation" if e.is_user_annotation() else "cpu_op", "name": e.name(), "tid": e.start_thread_id(),
         "start": e.start_ns(), "end": e.start_ns() + e.duration_ns()}
        for e in seen.profiler.kineto_results.events()
    ]  # fmt: skip
    one = events.seen(found, False)
    products: dict = {}
    for kernel, name in zip(one.kernels, named(one.kernels), strict=True):
        if kernel.name in (
            "aten::linear",
            "aten::layer_norm",
            "aten::scaled_dot_product_attention",
            "aten::embedding",
            "aten::softmax",
        ):
            products.setdefault((name.layer, name.part), []).append(kernel.name.removeprefix("aten::"))
    experts = {part: products.pop((1, f"experts {part}")) for part in ("up", "down")}
    assert products == {
        (-1, "embedding"): ["embedding"],
        (0, "norm"): ["layer_norm"] * 2,
        (0, "attention"): ["linear", "scaled_dot_product_attention", "linear"],
        (0, "dense"): ["linear"] * 2,
        (1, "norm"): ["layer_norm"] * 2,
        (1, "attention"): ["linear", "scaled_dot_product_attention", "linear"],
        (1, "gate"): ["linear", "softmax"],
        (-1, "norm"): ["layer_norm"],
        (-1, "output"): ["linear"],
    }
    routing = []
    model(tokens, ModelPass(record=lambda layer, found: routing.append(found.experts.unique().numel())))
    assert experts == {"up": ["linear"] * routing[0], "down": ["linear"] * routing[0]}


# ------------------------------------------------------------------------------------------------ real profiles


@pytest.fixture(scope="module")
def model():
    with moekit.load("demo", 2, "cpu", progress=False) as found:
        yield found


@pytest.fixture(scope="module", params=["score", "prefill", "decode"])
def profile(request, model) -> Profile:
    return model.profile("demo", request.param, steps=3, blocks=2, tokens_per_sample=64, progress=False)


def test_shares_add_up_to_the_steps(profile):
    frame = profile.frame
    assert profile.profiled.shape == (2, 3) and profile.plain.shape[1] % 3 == 0
    sums = frame.groupby("rank")["exclusive"].sum()
    assert sums.to_numpy() == pytest.approx(profile.profiled.sum(axis=1), rel=0.03)
    assert profile.shares()["share"].sum() == pytest.approx(1)
    assert sorted(frame["step"].unique()) == [0, 1, 2] and set(frame["part"]) <= set(PARTS)
    assert (frame["exclusive"] >= 0).all() and (frame["exclusive"] <= frame["duration"] + 1e-12).all()


def test_every_layer_has_its_parts(profile):
    frame = profile.frame[~profile.frame["part"].isin(naming.NO_WORK)]
    last = {"score": {"log-probabilities"}, "prefill": {"sampling"}, "decode": {"sampling"}}[
        profile.meta["mode"]
    ]
    experts = {"norm", "attention", "gate", "plan", "dispatch", "experts up", "experts down", "combine"}
    for _, rows in frame.groupby(["rank", "step"]):
        found = rows.groupby("layer")["part"].agg(set)
        for layer in range(6):
            wanted = experts if layer % 2 else {"norm", "attention", "dense"}
            # Of few tokens, none may go to a rank's experts.
            assert wanted - found[layer] <= ({"experts down"} if profile.meta["mode"] == "decode" else set())
        assert {"embedding", "norm", "output"} | last <= found[-1]
    assert profile.shares().set_index("part")["share"].get("other", 0) < 0.05


def test_an_exchange_ends_after_every_rank_has_come(profile):
    """What aligned clocks must show: nobody has the rows of a rank that has not come yet."""
    found = [
        sorted((e["start"], e["end"]) for e in own if e["name"] == "moekit: exchange")
        for own in profile.events
    ]
    exchanges = np.array(found)  # [W, exchanges, 2]
    assert exchanges.shape[1] >= 3 * 3 * (2 if profile.meta["mode"] == "decode" else 3)
    latest, first_end = exchanges[..., 0].max(axis=0), exchanges[..., 1].min(axis=0)
    assert (first_end - latest > -20_000).all(), "by more than 20 us"
    # What waits for the last rank is told as waiting, and nothing else is.
    waited = (latest - exchanges[..., 0]).sum(axis=1) / 1e9
    waiting = profile.frame[profile.frame["part"] == "waiting"].groupby("rank")["exclusive"].sum()
    assert waiting.reindex([0, 1], fill_value=0).to_numpy() == pytest.approx(waited, rel=0.02, abs=1e-4)


def test_rows_of_the_experts_are_those_of_the_trace(model):
    found = model.profile("demo", "score", steps=1, blocks=2, tokens_per_sample=64, progress=False)
    ids, _ = run._tokens(model, "demo", "valid", 2 * 2 * 64)
    trace = model.trace(ids[: 2 * 2 * 64].reshape(-1, 64)[:, :63].tolist(), progress=False)
    counts = np.stack([np.bincount(trace.experts[:, i].ravel(), minlength=16) for i in range(3)])
    rows = found.rows.pivot(index="layer", columns="rank", values="rows")
    assert rows.to_numpy().tolist() == [[int(c[:8].sum()), int(c[8:].sum())] for c in counts]
    experts = found.experts()
    assert experts["rows"].sum() == counts.sum() and (experts["seconds"] > 0).all()
    assert (experts.groupby("layer")["busiest"].first() >= 1).all()
    busiest = found.busiest()
    assert set(busiest) == {1, 3, 5} and 0 < sum(busiest.values()) < 1


def test_the_operations_of_a_real_profile_by_hand(profile, model):
    config, mode = model.config, profile.meta["mode"]
    d, f, sequences, steps = config.dim, config.ffn_dim, 2, 3
    tokens = sequences * (1 if mode == "decode" else 64)
    # Each token looks at itself and at all before it; the first decode step comes after 32 + 8 tokens.
    keys = sequences * (64 * 65 / 2 if mode != "decode" else (41 + 42 + 43) / 3)
    rows = profile.rows["rows"].sum() / (2 * steps)
    if mode != "decode":
        assert rows == 3 * 2 * tokens
    wanted = {
        "attention": 6 * (2 * tokens * 4 * d * d + 4 * keys * d),
        "dense": 3 * 2 * tokens * 2 * d * 4 * d,
        "gate": 3 * 2 * tokens * d * 16,
        "experts up": 2 * rows * d * f,
        "experts down": 2 * rows * d * f,
        "output": 2 * (tokens if mode == "score" else sequences) * model.vocab * d,
    }
    found = profile.frame.groupby("part")["flop"].sum() / (2 * steps)
    assert found[found > 0].to_dict() == pytest.approx(wanted)


class Counting(TorchDispatchMode):
    """Counts the operations that run, by name: a witness that is no profiler."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "profiler":
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(rank, work: Work, look: bool) -> Counter:
    doing = DOING[work.mode](rank, work)
    quiet, rank.send_report = rank.send_report, None
    try:
        with torch.inference_mode():
            doing.warm_up()
            with Counting() as counting:
                if look:
                    worker.looked_at(rank, doing)
                else:
                    # Before the calls that a profiler looks at, the ranks meet.
                    torch.distributed.barrier()
                    doing.ready()
                    for _ in range(doing.calls):
                        doing.timed()
    finally:
        doing.end()
        rank.send_report = quiet
    return counting.seen


@pytest.mark.parametrize("mode", ["score", "prefill", "decode"])
def test_the_same_operations_run_under_the_profiler(model, mode):
    ids, vocab = run._tokens(model, "demo", "valid", 2 * 64)
    work = work_of(model, Size(mode, 2, 1, 64), ids, 0.2, vocab, 1)
    without, under = (model.ranks.call(counted, work, look) for look in (False, True))
    for one, other in zip(without, under, strict=True):
        assert one - other == other - one == Counter() and one.total() > 100


def test_the_file_for_perfetto_is_in_its_format(profile, tmp_path):
    path = tmp_path / "trace.json.gz"
    profile.save_trace(path)
    held = trace_format.read(gzip.decompress(path.read_bytes()))
    assert trace_format.problems(held) == []
    found = held["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert sorted(names.values()) == [f"rank {r}: {what}" for r in (0, 1) for what in ("host", "parts")]
    assert {e["pid"] for e in found if e["ph"] == "X"} == set(names)
    lanes = [e for e in found if e.get("cat") == "part"]
    assert sum(e["dur"] for e in lanes) == pytest.approx(1e6 * profile.frame["exclusive"].sum(), rel=1e-6)
    # The profiler's own lanes are on the same clock, and begin with the first call.
    calls = sorted(e["ts"] for e in found if e["name"] == "moekit: call")
    assert calls[0] == 0 and len(calls) == 2 * (1 if profile.meta["mode"] == "decode" else 3)
    first = profile.frame.groupby(["rank", "step"])["start"].min()
    if profile.meta["mode"] != "decode":
        assert calls == pytest.approx(sorted(1e6 * first), abs=1e-3)


def launched() -> dict:
    """The trace of two ranks, each with a launch in a call, a flow to its kernel, and a launch before the call."""

    def x(cat, name, ts, end, pid, tid, **more):
        return {
            "ph": "X",
            "cat": cat,
            "name": name,
            "pid": pid,
            "tid": tid,
            "start": ts,
            "end": end,
            "args": {},
        } | more

    def flow(ph, ts, pid, tid, number):
        return {
            "ph": ph,
            "cat": "ac2g",
            "name": "ac2g",
            "pid": pid,
            "tid": tid,
            "start": ts,
            "id": number,
            "bp": "e",
        }

    own = [
        x("user_annotation", "moekit: clock", 0, 5, 4000, 4001),
        flow("s", 3, 4000, 4001, 8),
        x("kernel", "late", 1000, 1400, 0, 0),
        flow("f", 1000, 0, 0, 8),
        # What is around comes behind what it is around.
        x("cuda_runtime", "cudaLaunchKernel", 100, 300, 4000, 4001),
        x("user_annotation", "moekit: call", 100, 2000, 4000, 4001),
        flow("s", 100, 4000, 4001, 9),
        flow("f", 1500, 0, 0, 9),
        x("kernel", "gemm", 1500, 1900, 0, 0),
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "python"}},
    ]  # fmt: skip
    frame = pd.DataFrame(
        [(rank, 0, 1, "attention", "gemm", 1400e-9, 400e-9, 400e-9, 1.0, 2.0) for rank in (0, 1)],
        columns=COLUMNS,
    )
    return json.loads(json.dumps(trace_of(frame, [own, own], {"mode": "score"}), allow_nan=False))


def test_flows_lanes_and_times_of_a_trace_by_hand():
    found = launched()
    assert trace_format.problems(found) == []
    told = [
        (e["ph"], e["pid"], e["tid"], e["ts"], e.get("dur"), e.get("id"), e["name"])
        for e in found["traceEvents"]
        if e["ph"] != "M" and e["pid"] < 200
    ]
    # Neither the reading of the clock nor the flow that begins there is in the trace.
    assert told == [
        ("X", 102, 4001, 0, 1.9, None, "moekit: call"),
        ("X", 102, 4001, 0, 0.2, None, "cudaLaunchKernel"),
        ("s", 102, 4001, 0, None, 1, "ac2g"),
        ("X", 101, 1, 0.9, 0.4, None, "late"),
        ("X", 101, 1, 1.4, 0.4, None, "gemm"),
        ("f", 101, 1, 1.4, None, 1, "ac2g"),
        ("X", 100, 1, 1.4, 0.4, None, "attention"),
    ]
    ids = [e["id"] for e in found["traceEvents"] if e["ph"] == "s"]
    assert ids == [1, 2]
    names = {(e["pid"], e["name"]): e["args"].get("name") for e in found["traceEvents"] if e["ph"] == "M"}
    assert [names[pid, "process_name"] for pid in (100, 101, 102, 201)] == [
        "rank 0: parts", "rank 0: device", "rank 0: host", "rank 1: device"
    ]  # fmt: skip
    assert names[101, "thread_name"] == "stream 0" and names[102, "thread_name"] == "thread 4001"


def test_kernels_of_a_stream_that_overlap_have_lanes_of_their_own():
    """A kernel of a programmatic dependent launch begins before the one in front of it ends; its flow goes with it."""

    def kernel(name, start, end):
        return {
            "ph": "X",
            "cat": "kernel",
            "name": name,
            "pid": 0,
            "tid": 7,
            "start": start,
            "end": end,
            "args": {},
        }

    call = {"ph": "X", "cat": "user_annotation", "name": "moekit: call", "pid": 40, "tid": 41, "args": {}}
    flow = {"cat": "ac2g", "name": "ac2g", "bp": "e", "id": 3}
    own = [
        call | {"start": 0, "end": 1000},
        flow | {"ph": "s", "pid": 40, "tid": 41, "start": 10},
        kernel("a", 100, 200),
        kernel("b", 180, 300),
        flow | {"ph": "f", "pid": 0, "tid": 7, "start": 180},
        kernel("c", 190, 250),
        kernel("d", 250, 400),
        kernel("e", 400, 500),
    ]
    frame = pd.DataFrame([(0, 0, 1, "attention", "a", 1e-7, 1e-7, 1e-7, 1.0, 2.0)], columns=COLUMNS)
    found = trace_of(frame, [own], {"mode": "decode"})
    assert trace_format.problems(found) == []
    events = found["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    lanes = {e["name"]: (names[e["pid"], e["tid"]], e["tid"]) for e in events if e.get("cat") == "kernel"}
    assert {name: lane for name, (lane, _) in lanes.items()} == {
        "a": "stream 7", "b": "stream 7, overlapping", "c": "stream 7, overlapping", "d": "stream 7", "e": "stream 7"
    }  # fmt: skip
    assert len({lanes[name][1] for name in "abc"}) == 3
    [end] = [e for e in events if e["ph"] == "f"]
    assert end["tid"] == lanes["b"][1]


@pytest.mark.parametrize(
    ("phase", "name", "changes", "said"),
    [
        ("X", "gemm", {"ts": -0.1}, "ts is below 0"),
        ("X", "gemm", {"ts": float("inf")}, "ts is below 0 or not finite"),
        ("X", "gemm", {"ts": "1.4"}, "ts is no float"),
        ("X", "gemm", {"ts": 1.4004}, "no whole number of nanoseconds"),
        ("X", "gemm", {"dur": -0.001}, "dur is below 0"),
        ("X", "gemm", {"dur": None}, "dur is no float"),
        ("X", "gemm", {"pid": 0}, "pid is 0"),
        ("X", "gemm", {"tid": "stream 7"}, "tid is no int"),
        ("X", "gemm", {"tid": True}, "tid is no int"),
        ("X", "gemm", {"name": ""}, "name is empty"),
        ("X", "gemm", {"args": None}, "args is no dict"),
        ("X", "gemm", {"ph": "Q"}, "no event of a known phase"),
        ("X", "gemm", {"pid": 555}, r"\(555, None\) has no name"),
        ("X", "gemm", {"tid": 77}, r"\(101, 77\) has no name"),
        ("X", "gemm", {"ts": 1.2}, "overlaps a slice that it is not in"),
        ("X", "gemm", {"ts": 0.5}, "before the event in front of it"),
        ("X", "cudaLaunchKernel", {"dur": 1.901}, "overlaps a slice that it is not in"),
        ("X", "moekit: call", {"dur": 0.1}, "overlaps a slice that it is not in"),
        ("s", "ac2g", {"id": "0:9"}, "id is no int"),
        ("s", "ac2g", {"id": 5}, "a flow that ends and does not begin"),
        ("s", "ac2g", {"id": 2}, "a flow that begins 2 times"),
        ("f", "ac2g", {"id": 5}, "a flow that does not end"),
        ("f", "ac2g", {"bp": "s"}, "ends in the next slice"),
        ("f", "ac2g", {"ts": 1.8}, "a flow with no slice around it"),
        ("M", "process_name", {"args": {}}, "metadata that says nothing"),
        ("M", "process_name", {"name": "a note"}, "metadata that says nothing"),
        ("M", "thread_name", {"tid": 2}, r"\(10., .*\) has no name"),
        ("M", "process_name", {"pid": 201}, r"\(201, None\) has 2 names"),
    ],
)
def test_a_trace_that_is_not_in_the_format_is_seen(phase, name, changes, said):
    """The check itself: each change to one event of a good trace is a problem."""
    found = launched()
    event = next(e for e in found["traceEvents"] if (e["ph"], e["name"]) == (phase, name))
    event.update(changes)
    told = trace_format.problems(found)
    assert told and re.search(said, "; ".join(told)), told


def test_a_trace_that_is_no_trace_is_seen():
    good = launched()
    assert trace_format.problems([]) and trace_format.problems({"traceEvents": {}})
    assert trace_format.problems(good | {"displayTimeUnit": "s"}) == ["displayTimeUnit is neither ms nor ns"]
    assert trace_format.problems(good | {"otherData": 1}) == ["otherData is no object"]
    with pytest.raises(ValueError, match="NaN is no JSON"):
        trace_format.read(json.dumps(good | {"otherData": {"copy": float("nan")}}))


def test_a_profile_is_read_as_it_was_written(profile, tmp_path, monkeypatch):
    profile.save(tmp_path / "p.json.gz")
    again = Profile.load(tmp_path / "p.json.gz")
    pd.testing.assert_frame_equal(again.frame, profile.frame)
    pd.testing.assert_frame_equal(again.shares(), profile.shares())
    assert (
        again.meta == profile.meta and repr(again) == repr(profile) and (again.plain == profile.plain).all()
    )
    with pytest.raises(ValueError, match="read from a file and has no events"):
        again.save_trace(tmp_path / "t.json.gz")
    whole = (tmp_path / "p.json.gz").read_bytes()
    damaged = [
        whole[:-200],
        whole[:400] + bytes(200) + whole[600:],
        gzip.compress(bytes(200_000_000)),
        b"",
        b"{}",
    ]
    for bad in [gzip.compress(b'{"meta": {}}'), *damaged]:
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="no profile that Profile.save wrote"):
            Profile.load(tmp_path / "bad")
    monkeypatch.setattr(sys.modules[Profile.__module__], "MOST_VALUES", 100)
    with pytest.raises(ValueError, match="100 can be read: profile fewer steps"):
        profile.save(tmp_path / "more.json.gz")
    held = json.loads(gzip.decompress(whole))
    held["frame"]["part"][0] = "nope"
    (tmp_path / "bad").write_bytes(gzip.compress(json.dumps(held).encode()))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its frame has the part 'nope', expected one of"):
        Profile.load(tmp_path / "bad")
    os.mkfifo(tmp_path / "fifo")
    for name, found in (("missing", "there is no file .*missing"), ("fifo", "fifo is a device, a pipe")):
        with pytest.raises(ValueError, match=f"{found}.*; expected a profile"):
            Profile.load(tmp_path / name)


def test_a_profile_from_elsewhere_has_every_part_of_its_kind(tmp_path):
    """What is missing or of another kind is found when the file is read, not when it is drawn."""
    made_up().save(tmp_path / "p.json.gz")
    held = json.loads(gzip.decompress((tmp_path / "p.json.gz").read_bytes()))
    places = [("frame", name) for name in held["frame"]] + [("rows", name) for name in held["rows"]]
    places += [("plain",), ("profiled",), ("meta",), ("frame",), ("rows",)]
    places += [
        ("meta", name) for name in ("mode", "chip", "blocks", "tokens", "world_size", "copy", "matmul")
    ]
    for *above, last in places:
        for value in (None, "x", {}, [[]], [None], -1, float("nan")):
            of_words = last in ("mode", "chip", "part", "kernel")
            if (value == "x" and of_words) or (value == -1 and above and above[0] != "meta" and not of_words):
                # It is of the kind; one value for a whole column is a column of it.
                continue
            changed = copy.deepcopy(held)
            (changed[above[0]] if above else changed)[last] = value
            (tmp_path / "bad").write_bytes(gzip.compress(json.dumps(changed).encode(), 1))
            with pytest.raises(ValueError, match="no profile that Profile.save wrote"):
                Profile.load(tmp_path / "bad")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"frame": {"exclusive": 0}}, "the steps in its frame take no time"),
        ({"frame": {"exclusive": 1e308}}, "no column 'exclusive' of numbers up to 1e\\+30"),
        ({"frame": {"duration": 1e308}}, "no column 'duration' of numbers up to 1e\\+30"),
        ({"plain": [[1e308]]}, "plain holds something else than seconds"),
    ],
)
def test_numbers_that_no_picture_can_show_are_refused_with_the_file(change, said, tmp_path):
    made_up().save(tmp_path / "p.json.gz")
    held = json.loads(gzip.decompress((tmp_path / "p.json.gz").read_bytes()))
    for name, value in change.items():
        held[name] = held[name] | value if isinstance(value, dict) else value
    (tmp_path / "bad").write_bytes(gzip.compress(json.dumps(held).encode()))
    with pytest.raises(ValueError, match=f"{said}.*; name one, or profile anew"):
        Profile.load(tmp_path / "bad")


@pytest.mark.parametrize(
    "text, said",
    [
        (b'{"traceEvents": []}', "it has no 'frame'"),
        (b"[]", r"it is \[\]"),
        (b"null", "it is None"),
        (b"[", "it is no JSON"),
        (b'{"meta": 1, "meta": 2}', "it has the key 'meta' twice"),
    ],
)
def test_other_files_are_no_profiles_and_the_sentence_says_why(text, said, tmp_path):
    """A trace for Perfetto, say, which was named in place of the profile."""
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(text))
    with pytest.raises(ValueError, match=f"no profile that Profile.save wrote: {said}"):
        Profile.load(tmp_path / "t.json.gz")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mode": "train"}, "mode='train': expected one of score, prefill, decode"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 10**9}, "steps=1000000000: expected at most 1000"),
        ({"blocks": 1.5}, "blocks=1.5"),
        ({"tokens_per_sample": 1}, "tokens_per_sample=1: expected 2 to the model's 256"),
        (
            {"blocks": 10**6},
            "blocks=1000000: a step needs .* GiB on each rank, and .* are free; ask for fewer",
        ),
        ({"mode": "decode", "blocks": 10**7, "steps": 1}, "blocks=10000000: a step needs"),
        ({"mode": "decode", "steps": 200}, "the steps need 336 positions, and the model has 256"),
        ({"data_or_texts": [[]]}, "no tokens to profile with"),
        ({"data_or_texts": [[5], [5, 99999]]}, "^text 1 has the id 99999; expected 0 to 8191"),
        ({"data_or_texts": ["a", 5]}, "^text 1 is 5; expected a text or ids"),
        ({"data_or_texts": []}, "^there are no texts"),
    ],
)
def test_what_cannot_be_profiled(model, asked, said):
    with pytest.raises(ValueError, match=said):
        model.profile(**{"progress": False} | asked)
    assert model.score("It still runs.") is not None


@pytest.mark.parametrize("mode", ["score", "prefill", "decode"])
def test_a_forced_sample_has_to_be_there(mode, model, monkeypatch):
    """As in every other call: else the profile would be one of a routing that nobody changed."""
    how = {"mode": mode, "steps": 1, "blocks": 2, "tokens_per_sample": 32, "progress": False}
    monkeypatch.setattr(model.ranks, "call", lambda *_, **__: pytest.fail("the ranks were asked"))
    count = 2 * model.world_size
    last = 31 if mode != "decode" else 16 + STEPS_BEFORE
    for sample, position, said in (
        (2000, None, f"the samples of this call are {count}, from 0 to {count - 1}"),
        (count, None, f"from 0 to {count - 1}"),
        (0, last + 1, f"one of its positions, 0 to {last}"),
    ):
        with (
            model.route(force=moekit.Force(1, sample=sample, positions=position)),
            pytest.raises(ValueError, match=said),
        ):
            model.profile(**how)
    monkeypatch.undo()
    with model.route(force=moekit.Force(1, sample=count - 1, positions=last)):
        assert len(model.profile(**how).rows)


def test_as_many_steps_as_the_bench_makes_or_as_there_are_positions_for():
    config = replace(TINY, max_positions=256)

    def steps(device: str, mode: str, asked: int | None = None, length: int = 256) -> int:
        return Size.of(config, device, mode, asked, 1, length).steps

    assert [steps("cuda", mode) for mode in MODES] == [3, 3, DECODED["cuda"]]
    assert (steps("cpu", "decode"), steps("cuda", "decode", 3)) == (DECODED["cpu"], 3)
    # After prompts of 30 tokens and 8 steps there are 22 positions.
    config = replace(TINY, max_positions=60)
    assert (steps("cuda", "decode", length=60), steps("cuda", "decode", 5, 60)) == (60 - 30 - 8, 5)
    with pytest.raises(ValueError, match="^steps=23: prompts of 30 tokens and the steps need 61 positions"):
        steps("cuda", "decode", 23, 60)


def test_a_profiler_of_the_users_own_sees_all_that_it_looks_at():
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as own:
            with pytest.raises(moekit.ranks.RankError, match="profiler runs in this process already: end it"):
                model.profile("demo", steps=1, tokens_per_sample=16, progress=False)
            model.score("It still runs.")
        assert any(event.key == "aten::linear" for event in own.key_averages())
        assert model.profile("demo", steps=1, tokens_per_sample=16, progress=False).step > 0


def test_a_step_that_fails_leaves_no_profiler_running(monkeypatch):
    with moekit.load("demo", 1, "cpu", progress=False) as alone:
        work = {"steps": 1, "tokens_per_sample": 32, "progress": False}
        timed = Score.timed

        def fails_under_the_profiler(self):
            if parts._shown[0]:
                raise MemoryError("no room")
            return timed(self)

        with monkeypatch.context() as patched:
            patched.setattr(Score, "timed", fails_under_the_profiler)
            with pytest.raises(moekit.RankError, match="no room"):
                alone.profile("demo", **work)
        assert not parts._shown[0]
        found = alone.profile("demo", **work)
        assert "waiting" not in set(found.frame["part"]) and found.meta["world_size"] == 1
        assert found.meta["experts"] is None and found.meta["resident"] is None


def test_a_dense_model_has_no_experts():
    config = ModelConfig(2, 16, 32, 2, 50, 16, 16, 32)
    costs = least(
        config, replace(scored(1, 4), received=np.zeros((0, 0)), sent=np.zeros(0), taken=np.zeros(0))
    )
    assert {part for _, part in costs} == {
        "embedding",
        "norm",
        "attention",
        "dense",
        "output",
        "log-probabilities",
    }


def test_a_dense_model_is_profiled():
    with moekit.load("demo-dense", 2, "cpu", progress=False) as loaded:
        for mode in MODES:
            found = loaded.profile("demo", mode, steps=1, progress=False)
            assert {"attention", "dense", "output"} < set(found.frame["part"]) and found.experts().empty


@pytest.mark.parametrize("mode", ["score", "decode"])
def test_experts_that_are_fetched_are_experts(mode, monkeypatch):
    counted: list[list[int]] = []
    kind = DOING[mode]
    timed = kind.timed

    def counts(self):
        """The bytes that each layer fetches while the profiler looks."""
        layers = self.rank.state["model"].slots.layers
        before = [layer.counts.nbytes for layer in layers]
        seconds = timed(self)
        if parts._shown[0]:
            counted.append([layer.counts.nbytes - b for layer, b in zip(layers, before, strict=True)])
        return seconds

    monkeypatch.setattr(kind, "timed", counts)
    with moekit.load("demo", 1, "cpu", resident=2, experts="int8", progress=False) as loaded:
        found = loaded.profile("demo", mode, steps=2, progress=False)
        layers = loaded.config.moe_layers
    frame = found.frame
    for name in ("fetch", "experts up", "experts down"):
        assert set(frame[frame["part"] == name]["layer"]) == set(layers)
    assert found.meta["resident"] == 2 and found.meta["experts"] == "int8"
    assert frame["exclusive"].sum() == pytest.approx(found.profiled.sum(), rel=0.03)
    # What the frame tells of the link is what the slots counted.
    fetched = frame[frame["part"] == "fetch"].groupby("layer")["bytes"].sum()
    assert fetched.loc[list(layers)].tolist() == pytest.approx(np.sum(counted, axis=0).tolist())
    told = found.shares().set_index("part").loc["fetch"]
    assert told["least"] == pytest.approx(fetched.sum() / 2 / found.meta["link"])
    assert told["flop"] == 0 and told["seconds"] > 0 and told["of_limit"] > 0


def test_remarks_of_the_profiler_are_no_output(capfd):
    with worker.without_remarks():
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        profiler.start()
        profiler.stop()
    with contextlib.suppress(ZeroDivisionError), worker.without_remarks():
        os.write(2, b"a remark of others\n")
        # What torch 2.11 says at every first start.
        warnings.warn("Warning: Profiler clears events at the end of each cycle.", stacklevel=1)
        with pytest.warns(match="another"):
            warnings.warn("another", stacklevel=1)
        raise ZeroDivisionError
    assert capfd.readouterr().err == "a remark of others\n"
