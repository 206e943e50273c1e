"""``python -m moekit.checkpoint``: every verb, what it makes bit for bit, and what it refuses."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moekit
from moekit import checkpoint, paths
from moekit.checkpoint import reshaping, safetensors, writing
from moekit.checkpoint.__main__ import main
from moekit.checkpoint.options import options_of
from moekit.nn.transformer import Transformer

KEY = "decoder.layers.1.moe_layer.experts.1.fc2.weight"


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(reference):
    return reference / "checkpoint"


def run(*arguments) -> None:
    assert main([str(one) for one in arguments]) == 0


def refused(capsys, *arguments) -> str:
    """The one sentence of an error."""
    capsys.readouterr()
    assert main([str(one) for one in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def weights(path: Path) -> dict[str, torch.Tensor]:
    plan = checkpoint.survey(checkpoint.find(path))
    model = Transformer(plan.config).to(plan.dtype)
    checkpoint.fill(model, plan, range(plan.config.experts))
    return dict(model.named_parameters())


def same_weights(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def same_files(a: Path, b: Path) -> None:
    """The same names, keys, types, numbers and settings; one process has written the recorded files of all ranks."""
    names = sorted(path.name for path in a.iterdir() if path.suffix == ".pt")
    assert names == sorted(path.name for path in b.iterdir() if path.suffix == ".pt")
    for name in names:
        one, other = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        for state in (one, other):
            state["cfg"]["distributed_training"]["distributed_rank"] = None
        assert {**one, "model": None} == {**other, "model": None}
        assert one["model"].keys() == other["model"].keys()
        for key, tensor in one["model"].items():
            assert tensor.dtype == other["model"][key].dtype
            assert torch.equal(tensor, other["model"][key])


def add_optimizer(folder: Path) -> None:
    for path in folder.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.randn(50_000)}}}
        torch.save(state, path)


# ------------------------------------------------------------------------------------------------ round trips


def test_released_to_safetensors_and_back(source, tmp_path):
    run("convert", source, tmp_path / "st", "--to", "safetensors", "--quiet")
    assert {path.suffix for path in (tmp_path / "st").iterdir()} == {".safetensors"}
    same_weights(tmp_path / "st", source)
    for name in ("model.pt", "model-shared.safetensors", "model-rank-2.safetensors"):
        assert checkpoint.find(tmp_path / "st" / name).shared.name == "model-shared.safetensors"
    run("convert", tmp_path / "st", tmp_path / "back", "--to", "fairseq", "--quiet")
    same_files(tmp_path / "back", source)


@pytest.mark.parametrize("number", [1, 3, 8])
def test_other_numbers_of_files_and_back(source, tmp_path, number):
    run("reshard", source, tmp_path / "other", "--files", number, "--quiet")
    assert len(checkpoint.find(tmp_path / "other").ranks) == number
    same_weights(tmp_path / "other", source)
    run("reshard", tmp_path / "other", tmp_path / "back", "--files", "4", "--quiet")
    same_files(tmp_path / "back", source)


def in_args(state) -> None:
    """One flat ``args`` tells the rank and all options; ``cfg`` is there and empty."""
    model, task = options_of(state, "a file")
    state |= {"args": argparse.Namespace(**{**task, **model, "distributed_rank": 0}), "cfg": {}}


# How the files that the tool reads tell their rank.
TOLD = {
    "as the branch does": lambda state: None,
    "in args": in_args,
    "nowhere": lambda state: state["cfg"].pop("distributed_training"),
    "as text": lambda state: state["cfg"]["distributed_training"].update(distributed_rank="0"),
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("end", [".pt", ".safetensors"])
def test_files_that_are_swapped_are_refused(source, tmp_path, end, told):
    """Each file tells the rank of its name, in whatever number and format the tool writes it, and whatever it was made of."""
    before = tmp_path / "before"
    before.mkdir()
    for path in source.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        TOLD[told](state)
        torch.save(state, before / path.name)
    to = "fairseq" if end == ".pt" else "safetensors"
    run("convert", before, tmp_path / "there", "--to", to, "--quiet")
    run("reshard", tmp_path / "there", tmp_path / "two", "--files", "2", "--quiet")
    run("strip", before, tmp_path / "small", "--quiet")
    for folder, suffix, one, other in (("there", end, 1, 3), ("two", end, 0, 1), ("small", ".pt", 0, 2)):
        one, other = (tmp_path / folder / f"model-rank-{rank}{suffix}" for rank in (one, other))
        checkpoint.survey(checkpoint.find(tmp_path / folder))
        one.rename(tmp_path / "kept")
        other.rename(one)
        (tmp_path / "kept").rename(other)
        with pytest.raises(ValueError, match=r"model-rank-\d\.\w+ was written .*: were files swapped"):
            checkpoint.survey(checkpoint.find(tmp_path / folder))


def test_one_file_with_all_experts_stays_one(source, tmp_path):
    """In every format, and with fewer experts; the weights are those of the files that were joined."""
    state = torch.load(source / "model-shared.pt", weights_only=True)
    for index in range(4):
        part = torch.load(source / f"model-rank-{index}.pt", weights_only=True)["model"]
        for key, tensor in part.items():
            _, layer, expert, rest = re.split(r"layers\.(\d+)\.moe_layer\.experts\.(\d+)\.", key)
            state["model"][f"decoder.layers.{layer}.moe_layer.experts.{2 * index + int(expert)}.{rest}"] = (
                tensor
            )
    (tmp_path / "one").mkdir()
    torch.save(state, tmp_path / "one" / "model.pt")
    same_weights(tmp_path / "one", source)
    before = tmp_path / "one"
    for to in ("safetensors", "hf", "fairseq"):
        run("convert", before, tmp_path / to, "--to", to, "--quiet")
        same_weights(tmp_path / to, source)
        before = tmp_path / to
    same_files(before, tmp_path / "one")
    run("keep", source, tmp_path / "of files", "--experts", "*:1,*:6", "--quiet")
    run("keep", tmp_path / "one", tmp_path / "of one", "--experts", "*:1,*:6", "--quiet")
    same_weights(tmp_path / "of one", tmp_path / "of files")


def stored(path: Path) -> int:
    """The bytes of a file's numbers."""
    records = checkpoint.read(path)["model"].records.values()
    return sum({record.name: record.size for record in records}.values())


