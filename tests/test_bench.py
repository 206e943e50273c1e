"""The bench: its formulas by hand, its rows on a tiny shape, and that a wrong result is an error. Never its times."""

import json
import math
import os
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_traces import synthetic

import moekit
from moekit import paths, scoring
from moekit.bench import __main__ as bench
from moekit.bench import (
    data,
    decode,
    figures,
    load,
    measure,
    moe_layer,
    network,
    profile,
    routing,
    score,
    shapes,
)
from moekit.bench.figures import Figure
from moekit.bench.measure import Ceilings
from moekit.bench.setting import Setting
from moekit.nn import transformer
from moekit.nn.cost import flop_per_token
from moekit.nn.memory import TOKENS_A_PASS, Sizes
from moekit.nn.passes import Pass
from moekit.profiling.work import Size
from moekit.ranks import Rank, machine
from moekit.worker.steps import DOING, STEPS_BEFORE, TIMED, Work

CPU = torch.device("cpu")
TINY = shapes.SHAPES["tiny"]
H200 = "NVIDIA H200"


def setting(shape="tiny", world_size=1, dtype="float32", backend="loop") -> Setting:
    return Setting(shape, "cpu", dtype, backend, world_size, 2)


def run(tmp_path, *arguments: str) -> dict[str, list[dict]]:
    path = tmp_path / "figures.json"
    bench.main([*arguments, "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["command"].startswith("python -m moekit.bench " + arguments[0])
    assert found["versions"]["torch"] and found["date"]
    return found["benches"]


# -------------------------------------------------------------------------------------------------- formulas


def test_the_released_shapes_weigh_what_the_released_files_do():
    assert shapes.parameters(shapes.SHAPES["15b"]) == pytest.approx(14.6e9, rel=1e-3)
    assert shapes.parameters(shapes.SHAPES["52b"]) == pytest.approx(51.8e9, rel=1e-2)
    assert shapes.parameters(shapes.SHAPES["dense-1.3b"]) == pytest.approx(1.31e9, rel=1e-2)
    assert setting("15b", dtype="float16").rank_bytes() / 2**30 == pytest.approx(27.2, abs=0.1)


def test_costs_of_a_model_that_can_be_counted_by_hand():
    config = replace(TINY, layers=2, dim=4, ffn_dim=6, experts=3, vocab_rows=10, input_dim=4, output_dim=4)
    assert Sizes(config, torch.float32).expert == 4 * (4 * 6 + 6 + 6 * 4 + 4)
    # Projections 4 * 16 a layer and (1 + 3) / 2 * 2 * 4 for attention, 48 dense, 2 experts of 48, gate 12, output 40.
    assert flop_per_token(config, 3) == 2 * (2 * (64 + 16) + 48 + 96 + 12 + 40)
    assert flop_per_token(replace(config, gate="top1"), 3) == 2 * (2 * (64 + 16) + 48 + 48 + 12 + 40)
    # Both layers are dense, one of them 10 wide; bridges of 5 and 8 columns, and the output matrix has 8 of them.
    dense = replace(config, alternate_ffn_dim=10, input_dim=5, output_dim=8, share_output=False)
    assert flop_per_token(dense, 3) == 2 * (2 * (64 + 16) + 48 + 80 + 20 + 32 + 80)


def test_an_expert_of_one_byte_has_a_scale_a_row():
    config = replace(TINY, dim=4, ffn_dim=6, moe_freq=2, layers=2, experts=3)
    small = replace(setting(dtype="float16"), experts="int8")
    assert small.sizes.expert == 2 * 64 * 128 + (64 + 128) * (2 + 4)
    plain = setting(dtype="float16")
    saved = 2 * 16 * (plain.sizes.expert - small.sizes.expert)
    assert plain.rank_bytes() - small.rank_bytes() == saved
    kinds = torch.float16, torch.int8
    assert small.rank_bytes() == transformer.weight_bytes(TINY, None, *kinds)
    assert transformer.weight_bytes(config, None, *kinds) < transformer.weight_bytes(config, None, kinds[0])
    assert replace(setting("15b", dtype="float16"), experts="fp8").rank_bytes() / 2**30 == pytest.approx(
        13.7, abs=0.1
    )
    assert replace(setting("52b", dtype="float16"), experts="int8").rank_bytes() / 2**30 < 50
    chip = Ceilings(copy=4.29e12, matmul=727e12, fetch=50e9, device=H200)
    assert replace(setting("15b", dtype="float16"), experts="int8").goal("decode 64", chip) == 60e3


def test_limits_are_those_of_the_issue_at_its_ceilings():
    chip = Ceilings(copy=4.29e12, matmul=727e12, fetch=50e9, device=H200)
    big = setting("15b", dtype="float16")
    assert score.limit(big, chip, 1) == pytest.approx(300e3, rel=0.01)  # all weights read once
    assert score.limit(big, chip, 32) == pytest.approx(2.1e6, rel=0.01)  # operations
    assert decode.limit(big, chip, [2.0] * 6, 1) == pytest.approx(0.07e-3, rel=0.05)
    pair = setting("15b", world_size=2, dtype="float16")
    assert score.limit(pair, chip, 1) == pytest.approx(
        2 * 300e3 * 2, rel=0.02
    )  # half the experts, twice the tokens


def test_a_rank_reads_the_experts_that_any_rank_chooses():
    # Two steps, two layers, five experts: rank 0 holds the experts 0 and 1, rank 1 holds 2 to 4.
    chosen = np.zeros((2, 2, 2, 5), dtype=bool)
    first, second = chosen
    first[0, 0, [0, 2]] = second[0, 0, [0, 1, 4]] = True  # 2 on rank 0, 2 on rank 1
    first[1, 0, [1]] = second[1, 0, [2, 3, 4]] = True  # 1, 3
    first[0, 1, [0, 1]] = second[0, 1, [0]] = True  # 2, 0
    first[1, 1, [3]] = second[1, 1, [3]] = True  # 0, 1
    reads = decode.Reads.of(chosen)
    assert (reads.by_any, reads.by_a_rank) == ([4.0, 1.5], [2.5, 1.5])
    assert str(reads) == "2.8 of 5 experts a layer, 2.0 on one rank"
    # One rank alone reads what it chooses.
    alone = decode.Reads.of([second])
    assert alone.by_a_rank == [3.0, 1.0] and str(alone) == "2.0 of 5 experts a layer"
    assert str(decode.Reads.of(chosen[:, :, :0])) == "no experts"
    small = setting("tiny", world_size=2, dtype="float16")
    chip = Ceilings(copy=1.0, matmul=1e30, fetch=1.0, device=H200)
    assert decode.limit(small, chip, [2.5, 1.5], 1) == small.sizes.shared + 4 * small.sizes.expert


def test_ratio_and_goal_heed_which_way_is_better():
    rate = Figure("x", 50.0, "tokens/s", limit=200.0, goal=60.0)
    time = Figure("x", 50.0, "ms", limit=20.0, goal=60.0, lower=True)
    assert (rate.ratio, rate.met, time.ratio, time.met) == (0.25, False, 0.4, True)
    # A measured number may be NumPy's, and the table is written as JSON.
    assert (
        json.loads(json.dumps(Figure("x", np.float64(0.5), "ms", goal=1.0, lower=True).row()))["met"] is True
    )
    nothing = Figure("x", None, "ms", limit=20.0, goal=60.0, lower=True)
    assert (nothing.ratio, nothing.met) == (None, None)


def test_goals_are_for_that_chip_and_shape_alone():
    assert figures.goal("15b", 1, "score 1", H200, "bfloat16") == 255e3
    assert figures.goal("15b", 2, "generate share", f"2 x {H200}", "float16") == 90
    assert figures.goal("15b", 1, "score 1", H200, "float32") is None
    assert figures.goal("15b", 1, "score 1", "NVIDIA A100", "float16") is None
    assert figures.goal("15b-64e", 1, "score 1", H200, "float16") is None
    assert figures.goal("15b", 2, "all-to-all", f"2 x {H200}", "float16") == 20


@pytest.mark.parametrize(("value", "shown"), [(0.012345, 0.0123), (999.4, 999.0), (14437.4, 14437.0), (0, 0)])
def test_three_digits_count(value, shown):
    assert figures.rounded(value) == shown


def test_a_one_is_no_yes(capsys):
    bench.show("decode", [Figure("a token", 1.0, "ms", 0.5, goal=2.0, lower=True).row()])
    assert re.search(r"a token +1 +ms +0\.5 +0\.5 +2 yes", capsys.readouterr().out)


def test_numbers_are_shown_as_they_were_rounded(capsys):
    """Each as it is, whatever the others of its column are."""
    rates = [Figure("a rate", 10227.3, "tokens/s"), Figure("a product", 0.04664, "TFLOP/s", goal=8 / 0.45e-3)]
    bench.show("score", [rate.row() for rate in rates])
    said = capsys.readouterr().out
    assert re.search(r"a rate +10227 ", said) and re.search(r"a product 0\.0466 +TFLOP/s +17778 ", said)


# ------------------------------------------------------------------------------------------------ measuring


def test_what_is_short_is_called_several_times_on_end():
    calls = []
    found = measure.seconds(lambda: calls.append(1), CPU, repeats=3, warm_up=2)
    assert len(found) == 3 and len(calls) == 5
    calls.clear()
    measure.seconds(lambda: calls.append(1), CPU, repeats=1, warm_up=0, least=0.01)
    assert len(calls) > 100


def test_memory_beyond_mapped_files_is_seen(tmp_path):
    np.zeros(50 << 20, dtype=np.uint8).tofile(tmp_path / "file")
    with measure.memory(CPU) as before:
        pass
    with measure.memory(CPU) as mapped:
        int(np.memmap(tmp_path / "file", mode="r").sum())
    with measure.memory(CPU) as held:
        kept = np.ones(50 << 20, dtype=np.uint8)
    assert mapped.host_gib - before.host_gib < 0.02
    assert held.host_gib - before.host_gib > 0.04 and len(kept)


def test_ceilings_leave_torchs_draws_as_they_are():
    before = torch.get_rng_state()
    found = measure.ceilings(Rank(0, 1, torch.device("cpu")), torch.float32)
    assert found.matmul > 0 and torch.equal(torch.get_rng_state(), before)


def test_the_ceiling_of_a_product_is_that_of_a_linear_layer(monkeypatch):
    """torch has another way for a matrix that lies otherwise, which is much slower where a CPU has no float16."""
    lying, mm = set(), torch.mm

    def seen(a, b, out):
        lying.add((a.stride(), b.stride()))
        return mm(a, b, out=out)

    monkeypatch.setattr(torch, "mm", seen)
    measure.ceilings(Rank(0, 1, CPU), torch.float32)
    ((rows, columns),) = lying
    layer = torch.nn.Linear(rows[0], rows[0], device="meta")
    assert rows == layer.weight.stride() and columns == layer.weight.T.stride()


def test_ceilings_are_the_slowest_ranks():
    found = measure.slowest([Ceilings(3, 5, 7, "x"), Ceilings(4, 4, 4, "x")])
    assert found == Ceilings(3, 4, 4, "2 x x")
    assert found.seconds(bytes_read=6, flop=4) == 2 and found.seconds(bytes_read=3, flop=8) == 2


# ------------------------------------------------------------------------------------------- random weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_stay_finite_and_all_experts_work(dtype):
    rank = Rank(0, 1, CPU)
    shapes.build(rank, TINY, dtype, "loop")
    batches = [score.random_batch(i, TINY.max_positions, TINY.vocab_rows) for i in range(2)]
    text = score.describe(rank, batches)
    assert text.startswith("16 of 16 experts")
    assert float(text.split(", ")[1].split("x")[0]) < 4
    found = score.score(rank, Work("score", 1, score.FRACTION, TINY.vocab_rows, 1, batches))
    assert len(found.seconds) == 1 and found.routing == text and rank.send_report is None


def test_what_is_written_is_in_the_released_layout_and_found_again(tmp_path):
    sums = shapes.write(TINY, tmp_path, 4, CPU, torch.bfloat16)
    assert {p.name for p in tmp_path.iterdir()} == {
        "model-shared.pt",
        *(f"model-rank-{r}.pt" for r in range(4)),
    }
    with moekit.load(tmp_path, device="cpu", dtype="bfloat16", progress=False) as model:
        assert replace(model.config, max_positions=0) == replace(TINY, max_positions=0)
        load.check(model, sums)
        experts = model.ranks.call(lambda rank: rank.state["model"])[0].layers[1].moe.experts
        with torch.no_grad():
            experts.w2[[2, 3]] = experts.w2[[3, 2]]
        with pytest.raises(ValueError, match=r"layers\.1\.moe\.experts\.w2, expert 2: its numbers add up to"):
            load.check(model, sums)


# ----------------------------------------------------------------------------------------------- the benches


def test_score(tmp_path, capsys, monkeypatch):
    steps: list[list[int]] = []

    def noted(model, batches, **how):
        packed = scoring.plan_steps(batches, model.world_size, TOKENS_A_PASS["cpu"])
        steps.append([len(step) for step in packed])
        return scoring.score_batches(model, batches, **how)

    monkeypatch.setattr(score, "score_batches", noted)
    rows = run(tmp_path, "score", "--shape", "tiny", "--device", "cpu", "--blocks", "1,3", "--repeats", "2")
    works = [row["work"] for row in rows["score"]]
    passes = ["score, 1 x 256 tokens a call", "score, 3 x 256 tokens a call"]
    # evaluate's passes have 4,096 tokens, so that a rate of passes of as many blocks is measured, and is the one it is compared with.
    passes.append("score, 16 x 256 tokens a call")
    assert works[3:] == [*passes, "evaluate, 32 blocks", "evaluate, 32 blocks, of the scoring rate"]
    assert steps and all(step == [16, 16] for step in steps)
    share, rate, alone = (rows["score"][place]["figure"] for place in (-1, -2, -3))
    assert share == pytest.approx(100 * rate / alone, rel=0.02)
    for row in rows["score"]:
        assert row["figure"] > 0 and row["goal"] is None and row["met"] is None
    assert all(row["ratio"] > 0 for row in rows["score"][3:])
    shown = capsys.readouterr().out
    assert "score, 3 x 256 tokens a call" in shown and "16 of 16 experts" in shown


def test_questions(tmp_path):
    rows = run(
        tmp_path, "questions", "--shape", "tiny", "--device", "cpu", "--choices", "3", "--repeats", "1"
    )
    whole, alone, shared = rows["questions"]
    assert whole["work"] == "evaluate, whole blocks" and shared["work"].startswith("questions, 3 endings")
    # The goal is in the same run: the rate on blocks of as many tokens.
    for row in (alone, shared):
        assert row["goal"] == pytest.approx(0.8 * whole["figure"], rel=0.01)
        assert row["met"] == (row["figure"] >= row["goal"])


def test_decode(tmp_path):
    rows = run(tmp_path, "decode", "--shape", "tiny", "--device", "cpu", "--batches", "1,3", "--repeats", "2")
    found = {row["work"]: row for row in rows["decode"]}
    assert found["decode, batch 1"]["unit"] == "ms a token"
    assert "2.0 of 16 experts a layer" in found["decode, batch 1"]["note"]
    assert found["decode, batch 3"]["unit"] == found["generate, batch 3"]["unit"] == "tokens/s"
    assert all(row["figure"] > 0 for row in rows["decode"])
    # Three sequences, 16 tokens each.
    share = found["generate, batch 3, of its steps' rate"]
    steps, rate = (found[f"{name}, batch 3"]["figure"] for name in ("decode", "generate"))
    assert share["figure"] == pytest.approx(100 * rate / steps, rel=0.02)
    reading, part = re.match(r"([\d.]+) ms to read the prompts, which is ([\d.]+)%", share["note"]).groups()
    assert float(reading) * rate / (3 * 16 * 1e3) == pytest.approx(float(part) / 100, rel=0.1)


@pytest.mark.parametrize("bench_name", ["score", "decode"])
def test_a_dense_shape(tmp_path, bench_name):
    size = ["--blocks", "1"] if bench_name == "score" else ["--batches", "1,2"]
    rows = run(tmp_path, bench_name, "--shape", "dense-tiny", "--device", "cpu", "--repeats", "1", *size)
    rows = rows[bench_name][3:]
    assert rows and all(row["figure"] > 0 and row["limit"] > 0 for row in rows)
    assert "no experts" in rows[0]["note"]


@pytest.mark.parametrize("name", ["moe-layer", "padded"])
def test_a_dense_shape_has_no_layer_to_time(tmp_path, name):
    (row,) = run(tmp_path, name, "--shape", "dense-tiny", "--device", "cpu")[name]
    assert row["figure"] is None and row["note"] == "the model is dense, it has no layer with experts"


def test_load_writes_its_files_unless_they_are_there(tmp_path):
    folder = tmp_path / "model"
    arguments = ["load", "--shape", "tiny", "--device", "cpu", "--dtype", "bfloat16", "--folder", str(folder)]
    rows = run(tmp_path, *arguments)["load"]
    assert [row["work"] for row in rows[3:6]] == [
        "load",
        "of that, reading on the slowest rank",
        "of that, all headers",
    ]
    assert "in 5 files" in rows[3]["note"]
    dense = ["load", "--shape", "dense-tiny", "--device", "cpu", "--folder", str(tmp_path / "dense")]
    assert "in 1 files" in run(tmp_path, *dense)["load"][3]["note"]
    written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    run(tmp_path, *arguments)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written


@pytest.mark.parametrize("experts", ["int8", "fp8"])
def test_experts_of_one_byte(tmp_path, experts):
    how = ["--shape", "tiny", "--device", "cpu", "--repeats", "1", "--experts", experts]
    rows = run(tmp_path, "score", *how, "--blocks", "1")["score"]
    assert rows[3]["figure"] > 0 and "16 of 16 experts" in rows[3]["note"]
    assert run(tmp_path, "decode", *how, "--batches", "1")["decode"][3]["figure"] > 0
    layer = run(tmp_path, "moe-layer", *how, "--tokens", "64", "--against", "loop")["moe-layer"][3]
    assert layer["work"] == "layer, 64 tokens: moekit's (loop)" and "error 0e+00" in layer["note"]
    rows = run(tmp_path, "load", *how)["load"]
    assert rows[3]["work"] == "load" and rows[3]["figure"] > 0


def test_what_is_loaded_in_one_byte_is_checked_too(tmp_path):
    kind = torch.int8
    sums = shapes.write(TINY, tmp_path, 4, CPU, torch.float32, kind)
    with moekit.load(tmp_path, device="cpu", experts="int8", progress=False) as model:
        load.check(model, sums)
        experts = model.ranks.call(lambda rank: rank.state["model"])[0].layers[1].moe.experts
        experts.w1.data[[2, 3]] = experts.w1.data[[3, 2]]
        with pytest.raises(ValueError, match=r"layers\.1\.moe\.experts\.w1, expert 2: its numbers add up to"):
            load.check(model, sums)


def test_what_does_not_fit_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "host_memory", lambda what: 10 << 20)
    (row,) = run(tmp_path, "moe-layer", "--shape", "15b", "--device", "cpu")["moe-layer"]
    assert row["note"].startswith("does not fit: 9.2 GiB of a layer and its rows, 0.0 GiB")
    for name in ("score", "decode", "padded"):
        (row,) = run(tmp_path, name, "--shape", "15b", "--device", "cpu")[name]
        assert row["figure"] is None and row["note"].startswith("does not fit: 54.4 GiB of weights, 0.0 GiB")
    monkeypatch.setattr(load.shutil, "disk_usage", lambda path: type("", (), {"free": 1 << 30}))
    (row,) = run(tmp_path, "load", "--shape", "15b", "--device", "cpu")["load"]
    assert row["note"].startswith("does not fit: 27.2 GiB of files, 1.0 GiB")


def test_a_wrong_layer_is_an_error():
    expected = torch.randn(2, 1000, 8)
    assert moe_layer.same("x", expected.clone(), expected) == "error 0e+00"
    tie = expected.clone()
    tie[0, 5] += 1
    moe_layer.same("x", tie, expected)  # two experts with one logit
    for wrong in (expected * 1.01, expected.roll(1, 1), torch.full_like(expected, math.nan)):
        with pytest.raises(ValueError, match="x computes something else than the loop: 2000 of 2000 tokens"):
            moe_layer.same("x", wrong, expected)
    # One token alone is no tie, and a tie is finite.
    tie[0, 5] = math.nan
    for wrong, right in ((expected[:1, :1] * 100, expected[:1, :1]), (tie, expected)):
        with pytest.raises(ValueError, match="x computes something else than the loop: 1 of"):
            moe_layer.same("x", wrong, right)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score", "--device", "cpu", "--backend", "triton"], "backend='triton' needs"),
        (["decode", "--device", "cpu", "--world-size", "0"], "world_size=0"),
        (
            ["score", "--device", "cpu", "--world-size", "1000"],
            "--world-size 1000: ranks on the CPU need a core each",
        ),
        (
            ["decode", "--device", "cpu", "--shape", "dense-tiny", "--experts", "int8"],
            "--experts int8: the shape dense-tiny has no experts",
        ),
        (["data", "--bpe", "/nowhere"], "--bpe /nowhere: there is no /nowhere/encoder.json"),
        (["data", "--text", "/nowhere"], "there is no file /nowhere; expected a text file for --text"),
        (
            ["data", "--text", "/dev/zero"],
            "/dev/zero is a device, a pipe or a socket; expected a text file for --text",
        ),
        (
            ["data", "--text", __file__, "--megabytes", "1e-5"],
            f"--text {__file__} has no whole line in its first 10 bytes: name a text file",
        ),
        (["network", "--ranks", "16", "--gbit", "nan"], "--gbit=nan: expected a number above 0"),
        (["network", "--ranks", "80000000"], "--ranks=80000000: expected at most 4096"),
        (["network", "--ranks", "16", "--shape", "dense-tiny"], "--shape dense-tiny has no experts"),
        (["network", "--ranks", "16", "--rate", "0"], "--rate=0.0: expected a number above 0"),
        (
            ["moe-layer", "--shape", "tiny", "--device", "cpu", "--tokens", "256,515"],
            "--tokens 515: they go through the gate in 2 groups of one length; expected a multiple of 2, such as 514",
        ),
        (["score", "--json", "/nowhere/figures.json"], "/nowhere does not exist, so nothing was written"),
        (
            ["score", "--json", "/dev/null"],
            "/dev/null is a device, a pipe or a socket, which no file replaces",
        ),
        (["score", "--shape", "tiny", "--json", "/"], "/ is a folder, expected a file or nothing there"),
        (
            ["score", "--device", "cpu", "--shape", "dense-tiny", "--zipf", "1"],
            "--zipf 1: the shape dense-tiny has no gates to skew",
        ),
        (["decode", "--device", "cpu", "--no-prefetch"], "--no-prefetch says how experts are fetched"),
        (["load", "--device", "cpu", "--folder", "/dev/null"], "--folder /dev/null is no folder: name"),
        (["load", "--device", "cpu", "--folder", __file__], f"--folder {__file__} is no folder: name"),
        (["load", "--device", "cpu", "--folder", "/proc/new"], "/proc/new does not exist, so nothing"),
        (["load", "--device", "cpu", "--folder", ""], "--folder='': expected the path of a file or folder"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_text_that_is_a_pipe_is_not_waited_for(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Were the pipe opened, it would have a line, so that this test would fail and not wait.
    with subprocess.Popen(["sh", "-c", 'exec echo > "$0"', pipe]) as writer:
        try:
            with pytest.raises(SystemExit, match="2"):
                bench.main(["data", "--text", str(pipe)])
            assert writer.poll() is None
        finally:
            writer.kill()
    error = capsys.readouterr().err
    assert (
        f"{pipe} is a device, a pipe or a socket; expected a text file for --text" in error
        and error.count("\n") == 1
    )


def test_a_wait_that_is_too_long_says_so(capsys, monkeypatch):
    """It is an error of the system's kind, and of no file."""

    def ended(*_: object) -> None:
        raise TimeoutError("no progress from ranks [1]")

    monkeypatch.setattr(bench, "tables_of", ended)
    with pytest.raises(SystemExit, match="2"):
        bench.main(["network"])
    assert capsys.readouterr().err.endswith(": no progress from ranks [1]\n")


def test_the_interrupt_key_ends_it_in_one_sentence(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "tables_of", interrupted)
    with pytest.raises(SystemExit, match="130"):
        bench.main(["network"])
    assert capsys.readouterr().err == "python -m moekit.bench: interrupted\n"


def test_a_folder_with_something_else_in_it_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for folder, said in (
        (
            tmp_path,
            f"--folder {tmp_path} holds notes.txt and no checkpoint: name a folder that is new, empty",
        ),
        (
            paths.DEMO_MODEL,
            "has a checkpoint with layers=6, and --shape tiny has 4: name the shape of the files",
        ),
    ):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(SystemExit, match="2"):
            bench.main(["load", "--shape", "tiny", "--device", "cpu", "--folder", str(folder)])
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert sorted(path.name for path in folder.iterdir()) == before


def test_routing_that_is_made_up_is_called_no_trace(tmp_path):
    how = ["network", "--shape", "tiny", "--ranks", "4", "--per-machine", "2"]
    made_up = run(tmp_path, *how)["network"]
    assert all(list(row) == ["what", "formula", "made-up routing", "unit"] for row in made_up)
    trace, _ = synthetic(tokens=64, layers=(1, 3), experts=16, block=4)
    trace.save(tmp_path / "trace.parquet")
    real = run(tmp_path, *how, "--trace", str(tmp_path / "trace.parquet"))["network"]
    assert all(list(row) == ["what", "formula", "trace", "unit"] for row in real)


def test_a_trace_without_routing_has_nothing_to_send(tmp_path, capsys):
    trace, _ = synthetic(tokens=40)
    for part, missing in ((trace.select(samples=[]), "tokens"), (trace.select(layers=[]), "layers")):
        part.save(tmp_path / "t.parquet")
        with pytest.raises(SystemExit, match="2"):
            bench.main(["network", "--trace", str(tmp_path / "t.parquet")])
        error = capsys.readouterr().err
        assert f"t.parquet: the trace has no {missing}, expected at least one" in error
        assert error.count("\n") == 1


def test_a_bench_that_fails_leaves_no_file(tmp_path):
    (tmp_path / "old.json").write_text("{}")
    for name in ("new.json", "old.json"):
        with pytest.raises(SystemExit, match="2"):
            bench.main(["network", "--ranks", "7", "--json", str(tmp_path / name)])
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]


ODD = {
    "score --blocks 4,0": "'0': expected a whole number of at least 1",
    "score --blocks 1,,2": "'': expected a whole number of at least 1",
    "score --blocks many": "'many': expected a whole number of at least 1",
    "score --blocks 5000": "'5000': expected at most 4096",
    "score --zipf nan": "'nan': expected a number of at least 0 up to 10",
    "score --zipf -1": "'-1': expected a number of at least 0",
    "score --resident 0": "'0': expected a whole number of at least 1",
    "score --shape 16b": "invalid choice: '16b'",
    "score --device tpu": "invalid choice: 'tpu'",
    "score --world-size 1.5": "argument --world-size: invalid int value: '1.5'",
    "decode --batches=-1": "'-1': expected a whole number of at least 1",
    "decode --batches 1e3": "'1e3': expected a whole number of at least 1",
    "moe-layer --tokens 0": "'0': expected a whole number of at least 1",
    "moe-layer --tokens 100000000000000": "'100000000000000': expected at most 1048576",
    "moe-layer --against loop,": "[''] unknown; expected some of grouped_mm,loop,transformers,triton_kernels,vllm",
    "load --repeats 0": "'0': expected a whole number of at least 1",
    "load --repeats " + 5000 * "9": "expected a whole number of at least 1",
    "padded --fraction 0": "'0': expected a number above 0 up to 1",
    "profile --steps 1001": "'1001': expected at most 1000",
    "padded --fraction inf": "'inf': expected a number above 0 up to 1",
    "questions --choices 1001": "'1001': expected at most 1000",
    "data --megabytes -1": "'-1': expected a number above 0",
    "data --workers 100000": "'100000': expected at most 1024",
    "routing --tokens 0": "'0': expected a whole number of at least 1",
    "routing --experts 1": "'1': expected a whole number of at least 2",
    "routing --experts 40000": "'40000': expected at most 32767",
    "network --itemsize 99": "'99': expected at most 16",
    "tune --tries none": "'none': expected a whole number of at least 1",
    "sort": "invalid choice: 'sort'",
    "": "the following arguments are required: bench",
}


@pytest.mark.parametrize("line", ODD, ids=lambda line: line[:40])
def test_odd_arguments_are_one_sentence(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(line.split())
    last = capsys.readouterr().err.splitlines()[-1]
    assert ODD[line] in last and last.startswith("python -m moekit.bench") and len(last) < 400


def test_every_bench_says_what_its_arguments_are():
    _, found = bench.parsers()
    assert list(found) == [*bench.MODEL, *bench.OTHER, *bench.ALONE, "all"]
    for name, parser in found.items():
        text = parser.format_help()
        assert f"python -m moekit.bench {name}" in text and "`" not in text
        assert all(action.help for action in parser._actions), name


def test_unknown_opponents_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["moe-layer", "--against", "loop,vlm"])
    assert "['vlm'] unknown" in capsys.readouterr().err


def test_experts_that_are_fetched(tmp_path, monkeypatch):
    """Their share of hits, their bytes, and the limit that the bytes make."""
    how = ["--shape", "tiny", "--device", "cpu", "--resident", "2", "--zipf", "1.2", "--repeats", "2"]
    for work, rows in run(tmp_path, "decode", *how, "--batches", "1").items():
        assert work == "decode"
        ceilings = {row["work"]: row["figure"] * 1e9 for row in rows[:3]}
        row = next(row for row in rows if row["work"] == "decode, batch 1")
        share, gib = re.search(r"([\d.]+)% of 4 requests hit, ([\d.e-]+) GiB fetched", row["note"]).groups()
        assert 0 < float(share) < 100
        least = float(gib) * 2**30 / ceilings["from pinned host memory"] * 1e3
        assert row["limit"] == pytest.approx(max(least, row["limit"]), rel=0.02) and least > 0
    # What a pass of evaluate has to fetch limits it as it limits a call of as many blocks.
    monkeypatch.setattr(score, "limit", lambda setting, ceilings, blocks, fetched=0.0: 1e9 / (1 + fetched))
    rows = {row["work"]: row for row in run(tmp_path, "score", *how, "--blocks", "16")["score"]}
    assert "GiB fetched" in rows["score, 16 x 256 tokens a call"]["note"]
    assert rows["evaluate, 32 blocks"]["limit"] == rows["score, 16 x 256 tokens a call"]["limit"] < 1e9


def test_skewed_gates():
    """The most frequent experts are those that Zipf's law puts first."""
    rank = Rank(0, 1, CPU)
    shapes.build(rank, TINY, torch.float32, "loop", zipf=1.5)
    found = {}
    tokens = torch.randint(4, 500, (8, 256), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():

        def note(layer, routing):
            found[layer] = routing.experts.flatten().bincount(minlength=16)

        rank.state["model"](tokens, Pass(record=note))
    for layer, counts in found.items():
        place = torch.randperm(16, generator=after_the_way(layer))
        # The counts in the order of the law fall: the first quarter has most choices, the last one hardly any.
        quarters = counts[place.argsort()].view(4, 4).sum(dim=1) / counts.sum()
        assert quarters[0] > 0.6 and quarters[3] < 0.1


def after_the_way(layer: int) -> torch.Generator:
    """The generator of :func:`shapes.skew` once it has drawn the constant part's direction."""
    generator = torch.Generator().manual_seed(layer)
    torch.randn(TINY.dim, generator=generator)
    return generator


def test_two_ranks(tmp_path, monkeypatch):
    arguments = ["--shape", "tiny", "--device", "cpu", "--world-size", "2", "--repeats", "2"]
    rows = run(tmp_path, "score", *arguments, "--blocks", "16")["score"]
    share = next(row for row in rows if row["work"] == "exchanges, share of that")
    assert 0 < share["figure"] < 100 and share["unit"] == "%"
    both, one = re.fullmatch(r"(\d+) tokens/s against (\d+)", rows[-1]["note"]).groups()
    assert rows[-1]["work"] == "2 ranks against one, best of each" and rows[-1]["unit"] == "times"
    assert rows[-1]["figure"] == pytest.approx(int(both) / int(one), rel=0.01)
    fetched: list[float] = []

    def noted(setting, ceilings, experts, batch, nbytes=0.0):
        fetched.append(nbytes)
        return limit(setting, ceilings, experts, batch, nbytes)

    limit = decode.limit
    monkeypatch.setattr(decode, "limit", noted)
    rows = run(tmp_path, "decode", *arguments, "--batches", "2,1", "--resident", "2")["decode"]
    assert [row["work"] for row in rows[3:]] == [
        "decode, batch 2 on each of 2 ranks",
        "generate, batch 2",
        "generate, batch 2, of its steps' rate",
        "decode, batch 1 on each of 2 ranks",
        "decode, one sequence in all",
        "generate, batch 1",
        "generate, batch 1, of its steps' rate",
    ]
    assert re.search(r"of 16 experts a layer, [\d.]+ on one rank", rows[3]["note"])
    # One sequence in all has the link as its limit, too.
    assert len(fetched) == 3 and all(fetched)
    assert all(row["figure"] > 0 and row["limit"] > 0 for row in rows[3:])
    rows = run(tmp_path, "load", *arguments)["load"]
    assert rows[3]["figure"] > 0
    rows = run(tmp_path, "score", *arguments, "--shape", "dense-tiny", "--blocks", "16")["score"]
    works = [
        "evaluate, 64 blocks",
        "evaluate, 64 blocks, of the scoring rate",
        "2 ranks against one, best of each",
    ]
    assert [row["work"] for row in rows[4:]] == works


def watched(rank: Rank) -> None:
    """Note, for each call that is timed, what each of its passes reads: tokens, positions, and the experts of each layer."""
    calls = rank.state["calls"] = []
    model, timed = rank.state["model"], {kind: kind.timed for kind in DOING.values()}
    rank.state["timed"], looking = timed, []

    def read(_, given) -> None:
        tokens, asked = given
        if looking:
            before = None if asked.cache is None else asked.cache.lengths.tolist()
            calls[-1].append((tokens.tolist(), before))

    def routed(route):
        def noted(*given):
            found = route(*given)
            if looking:
                calls[-1].append(found.experts.tolist())
            return found

        return noted

    def watching(original):
        def call(self):
            calls.append([])
            looking.append(True)
            try:
                return original(self)
            finally:
                looking.pop()

        return call

    model.register_forward_pre_hook(read)
    for layer in model.config.moe_layers:
        moe = model.layers[layer].moe
        moe.route = routed(moe.route)
    for kind, original in timed.items():
        kind.timed = watching(original)


def calls_of(rank: Rank) -> list[list]:
    found = list(rank.state["calls"])
    rank.state["calls"].clear()
    return found


def unwatched(rank: Rank) -> None:
    for kind, original in rank.state["timed"].items():
        kind.timed = original


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profile_takes_the_time_of_what_the_bench_does(ranks):
    """Both have the same tokens at the same positions in what they time, and so the same experts."""
    with setting(world_size=ranks).model() as (model, _):
        model.ranks.call(watched)
        try:
            for mode, calls, steps in (("score", 3, 1), ("decode", 1 + TIMED, 4)):
                size = Size(mode, 3 if mode == "score" else steps, 2, TINY.max_positions)
                fraction = score.FRACTION if mode == "score" else None
                profile.bench(model, size, fraction)
                by_bench = model.ranks.call(calls_of)
                found = profile.profiled(model, size, fraction)
                by_profile = model.ranks.call(calls_of)
                assert [len(own) for own in by_bench] == ranks * [calls]
                # Those under the profiler follow: three steps, or one call of all steps.
                assert [len(own) for own in by_profile] == ranks * [calls + (3 if mode == "score" else 1)]
                for one, other in zip(by_bench, by_profile, strict=True):
                    assert one == other[:calls]
                    for call in other:
                        # The tokens and, of both layers with experts, what was chosen.
                        assert len(call) == 3 * steps
                    reads = [call[0][0] for call in other]
                    # Each call decodes prompts of its own, at the same positions; all steps of scoring are one.
                    assert len({str(tokens) for tokens in reads}) == (1 if mode == "score" else calls + 1)
                    assert {str(call[0][1]) for call in other} == {
                        "None" if mode == "score" else str(2 * [128 + STEPS_BEFORE])
                    }
                assert by_bench[0] != by_bench[-1] or ranks == 1
                assert found.step > 0 and found.meta["blocks"] == 2
                # On a GPU there is a goal, and the rows can be written.
                rows = profile.InTurns(size, [found.step], [found]).rows(
                    replace(setting(world_size=ranks), device="cuda")
                )
                met = [json.loads(json.dumps(row.row()))["met"] for row in rows]
                assert met == [None, None, True, None, True]
        finally:
            model.ranks.call(unwatched)


def test_profiles_beside_the_bench(tmp_path):
    how = ["--shape", "tiny", "--device", "cpu", "--repeats", "1", "--batches", "2", "--steps", "2"]
    rows = run(tmp_path, "profile", *how)["profile"]
    assert [row["unit"] for row in rows] == 2 * ["ms a step", "ms a step", "%", "times", "%"]
    for bench_row, plain, apart, under, parts in (rows[:5], rows[5:]):
        ratio = plain["figure"] / bench_row["figure"]
        assert apart["figure"] == pytest.approx(100 * abs(ratio - 1), abs=1.5)
        assert float(re.search(r"([-+][\d.]+)%", apart["note"])[1]) == pytest.approx(
            100 * (ratio - 1), abs=1.5
        )
        assert under["figure"] > 0 and parts["figure"] < 3
    how = ["--shape", "tiny", "--device", "cpu", "--steps", "200"]
    with pytest.raises(SystemExit, match="2"):
        bench.main(["profile", *how])


def test_all_at_once(tmp_path, monkeypatch):
    """Those that take long with what they do by default, the profiles, have a test of their own; others do less here."""
    asked, text, trace = [], data._text, routing.synthetic
    monkeypatch.setattr(data, "_text", lambda path, size: text(path, size // 40))
    monkeypatch.setattr(routing, "synthetic", lambda tokens, *sizes: trace(tokens // 50, 2, 16))
    monkeypatch.setattr(
        profile, "run", lambda setting, args: asked.append(args) or [Figure("profile", 1.0, "ms")]
    )
    found = run(tmp_path, "all", "--shape", "tiny", "--device", "cpu", "--repeats", "1")
    models = ["score", "questions", "decode", "load", "moe-layer", "padded", "profile"]
    assert list(found) == [*models, "data", "routing", "network"]
    assert all(found.values())
    assert [(args.shape, args.repeats, args.batches) for args in asked] == [("tiny", 1, [1, 64])]


def test_what_crosses_between_machines_by_hand():
    """Four ranks on two machines, one expert a rank; experts 0 and 1 are on the first machine."""
    trace, _ = synthetic(tokens=4, layers=(1,), experts=4, block=1)
    trace = replace(
        trace,
        # A sample for each rank: ranks 0 and 1 are on the first machine.
        sample=np.arange(4, dtype=np.int32),
        experts=np.array([[[0, 1]], [[2, 3]], [[1, 2]], [[0, 1]]], dtype=np.int16),
        kept=np.array([[[True, True]], [[True, True]], [[True, False]], [[True, True]]]),
    )
    flat, hierarchical, busiest = network.counted(trace, network.Cluster(4, 2))
    # Choices on the other machine: none, both, the first (the second one was dropped), both; each token goes there once.
    assert flat == (0 + 2 + 1 + 2) / 4 and hierarchical == (0 + 1 + 1 + 1) / 4
    # Two rows come to the first machine and one to the second.
    assert busiest == pytest.approx(2 / 1.5)


def test_the_formula_is_what_equally_likely_experts_give():
    cluster, rng = network.Cluster(16, 2), np.random.default_rng(0)
    trace, _ = synthetic(tokens=6400, layers=(1, 3), experts=32, block=4)
    experts = np.stack(
        [rng.permuted(np.tile(np.arange(32), (6400, 1)), axis=1)[:, :2] for _ in range(2)], axis=1
    )
    trace = replace(trace, experts=experts.astype(np.int16), kept=np.ones_like(experts, dtype=bool))
    flat, hierarchical, _ = network.counted(trace, cluster)
    assert (flat, hierarchical) == pytest.approx(network.expected(cluster, 32, 2), rel=0.01)


def test_a_trace_of_one_machine_or_of_ranks_that_do_not_fit_is_refused(capsys):
    for arguments, said in (
        (["--ranks", "8"], "share one machine"),
        (["--ranks", "9"], "9 ranks are no multiple of 8 a machine"),
    ):
        with pytest.raises(SystemExit):
            bench.main(["network", *arguments])
        assert said in capsys.readouterr().err
