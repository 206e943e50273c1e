"""The command line of eval_lm, against what the branch's own said."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from branch_cases import BASE
from test_data_verify import texts_of, write_cached

import moekit
from moekit import eval_lm
from moekit.checkpoint import export, reshaping
from moekit.nn.config import ModelConfig
from moekit.nn.transformer import Transformer

RECORDED = Path(__file__).parent / "data" / "eval_lm"
WORDS = re.compile(r"\d+ .* \[-?[\d.]+\]")


@pytest.fixture
def command(reference, caplog, monkeypatch):
    """Runs the command line with these arguments added; returns its status and its messages."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "argv", ["eval_lm"])  # fairseq's parser looks there for --user-dir

    def run(*arguments: str, data: Path | None = None, model: str = "model.pt") -> tuple[int, list[str]]:
        caplog.clear()
        fixed = f"--gen-subset valid --sample-break-mode none --tokens-per-sample 64 --path {reference / 'checkpoint' / model}"
        status = eval_lm.main(
            [str(data or reference / "data-bin"), *fixed.split(), "--cpu", "--no-progress-bar", *arguments]
        )
        return status, [r.getMessage() for r in caplog.records if r.name == "fairseq_cli.eval_lm"]

    return run


def compared(messages: list[str], recorded: list[str]) -> int:
    """Check each message against the recorded one, numbers of words to 1e-5; returns how many numbers those were."""
    start = next(i for i, message in enumerate(messages) if message.startswith("num. model params"))
    messages = [m for m in messages[start:] if not m.startswith(("load time", "Evaluation results saved"))]
    assert len(messages) == len(recorded)
    numbers = 0
    for ours, theirs in zip(messages, recorded, strict=True):
        if WORDS.match(theirs) or theirs.count("\t") == 5:
            split = re.compile(r"(?<=\[)-?[\d.]+(?=\])" if WORDS.match(theirs) else r"(?<=\t)-?\d+\.\d+")
            assert split.sub("", ours) == split.sub("", theirs)
            found, wanted = (np.array([float(n) for n in split.findall(line)]) for line in (ours, theirs))
            np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
            numbers += len(wanted)
        else:
            ours = re.sub(r"in [\d.]+s \(.* tokens/s\)", "in TIME", ours)
            assert re.sub(r"^\S*bin valid", "DATA valid", ours) == theirs
    return numbers


def test_log_and_figures_are_the_branchs(command, tmp_path):
    status, messages = command(
        *"--is-moe --batch-size 2 --output-word-probs --output-word-stats --num-workers 0".split(),
        *("--model-overrides", "{'world_size': 4, 'moe_eval_capacity_token_fraction': 0.05}"),
        *("--stats-path", str(tmp_path / "stats")),
    )
    assert status == 0
    assert compared(messages, (RECORDED / "batches.log").read_text().splitlines()) == 976 + 2 * 179
    ours = json.loads((tmp_path / "stats.json").read_text())
    theirs = json.loads((RECORDED / "batches.json").read_text())
    assert list(ours) == list(theirs) and list(ours["valid"]) == list(theirs["valid"])
    for name in ("loss", "perplexity", "ntok_total"):
        assert ours["valid"][name] == pytest.approx(theirs["valid"][name], abs=5e-4)


def test_joined_pieces_and_the_last_step_are_the_branchs(command, reference, tmp_path):
    data = tmp_path / "data-bin"
    shutil.copytree(reference / "data-bin", data, copy_function=shutil.copyfile)
    lines = (data / "dict.txt").read_text().splitlines()
    joined = [line.replace(" ", "@@ ") if i % 3 == 0 else line for i, line in enumerate(lines)]
    (data / "dict.txt").write_text("\n".join(joined) + "\n")
    status, messages = command(
        *"--is-moe --batch-size 1 --max-valid-steps 1 --output-word-probs --output-word-stats".split(),
        *("--post-process", "@@ ", "--model-overrides", "{'moe_eval_capacity_token_fraction': 0.05}"),
        data=data,
    )
    assert status == 0
    recorded = (RECORDED / "joined.log").read_text().splitlines()
    compared(messages, recorded)
    assert sum(bool(WORDS.match(message)) for message in messages) == 2  # one more than max_valid_steps


