"""Finding and reading checkpoints: every spelling, every kind of damage, nothing executed."""

import argparse
import os
import pickle
import shutil
from pathlib import Path

import omegaconf
import pytest
import torch
from branch_cases import BASE, build

from moekit import checkpoint
from moekit.checkpoint import keys
from moekit.checkpoint import options as config
from moekit.checkpoint.export import save
from moekit.nn.dispatch import owned
from moekit.nn.transformer import Transformer


@pytest.fixture
def folder(reference, tmp_path):
    return shutil.copytree(reference / "checkpoint", tmp_path / "checkpoint")


def change(path: Path, edit) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def load(folder) -> Transformer:
    plan = checkpoint.survey(checkpoint.find(folder))
    model = Transformer(plan.config)
    checkpoint.fill(model, plan, range(plan.config.experts))
    return model


# ------------------------------------------------------------------------------------------------ finding


@pytest.mark.parametrize("name", ["", "model.pt", "model-shared.pt", "model-rank-0.pt", "model-rank-3.pt"])
def test_every_spelling_names_the_same_model(reference, name):
    files = checkpoint.find(reference / "checkpoint" / name)
    assert files.shared.name == "model-shared.pt"
    assert [path.name for path in files.ranks] == [f"model-rank-{r}.pt" for r in range(4)]


def test_a_real_model_pt_is_the_shared_part(folder):
    (folder / "model-shared.pt").rename(folder / "model.pt")
    for name in ("", "model.pt", "model-rank-1.pt", "model-shared.pt"):
        assert checkpoint.find(folder / name).shared.name == "model.pt"


def test_a_model_pt_that_holds_something_else_is_passed_over(folder):
    torch.save({"model": {"other.weight": torch.zeros(2)}}, folder / "model.pt")
    assert checkpoint.find(folder / "model.pt").shared.name == "model-shared.pt"


def test_other_stems(folder):
    for path in sorted(folder.iterdir()):
        path.rename(folder / path.name.replace("model", "checkpoint_last"))
    assert checkpoint.find(folder).shared.name == "checkpoint_last-shared.pt"
    assert len(checkpoint.find(folder / "checkpoint_last.pt").ranks) == 4
    shutil.copy(folder / "checkpoint_last-shared.pt", folder / "best-shared.pt")
    with pytest.raises(ValueError, match=r"several checkpoints .best, checkpoint_last."):
        checkpoint.find(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        checkpoint.find(tmp_path / "nowhere" / "model.pt")
    (folder / "model-rank-1.pt").unlink()
    with pytest.raises(ValueError, match=r"lacks model-rank-1\.pt"):
        checkpoint.find(folder)
    (folder / "model-rank-1.pt").touch()
    (folder / "model-shared.pt").unlink()
    with pytest.raises(ValueError, match=r"expected model-shared\.pt"):
        checkpoint.find(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.find(empty)


# ------------------------------------------------------------------------------------------------ safety


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/moekit-was-here",)


def test_a_hostile_file_runs_nothing(folder):
    change(folder / "model-rank-2.pt", lambda state: state.update(extra_state=Hostile()))
    with pytest.raises(ValueError, match=r"model-rank-2\.pt asks to load .*system"):
        checkpoint.survey(checkpoint.find(folder))
    assert not Path("/tmp/moekit-was-here").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"hello world" * 9, pickle.dumps({"model": {}}, 2)]
)
def test_damaged_files_are_named(folder, content):
    (folder / "model-rank-2.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model-rank-2\.pt"):
        checkpoint.survey(checkpoint.find(folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: run git lfs pull"),
        (b"<html>", "a web page"),
    ],
)
def test_what_came_instead_of_a_checkpoint_is_named(folder, content, said):
    (folder / "model-shared.pt").write_bytes(content)
    with pytest.raises(ValueError, match=f"model-shared.pt is not a readable checkpoint file but {said}"):
        checkpoint.find(folder)


def test_a_rank_file_that_is_not_there_is_named(folder):
    with pytest.raises(ValueError, match=r"there is no file .*model-rank-99\.pt; .* holds 4 rank files"):
        checkpoint.find(folder / "model-rank-99.pt")


def test_a_truncated_file_is_named(folder):
    path = folder / "model-rank-2.pt"
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(ValueError, match=r"model-rank-2\.pt is not a readable checkpoint"):
        checkpoint.survey(checkpoint.find(folder))


def test_files_from_before_torch_1_6_are_read(folder):
    expected = load(folder).state_dict()
    for path in folder.iterdir():
        state = torch.load(path, weights_only=True)
        torch.save(state, path, _use_new_zipfile_serialization=False)
    assert all(tensor.equal(expected[name]) for name, tensor in load(folder).state_dict().items())


