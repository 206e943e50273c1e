"""The demo model is what the README says: trained, alive in every expert, and routed by kind of text."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import moekit
from moekit import demo
from moekit.demo.train import BLOCK, demo_config, dense_config, initialize, train
from moekit.nn.cost import flop_per_token
from moekit.nn.transformer import Transformer
from moekit.notebook import sparse_dense
from moekit.routing.domains import domains_of

FOLDER = Path(demo.__file__).parent
META = json.loads((FOLDER / "data" / "meta.json").read_text())


@pytest.fixture(scope="module")
def model():
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        yield model


@pytest.fixture(scope="module")
def result(model):
    return functools.cache(lambda subset: model.evaluate("demo", subset, progress=False))


@pytest.fixture(scope="module")
def trace(model):
    return model.trace("demo", "valid", progress=False)


@pytest.mark.parametrize("subset", ["valid", "test"])
def test_it_has_learnt(result, subset):
    """Bits a byte at least 35 % below a unigram model over the same pieces, on text it was not trained on."""
    facts = META["splits"][subset]["total"]
    result = result(subset)
    assert result.ntokens == facts["tokens"]
    bits_a_byte = result.loss_base2 * result.ntokens / facts["bytes"]
    assert bits_a_byte < 0.65 * facts["unigram_tokens_bits_per_byte"]


def test_no_expert_is_dead_and_domains_differ(trace):
    assert trace.kept.all()
    domains = domains_of(trace, "demo")
    names, domain = np.unique(domains, return_inverse=True)
    assert len(names) >= 5
    distances = []
    for layer in range(len(trace.layers)):
        load = np.bincount(trace.experts[:, layer].ravel(), minlength=16) / trace.experts[:, layer].size
        assert load.min() > 0.1 / 16, f"layer {trace.layers[layer]}: expert {load.argmin()} is nearly dead"
        shares = [
            np.bincount(trace.experts[domain == d, layer].ravel(), minlength=16) / (2 * (domain == d).sum())
            for d in range(len(names))
        ]
        distances.append(np.mean([abs(share - load).sum() / 2 for share in shares]))
    assert max(distances) > 0.2, "total variation between a domain's experts and all text's"


def test_half_precision_on_the_cpu_is_within_a_tenth_of_a_percent(result):
    exact = result("valid").perplexity
    with moekit.load("demo", 1, "cpu", "float16", progress=False) as half:
        assert half.evaluate("demo", "valid", progress=False).perplexity == pytest.approx(exact, rel=1e-3)


def test_training_in_mixed_precision_mixes_no_types_where_a_gpu_takes_one(monkeypatch):
    """The CPU's autocast lets ``index_copy`` have two types, that of GPUs does not list it."""
    index_copy = torch.Tensor.index_copy

    def strict(self, dim, index, source):
        assert self.dtype == source.dtype
        return index_copy(self, dim, index, source)

    monkeypatch.setattr(torch.Tensor, "index_copy", strict)
    net = Transformer(demo_config(50))
    initialize(net)
    tokens = torch.randint(4, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    exact = net.logits(net(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net.logits(net(tokens)).float()
    assert (mixed - exact).norm() < 0.05 * exact.norm()
    mixed.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters())


def test_training_makes_a_checkpoint_that_loads(tmp_path):
    """Two steps on noise: the script from end to end, not what it learns."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        np.save(data / f"{split}.npy", rng.integers(4, 60, 600).astype(np.uint16))
    (data / "meta.json").write_text(json.dumps({"vocabulary": 60}))
    how = {"steps": 2, "batch": 2, "rate": 1e-3, "device": "cpu", "seed": 1}
    train(data, tmp_path / "model", **how)
    with moekit.load(tmp_path / "model", 1, "cpu", progress=False) as made:
        assert made.config.experts == 16
        assert len(made.files.ranks) == 8
        assert made.config.vocab_rows == 60
    train(data, tmp_path / "dense", **how, kind="dense")
    assert [path.name for path in (tmp_path / "dense").iterdir()] == ["model.pt"]
    with moekit.load(tmp_path / "dense", 1, "cpu", progress=False) as made:
        assert made.config == dense_config(60)


def test_the_dense_sibling_takes_as_many_operations():
    """A token's, of blocks of any length, and so the training's, which reads the same blocks."""
    sparse, dense = demo_config(8192), dense_config(8192)
    assert not dense.moe_layers and dense.ffn_dim == 772
    for length in (1, 64, BLOCK):
        assert flop_per_token(sparse, length) == flop_per_token(dense, length)


@pytest.fixture(scope="module")
def dense():
    with moekit.load("demo-dense", 1, "cpu", progress=False) as dense:
        yield dense


@pytest.mark.parametrize("subset", ["valid", "test"])
def test_the_dense_sibling_has_learnt(dense, subset):
    facts = META["splits"][subset]["total"]
    result = dense.evaluate("demo", subset, progress=False)
    assert dense.config == dense_config(META["vocabulary"]) and result.ntokens == facts["tokens"]
    bits_a_byte = result.loss_base2 * result.ntokens / facts["bytes"]
    assert bits_a_byte < 0.65 * facts["unigram_tokens_bits_per_byte"]


def test_the_page_has_the_figures_of_both(model, dense, trace):
    """Each row of the page's table, from traces of both models."""
    traces = [trace, dense.trace("demo", progress=False)]
    table = sparse_dense.by_domain(*traces, domains_of(traces[0]))
    rows = [
        f"| {row.domain} | {row.sparse:.2f} | {row.dense:.2f} "
        f"| {row.perplexity_ratio:.2f} ({2**-row.high:.2f} to {2**-row.low:.2f}) |"
        for row in table.itertuples()
    ]
    page = (FOLDER / "README.md").read_text()
    assert "\n".join(rows) + "\n" in page, "\n".join(rows)
    costs = sparse_dense.costs({"sparse": model, "dense": dense})
    assert costs["flop"].nunique() == 1 and f"({costs['flop'].iloc[0] / 1e6:.3g} million" in page
    assert f"took {3 * costs['flop'].iloc[0] * 6000 * 64 * BLOCK:.3g} operations".replace("e+", "e") in page