def test_samples_that_are_too_long_are_skipped_as_the_branch_does(command):
    status, messages = command(
        *"--is-moe --batch-size 2 --sample-break-mode complete --tokens-per-sample 70".split(),
        *"--output-word-probs --output-word-stats --model-overrides".split(),
        "{'world_size': 4, 'moe_eval_capacity_token_fraction': 0.05}",
    )
    assert status == 0
    said = [message for message in messages if "longer than the model's 64 positions" in message]
    assert len(said) == 1 and "4 of 17" in said[0]
    recorded = (RECORDED / "skipped.log").read_text().splitlines()
    assert compared([message for message in messages if message not in said], recorded) > 705


def test_nothing_left_to_score_is_no_error_as_in_the_branch(command, tmp_path):
    status, messages = command(
        *"--is-moe --batch-size 2 --tokens-per-sample 128 --stats-path".split(), str(tmp_path / "stats")
    )
    assert status == 0
    assert messages[-2] == "valid Loss (base 2): 0.0000, Perplexity: 1.00"
    assert [message for message in messages if "8 of 8" in message and "--tokens-per-sample 64" in message]
    figures = json.loads((tmp_path / "stats.json").read_text())["valid"]
    assert (figures["loss"], figures["perplexity"], figures["ntok_total"]) == (0, 1, 0)