def test_files_made_of_stacks_hold_their_own_experts_alone(source, tmp_path):
    """torch writes all of a storage, and in Hugging Face's files all experts of a layer are one."""
    run("convert", source, tmp_path / "hf", "--to", "hf", "--quiet")
    run("convert", tmp_path / "hf", tmp_path / "back", "--to", "fairseq", "--quiet")
    for path in source.glob("*.pt"):
        assert stored(tmp_path / "back" / path.name) <= stored(path)


def test_numbers_that_have_two_names_are_written_once(tmp_path):
    """The matrix that is embedding and output, and parts of one storage, which each stand for all of it."""
    run("strip", "demo", tmp_path / "made", "--quiet")
    for path in paths.DEMO_MODEL.glob("*.pt"):
        assert stored(tmp_path / "made" / path.name) == stored(path)
    state = torch.load(paths.DEMO_MODEL / "model-rank-3.pt", weights_only=True)
    names = [key for key in state["model"] if key.endswith("fc1.weight")]
    parts = torch.stack([state["model"][key] for key in names]).unbind()
    state["model"] |= dict(zip(names, parts, strict=True))
    folder = shutil.copytree(paths.DEMO_MODEL, tmp_path / "parts")
    torch.save(state, folder / "model-rank-3.pt")
    run("strip", folder, tmp_path / "of parts", "--quiet")
    assert stored(tmp_path / "of parts" / "model-rank-3.pt") == stored(folder / "model-rank-3.pt")
    same_weights(tmp_path / "of parts", paths.DEMO_MODEL)


