"""The whole way, from a loopback server or own text to binarised data and a verified checkpoint."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from branch_cases import BASE
from data_server import Page, Server

import moekit
from moekit.checkpoint import export
from moekit.data import Binarised, DownloadError, prepare, preparing, settings, sources
from moekit.data.lock import locked
from moekit.nn.transformer import Transformer
from moekit.notebook import data_plots as plots
from moekit.paths import DEMO_BPE as DEMO

BPE = {f"/gpt2_bpe/{name}": DEMO / name for name in ("encoder.json", "vocab.bpe", "dict.txt")}


@pytest.fixture(autouse=True)
def only_the_loopback_server(monkeypatch):
    """No built-in address, and room for archives as small as the tests' ones."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    offline = {"urls": (), "unpacked": 10_000_000}
    monkeypatch.setattr(sources, "GPT2_BPE", tuple(replace(s, urls=()) for s in sources.GPT2_BPE))
    monkeypatch.setattr(sources, "WIKITEXT_103", replace(sources.WIKITEXT_103, **offline))
    checkpoints = {name: replace(remote, **offline) for name, remote in sources.CHECKPOINTS.items()}
    monkeypatch.setattr(sources, "CHECKPOINTS", checkpoints)


def run(folder: Path, **parameters) -> tuple[preparing.Prepared, list[str]]:
    said: list[str] = []
    asked = settings(**{"data_dir": str(folder / "data"), "workers": 1, **parameters})
    return prepare(asked, said.append), said


def wikitext() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for subset in ("train", "valid", "test"):
            file.writestr(
                f"wikitext-103-raw/wiki.{subset}.raw", f" \n = {subset} = \n \n Text , of the {subset} . \n"
            )
    return archive.getvalue()


def checkpoint(reference: Path, leave_out: str = "") -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        for path in sorted((reference / "checkpoint").iterdir()):
            if path.name != leave_out:
                file.add(path, f"en_moe_lm_15b/{path.name}")
    return archive.getvalue()


def pages(**more: Page) -> dict[str, Page]:
    return {**{path: Page(file.read_bytes()) for path, file in BPE.items()}, **more}


def untouched(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".moekit.lock"
    }


def no_halves(folder: Path) -> None:
    assert not [p for p in folder.rglob("*") if ".part" in p.name]


# ------------------------------------------------------------------------------------------------ the demo


def test_the_demo_without_the_web_and_again(tmp_path):
    first, said = run(tmp_path)
    steps = [f"{step} {subset}" for subset in ("valid", "test") for step in ("encode", "binarise")]
    assert [step for step in first.done if not step.startswith("copy")] == steps
    # Made by fairseq-preprocess.
    theirs = DEMO.parent / "data" / "data-bin"
    for name in ("valid.bin", "valid.idx", "test.bin", "test.idx", "dict.txt"):
        assert (first.data_bin / name).read_bytes() == (theirs / name).read_bytes(), name
    domains = (first.data_bin / "valid.domains.txt").read_text().splitlines()
    assert len(domains) == first.summaries["valid"].lines
    no_halves(tmp_path)
    before, started = untouched(tmp_path), time.monotonic()
    second, said = run(tmp_path)
    assert second.done == [] and said[-1].startswith("Nothing to do") and time.monotonic() - started < 1
    assert untouched(tmp_path) == before
    assert second.summaries == first.summaries


def test_fairseq_reads_it(tmp_path):
    from fairseq.data import data_utils

    from moekit.data import Codec

    prepared, _ = run(tmp_path)
    dataset = data_utils.load_indexed_dataset(str(prepared.data_bin / "valid"), dataset_impl="mmap")
    lines = prepared.texts["valid"][0].read_text(encoding="utf-8").split("\n")
    assert len(dataset) == prepared.summaries["valid"].lines
    assert Codec.load("demo").decode(dataset[7]) == lines[7].strip() + "\n"


# ------------------------------------------------------------------------------------------------ own text


