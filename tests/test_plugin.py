"""The released fairseq's own tools on the branch's checkpoints, against moekit and the branch."""

import argparse
import re
import shlex
import subprocess
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from branch_cases import BASE
from fairseq import checkpoint_utils
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.tasks.language_modeling import LanguageModelingTask
from test_project import ROOT

import moekit
from moekit.checkpoint import export
from moekit.checkpoint import options as config
from moekit.data.codec import Codec
from moekit.fairseq_data import open_data
from moekit.nn.config import ModelConfig
from moekit.nn.transformer import Transformer
from moekit.paths import DEMO_BPE as DEMO
from moekit.plugin import loading
from moekit.plugin.language_model import LanguageModel
from moekit.symbols import EOS, PAD

PLUGIN = Path(moekit.__file__).parent / "plugin"
GPT2 = {
    "bpe": "gpt2",
    "gpt2_encoder_json": str(DEMO / "encoder.json"),
    "gpt2_vocab_bpe": str(DEMO / "vocab.bpe"),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def write(folder: Path, options: dict, std: float, ends: float | None = None) -> None:
    """A checkpoint with random weights; ``ends`` makes those of ``</s>`` in the output matrix larger."""
    model = Transformer(ModelConfig(**(vars(BASE) | options)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=std)
    if ends is not None:
        model.output.weight.data[EOS] *= ends
    export.save(model, folder, files=2)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A random model with the demo's dictionary beside it."""
    folder = tmp_path_factory.mktemp("model")
    write(folder, {"vocab_rows": len(Codec.load("demo")), "max_positions": 200}, std=0.2)
    (folder / "dict.txt").write_bytes((DEMO / "dict.txt").read_bytes())
    return folder


def hub(reference, **options):
    """The tiny checkpoint in fairseq's own interface."""
    data = str((reference / "data-bin").resolve())
    return TransformerLanguageModel.from_pretrained(
        str(reference / "checkpoint"), data_name_or_path=data, user_dir=str(PLUGIN), **options
    )


def test_scores_of_texts_are_moekits(text_folder):
    """``from_pretrained`` and ``score`` as in the example (COPA) of fairseq's examples/moe_lm/README.md."""
    lm = TransformerLanguageModel.from_pretrained(
        str(text_folder), user_dir=str(PLUGIN), moe_eval_capacity_token_fraction=None, **GPT2
    ).eval()
    prompt = "The man broke his toe. What was the CAUSE of this?"
    texts = [f"{prompt}\n{end}" for end in ("He got a hole in his sock.", "He dropped a hammer on his foot.")]
    with moekit.load(text_folder, device="cpu", bpe=DEMO, progress=False) as model:
        wanted = model.score(texts)
    for number, text in enumerate(texts):
        found = lm.score(text, replace_newline_with_eos=True)
        mine = wanted[wanted["sample"] == number]
        assert found["tokens"].tolist() == mine["target"].tolist() and EOS in found["tokens"]
        np.testing.assert_allclose(found["positional_scores"], mine["logprob"], atol=1e-4)
    both = lm.score(texts, replace_newline_with_eos=True)  # of different lengths, padded
    np.testing.assert_allclose(both[1]["positional_scores"], found["positional_scores"], atol=1e-4)


def test_a_beam_search_of_moekit_is_fairseqs(reference, tmp_path):
    """On a model whose lines often end."""
    write(tmp_path, {"share_output": False}, std=0.1, ends=2.0)
    data = str((reference / "data-bin").resolve())
    lm = TransformerLanguageModel.from_pretrained(str(tmp_path), data_name_or_path=data)
    rng = np.random.default_rng(0)
    endings = []
    with moekit.load(tmp_path, device="cpu", progress=False) as model:
        for _ in range(15):
            length, beam, new = int(rng.integers(0, 12)), int(rng.integers(2, 7)), int(rng.integers(2, 20))
            ids = rng.integers(4, 200, length).tolist()
            wanted = lm.generate([torch.tensor([*ids, EOS])], beam=beam, max_len_b=length + new - 1)[0]
            found = model.generate(
                [ids], max_new_tokens=new, beam_size=beam, num_return_sequences=beam, progress=False
            )
            assert [g.ids for g in found] == [h["tokens"].tolist()[length:] for h in wanted]
            for generation, hypothesis in zip(found, wanted, strict=True):
                assert generation.score == pytest.approx(float(hypothesis["score"]), abs=1e-4)
                np.testing.assert_allclose(
                    generation.logprobs, hypothesis["positional_scores"][length:], atol=1e-4
                )
            endings += [g.finish_reason for g in found]
    assert {"stop", "length"} == set(endings)


def test_a_greedy_generation_of_moekit_is_fairseqs(text_folder):
    """Beyond 64 tokens, where the plug-in's cache has grown."""
    lm = TransformerLanguageModel.from_pretrained(str(text_folder), user_dir=str(PLUGIN), **GPT2)
    ids = lm.encode("Once upon a time")
    wanted = lm.generate([ids], beam=1, max_len_b=120, min_len=120)[0][0]["tokens"].tolist()[len(ids) - 1 :]
    with moekit.load(text_folder, device="cpu", bpe=DEMO, progress=False) as model:
        found = model.generate("Once upon a time", max_new_tokens=len(wanted), progress=False)[0].ids
    assert len(wanted) > 100
    assert found[: len(wanted) - 1] == wanted[:-1]


def test_the_incremental_decoder_is_the_whole_one_in_any_order(reference):
    decoder = hub(reference, moe_eval_capacity_token_fraction=None).models[0].decoder
    tokens = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(1))
    state = {}
    for step in range(12):
        found, _ = decoder(tokens[:, : step + 1], incremental_state=state)
        wanted, _ = decoder(tokens[:, : step + 1])
        torch.testing.assert_close(found[:, -1], wanted[:, -1], atol=1e-4, rtol=1e-4)
        order = torch.tensor([2, 0, 0] if step == 5 else [1, 2, 0])
        decoder.reorder_incremental_state_scripting(state, order)
        tokens = tokens[order]


def test_weights_that_are_not_finite_are_told(reference, tmp_path):
    module = moekit.module(reference / "checkpoint")
    with torch.no_grad():
        module.layers[1].moe.experts.w1[2, 0, 0] = float("nan")
    export.save(module, tmp_path, files=2)
    with pytest.warns(UserWarning, match="1 weights in 1 tensors are not finite, so results may be NaN"):
        TransformerLanguageModel.from_pretrained(
            str(tmp_path), data_name_or_path=str(reference / "data-bin"), user_dir=str(PLUGIN)
        )


def test_the_capacity_is_the_checkpoints_own_or_the_overrides(reference):
    sentence = " ".join(map(str, range(40)))
    own, same, none = (
        hub(reference, **options).score(sentence)["score"].item()
        for options in (
            {},
            {"moe_eval_capacity_token_fraction": -1.0},
            {"moe_eval_capacity_token_fraction": None},
        )
    )
    assert own == same != none
    # The branch takes 0 for the training's rule, too.
    assert hub(reference, moe_eval_capacity_token_fraction=0).score(sentence)["score"].item() == own
    for wrong in (float("nan"), float("inf"), "half"):
        with pytest.raises(ValueError, match="^moe_eval_capacity_token_fraction=.*: expected a number"):
            hub(reference, moe_eval_capacity_token_fraction=wrong)


def test_generation_drops_nothing_whatever_the_capacity(reference):
    """As the page says; the branch would drop, and what a hypothesis gets would depend on the others."""
    prompt = torch.tensor([5, 6, 7, EOS])
    tight, free = (
        hub(reference, moe_eval_capacity_token_fraction=fraction).generate([prompt], beam=4, max_len_b=12)[0]
        for fraction in (0.05, None)
    )
    for one, other in zip(tight, free, strict=True):
        torch.testing.assert_close(one["positional_scores"], other["positional_scores"])


@pytest.mark.parametrize("path", ["model.pt", "model-shared.pt", "model-rank-2.pt", ""])
def test_every_spelling_of_the_path(reference, path):
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(reference / "checkpoint" / path)],
        arg_overrides={"data": str(reference / "data-bin")},
    )
    assert models[0].max_positions() == 64