def test_max_tokens_cut_other_batches(command):
    """A batch of 2 samples of 64 tokens is what 128 tokens allow."""

    def loss(*more: str) -> str:
        override = "{'moe_eval_capacity_token_fraction': 0.05}"
        return command("--is-moe", "--model-overrides", override, *more)[1][-1]

    cut = loss("--batch-size", "4", "--max-tokens", "128")
    assert cut == loss("--batch-size", "2") != loss("--batch-size", "4")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stats-path", "nowhere/stats"], "nowhere does not exist"),
        (["--stats-path", "/proc/self/stats"], "nothing can be written there"),
        (["--gen-subset", "nowhere"], "nowhere"),
        (["--context-window", "64"], "--context-window 64"),
        (["--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_what_can_be_known_is_said_before_loading(command, capsys, monkeypatch, arguments, named):
    monkeypatch.setattr(eval_lm.moekit, "load", None)
    status, _ = command("--is-moe", "--batch-size", "1", *arguments)
    assert status == 1 and named in capsys.readouterr().err


def test_the_checkpoints_own_capacity_holds_without_an_override(command):
    def loss(*more: str) -> str:
        return command("--is-moe", "--batch-size", "4", *more)[1][-1]

    def override(fraction: str) -> str:
        return loss("--model-overrides", f"{{'moe_eval_capacity_token_fraction': {fraction}}}")

    assert loss() == override("-1.0")
    assert len({loss(), override("0.05"), override("None")}) == 3


def test_routing_options_are_overridden(command):
    def loss(overrides: str) -> str:
        return command("--is-moe", "--batch-size", "4", "--model-overrides", overrides)[1][-1]

    assert loss("{}") != loss("{'moe_batch_prioritized_routing': True}")


def test_several_ranks_say_the_same(command):
    arguments = "--is-moe --batch-size 2 --output-word-probs --max-valid-steps".split()
    _, one = command(*arguments, "5")
    status, two = command(*arguments, "2", "--distributed-world-size", "2", model="model-rank-0.pt")
    assert status == 0
    assert [m.split(" [")[0] for m in one if WORDS.match(m)] == [
        m.split(" [")[0] for m in two if WORDS.match(m)
    ]
    assert one[-1] == two[-1]


@pytest.mark.slow
def test_a_launchers_processes_are_the_ranks(reference, tmp_path):
    """torchrun on this machine; --standalone chooses a free port."""
    arguments = f"{reference / 'data-bin'} --path {reference / 'checkpoint' / 'model.pt'} --gen-subset valid --is-moe --cpu"
    arguments += " --sample-break-mode none --tokens-per-sample 64 --batch-size 2 --no-progress-bar --max-valid-steps 2"
    figures = {}
    for name, launcher in {
        "alone": ["-m"],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    }.items():
        size = ["--distributed-world-size", "2"] if name == "alone" else []
        command = [
            *launcher,
            "moekit.eval_lm",
            *arguments.split(),
            *size,
            "--stats-path",
            str(tmp_path / name),
        ]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Loss (base 2)") == 1, "rank 0 alone tells"
        figures[name] = json.loads((tmp_path / f"{name}.json").read_text())["valid"]
    same = ("loss", "perplexity", "ntok_total")
    assert [figures["torchrun"][key] for key in same] == [figures["alone"][key] for key in same]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment: expected less than WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is missing"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "--distributed-world-size 3",
        ),
    ],
)
def test_what_a_launcher_gets_wrong_is_said(command, capsys, monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, _ = command("--is-moe", "--distributed-world-size", "3")
    error = capsys.readouterr().err.strip()
    assert status == 1 and said in error and len(error.splitlines()) == 1


def test_one_process_of_a_launcher_is_no_other_than_none(command, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command("--is-moe", "--max-valid-steps", "0")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--is-moe", "--num-shards", "2"], "--num-shards 2"),
        (["--is-moe", "--bf16"], "--bf16 has"),
        (["--is-moe", "--task", "multilingual_language_modeling"], "multilingual_language_modeling"),
        (["--is-moe", "--model-overrides", "__import__('os').system('false')"], "--model-overrides"),
        (
            ["--is-moe", "--model-overrides", "{'decoder_layers': 2}"],
            "of a model with layers=4; leave out what changes that",
        ),
        (["--is-moe", "--model-overrides", "{'decoder_attention_heads': 2}"], "with heads=4"),
        (
            ["--is-moe", "--model-overrides", "{'moe_second_expert_policy': 'none'}"],
            "moe_second_expert_policy",
        ),
        (["--is-moe", "--no-such-option"], "--no-such-option"),
        (["--is-moe", "--batch-size", "many"], "--batch-size"),
        (["--is-moe", "--path", "nowhere/model.pt"], "nowhere"),
        (["--is-moe", "--path", "a.pt:b.pt"], "a.pt:b.pt"),
        (["--is-moe", "--path", "file:///ck/model.pt"], "file:///ck/model.pt is an address"),
        (["--is-moe", "--tokens-per-sample", "0"], "--tokens-per-sample 0"),
        (["--is-moe", "--post-process", "sentencepiece"], "sentencepiece"),
        ([], "--is-moe"),
    ],
)
def test_an_error_is_one_sentence(command, capsys, arguments, named):
    status, _ = command(*arguments)
    said = capsys.readouterr().err.strip()
    assert status == 1 and named in said
    assert len(said.splitlines()) == 1


def test_from_python_too_long_samples_are_a_mistake(reference, tmp_path):
    data = reference / "data-bin"
    with moekit.load(reference / "checkpoint", device="cpu", progress=False) as model:
        for call in (model.evaluate, model.trace):
            with pytest.raises(
                ValueError, match="tokens_per_sample=65: expected at most the model's 64 positions"
            ):
                call(data, tokens_per_sample=65)
    learned = Transformer(ModelConfig(**(vars(BASE) | {"learned_positions": True, "add_bos": True})))
    export.save(learned, tmp_path, files=1)
    with moekit.load(tmp_path, device="cpu", progress=False) as model:  # <s> comes on top of a full block
        assert model.evaluate(data, tokens_per_sample=63, max_batches=1, progress=False).ntokens
        with pytest.raises(ValueError, match="65 tokens, .* 64 learned positions"):
            model.evaluate(data, progress=False)