def test_own_text_by_folder_glob_and_file(tmp_path):
    texts = tmp_path / "My texts"
    for name, text in {
        "a.txt": "one\n",
        "b.test.txt": "two\n",
        "sub/train.md": "three",
        "c.py": "four",
    }.items():
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / name).write_text(text)
    prepared, _ = run(tmp_path, source=str(texts), bpe="demo")
    assert prepared.data_bin == (tmp_path / "data" / "own-My-texts" / "data-bin").resolve()
    got = {s: prepared.codec.decode(prepared.binarised(s).ids) for s in prepared.summaries}
    assert got == {"train": "three\n", "valid": "one\n", "test": "two\n"}
    # What was made of it goes too.
    (texts / "sub/train.md").unlink()
    prepared, _ = run(tmp_path, source=str(texts), bpe="demo")
    assert sorted(prepared.summaries) == ["test", "valid"] and not list(prepared.data_bin.glob("train*"))
    prepared, _ = run(tmp_path, source=str(texts / "**" / "*.py"), bpe="demo", data_dir=str(tmp_path / "two"))
    assert prepared.codec.decode(prepared.binarised("valid").ids) == "four\n"
    prepared, _ = run(tmp_path, source=str(texts / "a.txt"), bpe="demo", data_dir=str(texts))
    prepared, _ = run(tmp_path, source=str(texts), bpe="demo", data_dir=str(texts / "prepared"))
    assert prepared.texts["valid"] == [texts / "a.txt"]