def test_results_from_safetensors_are_those_of_the_released_files(source, reference, tmp_path):
    run("convert", source, tmp_path / "st", "--to", "safetensors", "--quiet")
    recorded = np.load(reference / "base_frac0.05_bsz4.npz")
    with moekit.load(tmp_path / "st", 2, "cpu", progress=False) as model:
        found = model.evaluate(
            reference / "data-bin",
            "valid",
            tokens_per_sample=64,
            batch_size=4,
            capacity_token_fraction=0.05,
            progress=False,
        )
    assert found.loss_base2 == pytest.approx(float(recorded["loss_base2"]), abs=1e-5)


def test_the_package_safetensors_reads_what_is_written(source, tmp_path):
    package = pytest.importorskip("safetensors.torch")
    run("convert", source, tmp_path / "st", "--to", "safetensors", "--quiet")
    path = tmp_path / "st" / "model-rank-1.safetensors"
    ours, theirs = checkpoint.read(path)["model"], package.load_file(path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_a_sharded_training_becomes_plain_files(tmp_path):
    import tarfile

    with tarfile.open(Path(__file__).parent / "data" / "branch_shards" / "shards.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "4ranks_2experts"
    run("reshard", folder / "flat", tmp_path / "whole", "--files", "2", "--quiet")
    assert checkpoint.find(tmp_path / "whole").shared.name == "checkpoint_last-shared.pt"
    same_weights(tmp_path / "whole", folder / "plain")
    one, other = (
        torch.load(p / "checkpoint_last-shared.pt", weights_only=True)["model"]
        for p in (tmp_path / "whole", folder / "plain")
    )
    assert one.keys() == other.keys()
    # Files without the optimizer's state are shards still.
    run("strip", folder / "flat", tmp_path / "small", "--quiet")
    same_weights(tmp_path / "small", folder / "plain")
    size = {
        p: sum(path.stat().st_size for path in p.iterdir()) for p in (folder / "flat", tmp_path / "small")
    }
    assert size[tmp_path / "small"] < 0.7 * size[folder / "flat"]


def test_strip_drops_the_optimizer_alone(source, tmp_path):
    large = shutil.copytree(source, tmp_path / "large")
    add_optimizer(large)
    (large / "dict.txt").write_text("a 1\n")
    run("strip", large, tmp_path / "small", "--quiet")
    same_files(tmp_path / "small", source)
    assert (tmp_path / "small" / "dict.txt").read_text() == "a 1\n"


# ------------------------------------------------------------------------------------------------ fewer experts


def test_a_kept_model_computes_what_a_mask_of_the_others_computes(source, reference, tmp_path):
    kept = {1: [0, 3, 4, 6], 3: [1, 2, 5, 7]}
    run("keep", source, tmp_path / "kept", "--experts", "1:0,1:3-4,1:6,3:1-2,3:5,3:7", "--quiet")
    mask = {layer: [e for e in range(8) if e not in experts] for layer, experts in kept.items()}
    settings = {"tokens_per_sample": 64, "batch_size": 4, "capacity_token_fraction": 1.0, "progress": False}
    with moekit.load(source, 1, "cpu", progress=False) as model, model.route(mask=mask):
        expected = model.evaluate(reference / "data-bin", "valid", **settings)
    with moekit.load(tmp_path / "kept", 2, "cpu", progress=False) as model:
        assert model.config.experts == 4
        found = model.evaluate(reference / "data-bin", "valid", **settings)
    np.testing.assert_allclose(found.tokens["logprob"], expected.tokens["logprob"], rtol=0, atol=1e-5)


def test_to_keep_all_experts_changes_nothing(source, tmp_path):
    run("keep", source, tmp_path / "kept", "--experts", "*:0-7", "--quiet")
    same_files(tmp_path / "kept", source)


@pytest.mark.parametrize(
    "experts, said",
    [
        ("1:0,1:1", r"names the layers [1]; expected all that have experts: [1, 3]"),
        ("1:0-2,3:0-1", "keeps 3 in layer 1, 2 in layer 3: expected the same number"),
        ("*:0-8", "--experts 1:8: expected an expert from 0 to 7"),
        ("*:0", "keeps 1 of each layer; expected at least 2, as many as a token goes to"),
        ("1:" + "9" * 5000, "9...9"),
        ("1-0", "expected LAYER:EXPERT or LAYER:FIRST-LAST"),
        ("0:0-1,1:0-1,3:0-1", "names the layers [0, 1, 3]"),
    ],
)
def test_what_cannot_be_kept_is_named(source, tmp_path, capsys, experts, said):
    found = refused(capsys, "keep", source, tmp_path / "kept", "--experts", experts)
    assert said in found and len(found) < 300
    assert not (tmp_path / "kept").exists()


# ------------------------------------------------------------------------------------------------ looking


def test_inspect_is_the_table_of_files(source, capsys):
    run("inspect", source, "--json")
    assert json.loads(capsys.readouterr().out) == checkpoint.describe(source)
    run("inspect", source)
    assert "model-rank-3.pt" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["fairseq", "safetensors"])
def test_verify_finds_one_bit_and_counts_what_is_not_finite(source, tmp_path, capsys, kind):
    folder = tmp_path / "st"
    run("convert", source, folder, "--to", kind, "--quiet")
    run("verify", folder, "--quiet", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["tensors"] for row in rows) in (128, 127) and all(row["checksums"] for row in rows)
    path = folder / checkpoint.find(folder).ranks[2].name
    record = checkpoint.read(path)["model"].records[KEY]
    data = bytearray(path.read_bytes())
    data[record.start] ^= 1
    path.write_bytes(data)
    assert f"{path.name}: {KEY} does not have the checksum" in refused(capsys, "verify", folder, "--quiet")
    # A load notices it by the same checksum.
    with pytest.raises(ValueError, match="is damaged"):
        weights(folder)


def test_verify_counts_nan_and_infinities(source, tmp_path, capsys):
    folder = shutil.copytree(source, tmp_path / "odd")
    path = folder / "model-rank-1.pt"
    state = torch.load(path, weights_only=True)
    state["model"][KEY][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    torch.save(state, path)
    assert main(["verify", str(folder), "--json", "--quiet"]) == 1
    row = json.loads(capsys.readouterr().out)[2]
    assert (row["nan"], row["infinite"], row["nonfinite"]) == (1, 2, [KEY])


# ------------------------------------------------------------------------------------------------ safety


def test_a_folder_is_overwritten_only_when_that_is_asked_for(source, tmp_path, capsys):
    target = tmp_path / "there"
    run("reshard", source, target, "--files", "2", "--quiet")
    assert "is there already: name another folder, or replace it with --force" in refused(
        capsys, "reshard", source, target, "--files", "4"
    )
    assert len(checkpoint.find(target).ranks) == 2
    run("reshard", source, target, "--files", "4", "--force", "--quiet")
    assert len(checkpoint.find(target).ranks) == 4
    (target / "thesis.tex").write_text("years of work")
    assert "holds more than a checkpoint (thesis.tex)" in refused(
        capsys, "reshard", source, target, "--files", "2", "--force"
    )
    copied = shutil.copytree(source, tmp_path / "copied")
    assert "is the source" in refused(capsys, "strip", copied, copied, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied", "there"]


def test_force_replaces_a_checkpoint_and_nothing_else(source, tmp_path, capsys):
    """What is no checkpoint, what holds the source, and what stands where the old folder goes meanwhile."""
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "years.md").write_text("years of work")
    there = shutil.copytree(source, tmp_path / "there")
    (there / "notes.txt").mkdir()
    linking, behind = tmp_path / "linking", shutil.copytree(source, tmp_path / "behind")
    linking.mkdir()
    for path in behind.iterdir():
        (linking / path.name).symlink_to(path)
    kept = shutil.copytree(source, tmp_path / "kept")
    (tmp_path / "kept.old").mkdir()
    told = {
        (source, notes): "holds more than a checkpoint (years.md)",
        (source, there): "holds more than a checkpoint (notes.txt)",
        (linking, behind): "holds the source's files",
        (source, kept): f"{tmp_path / 'kept.old'} is in the way",
    }

    def files() -> dict[Path, int]:
        return {path: path.lstat().st_ino for path in tmp_path.rglob("*")}

    before = files()
    for (what, target), sentence in told.items():
        assert sentence in refused(capsys, "reshard", what, target, "--files", "2", "--force", "--quiet")
    assert files() == before


def test_a_link_as_target_is_followed(source, tmp_path):
    (tmp_path / "other-disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other-disk" / "made")
    run("reshard", source, tmp_path / "link", "--files", "2", "--quiet")
    run("reshard", source, tmp_path / "link", "--files", "4", "--force", "--quiet")
    assert (tmp_path / "link").is_symlink()
    assert len(checkpoint.find(tmp_path / "other-disk" / "made").ranks) == 4
    assert [path.name for path in (tmp_path / "other-disk").iterdir()] == ["made"]


@pytest.mark.parametrize("name", ["loop", "x" * 300, "~nobody-of-this-name/made", "a\0b", "/"])
def test_a_target_that_cannot_be_is_one_sentence(source, tmp_path, capsys, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    target = name if name[0] in "~/" else f"{tmp_path}/{name}"
    said = refused(capsys, "strip", source, target)
    assert any(
        one in said
        for one in (
            "expected the path",
            "cannot be written",
            "no such home folder",
            "round in a circle",
            "too long",
            "/ is the root of the file system: name a folder below it",
        )
    )


def test_a_note_of_other_bytes_is_another_job(source, tmp_path):
    (tmp_path / "made.part").mkdir()
    (tmp_path / "made.part" / "job.json").write_bytes(b"\xff\xfe")
    (tmp_path / "made.part" / "model-shared.pt").write_text("half")
    run("strip", source, tmp_path / "made", "--quiet")
    same_files(tmp_path / "made", source)


def test_what_stands_beside_the_target_stays(source, tmp_path, capsys):
    """Where the target is absent, nothing is moved to its old name: what has that name is another's."""
    (tmp_path / "made.old").mkdir()
    (tmp_path / "made.old" / "diary.txt").write_text("dear")
    run("strip", source, tmp_path / "made", "--quiet")
    assert (tmp_path / "made.old" / "diary.txt").read_text() == "dear"
    same_weights(tmp_path / "made", source)

    shutil.copytree(source, tmp_path / "copy.old")
    said = refused(capsys, "strip", str(tmp_path / "copy.old"), str(tmp_path / "copy"), "--quiet")
    assert "copy.old holds the source's files" in said
    same_files(tmp_path / "copy.old", source)

    (tmp_path / "third.part").mkdir()
    (tmp_path / "third.part" / "job.json").write_text("{}")
    (tmp_path / "third.part" / "precious.txt").write_text("mine")
    assert "third.part is in the way: it holds precious.txt" in refused(
        capsys, "strip", str(source), str(tmp_path / "third"), "--quiet"
    )
    assert (tmp_path / "third.part" / "precious.txt").read_text() == "mine"


def test_the_same_run_at_the_same_time_is_refused(source, tmp_path, monkeypatch, capsys):
    """Each would write over the other's files while it compares them."""
    arguments = ["reshard", str(source), str(tmp_path / "made"), "--files", "2", "--quiet"]
    write, said = writing._write, []

    def second(path, *rest):
        monkeypatch.setattr(writing, "_write", write)
        said.append(refused(capsys, *arguments))
        write(path, *rest)

    monkeypatch.setattr(writing, "_write", second)
    run(*arguments)
    assert "another run makes files in" in said[0]
    same_weights(tmp_path / "made", source)


@pytest.mark.parametrize("moved", [0, 1])
def test_a_run_that_ended_while_it_moved_goes_on(source, tmp_path, monkeypatch, capsys, moved):
    """Both folders are there to the end, and the same command does the rest."""
    arguments = ["reshard", str(source), str(tmp_path / "made"), "--files", "2", "--force", "--quiet"]
    shutil.copytree(source, tmp_path / "made")
    replace, moves = os.replace, []

    def ends(a, b):
        if Path(a).is_dir():
            moves.append(a)
            if len(moves) > moved:
                raise OSError(5, "Input/output error")
        replace(a, b)

    monkeypatch.setattr(writing.os, "replace", ends)
    assert "cannot be written: Input/output error" in refused(capsys, *arguments)
    monkeypatch.setattr(writing.os, "replace", replace)
    same_weights(tmp_path / ("made.old" if moved else "made"), source)
    run(*arguments)
    assert len(checkpoint.find(tmp_path / "made").ranks) == 2
    same_weights(tmp_path / "made", source)


def test_a_run_that_was_ended_goes_on_where_it_was(source, tmp_path, monkeypatch):
    written, write = [], writing._write

    def once(path, *rest):
        if len(written) == 3:
            written.append(None)
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(writing, "_write", once)
    arguments = ["reshard", str(source), str(tmp_path / "made"), "--files", "8", "--quiet"]
    assert main(arguments) == 130
    assert not (tmp_path / "made").exists()
    assert main(arguments) == 0
    assert len(written) == 9 + 1 and len(set(written)) == 9 + 1
    same_weights(tmp_path / "made", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "made"]


def test_another_question_does_not_go_on_with_the_files_of_the_first(source, tmp_path, monkeypatch):
    write = writing._write

    def fail(path, *rest):
        if "rank-1" in path.name:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(writing, "_write", fail)
    assert main(["reshard", str(source), str(tmp_path / "made"), "--files", "8", "--quiet"]) == 130
    monkeypatch.setattr(writing, "_write", write)
    run("reshard", source, tmp_path / "made", "--files", "2", "--quiet")
    same_weights(tmp_path / "made", source)


def test_a_file_that_is_not_what_was_written_is_not_kept(source, tmp_path, monkeypatch, capsys):
    save = torch.save

    def damaged(state, file):
        state = {**state, "model": {key: tensor + 1 for key, tensor in state["model"].items()}}
        save(state, file)

    monkeypatch.setattr(torch, "save", damaged)
    assert "is not what was written" in refused(
        capsys, "reshard", source, tmp_path / "made", "--files", "2", "--quiet"
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("inspect", "/nowhere"), "/nowhere does not exist"),
        (("reshard", "SOURCE", "T", "--files", "9"), "--files 9: expected 1 to 8, the number of experts"),
        (("reshard", "SOURCE", "T", "--files", "0"), "files=0: expected a whole number of at least 1"),
        (("keep", "SOURCE", "T", "--experts", "*:0-3,*:7-6"), "'*:7-6' ends before it begins"),
        (("strip", "/nowhere", "T"), "/nowhere does not exist"),
    ],
)
def test_errors_are_one_sentence(source, tmp_path, capsys, arguments, said):
    arguments = [source if one == "SOURCE" else tmp_path / "T" if one == "T" else one for one in arguments]
    assert said in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "verb, asked, said",
    [
        ("keep", {"experts": [1, 2]}, "experts=[1, 2]: expected the experts to keep by layer"),
        (
            "keep",
            {"experts": {1: [0.5, 1], 3: [0, 1]}},
            "experts[1]=[0.5, 1]: expected a list of whole numbers",
        ),
        ("keep", {"experts": {"1": [0, 1]}}, "experts='1': expected a whole number"),
        ("reshard", {"files": 2.5}, "files=2.5: expected a whole number of at least 1"),
        ("reshard", {"files": None}, "files=None: expected a whole number"),
        ("reshard", {"files": 2, "to": "onnx"}, "to='onnx': expected one of fairseq, safetensors, hf"),
        ("convert", {"to": ""}, "to='': expected one of fairseq, safetensors, hf"),
        (
            "convert",
            {"to": "hf", "dictionary": "dict.txt"},
            "dictionary='dict.txt': expected how many types the dictionary has",
        ),
        ("convert", {"to": "hf", "dictionary": 10**9}, "rows, too few for a dictionary of 1000000000 types"),
        ("convert", {"to": "fairseq", "dictionary": 100}, "dictionary=100: only the format 'hf' tells it"),
        *(
            ("convert", {"to": to, "texts": {name: "{}"}}, f"texts names '{name}', which is kept for weights")
            for to, name in (
                ("hf", "model.safetensors"),
                ("hf", "config.json"),
                ("hf", "modeling_moekit.py"),
                ("hf", "job.json"),
                ("hf", "CONFIG.json"),
                ("safetensors", "config.json"),
                ("fairseq", "model.safetensors.index.json"),
                ("fairseq", "model-rank-0.pt.part"),
                ("fairseq", "model-rank-99.pt"),
            )
        ),
        (
            "convert",
            {"to": "hf", "texts": {"notes.rst": "a"}},
            "texts names 'notes.rst': expected LICENSE, vocab.bpe, or a name that ends in .json, .md or .txt",
        ),
        ("convert", {"to": "hf", "texts": {"../a": "b"}}, "texts names '../a': expected the name of a file"),
        ("convert", {"to": "hf", "texts": {"..": "b"}}, "texts names '..': expected the name of a file"),
        ("convert", {"to": "hf", "texts": {"a": 3}}, "texts=['a', 3]: expected a list of texts"),
        ("strip", {"force": "no"}, "force='no': expected True or False"),
    ],
)
def test_a_wrong_argument_from_python_is_named_and_makes_nothing(source, tmp_path, verb, asked, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        getattr(reshaping, verb)(source, tmp_path / "made", **{"show": False} | asked)
    assert not list(tmp_path.iterdir())


def test_texts_go_along_in_any_format(source, tmp_path):
    for to in reshaping.FORMATS:
        for text in ("é", "è"):
            texts = {"notes.md": text, "LICENSE": text}
            reshaping.convert(source, tmp_path / to, to, texts=texts, force=text == "è", show=False)
            assert (tmp_path / to / "notes.md").read_text("utf-8") == text
            assert (tmp_path / to / "LICENSE").read_text("utf-8") == text


def test_another_question_replaces_the_texts_of_the_first(source, tmp_path, monkeypatch):
    """Its note tells an unfinished run's texts from what somebody put there."""

    def ends(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "_write", ends)
        reshaping.convert(source, tmp_path / "made", "hf", texts={"notes.md": "é"}, show=False)
    part = tmp_path / "made.part"
    assert (part / "notes.md").is_file()
    (part / "mine.md").write_text("mine")
    with pytest.raises(ValueError, match=r"made\.part is in the way: it holds mine\.md"):
        reshaping.convert(source, tmp_path / "made", "hf", show=False)
    assert (part / "mine.md").read_text() == "mine" and (part / "notes.md").is_file()
    (part / "mine.md").unlink()
    reshaping.convert(source, tmp_path / "made", "hf", show=False)
    assert not (tmp_path / "made" / "notes.md").exists()


def test_numpys_numbers_name_experts_and_files(source, tmp_path):
    layers = checkpoint.survey(checkpoint.find(source)).config.moe_layers
    chosen = {np.int64(layer): np.array([2, 0]) for layer in layers}
    reshaping.keep(source, tmp_path / "numpy", chosen, show=False)
    reshaping.keep(source, tmp_path / "plain", {layer: [0, 2] for layer in layers}, show=False)
    same_weights(tmp_path / "numpy", tmp_path / "plain")
    reshaping.reshard(source, tmp_path / "two", np.int64(2), show=False)
    assert (tmp_path / "two" / "model-rank-1.pt").is_file()


def test_the_module_runs(source):
    done = subprocess.run(
        [sys.executable, "-m", "moekit.checkpoint", "inspect", str(source), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
        check=True,
    )
    assert len(json.loads(done.stdout)) == 5


# ------------------------------------------------------------------------------------------------ safetensors


@pytest.fixture
def one(source, tmp_path):
    run("convert", source, tmp_path / "st", "--to", "safetensors", "--quiet")
    return tmp_path / "st" / "model-rank-0.safetensors"


def rewrite(path: Path, edit) -> None:
    """Change the header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header) or json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(header):
    first, second = [key for key in header if key != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    header[second]["shape"] = header[first]["shape"]


@pytest.mark.parametrize(
    "edit, said",
    [
        (overlap, "does not begin where the tensor before it ends"),
        (lambda h: h[KEY].update(shape=[2**40, 2**20]), "has no place for shape"),
        (lambda h: h[KEY].update(shape=[-1]), "does not describe"),
        (lambda h: h[KEY].update(dtype="F4"), "of a type 'F4'; expected one of F64"),
        (lambda h: h[KEY].update(data_offsets=[0, 2**47]), "has no place for shape"),
        (lambda h: h.pop(KEY) and None, "its tensors end after|does not begin where"),
        (lambda h: h.pop("__metadata__") and None, "tells no config"),
        (lambda h: h["__metadata__"].update({"moekit.settings": "{"}), "moekit.settings is no JSON"),
        (lambda h: h["__metadata__"].update({"moekit.settings": "[]"}), "settings are no object"),
        (lambda h: b'{"a": 1, "a": 1}', "its header has the key 'a' twice"),
        (lambda h: b'{"a": [' + b"[]," * 700_000 + b"[]]}", "its header has more than 600,000 values"),
        (
            lambda h: h["__metadata__"].update({"moekit.settings": "[" + "{}," * 700_000 + "{}]"}),
            "has more than 600,000",
        ),
        (lambda h: h[KEY].update(shape=[2**47, 2**47, 0]), "does not describe"),
        (lambda h: b"{" + b"[" * 100_000, "its header is no JSON"),
        (lambda h: b"{\xff}", "its header is no JSON"),
    ],
)
def test_a_header_that_lies_is_refused(one, edit, said):
    rewrite(one, edit)
    with pytest.raises(
        ValueError, match=rf"model-rank-0\.safetensors is not a readable checkpoint file.*({said})"
    ):
        checkpoint.read(one)


def test_a_file_that_is_cut_short_is_refused_wherever_it_ends(one):
    data = one.read_bytes()
    for size in (9, 100, len(data) // 2, len(data) - 1):
        one.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"is not a readable checkpoint file"):
            checkpoint.read(one)
    one.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="its tensors end after"):
        checkpoint.read(one)


def test_numbers_of_all_types_come_back(tmp_path):
    wanted = {str(dtype): torch.arange(6).to(dtype).view(2, 3) for dtype in safetensors.DTYPES.values()} | {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    with open(tmp_path / "x.safetensors", "wb") as file:
        safetensors.write(file, wanted, {"cfg": None}, lambda contents: [0 for _ in contents])
    found = checkpoint.read(tmp_path / "x.safetensors")["model"]
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape
        assert torch.equal(found[key].float(), tensor.float())


def test_a_header_with_any_byte_changed_is_refused_or_read_as_itself(one):
    """Whatever is read of a damaged file lies inside it; nothing but a ValueError is raised."""
    data, rng = one.read_bytes(), np.random.default_rng(0)
    end = 8 + int.from_bytes(data[:8], "little")
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.integers(end)] = rng.integers(256)
        one.write_bytes(changed)
        try:
            found = checkpoint.read(one)["model"]
            assert sum(tensor.nbytes for tensor in found.values()) == len(data) - end
            outcomes["read"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10


def test_of_two_formats_in_a_folder_the_one_that_is_named_is_read(source, tmp_path):
    both = shutil.copytree(source, tmp_path / "both")
    run("convert", source, tmp_path / "st", "--to", "safetensors", "--quiet")
    shutil.copytree(tmp_path / "st", both, dirs_exist_ok=True)
    assert checkpoint.find(both).shared.suffix == ".pt"
    assert {path.suffix for path in checkpoint.find(both / "model.safetensors").all} == {".safetensors"}


def test_a_note_of_holes_takes_no_memory(reference, tmp_path):
    """A file may have a terabyte and take no disk."""
    (tmp_path / "made.part").mkdir()
    note = tmp_path / "made.part" / "job.json"
    note.touch()
    os.truncate(note, 1 << 40)
    reshaping.convert(reference / "checkpoint", tmp_path / "made", "safetensors", show=False)
    assert (tmp_path / "made" / "model-shared.safetensors").is_file()
