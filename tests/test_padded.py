"""The bench's padded dispatch: an oracle of its own for what a capacity keeps, and a wrong one ends the bench."""

import json

import pytest
import torch
from test_bench import CPU, TINY, run, setting

from moekit.bench import __main__ as bench
from moekit.bench import padded, score, shapes
from moekit.nn.passes import Pass
from moekit.ranks import Rank


@pytest.mark.parametrize("fraction", [0.02, 0.05, 1.0])
def test_a_pass_with_every_place_padded_is_a_pass_without(fraction):
    rank = Rank(0, 1, CPU)
    shapes.build(rank, TINY, torch.float32, "loop")
    model = rank.state["model"]
    batches = [score.random_batch(i, 256, TINY.vocab_rows) for i in range(2)]
    tokens = torch.cat([torch.from_numpy(b.tokens).long() for b in batches])
    kept = []
    with torch.inference_mode():
        asked = Pass(
            fraction, groups=2, record=lambda layer, routing: kept.append(routing.kept.float().mean().item())
        )
        expected = model(tokens, asked)
        for layer in model.layers:
            if layer.moe is not None:
                layer.moe.dispatch = padded.Padded(
                    256, 256 if fraction == 1 else int(-(-256 * fraction // 1)), 16
                )
        found = model(tokens, Pass(fraction, groups=2))
    assert torch.allclose(found, expected, atol=1e-4)
    assert all(0 < share < 1 for share in kept) if fraction == 0.02 else max(kept) == 1 or fraction < 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_both_ways_on_all_ranks(tmp_path, world_size):
    arguments = [
        "padded",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--world-size",
        str(world_size),
        "--repeats",
        "1",
    ]
    rows = run(tmp_path, *arguments)["padded"]
    works = [row["work"] for row in rows]
    assert works == ["ours, 1 x 256 tokens a call", "padded, 1 x 256 tokens a call", "speed, ours to padded"]
    assert all(row["figure"] > 0 for row in rows) and "log-probabilities differ by" in rows[-1]["note"]
    assert json.loads((tmp_path / "figures.json").read_text())["command"].startswith(
        "python -m moekit.bench padded"
    )


def test_another_result_ends_the_bench(monkeypatch):
    group = padded.Padded.group
    monkeypatch.setattr(padded.Padded, "group", lambda *args: 1.05 * group(*args))
    arguments = bench.parsers()[0].parse_args(["padded", "--shape", "tiny", "--device", "cpu"])
    with pytest.raises(
        ValueError, match=r"% of the padded way's log-probabilities differ by more than 0\.001 in float32"
    ):
        padded.run(setting(), arguments)


def test_experts_that_cannot_be_dealt_evenly():
    arguments = bench.parsers()[0].parse_args(["padded", "--shape", "tiny", "--device", "cpu"])
    with pytest.raises(ValueError, match="--world-size 3: expected a divisor of 16"):
        padded.run(setting(world_size=3), arguments)