def test_checkpoints_with_args_alone(reference, tmp_path):
    for path in (reference / "checkpoint").glob("*.pt"):
        state = torch.load(path, weights_only=False)
        model, task = config.options_of(state, "")
        state |= {"cfg": None, "args": argparse.Namespace(**(task | model), task="language_modeling")}
        torch.save(state, tmp_path / path.name)
    data = str((reference / "data-bin").resolve())
    lm = TransformerLanguageModel.from_pretrained(str(tmp_path), data_name_or_path=data)
    torch.testing.assert_close(
        lm.score("5 6 7 8")["positional_scores"], hub(reference).score("5 6 7 8")["positional_scores"]
    )


@pytest.mark.parametrize("form", ["cfg", "args"])
@pytest.mark.parametrize(
    "told",
    [
        {},
        {
            "decoder_normalize_before": False,
            "activation_fn": "gelu",
            "share_decoder_input_output_embed": True,
        },
        {"decoder_learned_pos": True, "no_scale_embedding": True, "layernorm_embedding": True},
        {"decoder_input_dim": 16, "decoder_output_dim": 24, "no_decoder_final_norm": True},
    ],
)
def test_a_dense_model_in_one_file_gives_what_fairseqs_own_gives(told, form, reference, tmp_path):
    sizes = {"decoder_layers": 2, "decoder_embed_dim": 32, "decoder_ffn_embed_dim": 48}
    sizes |= {"decoder_attention_heads": 4, "decoder_input_dim": 32, "decoder_output_dim": 32}
    options = {"decoder_normalize_before": True, "tokens_per_sample": 64, "max_target_positions": 64}
    built = TransformerLanguageModelConfig(**(sizes | options | told))
    data = str((reference / "data-bin").resolve())
    task = LanguageModelingTask.setup_task(argparse.Namespace(data=data, output_dictionary_size=-1))
    torch.manual_seed(1)
    model = TransformerLanguageModel.build_model(built, task).eval()
    values = {k: v for k, v in vars(built).items() if not str(v).startswith("${")}
    values = {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}
    state = {"args": None, "cfg": None, "model": model.state_dict()}
    if form == "args":
        state["args"] = argparse.Namespace(**values, arch="transformer_lm", task="language_modeling")
    else:
        state["cfg"] = {"model": values | {"_name": "transformer_lm"}, "task": {"tokens_per_sample": 64}}
    torch.save(state, tmp_path / "model.pt")

    lm = TransformerLanguageModel.from_pretrained(
        str(tmp_path), data_name_or_path=data, user_dir=str(PLUGIN)
    ).eval()
    assert type(lm.models[0]) is LanguageModel
    tokens = torch.randint(4, 200, (3, 12), generator=torch.Generator().manual_seed(2))
    tokens[0, 9:] = PAD
    real = tokens != PAD
    with torch.no_grad():
        torch.testing.assert_close(
            lm.models[0](tokens)[0][real], model(tokens)[0][real], atol=1e-5, rtol=1e-5
        )


