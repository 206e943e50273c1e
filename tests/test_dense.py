"""Models without experts: one file, every verb, as the released fairseq computes it, and alike on any number of ranks."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from branch_cases import BASE

import moekit
from moekit import checkpoint, exchange, metrics
from moekit.bench import shapes
from moekit.checkpoint import export
from moekit.checkpoint.__main__ import main
from moekit.invariance import batch_invariance
from moekit.nn.transformer import Transformer
from moekit.notebook import plots, report, routing_plots
from moekit.notebook.playground import Playground
from moekit.routing.trace import TOKEN_COLUMNS, Trace, join
from moekit.symbols import PAD

# The config of a dense training may name a gate that draws, which nothing uses.
CONFIG = replace(BASE, moe_freq=0, experts=0, second_expert="sampling")
QUIET = {"progress": False}
BLOCKS = {"tokens_per_sample": 48, "batch_size": 3, "max_batches": 9, "progress": False}
PROMPTS = [[5, 6, 7], [8], list(range(9, 30))]
DENSE = "the model is dense, it has no layer with experts"


@pytest.fixture(scope="module")
def whole() -> Transformer:
    torch.manual_seed(1)
    model = Transformer(CONFIG).requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3, mean=float(name.endswith("norm.weight")))
    return model


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory, reference):
    folder = tmp_path_factory.mktemp("dense")
    export.save(whole, folder, dtype=torch.float32)
    assert [path.name for path in folder.iterdir()] == ["model.pt"]
    (folder / "dict.txt").write_text((reference / "data-bin" / "dict.txt").read_text())
    return folder


@pytest.fixture(scope="module")
def model(folder):
    with moekit.load(folder, 1, "cpu", **QUIET) as model:
        yield model


@pytest.fixture(scope="module")
def trace(model, reference):
    return model.trace(reference / "data-bin", tokens_per_sample=48, max_tokens=600, **QUIET)


# ------------------------------------------------------------------------------------------------ fairseq's own

ORACLE = """
import json, sys
import numpy as np, torch
from moekit.fairseq_data import mend_numpy
mend_numpy()
from fairseq.models.transformer_lm import TransformerLanguageModel
folder, data, tokens, out = sys.argv[1:]
hub = TransformerLanguageModel.from_pretrained(folder, "model.pt", data_name_or_path=data).eval()
assert type(hub.models[0]) is TransformerLanguageModel and next(hub.parameters()).dtype == torch.float32
tokens = torch.tensor(json.loads(tokens))
with torch.no_grad():
    logits, _ = hub.models[0](tokens)
    ids, written = tokens[:1, :4], []
    for _ in range(12):
        last = hub.models[0](ids)[0][:, -1]
        last[:, 1] = -torch.inf
        written.append(last.argmax(-1).item())
        ids = torch.cat([ids, last.argmax(-1)[:, None]], 1)