def with_weights(**options) -> Transformer:
    """A model of the reference's shape with these options."""
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**(vars(BASE) | options)))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def test_where_there_are_no_positions_none_are_learned(reference, tmp_path):
    """The two options together are allowed; then <s> may come on top of a full block, as in the branch."""
    export.save(with_weights(positions=False, add_bos=True), tmp_path / "branch")
    reshaping.convert(tmp_path / "branch", tmp_path / "hf", to="hf", show=False)
    for path in (tmp_path / "branch").iterdir():
        state = torch.load(path, weights_only=True)
        state["cfg"]["model"]["decoder_learned_pos"] = True
        torch.save(state, path)
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(told | {"learned_positions": True}))
    for folder in ("branch", "hf"):
        with moekit.load(tmp_path / folder, device="cpu", progress=False) as model:
            assert not model.config.learned_positions
            assert model.evaluate(reference / "data-bin", progress=False).ntokens


def test_padding_beyond_the_learned_positions_has_none(reference, tmp_path):
    """A line longer than a block and the context before it leave more columns than the model has learned positions."""
    export.save(with_weights(learned_positions=True), tmp_path)
    how = {"sample_break_mode": "eos", "context_window": 62, "batch_size": 2, "progress": False}
    with moekit.load(tmp_path, device="cpu", progress=False) as model:
        # Where everything has a place, nothing is dropped, and padding has a mask.
        masked = model.evaluate(reference / "data-bin", capacity_token_fraction=1.0, **how)
        plain = model.evaluate(reference / "data-bin", **how)
    np.testing.assert_allclose(plain.tokens["logprob"], masked.tokens["logprob"], atol=1e-5, rtol=0)


def test_experts_in_one_file_with_all_else_need_the_option_too(command, tmp_path, capsys):
    """Without it the branch counts other padding among the tokens of a batch, on which the capacity depends."""
    export.save(with_weights(), tmp_path / "files")
    shared, experts = (
        torch.load(tmp_path / "files" / f"model-{part}.pt", weights_only=True)
        for part in ("shared", "rank-0")
    )
    torch.save(shared | {"model": shared["model"] | experts["model"]}, tmp_path / "model.pt")
    assert command("--path", str(tmp_path / "model.pt"))[0] == 1
    assert f"{tmp_path / 'model.pt'} has experts: add --is-moe" in capsys.readouterr().err
    status, messages = command("--is-moe", "--path", str(tmp_path / "model.pt"))
    assert status == 0
    in_files = command("--is-moe", "--path", str(tmp_path / "files" / "model.pt"))[1]
    assert messages[-1] == in_files[-1]


@pytest.mark.parametrize(
    ("failure", "told"),
    [(KeyboardInterrupt(), "KeyboardInterrupt"), (RuntimeError("a rank failed\n\nits log"), "a rank failed")],
)
def test_whatever_ends_it_is_said_in_a_sentence(command, capsys, monkeypatch, failure, told):
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(eval_lm.moekit, "load", fail)
    assert command("--is-moe")[0] == 1
    assert capsys.readouterr().err == f"python -m moekit.eval_lm: error: {told}\n"


def test_infinite_scores_are_left_out():
    class Dictionary(dict):
        pass

    found = eval_lm.Words(Dictionary({4: "a", 5: "b@@", 6: "c"}), "@@ ")
    words = found.add(np.array([4, 5, 6, 4]), np.array([-1, -2, -3, -np.inf], np.float32))
    assert words == [("a", -1.0), ("bc", -5.0), ("a", -np.inf)]
    assert (found.total, found.count) == (-6.0, 2)  # a and bc
    assert found.loss_base2 == pytest.approx(3 / math.log(2))