def test_a_path_where_nothing_lies_is_fairseqs_to_name(tmp_path):
    assert loading.find(str(tmp_path / "model.pt")) is None
    name_of = checkpoint_utils.get_maybe_sharded_checkpoint_filename
    assert name_of("elsewhere/model.pt", "-part", 0, 1) == "elsewhere/model-part.pt"
    with pytest.raises(OSError, match="Model file not found"):
        checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "model.pt")])


def test_a_dictionary_that_is_not_the_models(reference, text_folder):
    with pytest.raises(ValueError, match=r"8192.* 200|200.* 8192"):
        TransformerLanguageModel.from_pretrained(
            str(reference / "checkpoint"), data_name_or_path=str(text_folder.resolve())
        )


def fairseq(tool: str, reference, cwd: Path, *arguments: str, stdin: str = "") -> str:
    """A command-line tool of fairseq, in a process that has not heard of moekit but for --user-dir."""
    command = [sys.executable, "-m", f"fairseq_cli.{tool}", str((reference / "data-bin").resolve()), "--cpu"]
    path = str((reference / "checkpoint" / "model.pt").resolve())
    command += ["--path", path, "--user-dir", str(PLUGIN.resolve()), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["python -m moekit.eval_lm", "fairseq-interactive"])
def test_the_pages_command_lines_run(tool):
    readme = (ROOT / "moekit/plugin/README.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"^    {re.escape(tool)} .*", readme, re.MULTILINE)
    name, short = tool.split()[-1].replace("fairseq-", "fairseq_cli."), ["--cpu"]
    if "eval_lm" in name:
        short += ["--max-valid-steps", "0", "--no-progress-bar"]
    command = [sys.executable, "-m", name, *shlex.split(line.removeprefix(f"    {tool} ")), *short]
    done = subprocess.run(command, input="def main(\n", capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Loss \(base 2\): \d|^D-0\t\S+\tdef main\(.", done.stdout, re.MULTILINE)


def test_fairseqs_eval_lm_gives_the_branchs_loss(reference, tmp_path):
    said = fairseq(
        *("eval_lm", reference, tmp_path, "--gen-subset", "valid", "--sample-break-mode", "none"),
        *("--tokens-per-sample", "64", "--batch-size", "1", "--pad-to-fixed-length", "--num-workers", "0"),
        *("--model-overrides", "{'moe_eval_capacity_token_fraction': 0.05}"),
    )
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+)", said)[1])
    wanted = np.load(reference / "base_frac0.05_bsz1.npz")["loss_base2"]
    assert loss == pytest.approx(float(wanted), abs=6e-5)  # four decimals are printed


def test_fairseqs_interactive_goes_on_from_a_line(reference, tmp_path):
    said = fairseq(
        *(
            "interactive",
            reference,
            tmp_path,
            "--task",
            "language_modeling",
            "--beam",
            "3",
            "--max-len-b",
            "9",
        ),
        stdin="5 6 7\n",
    )
    found = re.search(r"H-0\t\S+\t(.*)", said)[1].split()
    with moekit.load(reference / "checkpoint", device="cpu", progress=False) as model:
        wanted = model.generate([[9, 10, 11]], max_new_tokens=7, beam_size=3, progress=False)[0].ids
    assert [int(symbol) + 4 for symbol in found] == [9, 10, 11, *wanted[:-1]]


@pytest.mark.slow
def test_fairseqs_generate_goes_on_from_samples(reference, tmp_path):
    said = fairseq(
        *("generate", reference, tmp_path, "--task", "language_modeling", "--gen-subset", "valid"),
        *(
            "--sample-break-mode",
            "eos",
            "--tokens-per-sample",
            "64",
            "--batch-size",
            "1",
            "--num-workers",
            "0",
        ),
        *("--num-shards", "12", "--beam", "2", "--max-len-b", "40"),
    )
    lines = re.findall(r"^H-(\d+)\t\S+\t(.*)", said, re.MULTILINE)
    data = {"tokens_per_sample": 64, "batch_size": 1, "max_positions": 64, "sample_break_mode": "eos"}
    samples = {int(b.ids[0]): b.tokens[0] for b in open_data(reference / "data-bin", "valid", **data)}
    compared = 0
    with moekit.load(reference / "checkpoint", device="cpu", progress=False) as model:
        for number, text in lines:
            first, *prompt = (token for token in samples[int(number)].tolist() if token != PAD)
            assert first == EOS  # which is the generator's own
            if len(prompt) >= 40:
                continue
            (wanted,) = model.generate([prompt], max_new_tokens=41 - len(prompt), beam_size=2, progress=False)
            shown = [
                token for token in (*prompt, *wanted.ids) if token not in (0, EOS)
            ]  # fairseq prints no <s>
            assert [int(symbol) + 4 for symbol in text.split()] == shown
            compared += 1
    assert compared > 1
