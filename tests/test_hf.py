"""Hugging Face's folders: what is written, what transformers computes with it, and the way back."""

import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from branch_cases import CASES, build
from test_branch import agree
from test_checkpoint_tool import refused, run, same_files, same_weights

import moekit
from moekit import checkpoint, paths
from moekit.checkpoint.hugging import writing
from moekit.checkpoint.reshaping import convert
from moekit.data.codec import Codec
from moekit.data.tokenizer import fast_tokenizer
from moekit.nn.config import ModelConfig
from moekit.nn.gate import balance_loss
from moekit.nn.passes import Pass

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import moekit.hf

TEXTS = ["It is a truth universally acknowledged.", "def main(", "Two lines.\nHere."]
RECORDED = Path(__file__).parent / "data" / "branch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo as transformers reads it."""
    target = tmp_path_factory.mktemp("hf") / "demo"
    run("convert", "demo", target, "--to", "hf", "--quiet")
    return target


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded():
    with moekit.load("demo", 2, "cpu", progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain():
    return moekit.module("demo")


def logits_of(model, *args, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(*args, **options).logits


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("most", [writing.MOST, 40_000], ids=["one file", "several"])
def test_to_transformers_and_back_bit_for_bit(reference, tmp_path, monkeypatch, most):
    monkeypatch.setattr(writing, "MOST", most)
    source, made = reference / "checkpoint", tmp_path / "hf"
    run("convert", source, made, "--to", "hf", "--quiet")
    run("convert", made, tmp_path / "back", "--to", "fairseq", "--quiet")
    same_files(tmp_path / "back", source)
    run("reshard", made, tmp_path / "two", "--files", "2", "--quiet")
    same_weights(tmp_path / "two", source)
    run("convert", made, tmp_path / "st", "--to", "safetensors", "--quiet")
    same_weights(tmp_path / "st", source)
    parts = sorted(made.glob("model*.safetensors"))
    assert len(parts) == 1 if most > 40_000 else len(parts) > 2
    for name in ("config.json", parts[-1].name):
        assert set(checkpoint.find(made / name).all) == set(parts)


def test_a_folder_that_came_back_reads_text_alone(folder, tmp_path, capsys):
    """As one that fairseq made: the dictionary and the files of the BPE lie with the weights."""
    run("convert", folder, tmp_path / "back", "--to", "fairseq", "--quiet")
    assert capsys.readouterr().err == ""
    assert Codec.load(tmp_path / "back").encode("def f(x):\n") == Codec.load("demo").encode("def f(x):\n")
    with moekit.load(tmp_path / "back", 1, "cpu", progress=False) as model:
        assert model.reads_text and len(model.score(["A line."]))
    (tmp_path / "without").mkdir()
    for path in (tmp_path / "back").glob("model*"):
        shutil.copy(path, tmp_path / "without")
    run("convert", tmp_path / "without", tmp_path / "st", "--to", "safetensors", "--quiet")
    said = capsys.readouterr().err
    assert (
        f"{tmp_path / 'st'} reads and writes ids alone: for text put encoder.json, vocab.bpe, dict.txt there"
        in said
    )


@pytest.mark.parametrize("name", CASES)
def test_every_option_comes_back_and_computes_the_same(name, tmp_path, reference):
    """Against moekit.module, which is checked against the branch: with padding, a capacity, and each routing."""
    build(name, tmp_path / "source")
    run("convert", tmp_path / "source", tmp_path / "hf", "--to", "hf", "--quiet")
    run("convert", tmp_path / "hf", tmp_path / "back", "--to", "fairseq", "--quiet")
    if CASES[name].config.moe_layers:
        same_files(tmp_path / "back", tmp_path / "source")
    # Without experts, one file holds all.
    same_weights(tmp_path / "back", tmp_path / "source")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    ours = moekit.module(tmp_path / "source")
    theirs.config.capacity_token_fraction = 0.1
    tokens = torch.from_numpy(np.random.default_rng(0).integers(4, 200, (3, 20)))
    real = torch.ones(3, 20, dtype=torch.long)
    real[1, 15:] = real[2, 7:] = 0
    tokens[real == 0] = 1
    expected = ours(tokens, Pass(fraction=0.1, padding=real == 0))
    found = logits_of(theirs, tokens, attention_mask=real)
    torch.testing.assert_close(found[real == 1], expected[real == 1].detach(), rtol=0, atol=1e-5)


def test_moekit_loads_the_folder(reference, tmp_path):
    run("convert", reference / "checkpoint", tmp_path / "hf", "--to", "hf", "--quiet")
    recorded = np.load(reference / "base_frac0.05_bsz4.npz")
    options = {"tokens_per_sample": 64, "batch_size": 4, "capacity_token_fraction": 0.05, "progress": False}
    with moekit.load(tmp_path / "hf", 2, "cpu", progress=False) as model:
        agree(model.evaluate(reference / "data-bin", "valid", **options), recorded)


def test_a_kept_model_is_the_same_whichever_way_it_is_made(reference, tmp_path):
    source, experts = reference / "checkpoint", "1:0,1:3-4,1:6,3:1-2,3:5,3:7"
    run("convert", source, tmp_path / "hf", "--to", "hf", "--quiet")
    run("keep", tmp_path / "hf", tmp_path / "kept_hf", "--experts", experts, "--quiet")
    run("keep", source, tmp_path / "kept", "--experts", experts, "--quiet")
    assert AutoConfig.from_pretrained(tmp_path / "kept_hf").num_local_experts == 4
    same_weights(tmp_path / "kept_hf", tmp_path / "kept")


def test_a_trained_model_becomes_files_of_the_branch(model, folder, tmp_path):
    """What save_pretrained writes has no settings of the branch's; they are made of the config."""
    model.save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "modeling_moekit.py").is_file()
    run("convert", tmp_path / "tuned", tmp_path / "back", "--to", "fairseq", "--quiet")
    same = moekit.module(tmp_path / "back")
    with torch.no_grad():
        tokens = torch.tensor([[2, 5, 6, 7]])
        assert same(tokens).equal(logits_of(model, tokens))


def test_a_changed_config_counts(folder, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in folder.iterdir():
        (changed / path.name).symlink_to(path)
    told = json.loads((folder / "config.json").read_text())
    (changed / "config.json").unlink()
    (changed / "config.json").write_text(json.dumps(told | {"second_expert": "random"}))
    assert checkpoint.survey(checkpoint.find(changed)).config.second_expert == "random"
    assert checkpoint.survey(checkpoint.find(folder)).config.second_expert == "all"


# ------------------------------------------------------------------------------------------------ the model


def test_logits_are_those_of_score(model, tokenizer, loaded):
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        table = loaded.score(text)
        assert ids[0].tolist() == [2, *table["target"]]
        found = F.log_softmax(logits_of(model, ids), -1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(found, table["logprob"], rtol=0, atol=1e-5)


def test_generate_is_that_of_moekit_with_any_cache_and_padding(model, tokenizer, loaded):
    expected = [one.ids for one in loaded.generate(TEXTS, max_new_tokens=12, temperature=0, progress=False)]
    assert any(2 in ids for ids in expected)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert (batch.attention_mask[:, 0] == 0).any()
    width = batch.input_ids.shape[1]
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        found = model.generate(**batch, max_new_tokens=12, do_sample=False, **options)
        assert found[:, width:].tolist() == expected
    # Two beams keep the best sequence, whose first tokens depend on the cache's order.
    beams = model.generate(**batch, max_new_tokens=6, num_beams=2, do_sample=False)
    alone = [
        model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=6, num_beams=2, do_sample=False)
        for text in TEXTS
    ]
    assert [b[width:].tolist() for b in beams] == [a[0, -6:].tolist() for a in alone]


def test_a_cache_continues_what_it_holds(model):
    tokens = torch.tensor([[2, *range(10, 30)]])
    whole = logits_of(model, tokens)
    with torch.no_grad():
        first = model(tokens[:, :8], use_cache=True)
        assert first.cache.get_seq_length() == 8
        rest = model(tokens[:, 8:15], cache=first.cache)
        last = model(tokens[:, 15:], past_key_values=rest.cache, logits_to_keep=1)
    torch.testing.assert_close(rest.logits, whole[:, 8:15], rtol=0, atol=1e-4)
    torch.testing.assert_close(last.logits, whole[:, -1:], rtol=0, atol=1e-4)


def test_router_logits_and_the_balance_loss(model, plain):
    tokens = torch.tensor([[2, *range(10, 30)], [2, *range(50, 70)]])
    routings = {}
    with torch.no_grad():
        plain(tokens, Pass(record=routings.__setitem__))
        found = model(tokens, labels=tokens, output_router_logits=True, output_hidden_states=True)
        alone = model(tokens, labels=tokens)
    assert len(found.router_logits) == len(routings) == 3 and alone.router_logits is None
    for logits, routing in zip(found.router_logits, routings.values(), strict=True):
        assert logits.shape == (42, 16) and logits.min() < 0 < logits.max()
        torch.testing.assert_close(logits.float().softmax(-1), routing.probs.flatten(0, 1))
    torch.testing.assert_close(found.aux_loss, sum(map(balance_loss, routings.values())))
    torch.testing.assert_close(found.loss, alone.loss + 0.01 * found.aux_loss)
    expected = F.cross_entropy(plain(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(alone.loss, expected.detach())
    assert len(found.hidden_states) == 7
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(found.hidden_states[-1]), found.logits)


def test_gradients_are_those_of_the_plain_module(model, plain):
    tokens = torch.tensor([[2, *range(10, 30)]])
    model.zero_grad()
    plain.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    F.cross_entropy(plain(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(theirs[f"model.decoder.{name}"].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_embeddings_in_place_of_ids(model):
    tokens = torch.tensor([[2, 7, 8, 9]])
    given = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(logits_of(model, inputs_embeds=given), logits_of(model, tokens))


@pytest.mark.parametrize("name", ["pads_take_places", "own_output"])
def test_new_tokens_have_rows(name, tmp_path):
    build(name, tmp_path / "source")
    run("convert", tmp_path / "source", tmp_path / "hf", "--to", "hf", "--quiet")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    tokens = torch.tensor([[2, 5, 6, 7]])
    before = logits_of(model, tokens)
    model.config.dictionary_size = 200
    model.resize_token_embeddings(203)
    after = logits_of(model, torch.tensor([[2, 5, 6, 7, 202]]))
    assert after.shape[-1] == 203 and after.isfinite().all()
    torch.testing.assert_close(after[:, :4, :200], before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "more")
    assert checkpoint.survey(checkpoint.find(tmp_path / "more")).config.vocab_rows == 203


def test_rows_beyond_the_dictionary_take_no_part(reference, tmp_path, capsys):
    """As in ``model.score``, which knows the dictionary."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (reference / "checkpoint").iterdir():
        (source / path.name).symlink_to(path)
    lines = (reference / "data-bin" / "dict.txt").read_text().splitlines()[:150]
    (source / "dict.txt").write_text("\n".join(lines) + "\n")
    run("convert", source, tmp_path / "hf", "--to", "hf", "--quiet")
    assert "no tokenizer is made" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    assert model.config.dictionary_size == 154
    ids = [5, 6, 7, 100, 150, 3]
    found = F.log_softmax(logits_of(model, torch.tensor([[2, *ids]])), -1)[0, :-1]
    assert found[:, 154:].eq(-torch.inf).all()
    with moekit.load(source, 1, "cpu", progress=False) as loaded:
        expected = loaded.score([ids])["logprob"]
    np.testing.assert_allclose(found.gather(-1, torch.tensor(ids)[:, None])[:, 0], expected, atol=1e-5)


def test_the_auto_classes_know_it(folder, model):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is moekit.hf.FairseqMoeConfig
    assert config.of_moekit() == checkpoint.survey(checkpoint.find("demo")).config
    names = {"hidden_size", "num_hidden_layers", "vocab_size", "num_experts_per_tok", "num_local_experts"}
    assert all(isinstance(getattr(config, name), int) for name in names)
    base = AutoModel.from_pretrained(folder, dtype="float32")
    tokens = torch.tensor([[2, 7, 8, 9]])
    with torch.no_grad():
        features = base(tokens).last_hidden_state
        assert model.model.decoder.logits(features).equal(logits_of(model, tokens))


def test_a_new_model_is_drawn(folder):
    """All of it, and not as the memory happened to be; its fields are those of moekit's config."""
    told = AutoConfig.from_pretrained(folder)
    ours = {field.name for field in fields(ModelConfig)}
    assert ours == set(vars(told.of_moekit()))
    config = moekit.hf.FairseqMoeConfig(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=8,
        num_attention_heads=2,
        vocab_size=40,
        num_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        wanted = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        assert abs(parameter.mean().item() - wanted) < 0.05, name
        assert (parameter.std() > 0.01) == (parameter.dim() > 1 and ".b" not in name), name


def test_what_makes_no_sense_is_refused(model):
    with pytest.raises(ValueError, match="input_ids and inputs_embeds: expected one"):
        model()
    with pytest.raises(ValueError, match="output_attentions"):
        model(torch.tensor([[2]]), output_attentions=True)


def of_sixteen_positions(**more):
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    config = moekit.hf.FairseqMoeConfig(**sizes, num_experts=4, max_position_embeddings=16, **more)
    return AutoModelForCausalLM.from_config(config)


def test_positions_that_are_not_learned_are_refused():
    model, ids = of_sixteen_positions(learned_positions=True), torch.tensor([[5, 6]])
    assert logits_of(model, ids, position_ids=torch.tensor([[3, 15]])).isfinite().all()
    with pytest.raises(
        ValueError, match="^position_ids go from 0 to 16; expected 0 to 15, the positions that the model has"
    ):
        model(ids, position_ids=torch.tensor([[0, 16]]))
    with pytest.raises(ValueError, match="^17 tokens, those in the cache included; expected at most 16"):
        model(torch.full((1, 17), 5))


@pytest.mark.parametrize("learned", [False, True])
def test_position_ids_that_are_none_are_refused(learned):
    """Below -1 they were rows of the table counted from its end, and other shapes made other logits."""
    model, ids = of_sixteen_positions(learned_positions=learned), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="^position_ids go from -2 to 0; expected 0 "):
        model(ids, position_ids=torch.tensor([[0, -2]]))
    for shape in ([1, 1], [1, 3], [2, 2], [1, 1, 2]):
        with pytest.raises(ValueError, match=rf"^position_ids have the shape \{shape}; expected \[1, 2\] or"):
            model(ids, position_ids=torch.zeros(shape, dtype=torch.long))
    none = torch.empty(1, 0, dtype=torch.long)
    assert logits_of(model, none, position_ids=none).shape == (1, 0, 40)
    # Padding has the position -1.
    mask = torch.tensor([[0, 1]])
    told = logits_of(model, ids, attention_mask=mask, position_ids=torch.tensor([[-1, 0]]))
    assert told.equal(logits_of(model, ids, attention_mask=mask))


def test_positions_far_behind_are_those_of_a_long_text():
    """Sinusoids go on beyond the positions that the model was trained with."""
    model, ids = of_sixteen_positions(), torch.full((1, 101), 5)
    mask = torch.ones_like(ids)
    mask[:, :100] = 0
    alone = logits_of(model, ids[:, -1:], position_ids=torch.tensor([[100]]))
    places = torch.arange(101)[None]
    assert alone[0, -1].allclose(
        logits_of(model, ids, attention_mask=mask, position_ids=places)[0, -1], atol=1e-6
    )


@pytest.mark.slow
def test_it_loads_where_nobody_imports_moekit(folder, tmp_path):
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer; import sys\n"
        "options = {'trust_remote_code': True}\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)\n"
        "model.save_pretrained(sys.argv[2])\n"
        "print(type(model).__module__, type(AutoTokenizer.from_pretrained(sys.argv[1], **options)).__module__)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.stdout.split() == ["moekit.hf.model", "moekit.hf.tokenizer"], done.stderr
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".py", ".safetensors"}
    # No code of moekit's was copied.
    assert [path.name for path in (tmp_path / "saved").glob("*.py")] == ["modeling_moekit.py"]


@pytest.mark.slow
def test_a_pipeline_writes_what_moekit_writes(folder, loaded):
    """Where torchaudio does not load, too, if moekit.hf is the first to be imported."""
    code = (
        "import moekit.hf, sys\n"
        "from transformers import pipeline\n"
        "made = pipeline('text-generation', sys.argv[1], dtype='float32', device='cpu')\n"
        "print(repr(made('def main(', max_new_tokens=12, do_sample=False)[0]['generated_text']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=200, check=False
    )
    expected = loaded.generate("def main(", max_new_tokens=12, temperature=0, progress=False)[0].text
    assert done.stdout.strip() == repr("def main(" + expected), done.stderr


# ------------------------------------------------------------------------------------------------ the tokenizer


@pytest.mark.parametrize(
    "text",
    [
        (paths.DEMO_TEXT / "valid.txt").read_text()[:60_000],
        "Two lines.\nHere.  \n\n x  \r\ny\rz\n",
        "  lead, don't, we'll 'quote'",
        "naïve café — “quotes” 日本語 🙂 12345 ½",
        "a\tb\x0bc  \x00",
        "",
    ],
    ids=["valid", "lines", "endings", "unicode", "blanks", "empty"],
)
def test_the_tokenizer_is_the_codec(tokenizer, text):
    codec = Codec.load("demo")
    ids = codec.encode(text)
    assert tokenizer(text).input_ids == [2, *ids]
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    for skipped in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skipped) == codec.decode(ids)


def test_the_symbols_of_the_tokenizer(tokenizer):
    codec = Codec.load("demo")
    assert len(tokenizer) == len(codec)
    symbols = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert symbols == [2, 1, 2, 3]
    assert tokenizer.decode([2, 1, 1, 85], skip_special_tokens=True) == "\n" + codec.decode([85])
    assert fast_tokenizer(codec, "<s>").encode("def").ids == [0, *codec.encode("def")]
    for number in range(4, len(codec)):
        if codec._bytes.get(number):
            assert tokenizer.decode([number]) == codec.decode([number])


# ------------------------------------------------------------------------------------------------ public copies


def light(source: Path, target: Path, kind: str, **options) -> None:
    """Write a checkpoint as light-fairseq's FSGPTMoEForCausalLM has it."""
    files = checkpoint.find(source)
    state, config, first = OrderedDict(), checkpoint.survey(files).config, 0
    for path in files.all:
        held = torch.load(path, weights_only=True)["model"]
        numbers = {int(key.split(".experts.")[1].split(".")[0]) for key in held if ".experts." in key}
        for key, tensor in held.items():
            parts = key.split(".")
            if key == "decoder.version":
                continue
            if key == "decoder.output_projection.weight":
                key = "lm_head.weight"
            elif "experts" in parts:
                key = ".".join([*parts[:3], "ffn.experts", f"expert_{first + int(parts[5])}", *parts[6:]])
            elif "gate" in parts:
                key = ".".join([*parts[:3], "ffn.router.classifier.weight"])
            elif parts[-2] in ("fc1", "fc2"):
                key = ".".join([*parts[:3], "ffn", *parts[3:]])
            state[key] = tensor
        first += len(numbers)
    told = {
        "architectures": ["FSGPTMoEForCausalLM"],
        "activation_function": "gelu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_positions,
        "num_experts": config.experts,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "sparse_step": 2,
        "vocab_size": config.vocab_rows,
        "moe_token_dropout": 0.0,
    }
    target.mkdir()
    (target / "config.json").write_text(json.dumps(told | options))
    if kind == "bin":
        torch.save(state, target / "pytorch_model.bin")
        return
    from safetensors.torch import save_file

    del state["lm_head.weight"]
    names = {key: f"model-{1 + number % 3:05d}-of-00003.safetensors" for number, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, target / name, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize(
    "case, options",
    [
        ("pads_take_places", {}),
        ("before_dropping", {"normalize_router_prob_before_dropping": True}),
        ("prioritized", {"batch_prioritized_routing": True}),
        ("gate_in_weights_dtype", {"router_dtype": "float16"}),
    ],
)
def test_a_public_copy_is_the_branchs_model(case, options, kind, tmp_path, reference):
    """Against what the branch computed on the files that the copy was made of."""
    build(case, tmp_path / "source")
    light(tmp_path / "source", tmp_path / "light", kind, **options)
    run("convert", tmp_path / "light", tmp_path / "released", "--to", "fairseq", "--quiet")
    same_weights(tmp_path / "released", tmp_path / "source")
    for folder in ("light", "released"):
        with moekit.load(tmp_path / folder, 1, "cpu", progress=False) as model:
            found = model.evaluate(reference / "data-bin", progress=False, **CASES[case].evaluate)
        agree(found, np.load(RECORDED / f"{case}.npz"))


def test_a_public_copy_becomes_a_model_of_transformers(tmp_path):
    build("pads_take_places", tmp_path / "source")
    light(tmp_path / "source", tmp_path / "light", "bin", moe_token_dropout=0.2)
    with pytest.warns(UserWarning, match="moe_token_dropout is ignored"):
        checkpoint.survey(checkpoint.find(tmp_path / "light"))
    run("convert", tmp_path / "light", tmp_path / "hf", "--to", "hf", "--quiet")
    tokens = torch.tensor([[2, 5, 6, 7]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    torch.testing.assert_close(logits_of(theirs, tokens), moekit.module(tmp_path / "source")(tokens).detach())


# ------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def tiny(reference, tmp_path):
    run("convert", reference / "checkpoint", tmp_path / "hf", "--to", "hf", "--quiet")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "change, said",
    [
        (b"[1, 2", "config.json is no JSON"),
        (b"\xff\xfe", "config.json is no JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "config.json is no JSON"),
        (b" " * 10_000_001, "config.json has 10,000,001 bytes; a config has 10,000,000 at most"),
        (
            b'{"num_hidden_layers": 2, "num_hidden_layers": 3}',
            "config.json has the key 'num_hidden_layers' twice",
        ),
        ({"architectures": [["FairseqMoeForCausalLM"]]}, "no config.json beside it names a model"),
        ({"hidden_size": "wide"}, "hidden_size='wide'; expected a whole number"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"pre_norm": 1}, "pre_norm=1; expected true or false"),
        ({"num_hidden_layers": 10**12}, "decoder_layers=1000000000000; expected a whole number"),
        ({"num_hidden_layers": 9}, "decoder_layers=9, but"),
        ({"num_experts": 7}, r"experts\.\w+ has shape .*, expected 7 experts"),
        ({"hidden_act": "silu"}, "activation_fn='silu' is unknown"),
        ({"intermediate_size": 24}, "expected"),
    ],
)
def test_a_config_that_lies_is_refused(tiny, change, said):
    path = tiny / "config.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        told = json.loads(path.read_text()) | change
        path.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))
    with pytest.raises(ValueError, match=said):
        checkpoint.survey(checkpoint.find(tiny))


@pytest.mark.parametrize(
    "index, said",
    [
        ("{", "is no JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "expected one beside it with weights"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "expected one beside it with weights"),
        ('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}', "which its index names: fetch it"),
        (
            '{"weight_map": {"a": "' + "a" * 5000 + '.safetensors"}}',
            "lacks 'aaaa.*which its index names: fetch it",
        ),
        (
            '{"weight_map": {"a": "\\ud800.safetensors"}}',
            r"lacks '.ud800.safetensors', which its index names",
        ),
    ],
)
def test_an_index_that_lies_is_refused(tiny, index, said):
    (tiny / "model.safetensors").unlink()
    (tiny / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=said):
        checkpoint.find(tiny)


def edited(path, edit):
    """A file of safetensors whose header ``edit`` changes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "kind", ["quint8", "bits8", "float4_e2m1fn_x2", "complex32", "load", "", 5, ["float32"]]
)
def test_a_buffer_of_another_type_is_refused(tiny, kind):
    """Of some of them torch cannot read a number, and of some it ends the process."""

    def edit(header):
        settings = json.loads(header["__metadata__"]["moekit.settings"])
        settings["buffers"] = {"decoder.version": {"dtype": kind, "bytes": "00" * 4}}
        header["__metadata__"]["moekit.settings"] = json.dumps(settings)

    edited(tiny / "model.safetensors", edit)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its buffers are"):
        checkpoint.survey(checkpoint.find(tiny))


@pytest.mark.parametrize("files", ["x", None, -1, 2.0, True, [1]])
def test_a_number_of_files_that_is_none_is_refused(tiny, tmp_path, files):
    def edit(header):
        settings = json.loads(header["__metadata__"]["moekit.settings"])
        header["__metadata__"]["moekit.settings"] = json.dumps(settings | {"files": files})

    edited(tiny / "model.safetensors", edit)
    said = "model.safetensors is damaged: its metadata tell that it was made of .* files; expected a whole number"
    with pytest.raises(ValueError, match=said):
        convert(tiny, tmp_path / "back", "fairseq", show=False)
    assert not (tmp_path / "back").exists()


def test_a_stack_of_another_number_of_experts_is_refused_at_once(tiny):
    """One of a million dimensions of one number would be a million tensors."""

    def edit(header):
        key = next(key for key in header if key.endswith("experts.w1"))
        header[key]["shape"] = [int(np.prod(header[key]["shape"]))]

    edited(tiny / "model.safetensors", edit)
    with pytest.raises(ValueError, match=r"experts.w1 has shape \[[0-9]+\], expected [0-9]+ experts"):
        checkpoint.survey(checkpoint.find(tiny))


@pytest.mark.parametrize("spelled", ["f" * 10_000, "-1234567", "xyz", "0X123456"])
def test_a_checksum_that_is_none_counts_as_unknown(tiny, spelled):
    def edit(header):
        key = next(key for key in header["__metadata__"] if key.startswith("crc32:"))
        header["__metadata__"][key] = spelled

    edited(tiny / "model.safetensors", edit)
    weights = checkpoint.read(tiny / "model.safetensors")["model"]
    assert sum(record.checksum is None for record in weights.records.values()) == 1


def test_a_folder_without_weights_or_of_another_model_is_refused(tiny):
    path = tiny / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"no config.json beside it names a model that moekit knows"):
        checkpoint.survey(checkpoint.find(tiny))
    path.write_text(json.dumps({"architectures": ["FairseqMoeForCausalLM"]}))
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has a config.json and no weights"):
        checkpoint.find(tiny)


def test_an_unknown_tensor_is_refused(tiny):
    from safetensors.torch import save_file

    save_file({"model.decoder.layers.0.extra": torch.zeros(2)}, tiny / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.extra is no parameter of moekit's model"):
        checkpoint.survey(checkpoint.find(tiny))


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_copy_executes_nothing(tmp_path):
    build("pads_take_places", tmp_path / "source")
    light(tmp_path / "source", tmp_path / "light", "bin")
    path, mark = tmp_path / "light" / "pytorch_model.bin", tmp_path / "executed"
    torch.save(torch.load(path, weights_only=True) | {"decoder.extra": Hostile(mark)}, path)
    with pytest.raises(ValueError, match="which moekit does not do: a checkpoint is data"):
        checkpoint.survey(checkpoint.find(tmp_path / "light"))
    assert not mark.exists()


def test_the_tool_says_what_it_cannot_do(tiny, tmp_path, capsys):
    assert "hold no optimizer's state" in refused(capsys, "strip", tiny, tmp_path / "x")
    arguments = ("convert", tiny, tmp_path / "x", "--to", "safetensors", "--bpe", "demo")
    assert "--bpe demo: a tokenizer is a part of --to hf alone" in refused(capsys, *arguments)
    arguments = ("convert", tiny, tmp_path / "x", "--to", "hf", "--bpe", "demo")
    assert "too few for a dictionary of 8192 types" in refused(capsys, *arguments)


# ------------------------------------------------------------------------------------------------ the harness


def test_the_harness_finds_what_score_finds(folder, loaded):
    """lm_eval's own class for models of transformers."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    pairs = [
        ("It is a truth", " universally acknowledged"),
        ("", "def main("),
        ("a\nb", "\nc"),
        ("Once", " a. "),
    ]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    theirs = harness.HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    found = theirs.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        table = loaded.score([loaded.codec.encode(context + continuation)])
        expected = table["logprob"][len(loaded.codec.encode(context)) :].sum()
        assert logprob == pytest.approx(expected, abs=1e-4)
    theirs.add_bos_token = False
    rolling = [Instance("loglikelihood_rolling", {}, (TEXTS[0],), 0)]
    assert theirs.loglikelihood_rolling(rolling, disable_tqdm=True) == [
        pytest.approx(loaded.score(TEXTS[0])["logprob"].sum(), abs=1e-4)
    ]
    theirs.add_bos_token = None
    # lm_eval always ends at the end of a line, which is the tokenizer's eos_token.
    settings = {"until": ["return"], "max_gen_toks": 12}
    text = theirs.generate_until(
        [Instance("generate_until", {}, ("def main(", settings), 0)], disable_tqdm=True
    )
    expected = loaded.generate(
        "def main(", max_new_tokens=12, temperature=0, stop=["return", "\n"], progress=False
    )
    assert text == [expected[0].text]
    try:
        from moekit.tasks.harness import HarnessModel
    except ImportError:
        return
    ours = HarnessModel(loaded, progress=False).loglikelihood(requests, disable_tqdm=True)
    for (one, greedy), (other, same) in zip(found, ours, strict=True):
        assert one == pytest.approx(other, abs=1e-4) and greedy == same
