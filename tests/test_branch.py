"""What fairseq's ``moe`` branch computed, reproduced: the one yardstick for everything else."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from branch_cases import CASES, build

import moekit
from moekit import checkpoint
from moekit import fairseq_data as batches
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer
from moekit.symbols import PAD

REFERENCE = sorted((Path(__file__).parent / "data" / "reference").glob("base_*bsz?.npz"))
RECORDED = Path(__file__).parent / "data" / "branch"


def settings(path: Path) -> dict:
    fraction, batch_size = re.fullmatch(r"base_frac(.+)_bsz(\d)", path.stem).groups()
    return {
        "capacity_token_fraction": float(fraction),
        "batch_size": int(batch_size),
        "tokens_per_sample": 64,
    }


def agree(result: moekit.Evaluation, recorded) -> None:
    lengths = result.tokens.groupby("sample").size()
    assert lengths.index.tolist() == recorded["ids"].tolist()
    assert lengths.tolist() == recorded["lengths"].tolist()
    assert result.tokens["target"].tolist() == recorded["tokens"].tolist()
    np.testing.assert_allclose(result.tokens["logprob"], recorded["logprobs"], rtol=0, atol=1e-4)
    assert result.ntokens == recorded["ntokens"]
    assert result.loss_base2 == pytest.approx(float(recorded["loss_base2"]), abs=1e-5)
    assert result.perplexity == pytest.approx(float(recorded["perplexity"]), rel=1e-5)
    assert repr(result).startswith(f"<evaluation of {result.ntokens:,} tokens: {result.loss_base2:.4f} bits")


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def model(request, reference):
    with moekit.load(reference / "checkpoint", request.param, "cpu", progress=False) as model:
        yield model


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.stem)
def test_log_probabilities_at_any_world_size(model, reference, path):
    result = model.evaluate(reference / "data-bin", "valid", progress=False, **settings(path))
    agree(result, np.load(path))


def combine_weights(folder: Path, data: Path, *, capacity_token_fraction: float, **options) -> dict:
    """The recordings' form of routing: ``batch{i}_moe{j}`` -> [tokens, experts] combine weights, padding left out."""
    plan = checkpoint.survey(checkpoint.find(folder))
    model = Transformer(plan.config).float().eval()
    checkpoint.fill(model, plan, range(plan.config.experts))
    found = {}
    limits = {"max_positions": plan.config.max_positions, "add_bos": plan.config.add_bos}
    for batch in batches.open_data(data, "valid", **limits, **options):
        tokens = torch.from_numpy(batch.tokens).long()

        def record(layer, routing, batch=batch, tokens=tokens):
            real = (tokens != PAD).flatten()
            dense = torch.zeros(routing.probs.shape[1:])
            dense.scatter_add_(1, routing.experts[0], routing.weights[0])
            found[f"batch{batch.index}_moe{plan.config.moe_layers.index(layer)}"] = dense[real].numpy()

        padding = tokens == PAD if batch.padded() else None
        with torch.inference_mode():
            model(tokens, Pass(fraction=capacity_token_fraction, padding=padding, record=record))
        found[f"batch{batch.index}_ids"] = batch.ids
        found[f"batch{batch.index}_real"] = (tokens != PAD).flatten().numpy()
    return found


def same_routing(found: dict, recorded: dict) -> None:
    layers = [name for name in recorded if "_moe" in name]
    assert layers or not any("_moe" in name for name in found)
    for name in layers:
        batch = name.split("_")[0]
        assert found[f"{batch}_ids"].tolist() == recorded[f"{batch}_ids"].tolist()
        want = recorded[name][found[f"{batch}_real"]]
        assert ((found[name] > 0) == (want > 0)).all(), f"{name}: other experts, or others dropped"
        np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", REFERENCE, ids=lambda p: p.stem)
def test_routing_of_the_reference(reference, path):
    recorded = np.load(path.with_name(path.stem + "_routing.npz"))
    same_routing(
        combine_weights(reference / "checkpoint", reference / "data-bin", **settings(path)), recorded
    )


@pytest.mark.parametrize("name", CASES)
def test_every_option(name, tmp_path, reference):
    build(name, tmp_path)
    recorded = np.load(RECORDED / f"{name}.npz")
    options = CASES[name].evaluate
    with moekit.load(tmp_path, 1, "cpu", progress=False) as model:
        agree(model.evaluate(reference / "data-bin", progress=False, **options), recorded)
    routing = {key.removeprefix("routing_"): recorded[key] for key in recorded if key.startswith("routing_")}
    same_routing(combine_weights(tmp_path, reference / "data-bin", **options), routing)


@pytest.mark.parametrize("name", ["mixture", "twelve_experts"])
def test_options_at_world_size_5(name, tmp_path, reference):
    """More ranks than files, and experts that do not divide."""
    build(name, tmp_path)
    with moekit.load(tmp_path, 5, "cpu", progress=False) as model:
        held = [part["experts"] for part in model.parts]
        assert [e for part in held for e in part] == list(range(model.config.experts))
        assert max(map(len, held)) - min(map(len, held)) <= 1
        options = CASES[name].evaluate
        agree(
            model.evaluate(reference / "data-bin", progress=False, **options),
            np.load(RECORDED / f"{name}.npz"),
        )