# ------------------------------------------------------------------------------------------------ the key table

RANK = "model-rank-1.pt"
EXPERT = "decoder.layers.1.moe_layer.experts.{}.fc1.weight"


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        (
            RANK,
            lambda m: m.update({"decoder.layers.1.extra": torch.zeros(1)}),
            "unknown key decoder.layers.1.extra",
        ),
        (
            RANK,
            lambda m: m.pop(EXPERT.format(1)),
            r"layers.1.moe.experts.w1 .expert 3.*experts\.\*\.fc1\.weight",
        ),
        (
            RANK,
            lambda m: m.update({EXPERT.format(0): torch.zeros(64, 31)}),
            r"shape \[64, 31\], expected \[64, 32\]",
        ),
        (RANK, lambda m: m.update({EXPERT.format(0): torch.zeros(64, 32).int()}), "dtype torch.int32"),
        (
            "model-shared.pt",
            lambda m: m.pop("decoder.layers.0.fc1.bias"),
            "layers.0.ffn.fc1.bias: expected the key",
        ),
        (
            "model-shared.pt",
            lambda m: m.update({EXPERT.format(0): torch.zeros(64, 32)}),
            r"model-rank-0.pt: .* for the second time, after model-shared.pt",
        ),
        (
            "model-shared.pt",
            lambda m: m.update({"decoder.layers.1.fc1.weight": torch.zeros(64, 32)}),
            "has no place in the model that cfg describes",
        ),
    ],
)
def test_each_mistake_in_the_keys_is_named(folder, file, edit, said):
    change(folder / file, lambda state: edit(state["model"]))
    with pytest.raises(ValueError, match=said):
        checkpoint.survey(checkpoint.find(folder))


def test_too_many_and_too_few_experts(folder):
    shutil.copy(folder / "model-rank-0.pt", folder / "model-rank-4.pt")
    with pytest.raises(ValueError, match=r"would be expert 8 .from 0., but cfg says moe_expert_count=8"):
        checkpoint.survey(checkpoint.find(folder))
    (folder / "model-rank-4.pt").unlink()
    (folder / "model-rank-3.pt").unlink()
    with pytest.raises(ValueError, match=r"expert 6.*model-rank-2\.pt .2., expected 8"):
        checkpoint.survey(checkpoint.find(folder))


def test_rows_beyond_the_dictionary_are_left_in_the_file(folder):
    plan = checkpoint.survey(checkpoint.find(folder), dictionary=190)
    model = Transformer(plan.config)
    checkpoint.fill(model, plan, range(8))
    stored = torch.load(folder / "model-shared.pt", weights_only=True)["model"]["decoder.embed_tokens.weight"]
    assert model.embed.weight.shape == (190, 32)
    assert model.embed.weight.equal(stored[:190].float())
    with pytest.raises(ValueError, match="200 rows, too few for a dictionary of 201"):
        checkpoint.survey(checkpoint.find(folder), dictionary=201)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 11])
