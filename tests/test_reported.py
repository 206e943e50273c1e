"""Faults that were reported of other tools, tried on moekit: the right value of each, and of its kind (README.md)."""

import dis
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from branch_cases import BASE
from synthetic_traces import synthetic
from test_preflight import INSPECT
from test_preflight import given as inference

import moekit
from moekit import checkpoint, eval_lm, metrics, paths
from moekit.checkpoint import export, reshaping
from moekit.data.codec import Codec
from moekit.fairseq_data import data_folder, importing_fairseq, is_data
from moekit.nn.record import Options
from moekit.nn.transformer import Transformer
from moekit.notebook import preflight, routing_plots
from moekit.notebook.parameters import ParameterError
from moekit.paths import DEMO_BPE
from moekit.ranks import start
from moekit.routing import exchange
from moekit.routing.domains import domains_of
from moekit.symbols import PAD

QUIET = {"progress": False}
BLOCKS = {"tokens_per_sample": 64, **QUIET}
LOSS = 8.6039  # of the reference's data without drops, as fairseq has it


@pytest.fixture(scope="module")
def model(reference):
    """The reference checkpoint on two ranks; no dictionary lies beside it."""
    with moekit.load(reference / "checkpoint", 2, "cpu", **QUIET) as model:
        yield model


@pytest.fixture
def data(reference, tmp_path):
    return shutil.copytree(reference / "data-bin", tmp_path / "data")


def rewrite(data: Path, change) -> Path:
    """``dict.txt`` with ``change(symbol, line number)`` as its lines."""
    lines = (data / "dict.txt").read_text().splitlines()
    changed = [change(line.split()[0], number) for number, line in enumerate(lines, 1)]
    (data / "dict.txt").write_text("".join(line + "\n" for line in changed))
    return data


def preprocess(text: Path, known: Path, folder: Path, *options: str) -> None:
    """Binarise ``text`` as ``valid`` with fairseq's own tool."""
    with importing_fairseq():
        from fairseq import options as parsers
        from fairseq_cli import preprocess
    command = ["--only-source", "--workers", "1", "--srcdict", str(known), "--validpref", str(text)]
    args = parsers.get_preprocessing_parser().parse_args([*command, "--destdir", str(folder), *options])
    before = preprocess.logger.handlers[:]
    try:
        preprocess.main(args)
    finally:
        for handler in set(preprocess.logger.handlers) - set(before):
            preprocess.logger.removeHandler(handler)
            handler.close()


# ------------------------------------------------------------------------------------- an iterator is read once


def test_any_iterable_is_read_once(model):
    texts = [[5, 6], [7, 8, 9]]
    wanted = model.score(texts)
    for some in (
        iter(texts),
        (iter(ids) for ids in texts),
        map(np.array, texts),
        {"a": texts[0], "b": texts[1]}.values(),
        np.array(texts, dtype=object),
        [torch.tensor(ids) for ids in texts],
        [pd.Series(ids, index=[9] * len(ids)) for ids in texts],
        [dict.fromkeys(ids).keys() for ids in texts],
    ):
        pd.testing.assert_frame_equal(model.score(some), wanted)
    pd.testing.assert_frame_equal(model.score(iter([5, 6])), model.score([[5, 6]]))
    made = [g.ids for g in model.generate(texts, max_new_tokens=2, **QUIET)]
    assert [g.ids for g in model.generate(map(iter, texts), max_new_tokens=2, **QUIET)] == made
    assert len(list(model.stream(map(iter, texts), max_new_tokens=2))) == 4
    trace = model.trace(map(iter, texts), layers=iter([1, 3]), full=iter([3]), **QUIET)
    assert trace.layers == (1, 3) and list(trace.full) == [3] and len(trace) == 7


