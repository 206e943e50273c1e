import atexit
import errno
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from synthetic_traces import synthetic

import moekit
from moekit.notebook import parameters, preflight
from moekit.notebook.parameters import ParameterError
from moekit.paths import DEMO_BPE, DEMO_TEXT

# of this run alone: others on the machine write into its temporary folder, too
FOLDER = tempfile.mkdtemp()
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
GOOD = {
    "checkpoint": "demo",
    "bpe": None,
    "experts": None,
    "ranks": "local",
    "resident": None,
    "gpu_memory": None,
    "data": "demo",
    "subset": "valid",
    "world_size": 2,
    "device": "cpu",
    "tokens_per_sample": None,
    "context_window": 0,
    "prompts": ["Once upon a time"],
    "max_new_tokens": 40,
    "temperature": 0.7,
    "top_k": None,
    "top_p": 0.9,
    "beam_size": 1,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "seed": 1,
    "output_dir": FOLDER,
}


def given(**changes) -> SimpleNamespace:
    return SimpleNamespace(**GOOD | changes)


def test_what_is_whole_passes():
    assert preflight.run_inference(given()).experts == 16
    assert preflight.run_inference(given(world_size=None)).experts == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": "/nowhere/model.pt"}, "there is no folder /nowhere"),
        ({"checkpoint": "demo/model-rank-99.pt"}, "no folder|no file"),
        ({"device": "cuda", "world_size": 99}, "world_size 99 needs as many GPUs"),
        ({"subset": "bogus"}, r"has no bogus\.bin"),
        ({"data": "/nowhere"}, r"/nowhere (has no dict\.txt|does not exist)"),
        ({"tokens_per_sample": 9999}, "tokens_per_sample=9999: the model has 256 positions"),
        ({"context_window": 256}, "context_window=256: expected less than a block's 256 tokens"),
        ({"max_new_tokens": 256}, "max_new_tokens=256: the model has 256 positions"),
        ({"temperature": 0.0, "num_return_sequences": 3}, "num_return_sequences=3: at temperature 0"),
        ({"beam_size": 2, "num_return_sequences": 3}, "expected at most beam_size=2"),
        ({"output_dir": "/proc/nowhere"}, "output_dir='/proc/nowhere': nothing can be written to"),
        ({"output_dir": __file__}, "test_preflight.py' is a file; expected a folder"),
    ],
)
def test_what_would_fail_later_is_said_at_once(changes, said):
    with pytest.raises(ParameterError, match=said):
        preflight.run_inference(given(**changes))


INSPECT = {"texts": None, "domains": None, "layers": None, "compare_with": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": []}, "expected at least one text, and none of them empty"),
        ({"texts": ["some text", ""]}, "expected at least one text, and none of them empty"),
        ({"texts": [__file__]}, "reads as the name of a file or folder, expected the text itself"),
        ({"texts": ["/no/such/file.txt"]}, "reads as the name of a file or folder, expected the text itself"),
        ({"texts": ["short", "long " * 300]}, "text 1 has [0-9]+ tokens, expected at most 255"),
        ({"texts": ["a"], "domains": ["x", "y"]}, "domains has 2 labels for 1 texts; expected one for each"),
        (
            {"domains": [__file__]},
            "test_preflight.py has [0-9]+ lines, the text [0-9]+: expected a domain for each line",
        ),
        ({"texts": ["a", "b"], "domains": ["x"]}, "domains has 1 labels for 2 texts; expected one for each"),
        ({"domains": ["/nowhere/x"]}, "expected the one file with a domain for each line"),
        ({"domains": ["a", "b"]}, "expected the one file with a domain for each line"),
        ({"layers": [0]}, "layer 0 holds no experts"),
        ({"layers": []}, r"layers=\[\]: expected at least one layer, or None for all"),
        ({"compare_with": "/nowhere"}, "there is no trace /nowhere"),
        ({"bpe": "/nowhere"}, "text needs encoder.json, vocab.bpe, dict.txt, expected in /nowhere"),
        ({"subset": "bogus"}, r"has no bogus\.bin"),
    ],
)
def test_what_inspect_routing_would_trip_over(changes, said):
    assert preflight.inspect_routing(given(**INSPECT)).experts == 16
    assert preflight.inspect_routing(given(**INSPECT | {"texts": ["some/text"]})).experts == 16
    with pytest.raises(ParameterError, match=said):
        preflight.inspect_routing(given(**INSPECT | changes))