def test_changed_text_and_options_are_prepared_anew_and_nothing_else(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one\n\ntwo\n")
    first, _ = run(tmp_path, source=str(text), bpe="demo")
    assert first.summaries["valid"].lines == 3
    second, said = run(tmp_path, source=str(text), bpe="demo", keep_empty=False)
    assert second.summaries["valid"].lines == 2 and any("1 empty ones dropped" in line for line in said)
    text.write_text("one\n")
    third, _ = run(tmp_path, source=str(text), bpe="demo", keep_empty=False)
    assert third.done == ["encode valid", "binarise valid"] and third.summaries["valid"].lines == 1
    # Damaged meanwhile.
    (third.data_bin / "valid.bin").write_bytes(b"")
    (third.data_bin / "dict.txt").unlink()
    fourth, _ = run(tmp_path, source=str(text), bpe="demo", keep_empty=False)
    assert (
        fourth.done == ["copy dict.txt", "binarise valid"]
        and len(Binarised(fourth.data_bin / "valid").ids) == 2
    )


def test_two_sources_of_the_same_name_do_not_mix(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    run(tmp_path, source=str(tmp_path / "a" / "x.txt"), bpe="demo")
    with pytest.raises(ValueError, match=r"holds what was made of .*/a/x.txt; choose another data_dir"):
        run(tmp_path, source=str(tmp_path / "b" / "x.txt"), bpe="demo")


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_text_without_text(tmp_path, content):
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(ValueError, match="there is no line of text in"):
        run(tmp_path, source=str(tmp_path / "x.txt"), bpe="demo", keep_empty=False)
    with pytest.raises(ValueError, match="no text there; expected 'demo', 'wikitext-103' or own text"):
        run(tmp_path, source=str(tmp_path / "nothing*"), bpe="demo")


def test_text_that_is_not_there_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "download", lambda *a, **k: pytest.fail("went to the web first"))
    with pytest.raises(ValueError, match="no text there"):
        run(tmp_path, source=str(tmp_path / "nothing.txt"), bpe="gpt2")


# ------------------------------------------------------------------------------------------------- the web


def test_wikitext_from_a_mirror_and_again_without_it(tmp_path):
    with Server(pages(**{"/wikitext-103-raw-v1.zip": Page(wikitext())})) as server:
        first, said = run(tmp_path, source="wikitext-103", mirrors=[server.url("/")])
    assert any("its hash is recorded for later downloads" in line for line in said)
    assert first.codec.decode(first.binarised("train").ids) == "\n= train =\n\nText , of the train .\n"
    assert list(first.summaries) == ["train", "valid", "test"]
    second, said = run(tmp_path, source="wikitext-103", mirrors=["http://127.0.0.1:9/gone"])
    assert second.done == [] and said[-1].startswith("Nothing to do")
    no_halves(tmp_path)


def test_a_dense_checkpoint_is_fetched_and_verified(tmp_path, reference):
    """An archive of one file and the dictionary, as those of the release."""
    model = Transformer(replace(BASE, moe_freq=0, experts=0)).requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    export.save(model, tmp_path / "en_dense_lm_1_3b")
    shutil.copy(reference / "data-bin" / "dict.txt", tmp_path / "en_dense_lm_1_3b")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        file.add(tmp_path / "en_dense_lm_1_3b", "en_dense_lm_1_3b")
    with Server(pages(**{"/models/lm/en_dense_lm_1_3b.tar.gz": Page(archive.getvalue())})) as server:
        found, _ = run(tmp_path, checkpoint="en_dense_lm_1_3b", mirrors=[server.url("")])
    assert found.files_table()["file"].tolist() == ["model.pt"]
    with moekit.load(found.checkpoint, 1, "cpu", progress=False) as model:
        assert model.config.moe_layers == [] and len(model.dictionary) == 200


def test_a_checkpoint_is_fetched_unpacked_and_verified(tmp_path, reference):
    archive = Page(checkpoint(reference), drops=3, drop_after=30_000)
    with Server(pages(**{"/models/lm/en_moe_lm_15b.tar.gz": archive})) as server:
        first, _ = run(tmp_path, checkpoint="en_moe_lm_15b", mirrors=[server.url("")])
    table = first.files_table()
    assert table["file"].tolist() == ["model-shared.pt", *(f"model-rank-{i}.pt" for i in range(4))]
    assert table["experts"].tolist() == [0, 2, 2, 2, 2] and set(table["dtype"]) == {"float16"}
    assert archive.sent == len(archive.body)
    assert (tmp_path / "data/downloads/en_moe_lm_15b.tar.gz").exists()
    before, started = untouched(tmp_path), time.monotonic()
    second, _ = run(tmp_path, checkpoint="en_moe_lm_15b")
    assert second.done == [] and second.files == first.files and time.monotonic() - started < 1
    assert untouched(tmp_path) == before
    third, _ = run(tmp_path, checkpoint="en_moe_lm_15b", delete_archive=True)
    [left] = (tmp_path / "data/downloads").iterdir()
    assert third.done == [] and left.name == "en_moe_lm_15b.tar.gz.json"
    fourth, _ = run(tmp_path, checkpoint="en_moe_lm_15b")
    assert fourth.done == []
    shutil.rmtree(first.checkpoint)
    other = Page(checkpoint(reference, leave_out="model-rank-3.pt"))
    with (
        Server(pages(**{"/models/lm/en_moe_lm_15b.tar.gz": other})) as server,
        pytest.raises(DownloadError, match=f"as of the first download; remove {left} to accept another file"),
    ):
        run(tmp_path, checkpoint="en_moe_lm_15b", mirrors=[server.url("")])


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_archive_sends_us_to_the_next_mirror(tmp_path, reference, damage):
    good = checkpoint(reference)
    middle = len(good) // 2
    bad = good[:middle] if damage == "cut" else good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    name = "/models/lm/en_moe_lm_15b.tar.gz"
    with Server({**pages(), f"/a{name}": Page(bad), f"/b{name}": Page(good)}) as server:
        mirrors = [server.url("/a"), server.url("")]
        with pytest.raises(DownloadError, match=r"404 Not Found; .*/a/models.*is cut short or damaged"):
            run(tmp_path, checkpoint="en_moe_lm_15b", mirrors=mirrors)
        left = [p for name in ("downloads", "checkpoints") for p in (tmp_path / "data" / name).iterdir()]
        assert left == []
        prepared, said = run(tmp_path, checkpoint="en_moe_lm_15b", mirrors=[*mirrors, server.url("/b")])
    assert len(prepared.files) == 5 and any("asking the next mirror" in line for line in said)
    no_halves(tmp_path)


def test_a_checkpoint_with_a_file_missing_is_not_verified(tmp_path, reference):
    name = "/models/lm/en_moe_lm_15b.tar.gz"
    for missing, match in (("model-rank-3.pt", "expert"), ("model-rank-1.pt", "lacks model-rank-1.pt")):
        page = Page(checkpoint(reference, leave_out=missing))
        folder = tmp_path / missing
        with Server(pages(**{name: page})) as server, pytest.raises(ValueError, match=match):
            run(folder, checkpoint="en_moe_lm_15b", mirrors=[server.url("")])


def test_every_interruption_is_made_good_by_the_next_run(tmp_path, reference, monkeypatch):
    """Stop at each file that is renamed or begun, one after the other, as an interrupt would; then finish."""
    everything = pages(
        **{
            "/models/lm/en_moe_lm_15b.tar.gz": Page(checkpoint(reference)),
            "/wikitext-103-raw-v1.zip": Page(wikitext()),
        }
    )
    rename, stops = Path.replace, 0

    def stopping(left: list[int]):
        def stop(self, target):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return rename(self, target)

        return stop

    with Server(everything) as server:
        while True:
            left = [2 + stops % 5]
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", stopping(left))
                try:
                    mirrors = [server.url("")]
                    run(tmp_path, source="wikitext-103", checkpoint="en_moe_lm_15b", mirrors=mirrors)
                    break
                except KeyboardInterrupt:
                    stops += 1
            assert stops < 100
    assert stops >= 12
    whole, _ = run(tmp_path, source="wikitext-103", checkpoint="en_moe_lm_15b")
    assert whole.done == [] and len(whole.files) == 5
    no_halves(tmp_path)
    with Server(everything) as server:
        other, _ = run(
            tmp_path / "at once", source="wikitext-103", checkpoint="en_moe_lm_15b", mirrors=[server.url("")]
        )
    for path in (p for p in other.data_bin.iterdir() if p.suffix in (".bin", ".idx", ".txt")):
        assert path.read_bytes() == (whole.data_bin / path.name).read_bytes()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("here")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/moekit")):
        with pytest.raises(ValueError, match="data_dir='.*' cannot be written to"):
            with locked(folder):
                pass


def test_an_answer_that_is_not_the_file(tmp_path):
    login = {path: Page(b"<html>Please log in</html>") for path in BPE}
    with (
        Server(login) as server,
        pytest.raises(DownloadError, match=r"encoder\.json could not be downloaded"),
    ):
        run(tmp_path, bpe="gpt2", mirrors=[server.url("")])
    assert not list((tmp_path / "data/gpt2_bpe").iterdir())


# ------------------------------------------------------------------------------------------------- the lock


def test_only_one_at_a_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from moekit.data.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "data"], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"is being prepared by process {child.pid} on .*; wait for it"):
            run(tmp_path)
        assert not (tmp_path / "data" / "demo").exists()
    finally:
        child.kill()
        child.wait(10)
    # Killed: the folder is free again.
    run(tmp_path)
    with locked(tmp_path / "data"), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        run(tmp_path)