def test_a_change_of_the_routing_takes_any_iterable(model):
    def scores(**change):
        with model.route(**change):
            return model.score([[5, 6, 7]])["logprob"].tolist()

    wanted = scores(mask={1: [0, 1, 2], 3: [0, 1, 2]})
    assert wanted != scores()
    assert scores(mask={1: iter([0, 1, 2]), 3: {2, 1, 0}}) == wanted
    assert scores(mask=((layer, expert) for layer in (1, 3) for expert in range(3))) == wanted
    assert scores(mask=np.array([(layer, expert) for layer in (1, 3) for expert in range(3)])) == wanted
    wanted = scores(force=moekit.Force([4, 2], 0, positions=[1, 2], layers=[1]))
    assert wanted != scores()
    force = moekit.Force(iter([4, 2]), 0, positions=iter([1, 2]), layers=iter([1]))
    assert scores(force=iter([force])) == scores(force=force) == wanted
    assert scores(force=moekit.Force([4, 2], np.int64(0), positions={2, 1}, layers=np.array([1]))) == wanted
    with pytest.raises(
        ValueError, match=r"Force.experts=\{2, 4\}: .* in an order, which a set does not have"
    ):
        moekit.Force({4, 2}, 0)
    with pytest.raises(ValueError, match="Force.layers=.*: expected at least one layer"):
        scores(force=moekit.Force([4, 2], 0, layers=[]))


def test_no_layer_to_record_is_said_before_the_ranks_are_asked(model, monkeypatch):
    assert Options(iter([3, 1]), np.array([1])) == Options((3, 1), (1,))
    monkeypatch.setattr(model.ranks, "call", None)
    with pytest.raises(ValueError, match=r"layers=\[\]: expected at least one layer, or None for all"):
        model.trace([[5, 6]], layers=(), **QUIET)


def test_labels_and_selections_take_any_iterable(tmp_path):
    trace, _ = synthetic(tokens=60, layers=(1, 3), experts=8, block=20)
    labels = ["ab"[n % 2] for n in range(60)]
    for metric in (metrics.domain_specialisation, metrics.domain_information):
        pd.testing.assert_frame_equal(metric(trace, iter(labels)), metric(trace, labels))
    for metric in (metrics.hot_set, metrics.cache_hits):
        pd.testing.assert_frame_equal(metric(trace, sizes=iter([4, 2])), metric(trace, sizes=[2, 4]))
    assert routing_plots.domain_heatmap(trace, iter(labels)).axes
    assert moekit.explore(trace, domains=iter(labels)).domains.tolist() == labels
    moekit.explore(trace, domains=iter(labels)).save_html(tmp_path / "x.html", max_tokens=np.int64(40))
    assert len(trace.select(samples=iter([0, 2]), layers=iter([3]))) == 40
    assert len(trace.select(samples={0, 2}, layers=np.int64(3))) == 40


def test_a_table_in_a_message_is_one_line(model):
    with pytest.raises(ValueError, match="^texts=a 0 x: found DataFrame, expected a text") as caught:
        model.score(pd.DataFrame({"a": ["x"]}))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- dictionaries


@pytest.mark.parametrize(
    "change",
    [lambda word, n: f"{word} -{n}", lambda word, n: f"{word} 0", lambda word, n: f"{word} {n}\r"],
)
def test_a_count_may_be_anything_whole(change, model, data):
    assert model.evaluate(rewrite(data, change), **BLOCKS).loss_base2 == pytest.approx(LOSS, abs=5e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda word, n: f"w{word} 1", "line 1: 'w0' and '0'"),
        (lambda word, n: f"{ {'10': '11', '11': '10'}.get(word, word) } 1", "line 11: '11' and '10'"),
        (lambda word, n: f"{'2' if n == 4 else word} 1", "dict.txt, line 4: '2' for the second time"),
        (lambda word, n: f"{'<unk>' if n == 4 else word} 1", "line 4: '<unk>' for the second time"),
    ],
)
def test_a_dictionary_of_other_words_is_refused(change, said, reference, data, tmp_path):
    """In the first cell, too; the model's is the one beside the checkpoint."""
    folder = shutil.copytree(reference / "checkpoint", tmp_path / "checkpoint")
    shutil.copy(reference / "data-bin" / "dict.txt", folder)
    rewrite(data, change)
    with (
        moekit.load(folder, 1, "cpu", **QUIET) as model,
        pytest.raises(ValueError, match=said) as caught,
    ):
        model.evaluate(data, **BLOCKS)
    assert str(data) in str(caught.value)
    with pytest.raises(ParameterError, match=said):
        preflight.run_inference(inference(checkpoint=str(folder), data=str(data), prompts=[]))