def test_scores_that_are_no_numbers_count_as_in_fairseq(command, tmp_path, monkeypatch):
    """Only infinite ones are left out there, so one NaN makes the loss one."""
    score_batches = eval_lm.score_batches

    def spoiled(*arguments, **options):
        scores = score_batches(*arguments, **options)
        for array in scores.values():
            array[:, 0] = np.nan
        return scores

    monkeypatch.setattr(eval_lm, "score_batches", spoiled)
    status, messages = command("--is-moe", "--stats-path", str(tmp_path / "stats"))
    assert status == 0 and messages[-2] == "valid Loss (base 2): nan, Perplexity: nan"
    assert not any(message.startswith("skipping tokens") for message in messages)
    figures = json.loads((tmp_path / "stats.json").read_text())["valid"]
    assert math.isnan(figures["loss"]) and math.isnan(figures["perplexity"])


def test_options_of_a_bpe_are_without_effect_as_the_bpe_is(command):
    plain = command("--is-moe", "--batch-size", "2")[1][-1]
    status, messages = command(
        *"--is-moe --batch-size 2 --bpe gpt2 --gpt2-encoder-json x --gpt2-vocab-bpe y".split(),
        *"--tokenizer moses --moses-no-escape --dataset-impl mmap".split(),
    )
    assert status == 0 and messages[-1] == plain


def test_data_of_the_older_formats_and_the_first_of_several_folders(command, reference, tmp_path):
    plain = command("--is-moe", "--batch-size", "2")[1][-1]
    shutil.copyfile(reference / "data-bin" / "dict.txt", tmp_path / "dict.txt")
    write_cached(tmp_path / "valid", texts_of(reference / "data-bin" / "valid"))
    for impl in ("cached", "lazy"):
        status, messages = command("--is-moe", "--batch-size", "2", "--dataset-impl", impl, data=tmp_path)
        assert status == 0 and messages[-1] == plain
    status, messages = command("--is-moe", "--batch-size", "2", data=f"{tmp_path}:/nowhere")
    assert status == 0 and messages[-1] == plain


def test_data_of_another_dictionary_than_the_one_beside_the_checkpoint(command, reference, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(reference / "checkpoint", folder, copy_function=shutil.copyfile)
    lines = (reference / "data-bin" / "dict.txt").read_text().splitlines()
    (folder / "dict.txt").write_text("\n".join(reversed(lines)) + "\n")
    assert command("--is-moe", "--path", str(folder / "model.pt"))[0] == 1
    said = capsys.readouterr().err
    assert f"{reference / 'data-bin'}/dict.txt and {folder}/dict.txt differ first in line 1" in said
    (folder / "dict.txt").write_text("\n".join(lines) + "\n")
    plain = command("--is-moe")[1][-1]
    assert command("--is-moe", "--path", str(folder / "model.pt"))[1][-1] == plain


def test_an_error_of_another_kind_says_which(command, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyError(58)

    monkeypatch.setattr(eval_lm.moekit, "load", fail)
    assert command("--is-moe")[0] == 1
    assert capsys.readouterr().err == "python -m moekit.eval_lm: error: KeyError: 58\n"


def test_earlier_figures_stay_until_new_ones_are_whole(command, tmp_path, monkeypatch):
    stats = tmp_path / "stats.json"
    stats.write_text("earlier")
    write_text = Path.write_text

    def full(self: Path, text: str) -> None:
        write_text(self, text[:10])
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as changed:
        changed.setattr(Path, "write_text", full)
        assert command("--is-moe", "--stats-path", str(tmp_path / "stats"))[0] == 1
    assert stats.read_text() == "earlier"
    assert command("--is-moe", "--stats-path", str(tmp_path / "stats"))[0] == 0
    assert json.loads(stats.read_text())["valid"]["ntok_total"] == 976
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stats.json"]