PROFILE = {"mode": "decode", "batch_blocks": [1, 4], "steps": 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_blocks": []}, r"batch_blocks=\[\]: expected one number of at least 1"),
        ({"batch_blocks": [2, 0]}, r"batch_blocks=\[2, 0\]: expected one number of at least 1"),
        (
            {"steps": 121},
            "steps=121: prompts of 128 tokens and the steps need 257 positions, and the model has 256",
        ),
        ({"data": "/nowhere"}, "/nowhere"),
        ({"checkpoint": "/nowhere"}, "/nowhere does not exist"),
        ({"resident": 2, "gpu_memory": 2**30}, "resident=2 and gpu_memory=1024MiB: give one of them"),
        ({"ranks": "ray", "gpu_memory": "auto"}, 'gpu_memory="auto": nothing tells what is free'),
        ({"checkpoint": "demo-dense", "resident": 2}, "resident=2 is a number of experts, .* has none"),
        ({"checkpoint": "demo-dense", "experts": "int8"}, "experts='int8'.* no experts"),
    ],
)
def test_what_profile_inference_would_trip_over(changes, said):
    whole = {name: value for name, value in GOOD.items() if name in parameters.PROFILE_INFERENCE} | PROFILE
    assert preflight.profile_inference(SimpleNamespace(**whole)).experts == 16
    assert (
        preflight.profile_inference(SimpleNamespace(**whole | {"mode": "score", "steps": 121})).experts == 16
    )
    with pytest.raises(ParameterError, match=said):
        preflight.profile_inference(SimpleNamespace(**whole | changes))


STUDY = {
    "domains": None,
    "capacity_token_fractions": [0.5],
    "mask": None,
    "prompt_tokens": 32,
    "max_new_tokens": 225,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 226}, "max_new_tokens=226: expected at most 225, as the model has 256 positions"),
        ({"prompt_tokens": 257}, "prompt_tokens=257: expected at most a block's 256 tokens"),
        ({"capacity_token_fractions": []}, r"capacity_token_fractions=\[\]: expected at least one share"),
        ({"tokens_per_sample": 31}, "prompt_tokens=32: expected at most a block's 31 tokens"),
        ({"mask": {4: [1]}}, "^mask: layer 4 holds no experts"),
    ],
)
def test_what_study_routing_would_trip_over(changes, said):
    assert preflight.study_routing(given(**STUDY)).experts == 16
    with pytest.raises(ParameterError, match=said):
        preflight.study_routing(given(**STUDY | changes))