def test_ids_beyond_their_dictionary_are_found_before_the_ranks_are_asked(model, data):
    (data / "dict.txt").write_text("".join(f"{n} 1\n" for n in range(100)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"valid.bin: id \d+ at place \d+ is outside dict.txt beside it"):
            model.evaluate(data, **BLOCKS)
    assert len(model.score([[5, 6]])) == 2


# ------------------------------------------------------------------------------------------------------ data sets


@pytest.mark.parametrize("kind", ["lazy", "cached", "mmap", "raw"])
def test_every_format_of_preprocess_is_read(kind, model, reference, tmp_path):
    text, known = reference / "raw" / "valid.bpe", reference / "data-bin" / "dict.txt"
    preprocess(text, known, tmp_path, "--dataset-impl", kind)
    if kind == "raw":
        with pytest.raises(ValueError, match="but valid.None-None, .* rename it to valid, the name that"):
            model.evaluate(tmp_path, **BLOCKS)
        (tmp_path / "valid.None-None").rename(tmp_path / "valid")
    assert model.evaluate(tmp_path, **BLOCKS).loss_base2 == pytest.approx(LOSS, abs=5e-5)
    opened = model.open_data(tmp_path, tokens_per_sample=64)
    *_, last = opened
    found = opened.read([1, *last.ids, 1_000_000])
    assert [*found] == [1, *last.ids] and len(found[1]) == 64
    for ids, row in zip(last.ids, last.tokens, strict=True):
        assert found[ids].tolist() == row[: len(found[ids])].tolist() and set(row[len(found[ids]) :]) <= {PAD}


def test_of_several_folders_the_first_counts(model, reference, tmp_path):
    several = f"{(reference / 'data-bin').resolve()}:/nowhere"
    assert model.evaluate(several, **BLOCKS).loss_base2 == pytest.approx(LOSS, abs=5e-5)
    trace = model.trace(several, tokens_per_sample=64, max_tokens=64, **QUIET)
    (tmp_path / "domains").write_text("one\n" * 60)
    assert set(domains_of(trace, several, domains=tmp_path / "domains")) == {"one"}
    with pytest.raises(ValueError, match="/nowhere has no dict.txt, it does not exist"):
        model.evaluate(f"/nowhere:{reference / 'data-bin'}", **BLOCKS)


def test_numpys_numbers_are_numbers(model, reference):
    wanted = model.evaluate(reference / "data-bin", batch_size=2, max_batches=3, **BLOCKS)
    how = {"batch_size": np.int64(2), "max_batches": np.array(3), "seed": torch.tensor(1)}
    found = model.evaluate(reference / "data-bin", tokens_per_sample=np.uint8(64), **how, **QUIET)
    assert found.loss_base2 == wanted.loss_base2
    settings = {"max_new_tokens": np.int32(2), "temperature": np.float32(0.5), "top_k": np.int64(3)}
    assert model.generate([5, 6], **settings, seed=np.int64(2), **QUIET)[0].ids == (
        model.generate([5, 6], max_new_tokens=2, temperature=0.5, top_k=3, seed=2, **QUIET)[0].ids
    )


def test_blank_lines_give_no_warning(model, data):
    text = data / "blank.txt"
    text.write_text("5 6\n\n7 8\n\n\n9\n")
    preprocess(text, data / "dict.txt", data / "blank")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for mode in ("none", "eos", "complete", "complete_doc"):
            assert np.isfinite(model.evaluate(data / "blank", sample_break_mode=mode, **BLOCKS).loss_base2)


# ---------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("address", ["file:///models/moe", "https://host/model.pt", "s3://bucket/model"])
def test_an_address_is_no_path(address):
    for call in (
        lambda: moekit.load(address),
        lambda: moekit.load("demo", bpe=address),
        lambda: moekit.load("demo", dictionary=address),
        lambda: preflight.load_shards(inference(checkpoint=address)),
        lambda: eval_lm.parse(["data", "--path", address, "--is-moe"]),
    ):
        with pytest.raises(ValueError, match="an address") as caught:
            call()
        assert address in str(caught.value)


def test_every_path_takes_the_home_folder(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(reference / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(reference / "data-bin", tmp_path / "data")
    with moekit.load("~/checkpoint", 1, "cpu", dictionary="~/data", **QUIET) as model:
        result = model.evaluate("~/data", trace=True, **BLOCKS)
        traced = model.trace("~/data", tokens_per_sample=64, **QUIET)
    assert result.loss_base2 == pytest.approx(LOSS, abs=5e-5)
    traced.save("~/t.parquet")
    assert len(moekit.Trace.load("~/t.parquet")) == len(traced)
    exchange.write(traced, "~/t.npz", "vllm")
    assert np.array_equal(exchange.read("~/t.npz", "vllm", layers=traced.layers).experts, traced.experts)
    moekit.explore(traced).save_html("~/t.html", max_tokens=100)
    assert {"t.parquet", "t.npz", "t.html"} <= {path.name for path in tmp_path.iterdir()}
    for call in (
        lambda: moekit.load("demo", bpe="~/nowhere"),
        lambda: moekit.load("demo", dictionary="~/nowhere"),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path}/nowhere"):
            call()


def test_the_demos_names_stand_for_its_files(reference):
    with moekit.load("demo", 1, "cpu", bpe="demo", dictionary="demo", **QUIET) as model:
        assert model.reads_text and model.vocab == 8192
    for given in ({"bpe": "demo"}, {"dictionary": "demo"}):
        with pytest.raises(ValueError, match="8192 types"):
            moekit.load(reference / "checkpoint", **given)


def test_a_folder_may_be_called_like_the_demo(reference, tmp_path, monkeypatch):
    """A text is the name, and a ``Path`` the folder, for each kind of file."""
    monkeypatch.chdir(tmp_path)
    demo = Path("demo")
    shutil.copytree(reference / "checkpoint", demo)
    shutil.copytree(reference / "data-bin", demo, dirs_exist_ok=True)
    assert checkpoint.find(demo).shared.parent == demo and data_folder(demo) == demo
    for name, folder in (("demo", paths.DEMO_MODEL), ("demo-dense", paths.DEMO_DENSE)):
        assert checkpoint.find(name).shared.parent == folder
        assert data_folder(name) == paths.DEMO_DATA and is_data(name)
        assert len(Codec.load(name)) == 8192
    # The path of the current folder is ".", and nothing is an empty text.
    assert is_data(".") and not is_data("")
    # A name on a file system has up to 255 bytes, a path up to 4,095.
    sentence = "It is a truth universally acknowledged. "
    for text in (sentence * 7, sentence * 200, "é" * 130, "~" + "a" * 300, "~\ud800"):
        assert not is_data(text)
    with moekit.load(demo, 1, "cpu", dictionary=demo, **QUIET) as model:
        assert model.vocab == 200
        assert len(model.trace(demo, tokens_per_sample=64, max_tokens=100, **QUIET))
        with pytest.raises(ValueError, match="text needs encoder.json.*, expected in demo:"):
            moekit.load(demo, 1, "cpu", bpe=demo, **QUIET)
    with pytest.raises(ValueError, match=r"demo/encoder\.json"):
        Codec.load(demo)


UNREADABLE = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace
    import moekit
    from moekit.notebook import preflight
    from moekit.routing import exchange
    from moekit.routing.domains import domains_of

    at = Path(sys.argv[1])
    p = {"bpe": None, "experts": None, "world_size": 1, "device": "cpu", "output_dir": str(at / "out")}
    p |= {"ranks": "local", "resident": None, "gpu_memory": None}
    prepared = {"checkpoint": "none", "workers": 1, "keep_empty": True, "mirrors": [], "bpe": "auto"}
    prepared |= {"delete_archive": False, "data_dir": str(at / "out")}
    checked = p | {"checkpoint": str(at / "checkpoint")}
    model = moekit.load(at / "checkpoint", 1, "cpu", progress=False)
    trace = model.trace([[5, 6]], progress=False)
    tried = {
        "shard/model-rank-2.pt": [
            lambda: moekit.load(at / "shard", 1, "cpu", progress=False),
            lambda: preflight.load_shards(SimpleNamespace(**p, checkpoint=str(at / "shard"))),
        ],
        "closed": [
            lambda: moekit.load(at / "closed"),
            lambda: moekit.load(at / "closed" / "model.pt"),
            lambda: moekit.load(at / "checkpoint", dictionary=at / "closed"),
            lambda: moekit.load(at / "checkpoint", bpe=at / "closed"),
            lambda: model.evaluate(at / "closed"),
            lambda: model.trace(str(at / "closed")),
            lambda: moekit.Trace.load(at / "closed" / "t.parquet"),
            lambda: exchange.read(at / "closed", "megatron"),
            lambda: exchange.read(at / "closed" / "x", "olmoe"),
            lambda: preflight.prepare_data(SimpleNamespace(**prepared, source=str(at / "closed"))),
            lambda: preflight.prepare_data(SimpleNamespace(**prepared, source=str(at / "closed" / "x"))),
            lambda: preflight.load_shards(SimpleNamespace(**p, checkpoint=str(at / "closed"))),
            lambda: model.trace(str(at / "closed" / "x")),
            lambda: model.evaluate(at / "closed" / "x"),
            lambda: domains_of(trace, "demo", "valid", at / "closed" / "x"),
            lambda: trace.save(at / "closed" / "t.parquet"),
            lambda: trace.save(at / "closed" / "x" / "t.parquet"),
            lambda: exchange.write(trace, at / "closed" / "x" / "t", "vllm"),
            lambda: preflight.load_shards(SimpleNamespace(**checked | {"output_dir": str(at / "closed")})),
            lambda: preflight.load_shards(SimpleNamespace(**checked | {"output_dir": str(at / "closed" / "x")})),
        ],
        "data/valid.bin": [lambda: model.evaluate(at / "data")],
        "text.txt": [
            lambda: moekit.Trace.load(at / "text.txt"),
            lambda: moekit.load(at / "checkpoint", dictionary=at / "text.txt"),
            lambda: exchange.read(at / "text.txt", "sglang"),
            lambda: preflight.prepare_data(SimpleNamespace(**prepared, source=str(at / "text.txt"))),
            lambda: domains_of(trace, "demo", "valid", at / "text.txt"),
        ],
    }
    for name, calls in tried.items():
        for number, call in enumerate(calls):
            try:
                call()
                said = "nothing"
            except ValueError as error:
                said = str(error)
            assert str(at / name) in said and "Permission denied" in said and "\\n" not in said, (name, number, said)
    model.close()
    print("all said")
"""


@pytest.mark.skipif(
    not shutil.which("setpriv"), reason="root reads everything unless setpriv takes that away"
)
def test_what_may_not_be_read_is_named(reference, tmp_path):
    """In a process without root's right to read everything."""
    for name in ("checkpoint", "shard"):
        shutil.copytree(reference / "checkpoint", tmp_path / name)
    shutil.copytree(reference / "data-bin", tmp_path / "data")
    (tmp_path / "text.txt").write_text("some text\n")
    (tmp_path / "closed").mkdir()
    shut = [tmp_path / name for name in ("shard/model-rank-2.pt", "data/valid.bin", "text.txt", "closed")]
    for path in shut:
        path.chmod(0)
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-c"]
    try:
        done = subprocess.run(
            [*command, textwrap.dedent(UNREADABLE), tmp_path], capture_output=True, text=True, timeout=120
        )
    finally:
        for path in shut:
            path.chmod(0o700)
    assert done.stdout.endswith("all said\n"), done.stderr


# ------------------------------------------------------------------------------------- said in the first cell


def test_prompts_without_a_codec_are_an_error(reference):
    """A text that was asked for and cannot be written; without prompts there is nothing to write."""
    small = {"checkpoint": str(reference / "checkpoint"), "data": str(reference / "data-bin")}
    small["max_new_tokens"] = 5
    assert preflight.run_inference(inference(**small, prompts=[])).experts == 8
    with pytest.raises(ParameterError, match=r"prompts=\['a'\]: text needs .*; or set prompts to \[\]$"):
        preflight.run_inference(inference(**small, prompts=["a"]))
    with pytest.raises(ParameterError, match=r"texts|text needs encoder.json"):
        preflight.inspect_routing(inference(**INSPECT | small | {"texts": ["a"]}))
    with pytest.raises(ParameterError, match="8192 types, the model knows 200"):
        preflight.inspect_routing(inference(**INSPECT | small | {"bpe": str(DEMO_BPE)}))


def test_a_dense_model_is_said_in_the_first_cell(reference, tmp_path):
    export.save(Transformer(replace(BASE, moe_freq=0)), tmp_path)
    dense = {"checkpoint": str(tmp_path), "data": str(reference / "data-bin"), "prompts": []}
    dense["max_new_tokens"] = 5
    assert preflight.run_inference(inference(**dense)).moe_layers == []
    with pytest.raises(ParameterError, match="the model is dense, it has no layer with experts"):
        preflight.inspect_routing(inference(**INSPECT | dense))
    assert preflight.load_shards(inference(**dense)).experts == 0


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    p = {"source": "demo", "checkpoint": "none", "workers": 1, "keep_empty": True, "mirrors": []}
    p |= {"bpe": "auto", "delete_archive": False}
    for place in ("file", "file/below"):
        with pytest.raises(ParameterError, match=f"data_dir='{tmp_path}/{place}'"):
            preflight.prepare_data(SimpleNamespace(**p, data_dir=str(tmp_path / place)))
    with pytest.raises(ParameterError, match=r"output_dir=.*file' is a file; expected a folder"):
        preflight.load_shards(inference(output_dir=str(tmp_path / "file")))


# --------------------------------------------------------------------------------------------- exchange, eval_lm


def test_sglang_passes_that_tell_of_no_request(tmp_path):
    """A pass that verifies drafts (mode 5) has several tokens a request; positions may go on by chance."""
    ids = torch.tensor([[[0, 1], [2, 3], [4, 5]]], dtype=torch.int32)
    record = {
        "input_ids": [7, 8, 9],
        "positions": [4, 5, 6],
        "extend_seq_lens": None,
        "topk_ids_of_layer": ids,
    }
    for mode, samples in ((1, [0, 0, 0]), (2, [0, 1, 2]), (5, [0, 1, 2])):
        torch.save({"records": [record | {"forward_mode": mode}]}, tmp_path / "x.pt")
        assert exchange.read(tmp_path / "x.pt", "sglang").sample.tolist() == samples


def test_megatron_reads_the_files_of_a_folder_that_are_its_own(tmp_path):
    line = {"step": 0, "rank": 0, "layer": 1, "num_tokens": 1, "topk": 2, "top_indices": [[3, 1]]}
    (tmp_path / "router_trace_rank0.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "hidden_states_rank0.bin").write_bytes(b"\0\1")
    (tmp_path / "router_state_rank0.pt").write_bytes(b"\0")
    assert exchange.read(tmp_path, "megatron").experts.tolist() == [[[3, 1]]]


@pytest.mark.parametrize(
    "options",
    [
        ["--bpe", "gpt2", "--gpt2-encoder-json", "x", "--gpt2-vocab-bpe", "y"],
        ["--bpe", "sentencepiece", "--sentencepiece-model", "x"],
        ["--tokenizer", "moses", "--source-lang", "en"],
    ],
)
def test_options_of_a_codec_have_no_effect(options):
    args = eval_lm.parse(["data", "--path", "model.pt", "--is-moe", *options])
    assert args.path == "model.pt" and args.data == "data"


def test_what_looks_like_a_list_or_a_function_is_refused_before_the_ranks_are_asked():
    """A memoryview has `tolist`, a sparse tensor has one that fails, and a falsy config is no dict."""
    with moekit.load("demo", 1, "cpu", progress=False) as model:
        before = model.score("abc")["logprob"]
        for given in (memoryview(b"ab"), torch.tensor([[1, 0]]).to_sparse()):
            for call in (model.score, model.trace, model.generate):
                with pytest.raises(ValueError, match="expected a text, texts, ids or lists of ids"):
                    call(given)
        with pytest.raises(ValueError, match="mask"), model.route(mask={5: memoryview(b"\1")}):
            pass
        for record in (3, "x", True):
            with pytest.raises(ValueError, match=r"record=.* expected a function"):
                model.generate(["hi"], record=record, max_new_tokens=1)
            with pytest.raises(ValueError, match=r"record=.* expected a function"):
                list(model.stream(["hi"], record=record, max_new_tokens=1))
        with pytest.raises(ValueError, match="there is no folder ~nouser/x"):
            model.trace("~nouser/x")
        for subset in ("/", ".", "/etc/passwd", "a\0b", "x" * 5000):
            with pytest.raises(ValueError, match="^subset=.{1,90}: expected the name of a subset"):
                model.evaluate("demo", subset=subset)
        np.testing.assert_array_equal(model.score("abc")["logprob"], before)
    for config in (0, False, "", []):
        with pytest.raises(ValueError, match="expected a dict of some of"):
            moekit.load("demo", 1, "cpu", progress=False, config=config)


def test_defaults_of_the_notebook_change_nothing(tmp_path):
    """``torch.set_default_device("cuda")`` and ``torch.set_default_dtype(torch.bfloat16)`` at its top, autocast or inference mode around calls.

    "meta" stands for the GPU. With the second one, the scores of beams were rounded; with the third one, all of scoring was.
    """
    reshaping.convert("demo", tmp_path / "made", "safetensors", show=False)
    quiet = {"progress": False}

    def results(source, **how):
        with moekit.load(source, 1, "cpu", bpe="demo", **how, **quiet) as model:
            generations = model.generate(["On the", ""], max_new_tokens=3, temperature=0.5, **quiet)
            generations += model.generate("On the", max_new_tokens=3, beam_size=2, **quiet)
            trace = model.trace(["def main():"], **quiet)
            scores = model.evaluate("demo", max_batches=1, **quiet).tokens["logprob"]
            return (
                [(one.ids, one.score) for one in generations],
                trace.experts.tolist(),
                scores.tolist(),
            )

    for source, how in (("demo", {}), ("demo", {"resident": 2}), (tmp_path / "made", {})):
        wanted = results(source, **how)
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.bfloat16)
        # Products on this CPU are rounded where it has instructions for it.
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
                assert results(source, **how) == wanted
                assert torch.is_autocast_enabled("cpu")
            assert torch.get_default_dtype() == torch.bfloat16 and torch.empty(1).is_meta
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")


def older_names() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def newer_names() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def all_backends() -> None:
    torch.backends.fp32_precision = "tf32"


def precisions(rank=None) -> list[str]:
    """What torch tells of float32, by both of its names; "?" where it refuses."""
    b = torch.backends
    found = [one.fp32_precision for one in (b.cuda.matmul, b.mkldnn.matmul, b.cudnn.conv, b.cudnn.rnn)]
    for told in (
        torch.get_float32_matmul_precision,
        lambda: b.cuda.matmul.allow_tf32,
        lambda: b.cudnn.allow_tf32,
    ):
        try:
            found.append(str(told()))
        except RuntimeError:
            found.append("?")
    return found


def test_the_precision_that_a_notebook_chose_reaches_no_single_rank():
    """In new processes, since torch does not take back all that was chosen."""
    choices = [older_names, newer_names, all_backends, lambda: None]

    def chosen(rank):
        new = precisions()
        choices[rank.rank]()
        own = precisions()
        with start(1, "cpu") as pool:
            inside = pool.call(precisions)[0]
            with pytest.raises(moekit.RankError):
                pool.call(lambda rank: 1 / 0)
        return new, own, inside, precisions()

    with start(len(choices), "cpu") as fresh:
        found = fresh.call(chosen)
    for number, (new, own, inside, after) in enumerate(found):
        # Torch tells "none" where nothing was chosen.
        assert ["none" if one == "ieee" else one for one in inside] == new
        assert after == own and (own == new) == (number == 3)


def settings() -> tuple:
    return (
        torch.empty(1).device,
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        signal.getsignal(signal.SIGINT),
    )


# The operations after which the interpreter looks for interrupts.
LOOKS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD", "RESUME"}


def interrupted_call(pool, at: int) -> tuple[int, BaseException | None]:
    """A call that is interrupted at the moment ``at``: the moments that were seen, and what was raised."""
    seen, last = 0, {}

    def step(frame, event, _):
        nonlocal seen
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += last.get(frame) in LOOKS
            last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if seen == at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return step

    sys.settrace(step)
    try:
        pool.call(lambda rank: rank.state.get("x"))
    except KeyboardInterrupt as error:
        return seen, error
    finally:
        sys.settrace(None)
    return seen, None


def test_an_interrupt_at_any_moment_of_a_call_leaves_what_the_notebook_chose():
    """The errors are kept, as a notebook keeps its last one."""
    pool, raised = start(1, "cpu"), []
    before, tracing = signal.signal(signal.SIGINT, signal.default_int_handler), sys.gettrace()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            chosen, (moments, _) = settings(), interrupted_call(pool, -1)
            assert moments > 200
            for at in range(1, moments):
                raised.append(interrupted_call(pool, at)[1])
                assert settings() == chosen, f"at moment {at} of {moments}"
        assert None not in raised and pool.call(lambda rank: 5) == [5]
    finally:
        sys.settrace(tracing)
        signal.signal(signal.SIGINT, before)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


def test_two_models_in_two_threads_leave_a_notebooks_own_type_as_it_is():
    """The first call ends while the second one runs."""
    begun, second_runs = threading.Event(), threading.Event()
    pools = [start(1, "cpu"), start(1, "cpu")]

    def first(rank):
        begun.set()
        second_runs.wait(20)
        return torch.get_default_dtype()

    def second(rank):
        second_runs.set()
        other.join(20)
        return torch.get_default_dtype()

    torch.set_default_dtype(torch.float64)
    try:
        other = threading.Thread(target=pools[0].call, args=(first,))
        other.start()
        assert begun.wait(20)
        assert pools[1].call(second) == [torch.float32]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