# ----------------------------------------------------------------------------------------------- parameters


def test_settings():
    got = settings(workers=2, mirrors=["http://a, https://b/c"])
    assert (got.workers, got.keep_empty, got.mirrors) == (2, True, ("http://a", "https://b/c"))
    assert settings(mirrors="http://a").mirrors == ("http://a",)
    assert settings().workers == len(os.sched_getaffinity(0))
    assert settings().bpe == "demo" and settings(source=Path("x")).bpe == "gpt2"
    assert settings(checkpoint="en_moe_lm_52b").bpe == "gpt2"
    assert settings(data_dir="~/x").data_dir == Path.home() / "x"


@pytest.mark.parametrize(
    "given, match",
    [
        ({"source": " "}, "source is empty"),
        ({"data_dir": ""}, "data_dir is empty"),
        ({"workers": 1000}, "workers=1000: expected at most 256"),
        ({"workers": -1}, "workers=-1: expected a whole number of at least 0"),
        ({"checkpoint": "en_moe_lm_1b"}, "checkpoint='en_moe_lm_1b': expected one of none, en_moe_lm_15b"),
        ({"bpe": "gpt3"}, "bpe='gpt3': expected one of auto, gpt2, demo"),
        ({"mirrors": ["ftp://x"]}, "'ftp://x' does not begin with http"),
        ({"bpe": "demo", "checkpoint": "en_moe_lm_15b"}, "reads GPT-2's pieces"),
    ],
    ids=str,
)
def test_settings_that_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        settings(**given)