def test_every_rank_gets_its_experts_and_opens_only_their_files(folder, world_size):
    plan = checkpoint.survey(checkpoint.find(folder))
    whole = load(folder).state_dict()
    seen = []
    for rank in range(world_size):
        held = owned(8, world_size, rank)
        model = Transformer(plan.config, len(held))
        checkpoint.fill(model, plan, held)
        for name, tensor in model.state_dict().items():
            expected = whole[name][held.start : held.stop] if ".moe.experts." in name else whole[name]
            assert tensor.equal(expected), name
        opened = {int(s.path.stem.split("-")[-1]) for s in plan.needed(held)[1:]}
        assert opened == {expert // 2 for expert in held}
        seen += held
    assert seen == list(range(8))


def test_a_file_that_changes_between_survey_and_load_is_noticed(folder):
    plan = checkpoint.survey(checkpoint.find(folder))
    change(folder / RANK, lambda state: state["model"].pop(EXPERT.format(1)))
    with pytest.raises(
        ValueError, match=r"0 of 2,048 numbers of layers\.1\.moe\.experts\.w1 \(expert 3\) were filled"
    ):
        checkpoint.fill(Transformer(plan.config), plan, range(8))


def test_a_file_that_changes_between_find_and_survey_is_read_again(folder):
    files = checkpoint.find(folder)
    assert list(files.seen) == [files.shared] and not pickle.loads(pickle.dumps(files)).seen
    change(folder / "model-shared.pt", lambda state: state["model"].pop("decoder.layer_norm.weight"))
    with pytest.raises(ValueError, match="no file fills"):
        checkpoint.survey(files)


# ------------------------------------------------------------------------------------------------ configs


def as_namespace(state):
    state["cfg"]["model"] = argparse.Namespace(**state["cfg"]["model"])


def as_dictconfig(state):
    state["cfg"] = omegaconf.OmegaConf.create(state["cfg"])


def as_references(state):
    state["cfg"]["model"]["max_target_positions"] = "${task.tokens_per_sample}"
    state["cfg"]["model"]["add_bos_token"] = "${task.add_bos_token}"
    state["cfg"]["model"]["decoder_moe_freq"] = "${common.nowhere}"  # leads nowhere: as if it were not there


def as_of_the_task(state):
    """The model's limit is the task's, however long its samples were."""
    limit = state["cfg"]["model"].pop("max_target_positions")
    state["cfg"]["model"]["tokens_per_sample"] = 16
    state["cfg"]["task"] |= {"max_target_positions": limit, "tokens_per_sample": 16}


def as_args(state):
    state["args"] = argparse.Namespace(**state["cfg"]["task"] | state["cfg"]["model"])
    state["cfg"] = None


@pytest.mark.parametrize("edit", [as_namespace, as_dictconfig, as_references, as_of_the_task, as_args])
def test_every_form_of_config(folder, edit):
    expected = checkpoint.survey(checkpoint.find(folder)).config
    for path in folder.iterdir():
        change(path, edit)
    assert checkpoint.survey(checkpoint.find(folder)).config == expected


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("adaptive_input", True, "adaptive input embeddings .adaptive_input=True"),
        ("adaptive_softmax_cutoff", "20000,60000", "an adaptive softmax"),
        ("character_embeddings", True, "character embeddings"),
        ("use_stable_embedding", True, "stable embedding"),
        ("quant_noise_pq", 0.1, "quantisation noise"),
        ("decoder_layers_to_keep", "0,2", "pruned layers"),
        ("base_layers", 1, "BASE layers"),
        ("activation_fn", "swish", "activation_fn='swish' is unknown"),
        ("moe_second_expert_policy", "best", "moe_second_expert_policy='best' is unknown"),
        ("_name", "transformer", "holds a 'transformer'"),
    ],
)
def test_what_moekit_has_not_is_refused_by_name(option, value, said):
    options = {"decoder_embed_dim": 32, option: value}
    with pytest.raises(ValueError, match=said):
        config.from_fairseq(options, {}, vocab_rows=10, before_final_norm=False)


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("files", [1, 3, 8])
def test_what_is_saved_is_what_is_read(tmp_path, files):
    build("mixture", tmp_path / "first")
    model = load(tmp_path / "first")
    save(model, tmp_path / "second", files)
    again = load(tmp_path / "second")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    rows = checkpoint.describe(tmp_path / "second")
    assert [row["kind"] for row in rows] == ["shared"] + ["rank"] * files
    assert sum(row["experts"] for row in rows) == BASE.experts


def test_saving_writes_every_key_of_the_branch(reference, tmp_path):
    """cfg and names as in a file that the branch wrote."""
    build("before_dropping", tmp_path)
    for name in ("model-shared.pt", "model-rank-0.pt"):
        theirs = torch.load(reference / "checkpoint" / name, weights_only=True)
        ours = torch.load(tmp_path / name, weights_only=True)
        assert set(ours["cfg"]) == set(theirs["cfg"])
        assert all(
            set(ours["cfg"][part]) == set(theirs["cfg"][part]) for part in ("model", "task", "criterion")
        )
        if name == "model-shared.pt":
            assert set(ours["model"]) == set(theirs["model"])


def test_a_checkpoint_that_is_not_there_is_told_apart_from_one_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='dmo does not exist: name .* or "demo"'):
        checkpoint.find("dmo")
    # What is blank, or has spaces around it, is seen between quotes.
    for spaces, said in (
        ("", "checkpoint='' is blank"),
        (" \t", r"checkpoint=' \\t' is blank"),
        (" demo", "' demo' does"),
    ):
        with pytest.raises(ValueError, match=f'^{said}.*: name .* or "demo"'):
            checkpoint.find(spaces)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="notes.txt is not a .pt file or a folder"):
        checkpoint.find("notes.txt")


@pytest.mark.parametrize(
    "name", ["layers.{}.fc1.weight", "layers.1.moe_layer.experts.{}.fc1.weight", "layers.{0}.fc2.bias"]
)
def test_braces_of_a_key_are_no_number(name):
    key = "decoder." + name
    assert keys._place(key) is None and keys.split(key)[0] not in keys.KEYS
    whole = key.replace("{}", "3").replace("{0}", "3")
    assert keys._place(whole) is not None and keys.split(whole)[0] in keys.KEYS