def test_a_trace_of_another_model_is_said(tmp_path):
    for experts, choices, layers in ((8, 2, (1, 3, 5)), (16, 1, (1, 3, 5)), (16, 2, (1, 3))):
        trace, _ = synthetic(tokens=64, layers=layers, experts=experts, choices=choices)
        trace.save(tmp_path / "t.parquet")
        said = f"has {experts} experts, {choices} choices a token and the layers {list(layers)}; this run has 16, 2 and [1, 3, 5]"
        with pytest.raises(ParameterError, match=re.escape(said)):
            preflight.inspect_routing(given(**INSPECT | {"compare_with": str(tmp_path / "t.parquet")}))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Traces of the demo's text, of a part of it in shorter blocks, of texts, of raw data, and of a model whose samples begin with
    <s>."""
    folder, texts = tmp_path_factory.mktemp("read"), ["one text", "and another one"]
    how = {"max_tokens": 600, "progress": False}
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        traces = {
            "data": model.trace("demo", **how),
            "short": model.trace("demo", tokens_per_sample=100, **how),
        }
        traces["texts"] = model.trace(texts, progress=False)
        # Raw data has no index.
        (folder / "raw").mkdir()
        shutil.copy(DEMO_TEXT / "data-bin" / "dict.txt", folder / "raw")
        words = [line.split()[0] for line in (folder / "raw" / "dict.txt").read_text().splitlines()]
        (folder / "raw" / "valid").write_text("".join(f"{one} {words[0]}\n" for one in words[:200]))
        traces["raw"] = model.trace(folder / "raw", **how)
    with moekit.load("demo", 1, "cpu", config={"add_bos": True}, progress=False) as model:
        traces["begun"] = model.trace("demo", **how)
    traces["later"] = traces["texts"].select(samples=1)
    for name, trace in traces.items():
        trace.save(folder / f"{name}.parquet")
    return folder, texts


def test_a_trace_of_another_text_is_said(read, monkeypatch):
    """The comparison would fail in a late cell, and with it the whole run."""
    folder, texts = read

    def asked(name, **changes):
        return given(**INSPECT | {"compare_with": str(folder / f"{name}.parquet")} | changes)

    for name, changes in (
        ("data", {}),
        ("short", {"tokens_per_sample": 100}),
        ("texts", {"texts": texts}),
        ("texts", {"texts": texts[:1]}),
    ):
        assert preflight.inspect_routing(asked(name, **changes)).experts == 16
    for name, changes in (
        ("short", {}),
        ("data", {"tokens_per_sample": 100}),
        ("begun", {}),
        ("texts", {}),
        ("data", {"texts": texts}),
        ("texts", {"texts": texts[::-1]}),
        ("later", {"texts": texts[:1]}),
    ):
        with pytest.raises(
            ParameterError, match=r"^compare_with=.*: \d+ of its \d+ tokens are not those of this run's text"
        ):
            preflight.inspect_routing(asked(name, **changes))
    assert preflight.inspect_routing(asked("raw", data=str(folder / "raw"))).experts == 16
    with pytest.raises(ParameterError, match="are not those of this run's text"):
        preflight.inspect_routing(asked("raw"))
    begun = replace(preflight.load_shards(given()), add_bos=True)
    monkeypatch.setattr(preflight, "load_shards", lambda p: begun)
    assert preflight.inspect_routing(asked("begun")).add_bos


def test_a_dense_model_has_no_routing(monkeypatch):
    dense = replace(preflight.load_shards(given()), moe_freq=0)
    assert not dense.moe_layers
    monkeypatch.setattr(preflight, "load_shards", lambda p: dense)
    with pytest.raises(ParameterError, match="checkpoint='demo': the model is dense"):
        preflight.inspect_routing(given(**INSPECT))
    tasks = {"baseline": None, "tasks": ["demo_endings"], "task_data": None, "domains": None, "bpe": "demo"}
    with pytest.raises(ParameterError, match=r"mask=\{5: \[8\]\}: .* is dense, .*; set mask to None"):
        preflight.evaluate_tasks(given(**tasks, capacity_token_fractions=[], mask={5: [8]}))


def test_a_dictionary_of_another_size_is_said(reference, tmp_path):
    small = str(reference / "checkpoint")
    with pytest.raises(ParameterError, match="demo/data/data-bin/dict.txt has 8192 types, the model knows"):
        preflight.run_inference(given(checkpoint=small))
    with pytest.raises(ParameterError, match="of another dictionary than the model: .* line 1: '0' and '13'"):
        preflight.run_inference(given(data=str(reference / "data-bin")))
    with pytest.raises(ParameterError, match="8192 types, the model knows"):
        preflight.load_shards(given(checkpoint=small, bpe=str(DEMO_BPE)))


def test_what_prepare_data_would_trip_over(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n")

    def asked(**changes):
        values = {
            "source": str(tmp_path / "text.txt"),
            "checkpoint": "none",
            "data_dir": str(tmp_path / "data"),
        }
        rest = {"workers": 1, "keep_empty": True, "mirrors": [], "bpe": "auto", "delete_archive": False}
        return preflight.prepare_data(SimpleNamespace(**values | rest | changes))

    assert asked().bpe == "gpt2" and asked(source="demo").bpe == "demo"
    for changes, said in (
        (
            {"data_dir": str(tmp_path / "text.txt")},
            "data_dir=.*text.txt' is a file; expected a folder, or a name for a new one",
        ),
        ({"data_dir": "/proc/nowhere"}, "data_dir='/proc/nowhere': nothing can be written to"),
        ({"source": "/nowhere"}, "source='/nowhere': no text there"),
        ({"workers": 999}, "workers=999: expected at most 256"),
        ({"bpe": "demo", "checkpoint": "en_moe_lm_15b"}, "reads GPT-2's pieces"),
    ):
        with pytest.raises(ParameterError, match=said):
            asked(**changes)


def test_an_unreadable_folder_is_said(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(preflight.os, "listdir", refuse)
    monkeypatch.setattr(preflight.ckpt, "find", refuse)
    with pytest.raises(
        ParameterError, match=r"^demo cannot be read \(Permission denied\); change its permissions"
    ):
        preflight.load_shards(given())
    settings = {"source": str(tmp_path), "data_dir": str(tmp_path)}
    with pytest.raises(ParameterError, match=rf"^{tmp_path} cannot be read \(Permission denied\)"):
        preflight.prepare_data(SimpleNamespace(**settings))


def test_settings_of_the_generation_fit_each_other():
    draws = preflight.generation(given())
    assert (draws["temperature"], draws["top_p"], draws["alternatives"]) == (0.7, 0.9, 5)
    with pytest.raises(ParameterError, match="max_new_tokens=1 leaves a beam search nothing"):
        preflight.run_inference(given(beam_size=4, max_new_tokens=1))
    assert {"temperature", "top_p", "alternatives"}.isdisjoint(preflight.generation(given(beam_size=4)))


TASKS = {
    "baseline": None,
    "tasks": ["copa_release"],
    "task_data": None,
    "domains": "demo",
    "capacity_token_fractions": [0.5],
    "mask": {5: [8]},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, r"tasks=\[\]: expected at least one name"),
        ({"tasks": ["nothing.yaml"]}, "there is no task file nothing.yaml"),
        (
            {"task_data": {"fair_piqa": "x.jsonl"}},
            "data is given for 'fair_piqa', which is none of the tasks",
        ),
        ({"tasks": ["fair_piqa"], "task_data": {"fair_piqa": "/x.jsonl"}}, "there is no file /x.jsonl"),
        ({"baseline": "/nowhere"}, "/nowhere does not exist"),
        ({"domains": {"x": "/nowhere"}}, r"/nowhere (has no dict\.txt|does not exist)"),
        ({"domains": "/nowhere"}, r"/nowhere (has no dict\.txt|does not exist)"),
        ({"subset": "bogus"}, r"has no bogus\.bin"),
        ({"capacity_token_fractions": [0.0]}, "expected shares of a batch's tokens"),
        ({"mask": {0: [1]}}, "^mask: layer 0 holds no experts"),
        ({"bpe": "/nowhere"}, "text needs encoder.json"),
    ],
)
def test_what_evaluate_tasks_would_trip_over(changes, said):
    with pytest.raises(ParameterError, match=said):
        preflight.evaluate_tasks(given(**TASKS | changes))


def test_tasks_that_are_whole_pass(monkeypatch):
    assert preflight.evaluate_tasks(given(**TASKS, **{"seed": 1})).experts == 16
    own = {"baseline": "demo", "domains": {"a": "demo", "b": "demo"}, "mask": None}
    assert preflight.evaluate_tasks(given(**TASKS | own)).experts == 16
    monkeypatch.setitem(sys.modules, "moekit.tasks", None)
    monkeypatch.delitem(sys.modules, "moekit.tasks.loading", raising=False)
    with pytest.raises(ParameterError, match="moekit.tasks"):
        preflight.evaluate_tasks(given(**TASKS))