np.savez(out, logits=logits.numpy(), written=written)
"""


@pytest.mark.slow
def test_fairseqs_own_model_computes_the_same_from_the_same_file(model, folder, reference, tmp_path):
    """The released fairseq reads the file with its own loader, in a process that never hears of the plug-in."""
    tokens = torch.randint(4, 200, (3, 24), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = 2
    given = [str(folder), str((reference / "data-bin").resolve()), json.dumps(tokens.tolist())]
    command = [sys.executable, "-c", ORACLE, *given, str(tmp_path / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    wanted = F.log_softmax(torch.from_numpy(found["logits"])[:, :-1].double(), dim=-1)
    wanted = wanted.gather(-1, tokens[:, 1:, None]).flatten().numpy()
    scored = model.score(tokens[:, 1:].tolist())
    np.testing.assert_allclose(scored["logprob"], wanted, atol=1e-4)
    (one,) = model.generate([tokens[0, 1:4].tolist()], max_new_tokens=12, **QUIET)
    assert one.ids == found["written"].tolist()[: len(one.ids)] and len(one.ids) >= 1


# ------------------------------------------------------------------------------------------------ on any ranks


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same(model, folder, trace, reference):
    """Each rank holds the whole model and takes its share of the batches and of the prompts."""
    alone = model.evaluate(reference / "data-bin", **BLOCKS)
    written = model.generate(PROMPTS, max_new_tokens=6, **QUIET)
    for world_size in (2, 4):
        with moekit.load(folder, world_size, "cpu", **QUIET) as many:
            assert {part["parameters"] for part in many.parts} == {model.parts[0]["parameters"]}
            found = many.evaluate(reference / "data-bin", **BLOCKS)
            assert found.loss_base2 == pytest.approx(alone.loss_base2, abs=1e-6)
            np.testing.assert_allclose(found.tokens["logprob"], alone.tokens["logprob"], atol=1e-5)
            ids = [one.ids for one in many.generate(PROMPTS, max_new_tokens=6, **QUIET)]
            assert ids == [one.ids for one in written]
            again = many.trace(reference / "data-bin", tokens_per_sample=48, max_tokens=600, **QUIET)
            assert np.array_equal(again.token, trace.token) and np.array_equal(again.sample, trace.sample)
            np.testing.assert_allclose(again.output_entropy, trace.output_entropy, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ traces


def test_a_trace_holds_log_probabilities_and_entropies(model, whole, trace, reference):
    assert trace.layers == () and (trace.top_k, trace.num_experts) == (0, 0)
    assert "without experts" in repr(trace)
    found = model.evaluate(reference / "data-bin", tokens_per_sample=48, trace=True, **QUIET)
    assert np.array_equal(found.trace.logprob[found.trace.target != PAD], found.tokens["logprob"])
    sample = trace.select(samples=int(trace.sample[-1]))
    with torch.inference_mode():
        logits = whole.logits(whole(torch.from_numpy(sample.token)[None].long()), 200)[0].double()
    shares = F.log_softmax(logits, dim=-1)
    np.testing.assert_allclose(sample.output_entropy, -(shares.exp() * shares).sum(-1), atol=1e-4)
    assert np.array_equal(sample.predicted, logits.argmax(-1))
    np.testing.assert_allclose(
        sample.logprob, shares.gather(1, torch.from_numpy(sample.target).long()[:, None])[:, 0], atol=1e-4
    )


def test_a_trace_is_kept_and_compared(trace, tmp_path):
    trace.save(tmp_path / "t.parquet")
    again = Trace.load(tmp_path / "t.parquet")
    assert all(np.array_equal(getattr(again, n), getattr(trace, n), equal_nan=True) for n in TOKEN_COLUMNS)
    table = trace.to_pandas()
    assert len(table) == len(trace) and list(table) == list(TOKEN_COLUMNS)
    parts = [trace.select(samples=n) for n in np.unique(trace.sample)]
    assert np.array_equal(join(parts).logprob, trace.logprob, equal_nan=True)
    worse = replace(trace, logprob=trace.logprob - np.float32(0.5))
    found = moekit.compare(trace, worse)
    assert found.delta == pytest.approx(-0.5, abs=1e-6) and found.layers.empty
    assert (found.tokens["first_changed"] == -1).all()


def test_the_trace_of_a_generation(model):
    (one,) = model.generate([[5, 6, 7]], max_new_tokens=4, trace=True, **QUIET)
    assert one.trace.layers == () and one.trace.token.tolist() == [2, 5, 6, 7, *one.ids[:-1]]
    np.testing.assert_allclose(one.trace.logprob[3:], one.logprobs, atol=1e-6)


def test_models_whose_experts_are_not_alike_are_compared_by_their_tokens(trace, reference):
    with moekit.load(reference / "checkpoint", 1, "cpu", **QUIET) as sparse:
        other = sparse.trace(reference / "data-bin", tokens_per_sample=48, max_tokens=600, **QUIET)
    with pytest.raises(ValueError, match="the traces' layers differ: .*by without_experts"):
        moekit.compare(other, trace)
    compared = moekit.compare(other.without_experts(), trace)
    delta = compared.delta
    assert repr(compared).startswith(f"<comparison of {len(compared.tokens)} tokens in ")
    assert f"{delta:+.4f} nats" in repr(compared) and "other experts" not in repr(compared)
    assert repr(moekit.compare(other, other)).endswith("0.0% of tokens with other experts>")
    assert delta == pytest.approx(float(np.nanmean(trace.logprob - other.logprob)), abs=1e-5)


@pytest.mark.parametrize(
    "ask, said",
    [
        (lambda m, t: m.trace([5], layers=[1]), rf"layers=\[1\]: {DENSE}; leave layers out"),
        (lambda m, t: m.trace([5], full=[1]), rf"full=\[1\]: {DENSE}; leave full out"),
        (lambda m, t: m.trace([5], layers=[]), r"layers=\[\]: expected at least one layer"),
        (lambda m, t: m.route(mask={1: [0]}).__enter__(), f"route: {DENSE} whose choices could be changed"),
        (lambda m, t: m.route(drop_second=True).__enter__(), f"route: {DENSE}"),
        (lambda m, t: m.route(force=moekit.Force([0], sample=0)).__enter__(), f"route: {DENSE}"),
        (lambda m, t: metrics.balance(t), "metrics.balance: the trace has no layers, .* its model is dense"),
        (lambda m, t: metrics.bootstrap(t, "load"), "metrics.bootstrap: the trace has no layers"),
        (lambda m, t: moekit.explore(t), "explore: the trace has no layers, .* its model is dense"),
        (lambda m, t: exchange.write(t, "x.npz", "vllm"), "layout='vllm': the trace has no layers"),
        (lambda m, t: routing_plots.paths(t), "paths: the trace has no layers"),
        (lambda m, t: routing_plots.text_html(t), "text: the trace has no layers"),
        (lambda m, t: routing_plots.coactivation(t), "coactivation: the trace has no layers"),
        (lambda m, t: routing_plots.drops_by_position(t), "drops_by_position: the trace has no layers"),
        (lambda m, t: routing_plots.load_heatmap(t), "the trace has no layers"),
        (lambda m, t: routing_plots.domain_heatmap(t, t.sample), "the trace has no layers"),
    ],
)
def test_what_asks_for_experts_is_told_why_there_are_none(model, trace, ask, said):
    with pytest.raises(ValueError, match=said) as raised:
        ask(model, trace)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("error")
def test_a_batch_changes_nothing(model):
    found = batch_invariance(model, PROMPTS, **QUIET).summary
    assert (found["max_abs_delta"] < 1e-5).all() and found["dropped"].isna().all()


def test_a_beam_search_and_a_stream(model):
    (one,) = model.generate([[5, 6, 7]], beam_size=3, max_new_tokens=5, **QUIET)
    scored = model.score([[5, 6, 7, *one.ids]])["logprob"][3:]
    np.testing.assert_allclose(one.logprobs, scored, atol=1e-5)
    greedy = model.generate([[5, 6, 7]], max_new_tokens=5, **QUIET)[0].ids
    assert [token.id for token in model.stream([[5, 6, 7]], max_new_tokens=5)] == greedy


def test_a_capacity_changes_nothing(model, reference):
    free = model.evaluate(reference / "data-bin", **BLOCKS)
    tight = model.evaluate(reference / "data-bin", capacity_token_fraction=0.05, **BLOCKS)
    assert free.loss_base2 == tight.loss_base2
    with model.route(capacity_token_fraction=0.05):
        assert model.trace([5, 6], **QUIET).meta["capacity_token_fraction"] is None


# ------------------------------------------------------------------------------------------------ files, pictures


def test_what_is_exported_is_what_was_loaded(folder, whole, tmp_path):
    export.save(moekit.module(folder), tmp_path, dtype=torch.float32)
    loaded = moekit.module(tmp_path)
    assert all(torch.equal(p, dict(whole.named_parameters())[n]) for n, p in loaded.named_parameters())
    with pytest.raises(ValueError, match=f"files=2: {DENSE} to spread over files; expected 1"):
        export.save(whole, tmp_path / "two", files=2)
    assert not (tmp_path / "two").exists()


def test_experts_that_no_layer_holds_do_not_count(whole, tmp_path):
    export.save(whole, tmp_path, moe_expert_count=8)
    assert checkpoint.survey(checkpoint.find(tmp_path)).config == replace(CONFIG, experts=0)


def run(*arguments) -> None:
    assert main([*map(str, arguments), "--quiet"]) == 0


def same(one, other) -> None:
    one, other = (dict(moekit.module(path).named_parameters()) for path in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_checkpoint_tool(folder, tmp_path, capsys):
    run("inspect", folder)
    assert "model.pt" in capsys.readouterr().out
    run("verify", folder)
    run("strip", folder, tmp_path / "stripped")
    run("convert", folder, tmp_path / "st", "--to", "safetensors")
    assert (tmp_path / "st" / "model.safetensors").is_file()
    run("convert", tmp_path / "st", tmp_path / "pt", "--to", "fairseq")
    run("reshard", tmp_path / "pt", tmp_path / "one", "--files", 1)
    for made in ("stripped", "st", "pt", "one"):
        assert {p.suffix for p in (tmp_path / made).iterdir()} == {
            ".txt",
            ".safetensors" if made == "st" else ".pt",
        }
        same(tmp_path / made, folder)
    for asked, said in (
        (["reshard", folder, tmp_path / "x", "--files", "2"], f"--files 2: {DENSE} to spread over files"),
        (["keep", folder, tmp_path / "x", "--experts", "*:0"], f"--experts: {DENSE} to choose from"),
        (["keep", folder, tmp_path / "x", "--experts", "1:0"], f"--experts: {DENSE} to choose from"),
    ):
        capsys.readouterr()
        assert main([str(one) for one in asked]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_tables_and_pictures(model, folder):
    shares = report.shares(folder, 3, "cpu", "auto")
    assert shares["experts a layer"].tolist() == ["none"] * 3 and shares["files"].tolist() == ["model.pt"] * 3
    assert report.files(folder).loc["model.pt", "experts"] == 0
    assert report.model(model).loc["experts", ""] == "none"
    assert "all dense" in repr(model)
    said = plots.filled(report.filled(model)).axes[0].get_title()
    assert said == "no experts: each rank filled its copy of the whole model once"
    figure = plots.shards(folder, 3)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("model.pt") == 1 and "rank 2: the whole model" in texts
    assert "each of 3 ranks reads the whole model" in figure.get_suptitle()
    assert "the rank reads the whole model" in plots.shards(folder, 1).get_suptitle()


def test_the_playground(folder, tmp_path):
    torch.manual_seed(1)
    wide = Transformer(replace(CONFIG, vocab_rows=8192)).requires_grad_(False)
    for parameter in wide.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    export.save(wide, tmp_path)
    with moekit.load(tmp_path, 1, "cpu", bpe="demo", **QUIET) as model:
        playground = Playground(model, "Once")
        playground.settings["max_new_tokens"].value = 3
        playground.generate()
        playground.thread.join(60)
        assert [len(run.tokens) for run in playground.runs] == [3] and not playground.runs[0].said


@pytest.mark.parametrize(
    "freq, layers, alternate", [(0, 4, 0), (1, 4, 0), (2, 4, 0), (5, 4, 0), (4, 4, 0), (2, 4, 8)]
)
def test_a_config_tells_whether_it_is_dense(freq, layers, alternate):
    config = replace(
        shapes.SHAPES["tiny"], layers=layers, moe_freq=freq, experts=2, alternate_ffn_dim=alternate
    )
    assert config.dense == (not config.moe_layers)
    assert replace(config, layers=10**12).dense == (freq == 0 or alternate > 0)