# -------------------------------------------------------------------------------------------------- pictures


def test_document_lengths():
    # Two lines, two empty ones, a line, an empty one, a line.
    sizes = np.array([3, 4, 1, 1, 5, 1, 2], "<i4")
    assert plots.document_lengths(sizes).tolist() == [7, 5, 2]
    assert plots.document_lengths(np.array([1, 3, 1], "<i4")).tolist() == [3]
    assert plots.document_lengths(np.array([3, 4], "<i4")).tolist() == [3, 4]


def test_counts_tables_and_the_picture(tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("a $x$ a 中\n" * 10)
    prepared, _ = run(tmp_path, source=str(text), bpe="demo")
    counts = plots.type_counts(prepared.binarised("valid"), len(prepared.codec))
    assert counts[2] == 10 and counts.sum() == prepared.summaries["valid"].tokens
    (a,) = prepared.codec.encode(" a")
    assert counts[a] == 10
    figure = plots.picture(prepared)
    assert figure.axes[0].get_title() == "Document lengths"
    figure.savefig(tmp_path / "picture.png")
    row = prepared.subsets_table().loc["valid"]
    assert (row["lines"], row["text"]) == (10, "120 B")
    assert prepared.passage(2, 3) == "a $x$ a\na $x$ a"
    assert prepared.passage(1, 12) == "a $x$ a 中"


def test_a_text_of_blank_lines_has_a_picture(tmp_path):
    (tmp_path / "x.txt").write_text("\n\n\n")
    prepared, _ = run(tmp_path, source=str(tmp_path / "x.txt"), bpe="demo")
    plots.picture(prepared).savefig(tmp_path / "picture.png")
    assert prepared.passage() == "" and plots.round_trip(prepared.codec, prepared.passage())


def test_a_round_trip_shows_every_token(tmp_path):
    prepared, _ = run(tmp_path)
    shown = plots.round_trip(prepared.codec, "Two lines.\nHere.", width=20)
    assert shown.startswith("Two lines.\nHere.\n\n") and shown.endswith("\n\nTwo lines.\nHere.")
    assert "</s>" in shown and max(map(len, shown.split("\n"))) <= 20
    ids = prepared.codec.encode("Two lines.\nHere.")
    assert [int(word) for word in shown.split() if word.isdecimal()] == ids


# -------------------------------------------------------------------------------------------------- notebook

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "prepare_data.ipynb"


def outputs(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "".join("".join(output.get("text", [])) for cell in cells for output in cell.get("outputs", []))


def test_the_notebook_headless_from_another_folder_twice(tmp_path, monkeypatch):
    import papermill

    monkeypatch.chdir(tmp_path)
    for name, done in (("one", "Prepared in"), ("two", "Nothing to do: everything is there")):
        papermill.execute_notebook(
            NOTEBOOK, f"{name}.ipynb", {"keep_empty": "true"}, progress_bar=False, cwd=tmp_path
        )
        assert done in outputs(tmp_path / f"{name}.ipynb")
    assert (tmp_path / "data" / "demo" / "data-bin" / "valid.bin").exists()
    shown = [
        "".join(o.get("data", {}).get("text/html", ""))
        for c in json.loads((tmp_path / "one.ipynb").read_text())["cells"]
        for o in c.get("outputs", [])
    ]
    assert any(
        re.search(r'<img src="data:image/png;base64,[^"]{1000,}" alt="[^"]{10,}"', one) for one in shown
    )


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    (parameters,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    import ast

    for statement in ast.parse("".join(parameters["source"])).body:
        # Literals only, so that papermill can show and replace them.
        ast.literal_eval(statement.value)
