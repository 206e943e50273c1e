"""What is read of a file, what is remembered of it, and how each kind of damage is told."""

import contextlib
import errno
import os
import re
import shutil
import struct
import tempfile
import threading
import warnings
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import moekit
from moekit import checkpoint, paths
from moekit.checkpoint import inspection, options, reading
from moekit.checkpoint.contents import short
from moekit.checkpoint.objects import Unreadable
from moekit.checkpoint.pickles import parse
from moekit.checkpoint.stretch import Stretch
from moekit.checkpoint.weights import Header
from moekit.nn.transformer import Transformer

COUNT = int(os.environ.get("FUZZ", 600)) // 4
# The same examples in every run, unless more are asked for; nothing is written into the folder.
SETTINGS = {"database": None, "derandomize": "FUZZ" not in os.environ}
KEY = "decoder.layers.1.moe_layer.experts.1.fc2.weight"


@pytest.fixture
def folder(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(reference / "checkpoint", tmp_path / "checkpoint")


@pytest.fixture
def counted(monkeypatch):
    """The bytes of each part whose sum was checked, but for the version, one number, which every survey checks."""
    sizes: list[int] = []
    crc32 = inspection.crc32

    def count(data):
        if len(data) > 4:
            sizes.append(len(data))
        return crc32(data)

    monkeypatch.setattr(inspection, "crc32", count)
    return sizes


def change(path: Path, edit, **how) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path, **how)


def fill(folder, held=None, **how):
    plan = checkpoint.survey(checkpoint.find(folder))
    held = held or range(plan.config.experts)
    return checkpoint.fill(Transformer(plan.config, len(held)), plan, held, **how)


def flip(path: Path, key: str) -> None:
    """Change one bit of a weight."""
    weights = checkpoint.read(path)["model"]
    at = weights.records[key].start
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------ checksums


def test_one_bit_of_one_weight_is_noticed_and_named(folder):
    flip(folder / "model-rank-2.pt", KEY)
    with pytest.raises(ValueError, match=rf"model-rank-2\.pt: {KEY} is damaged .* fetch the file again"):
        fill(folder)
    with pytest.raises(ValueError, match=r"model-rank-2\.pt"):
        fill(folder, range(4, 6), threads=4)
    # Of the rank's own experts alone.
    assert fill(folder, range(0, 2))
    assert fill(folder, verify=False)
    with pytest.raises(ValueError, match=rf"model-rank-2\.pt: {KEY} is damaged"):
        checkpoint.inspect(checkpoint.survey(checkpoint.find(folder)))


def test_a_version_that_is_damaged_is_named(folder):
    """It decides whether there is a norm behind the last layer."""
    flip(folder / "model-shared.pt", "decoder.version")
    with pytest.raises(ValueError, match=r"model-shared\.pt: decoder\.version is damaged"):
        checkpoint.survey(checkpoint.find(folder))


def test_tied_matrices_have_one_shape(folder):
    key = "decoder.embed_tokens.weight"
    change(folder / "model-shared.pt", lambda state: state["model"].update({key: state["model"][key].t()}))
    with pytest.raises(
        ValueError, match=rf"{key} has shape \[32, 200\], expected \[200, 32\] as .*: cfg ties them"
    ):
        checkpoint.survey(checkpoint.find(folder))


def test_load_can_leave_the_checksums_out(folder):
    flip(folder / "model-rank-2.pt", KEY)
    for world_size in (1, 2):
        with pytest.raises(
            ValueError, match=r"^\S+model-rank-2\.pt: \S+ is damaged .* fetch the file again$"
        ):
            moekit.load(folder, world_size, "cpu", progress=False)
    with moekit.load(folder, 1, "cpu", progress=False, verify=False) as model:
        assert model.parts[0]["nonfinite"] == []
    with pytest.raises(ValueError, match="verify='no': expected True or False"):
        moekit.load(folder, 1, "cpu", progress=False, verify="no")


def four_ranks_check_what_one_does(folder, counted):
    fill(folder)
    alone = sorted(counted)
    counted.clear()
    for rank in range(4):
        fill(folder, range(2 * rank, 2 * rank + 2), share=(rank, 4))
    assert sorted(counted) == alone


def test_ranks_share_the_checks_of_the_shared_file(folder, counted):
    """Each of its members is checked by one rank, and each rank checks its own experts."""
    four_ranks_check_what_one_does(folder, counted)
    flip(folder / "model-shared.pt", "decoder.layers.0.fc1.weight")
    refused = 0
    for rank in range(4):
        try:
            fill(folder, range(2 * rank, 2 * rank + 2), share=(rank, 4))
        except ValueError as error:
            refused += "model-shared.pt: decoder.layers.0.fc1.weight is damaged" in str(error)
    assert refused == 1


def test_ranks_that_read_one_file_check_all_of_it(folder, monkeypatch):
    """Experts and what all ranks read lie in one file: each tensor is checked by a rank, and damage ends a load."""
    parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]
    experts = 0
    whole = next(part for part in parts if "decoder.embed_tokens.weight" in part["model"])
    for part in (part for part in parts if part is not whole):
        own = {int(found[1]) for key in part["model"] if (found := re.search(r"experts\.(\d+)", key))}
        for key, tensor in part["model"].items():
            moved = re.sub(r"experts\.(\d+)", lambda m, first=experts: f"experts.{first + int(m[1])}", key)
            whole["model"][moved] = tensor
        experts += len(own)
    whole["cfg"] = next(part["cfg"] for part in parts if part.get("cfg") is not None)
    for path in folder.glob("*.pt"):
        path.unlink()
    torch.save(whole, folder / "model.pt")
    counted: list[str] = []
    check = inspection.Inspection.check
    monkeypatch.setattr(
        inspection.Inspection, "check", lambda self, part: counted.append(part[0]) or check(self, part)
    )
    four_ranks_check_what_one_does(folder, counted)


def test_rows_beyond_the_dictionary_are_part_of_what_is_checked(folder):
    path = folder / "model-shared.pt"
    weights = checkpoint.read(path)["model"]
    # Of the two copies of the tied matrix, this is the one that is read.
    record = weights.records["decoder.output_projection.weight"]
    data = bytearray(path.read_bytes())
    data[record.start + record.size - 1] ^= 1
    path.write_bytes(data)
    plan = checkpoint.survey(checkpoint.find(folder), dictionary=190)
    with pytest.raises(ValueError, match=r"model-shared\.pt: decoder\.\S+ is damaged"):
        checkpoint.fill(Transformer(plan.config), plan, range(8))


def test_the_second_load_checks_nothing_until_the_file_changes(folder, counted, monkeypatch):
    fill(folder)
    once = len(counted)
    assert once > 100
    # A file that was written a moment ago is not remembered.
    fill(folder)
    assert len(counted) == 2 * once
    monkeypatch.setattr(inspection, "SETTLED", -1)
    fill(folder)
    fill(folder)
    assert len(counted) == 3 * once
    # Other tensors are another question.
    fill(folder, range(0, 1))
    assert len(counted) > 3 * once
    counted.clear()
    os.utime(folder / "model-rank-1.pt")
    fill(folder)
    assert len(counted) == 16
    flip(folder / "model-rank-1.pt", KEY)
    with pytest.raises(ValueError, match=r"model-rank-1\.pt"):
        fill(folder)


def test_what_was_not_finite_is_remembered_too(folder, monkeypatch):
    monkeypatch.setattr(inspection, "SETTLED", -1)
    change(folder / "model-rank-2.pt", lambda state: state["model"][KEY].view(-1)[:3].fill_(float("nan")))
    for _ in range(2):
        (found,) = fill(folder).nonfinite
        assert found == ("model-rank-2.pt", KEY, 1, 5, 3, 0)


def test_where_nothing_can_be_remembered_nothing_fails(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(inspection, "SETTLED", -1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fill(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fill(folder)
    for path in (tmp_path / "moekit" / "checked").iterdir():
        path.write_text("not what was written")
    assert fill(folder)


def test_only_so_many_results_are_kept(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(inspection, "SETTLED", -1)
    monkeypatch.setattr(inspection, "MOST_REMEMBERED", 3)
    fill(folder)
    assert len(list((tmp_path / "cache" / "moekit" / "checked").iterdir())) <= 4


def test_the_oldest_results_go_several_at_a_time(monkeypatch, tmp_path):
    """The times of all results are looked at to remove some, and not to add one."""
    monkeypatch.setattr(inspection, "MOST_REMEMBERED", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, counts = tmp_path / "moekit" / "checked", []
    for number in range(13):
        inspection._keep(f"{number}", [])
        os.utime(folder / f"{number}", (number, number))
        counts.append(len(os.listdir(folder)))
    assert counts == [*range(1, 9), 7, 8, 7, 8, 7]
    assert sorted(map(int, os.listdir(folder))) == [*range(6, 13)]


def test_files_without_checksums_are_told_once(folder):
    torch.serialization.set_crc32_options(False)
    try:
        change(folder / "model-rank-1.pt", lambda state: None)
    finally:
        torch.serialization.set_crc32_options(True)
    change(folder / "model-rank-2.pt", lambda state: None, _use_new_zipfile_serialization=False)
    with pytest.warns(
        UserWarning, match=r"2 of 5 files tell no checksums .model-rank-1\.pt, model-rank-2\.pt"
    ):
        fill(folder)


def test_a_large_sum_of_finite_numbers_is_no_infinity(folder):
    """60,000 twice is infinite in half precision."""
    change(folder / "model-rank-0.pt", lambda state: state["model"][KEY].fill_(60_000))
    assert fill(folder).nonfinite == []


def test_load_warns_of_weights_that_are_not_finite(folder):
    def edit(state):
        state["model"][KEY].view(-1)[:3] = float("inf")
        state["model"][KEY.replace("experts.1", "experts.0")][0, 0] = float("nan")

    change(folder / "model-rank-3.pt", edit)
    with (
        pytest.warns(
            UserWarning, match=r"4 weights in 2 tensors are not finite.*layer 1, expert 6.: 1 NaN, 0 infinite"
        ),
        moekit.load(folder, world_size=1, progress=False) as model,
    ):
        (part,) = model.parts
        assert [(found.layer, found.expert) for found in part["nonfinite"]] == [(1, 6), (1, 7)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inspection.warn_nonfinite([])


# ------------------------------------------------------------------------------------------------ which files


def test_a_rank_far_away_is_a_gap_that_takes_no_memory(folder):
    shutil.copy(folder / "model-rank-0.pt", folder / "model-rank-99999999999.pt")
    with pytest.raises(
        ValueError,
        match=r"5 rank files up to model-rank-99999999999\.pt but lacks model-rank-4\.pt, .*8\.pt$",
    ):
        checkpoint.find(folder)


def test_copied_and_strange_shards_are_told_apart(folder, reference):
    shutil.copy(folder / "model-rank-0.pt", folder / "model-rank-2.pt")
    with pytest.raises(ValueError, match=r"model-rank-2\.pt holds the same experts as model-rank-0\.pt"):
        checkpoint.survey(checkpoint.find(folder))
    shutil.copy(reference / "checkpoint" / "model-rank-2.pt", folder)
    change(folder / "model-rank-2.pt", lambda state: state["optimizer_history"][-1].update(num_updates=9))
    with pytest.raises(
        ValueError, match=r"model-rank-2\.pt is of another training .*num_updates is 9, expected 5"
    ):
        checkpoint.survey(checkpoint.find(folder))


def rank_of_its_own(state, rank):
    """What differs by rank where every rank writes its own header, as fairseq's do, or where somebody wrote it anew."""
    state["cfg"]["distributed_training"] |= {
        "distributed_rank": rank,
        "device_id": rank,
        "distributed_port": 9000 + rank,
    }
    state["cfg"]["checkpoint"]["checkpoint_suffix"] = f"-rank-{rank}"
    state["cfg"]["task"]["data"] = f"/scratch/{rank}/data-bin"
    state["extra_state"] |= {
        "val_loss": 2.0 + rank,
        "metrics": [[rank]],
        "previous_training_time": 9.5 * rank,
    }
    state["last_optimizer_state"] = {"state": {rank: torch.zeros(2)}}


def test_the_ranks_of_one_training_may_differ_in_what_is_each_ranks_own(folder):
    for rank in range(4):
        change(folder / f"model-rank-{rank}.pt", lambda state, rank=rank: rank_of_its_own(state, rank))
    for bare in ("extra_state", "optimizer_history", "cfg"):
        change(folder / "model-shared.pt", lambda state, bare=bare: state.pop(bare))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint.survey(checkpoint.find(folder))


def test_what_may_be_another_training_is_said_and_loads(folder):
    def edit(state):
        state["extra_state"]["epoch"] = 7
        state["cfg"]["common"]["seed"] = 8

    for rank in (1, 2):
        change(folder / f"model-rank-{rank}.pt", edit)
    with pytest.warns(
        UserWarning,
        match=r"model-rank-1\.pt may be of another training than model-rank-0\.pt: extra_state\.epoch is 7, expected 1; "
        "so may 1 others",
    ) as told:
        checkpoint.survey(checkpoint.find(folder))
    assert len(told) == 1


NAMES = ["model-rank-0.pt", "model-rank-3.pt", "model-shared.pt"]


def of_the_model(**options):
    return lambda state: state["cfg"]["model"].update(options)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_training_than_all_others_is_the_one_that_is_named(folder, name):
    """It may be rank 0's, with which the others are compared."""
    path = folder / name
    like = "model-shared.pt" if name == "model-rank-0.pt" else "model-rank-0.pt"
    change(path, lambda state: state["cfg"]["common"].update(seed=77))
    with pytest.warns(
        UserWarning, match=f"^{path} may be of another training than {like}: cfg.common.seed is 77"
    ):
        checkpoint.survey(checkpoint.find(folder))
    change(path, lambda state: state["optimizer_history"][-1].update(num_updates=9))
    with pytest.raises(ValueError, match=f"^{path} is of another training than {like}: .*is 9, expected 5$"):
        checkpoint.survey(checkpoint.find(folder))


@pytest.mark.parametrize(
    "edit",
    [
        lambda state: state.update(cfg=5),
        lambda state: state.update(args="none"),
        lambda state: state["cfg"].pop("model"),
        lambda state: state["cfg"].update(model=[1]),
        lambda state: state["cfg"].update(task="x"),
    ],
)
def test_a_file_whose_config_is_damaged_is_the_one_that_is_named(folder, edit):
    for name in NAMES:
        before = (folder / name).read_bytes()
        change(folder / name, edit)
        with pytest.raises(ValueError, match=rf"^(cfg|args|cfg\['\w+'\]) in {folder / name} (is a|has no)"):
            checkpoint.survey(checkpoint.find(folder))
        (folder / name).write_bytes(before)


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_ffn_embed_dim": 68},
        {"decoder_layers": 3},
        {"moe_expert_count": 2},
        {"moe_freq": 1},
        {"decoder_learned_pos": True},
        {"moe_expert_count": 16},
    ],
)
def test_options_of_one_file_are_not_blamed_on_the_tensors_of_others(folder, options):
    """Rank 0's file has the config that counts. Where it is the odd one, it is named, and no file whose tensors do not fit it."""
    ((option, value),) = options.items()
    said = rf"cfg\.model\.{option} is {value}, expected \w+"
    for name in NAMES:
        before = (folder / name).read_bytes()
        change(folder / name, of_the_model(**options))
        if name == "model-rank-0.pt":
            with pytest.raises(
                ValueError,
                match=rf"^{folder / name} has another config than all other files \({said}\): .*with it, ",
            ):
                checkpoint.survey(checkpoint.find(folder))
        else:
            with pytest.warns(
                UserWarning, match=f"^{folder / name} may be of another training than .*: {said}"
            ):
                checkpoint.survey(checkpoint.find(folder))
        (folder / name).write_bytes(before)


@pytest.mark.parametrize(
    ("number", "more"), [(2, None), (3, None), (4, "and 1 more"), (5, "and 2 more")], ids=str
)
def test_all_options_in_which_one_file_differs_are_named_or_counted(folder, number, more):
    """The first one may be a user's change, with which the model fits the files, while another one is the cause."""
    options = {
        "activation_fn": ("relu", "gelu"),
        "decoder_ffn_embed_dim": (68, 64),
        "decoder_layers": (3, 4),
        "moe_freq": (1, 2),
        "moe_expert_count": (2, 8),
    }
    changed = dict(list(options.items())[:number])
    first = folder / "model-rank-0.pt"
    change(first, of_the_model(**{option: value for option, (value, _) in changed.items()}))
    said = [
        f"cfg.model.{option} is {value!r}, expected {before!r}" for option, (value, before) in changed.items()
    ]
    said = "; ".join(said[:3] + ([more] if more else []))
    said = re.escape(f"{first} has another config than all other files ({said}): fetch it again, ")
    with pytest.raises(ValueError, match=f"^{said}"):
        checkpoint.survey(checkpoint.find(folder))


def test_the_config_of_a_file_that_lacks_options_does_not_hide_the_one_that_differs(folder):
    """The first of the others tells only some of the options that differ; the model does not fit its config, either."""
    change(folder / "model-shared.pt", lambda state: state["cfg"]["model"].pop("moe_freq"))
    change(folder / "model-rank-0.pt", of_the_model(decoder_layers=3, moe_freq=1))
    said = r"decoder_layers is 3, expected 4; cfg\.model\.moe_freq is 1, expected 2\)"
    with pytest.raises(ValueError, match=rf"model-rank-0\.pt has another config .*{said}"):
        checkpoint.survey(checkpoint.find(folder))


def without(*names):
    def edit(state):
        for name in names:
            del state["cfg"]["model"][name]

    return edit


def in_args(state):
    """One flat ``args`` in place of ``cfg``; it wins where a file has both."""
    state |= {"args": state["cfg"]["task"] | state["cfg"]["model"] | {"decoder_layers": 3}, "cfg": {}}


TWO_OPTIONS = r"cfg\.model\.decoder_layers is 3, expected 4; cfg\.model\.moe_freq is 1, expected 2\)"


@pytest.mark.parametrize(
    ("first", "others", "said"),
    [
        (
            of_the_model(decoder_layers=3, moe_freq=1),
            {"shared": without("moe_freq")} | {f"rank-{n}": without("decoder_layers") for n in (1, 2, 3)},
            TWO_OPTIONS,
        ),
        (
            of_the_model(decoder_layers=3),
            {"shared": without("moe_freq")} | {f"rank-{n}": without("decoder_layers") for n in (1, 2, 3)},
            r"cfg\.model\.decoder_layers is 3, expected 4\)",
        ),
        (of_the_model(decoder_layers=3, moe_freq=1), {"shared": of_the_model(moe_freq=3)}, TWO_OPTIONS),
        (
            of_the_model(alternate_decoder_ffn_embed_dim=48),
            {
                name: without("alternate_decoder_ffn_embed_dim")
                for name in ("shared", "rank-1", "rank-2", "rank-3")
            },
            r"cfg\.model\.alternate_decoder_ffn_embed_dim is 48, expected None\)",
        ),
        (in_args, {}, r"cfg\.model\._name is None, expected 'transformer_lm_gpt'; .* more\)"),
    ],
    ids=["none tells all", "none tells the rest", "others differ, too", "none tells it", "another form"],
)
def test_rank_0s_config_is_named_whichever_options_other_files_tell(folder, first, others, said):
    """What most of the others tell makes the config that fits, and no file need tell all of it."""
    for name, edit in {"rank-0": first, **others}.items():
        change(folder / f"model-{name}.pt", edit)
    with pytest.raises(
        ValueError, match=rf"model-rank-0\.pt has another config than all other files \({said}"
    ):
        checkpoint.survey(checkpoint.find(folder))


def test_what_another_file_tells_too_is_not_blamed_on_rank_0s_alone(folder):
    for name in ("rank-0", "rank-1"):
        change(folder / f"model-{name}.pt", of_the_model(decoder_layers=3))
    with pytest.raises(
        ValueError, match=r"model-shared\.pt: .* has no place in the model that cfg describes"
    ):
        checkpoint.survey(checkpoint.find(folder))


@pytest.mark.parametrize("taken", [True, False], ids=["without it", "None"])
def test_an_option_that_one_file_does_not_tell_is_not_blamed_on_others(folder, taken):
    def missing(state: dict) -> None:
        model = state["cfg"]["model"]
        if taken:
            del model["moe_freq"]
        else:
            model["moe_freq"] = None

    first = folder / "model-rank-0.pt"
    change(first, missing)
    with pytest.raises(
        ValueError, match=rf"^{first} .* all other files \(cfg\.model\.moe_freq is None, expected 2\): "
    ):
        checkpoint.survey(checkpoint.find(folder))


def test_options_that_a_user_changed_are_not_blamed_for_damage(folder):
    """They are changed in rank 0's file alone, and the model fits the files with them."""
    change(folder / "model-rank-0.pt", lambda state: state["cfg"]["task"].update(tokens_per_sample=32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.survey(checkpoint.find(folder))
    change(folder / "model-rank-2.pt", lambda state: state["model"].update({KEY: torch.zeros(5)}))
    with pytest.raises(ValueError, match=rf"^{folder / 'model-rank-2.pt'}: {KEY} has shape \[5\]"):
        checkpoint.survey(checkpoint.find(folder))


def test_a_renamed_file_is_refused_only_if_it_was_another_rank(folder):
    path = folder / "model-rank-1.pt"
    for name, refused in [("model-rank-1.pt", False), ("other-rank-3.pt", False), ("model-rank-3.pt", True)]:
        state = torch.load(path, weights_only=True)
        torch.save(state, folder / name)
        if name != path.name:
            os.replace(folder / name, path)
        shutil.copy(
            Path(__file__).parent / "data/reference/checkpoint/model-rank-3.pt", folder / "model-rank-3.pt"
        )
        if refused:
            with pytest.raises(
                ValueError, match=r"model-rank-1\.pt was written as model-rank-3: were files swapped"
            ):
                checkpoint.survey(checkpoint.find(folder))
        else:
            checkpoint.survey(checkpoint.find(folder))


def test_experts_that_are_all_the_same_say_nothing_of_copies(folder):
    """As before a training that begins with copies of a dense model."""

    def edit(state):
        for key in state["model"]:
            state["model"][key] = torch.full_like(state["model"][key], 0.5)

    for rank in range(4):
        change(folder / f"model-rank-{rank}.pt", edit)
    assert checkpoint.survey(checkpoint.find(folder))


# ------------------------------------------------------------------------------------------------ reading


def test_a_survey_makes_a_tensor_of_the_version_alone(folder, monkeypatch):
    """It compares shapes and dtypes, and a tensor takes longer to make than to compare."""
    made, make = [], Header.tensor
    monkeypatch.setattr(
        Header, "tensor", lambda header, *how: made.append(header.record) or make(header, *how)
    )
    plan = checkpoint.survey(checkpoint.find(folder))
    shared = plan.opened[folder / "model-shared.pt"]
    assert made == [shared.records["decoder.version"]]
    weights = plan.opened[folder / "model-rank-2.pt"]
    assert weights[KEY] is weights[KEY] and made[1:] == [weights.records[KEY]]
    del weights[KEY]
    assert KEY not in weights and len(weights) == len(list(weights.items())) == len(weights.records) - 1


def test_two_threads_read_at_once(folder):
    import omegaconf

    for path in folder.iterdir():
        change(path, lambda state: state.update(cfg=omegaconf.OmegaConf.create(state["cfg"])))
    files, errors = checkpoint.find(folder), []

    def survey():
        try:
            for _ in range(5):
                checkpoint.survey(files)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=survey) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_what_is_neither_weights_nor_config_is_not_built(folder):
    path = folder / "model-rank-1.pt"

    def edit(state):
        state["last_optimizer_state"] = {0: torch.zeros(100)}
        state["more"] = np.zeros(3)
        more = {"a": np.float32(0.5), "b": Path("x/y"), "c": np.zeros(2), "d": {1: frozenset([2])}}
        state["extra_state"] |= more

    change(path, edit)
    state = checkpoint.read(path)
    assert set(state) == {"model", "args", "cfg", "optimizer_history", "extra_state"}
    extra = state["extra_state"]
    assert extra["a"] == 0.5 and extra["b"] == "x/y" and extra["d"] == {1: [2]}
    assert repr(extra["c"]).startswith("<numpy")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True])
def test_plain_data_is_read_from_every_protocol(folder, protocol, old):
    path = folder / "model-rank-1.pt"
    extra = [
        bytearray(b"x"),
        bytearray(),
        b"",
        range(3),
        slice(1, 2),
        {1},
        frozenset(),
        complex(1, 2),
        np.zeros(2),
    ]
    change(
        path,
        lambda state: state["extra_state"].update(more=extra),
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not old,
    )
    assert len(checkpoint.read(path)["extra_state"]["more"]) == len(extra)


def test_cut_short_says_how_many_bytes_and_what_to_do(folder):
    path = folder / "model-rank-2.pt"
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(
        ValueError, match=r"model-rank-2\.pt .* is cut short: it has 30,000 bytes .*; fetch it again$"
    ):
        checkpoint.survey(checkpoint.find(folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_sentence(folder):
    (folder / "model-rank-2.pt").chmod(0)
    with pytest.raises(ValueError, match=r"model-rank-2\.pt cannot be read .*change its permissions"):
        checkpoint.survey(checkpoint.find(folder))


@pytest.mark.parametrize(
    "kind, found",
    [("nothing", "there is no file"), ("pipe", "is a device, a pipe or a socket"), ("folder", "is a folder")],
)
def test_what_is_no_file_is_told_with_what_was_expected(tmp_path, kind, found):
    path = tmp_path / "model.pt"
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=rf"{found}.*; expected a file of SGLang's recorder"):
        reading.content(path, "file of SGLang's recorder")
    with pytest.raises(ValueError, match=rf"{found}.*; expected a checkpoint file"):
        checkpoint.read(path)


def test_an_archive_of_more_than_4_gb_has_its_sizes_elsewhere(tmp_path):
    """Sizes and places that do not fit into 32 bits stand in an extra field; here they are small and stand there, too."""
    torch.save({"model": {"x": torch.arange(3.0)}}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    data, directory = b"", b""
    for name, member in content.items():
        crc, start, spelled = zipfile.crc32(member), len(data), name.encode()
        data += (
            struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, 2**32 - 1, 2**32 - 1, len(spelled), 20)
            + spelled
        )
        data += struct.pack("<2H2Q", 1, 16, len(member), len(member)) + member
        sizes = struct.pack("<4H3Q", 7, 0, 1, 24, len(member), len(member), start)
        fields = (
            b"PK\1\2",
            45,
            45,
            0,
            0,
            0,
            0,
            crc,
            2**32 - 1,
            2**32 - 1,
            len(spelled),
            len(sizes),
            0,
            0,
            0,
            0,
            2**32 - 1,
        )
        directory += struct.pack("<4s6H3L5H2L", *fields) + spelled + sizes
    ends = len(data) + len(directory)
    end = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(content), len(content), len(directory), len(data)
    )
    end += struct.pack("<4sLQL", b"PK\6\7", 0, ends, 1)
    end += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    (tmp_path / "y.pt").write_bytes(data + directory + end)
    with zipfile.ZipFile(tmp_path / "y.pt") as archive:
        assert archive.testzip() is None
    assert checkpoint.read(tmp_path / "y.pt")["model"]["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02]q",
        b"\x80\x02X\xff\xff\xff\x7fx.",
        b"(((",
        b"\x80\x04\x8c\x03ab",
        b"h\0.",
    ],
)
def test_damaged_pickles_raise_one_kind_of_error(data):
    with pytest.raises(Unreadable):
        parse(data)


@pytest.mark.parametrize(
    "data",
    [
        b"}K\x01a",
        b"}(K\x01K\x02e",
        b"}(K\x01\x90",
        b"\x8fK\x01a",
        b"](K\x01\x90",
        b"]K\x01K\x02s",
        b"}cos\nsystem\na",
    ],
)
def test_only_a_list_is_appended_to_and_only_a_set_gets_members(data):
    with pytest.raises(Unreadable, match="damaged pickle"):
        parse(b"\x80\x04" + data + b".")
    for whole, value in (
        (b"]K\x01a", [1]),
        (b"](K\x01K\x02e", [1, 2]),
        (b"\x8f(K\x01\x90", [1]),
        (b"}K\x01K\x02s", [(1, 2)]),
    ):
        assert list(parse(b"\x80\x04" + whole + b".").value) == value


@hypothesis.given(
    data=st.binary(max_size=200), start=st.sampled_from([b"", b"\x80\x02", b"\x80\x04]\x94(", b"}("])
)
@hypothesis.settings(max_examples=2 * COUNT, deadline=None, **SETTINGS)
def test_any_bytes_are_a_pickle_or_one_kind_of_error(data, start):
    with contextlib.suppress(Unreadable):
        assert parse(start + data + b".").end <= len(start + data) + 1


@hypothesis.given(
    data=st.binary(max_size=300), start=st.sampled_from([b"PK\3\4", b"\x80\x02", b"", b"PK\5\6"])
)
@hypothesis.settings(max_examples=COUNT, deadline=None, **SETTINGS)
def test_any_file_is_one_sentence_that_names_it(data, start):
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        Path(file.name).write_bytes(start + data)
        with pytest.raises(ValueError, match=re.escape(file.name)) as raised:
            checkpoint.read(Path(file.name))
    assert type(raised.value) is ValueError and str(raised.value).isprintable()


@hypothesis.given(
    name=st.one_of(
        st.text(max_size=50), st.text("a/.~-_", max_size=20), st.integers(), st.none(), st.binary()
    )
)
@hypothesis.example("a" * 5000)
@hypothesis.example("x\0y")
@hypothesis.example("~nobody-of-this-name/model.pt")
@hypothesis.settings(max_examples=COUNT, deadline=None, **SETTINGS)
def test_any_path_is_one_sentence(name):
    hypothesis.assume(name not in paths.DEMOS)
    with pytest.raises(ValueError) as raised:
        checkpoint.find(name)
    assert type(raised.value) is ValueError and len(str(raised.value)) < 700


# ------------------------------------------------------------------------------------------------ options


VALUE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=9)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@hypothesis.given(given=st.dictionaries(st.sampled_from(sorted(options.READ)), VALUE, max_size=3))
@hypothesis.settings(max_examples=2 * COUNT, deadline=None, **SETTINGS)
def test_any_options_are_a_config_within_bounds_or_one_sentence(given):
    try:
        config = options.from_fairseq(given, {}, vocab_rows=10, before_final_norm=False, where="x.pt")
    except ValueError as error:
        assert (
            str(error).startswith("x.pt")
            and len(str(error)) < 300
            and any(name in str(error) for name in given)
        )
        return
    for name, value in vars(config).items():
        expected = {"activation": str, "second_expert": str}.get(name) or type(value)
        assert type(value) is expected in (str, int, bool)
    assert (
        config.dim % config.heads == 0
        and 1 <= config.layers <= 10_000
        and 1 <= config.max_positions <= 1_000_000
    )


def test_every_option_that_is_read_is_listed():
    """What is listed may differ from one file to another; nothing else may."""
    seen: set[str] = set()

    class Noting(dict):
        def get(self, name, default=None):
            seen.add(name)
            return super().get(name, default)

    options.from_fairseq(Noting(), Noting(), vocab_rows=10, before_final_norm=False)
    assert seen == options.READ


def test_values_in_messages_are_short():
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    for value in ("x" * 10**6, nested, 10**5000, b"x" * 1000, dict.fromkeys(range(100), nested), object()):
        assert len(short(value)) <= 80


def test_a_path_that_is_no_utf8_is_one_sentence(tmp_path, reference):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    shutil.copytree(reference / "checkpoint", folder)
    with pytest.raises(
        ValueError, match=r"b.udcff/model-.* has bytes in its path that are no UTF-8"
    ) as caught:
        checkpoint.survey(checkpoint.find(folder))
    assert str(caught.value).isprintable()


def test_a_file_on_a_disk_that_fails_is_named(reference, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(ValueError, match=r"model-rank-1\.pt is not a readable .* it cannot be read \(Input"):
        checkpoint.read(reference / "checkpoint" / "model-rank-1.pt")


@pytest.mark.parametrize("dtype", inspection.INFINITE)
def test_the_bits_of_a_number_tell_whether_it_is_finite(dtype):
    """Every number of 16 bits, and of 32 those around the limits and some others, alone among finite ones."""
    if dtype.itemsize == 2:
        bits = np.arange(1 << 16, dtype=np.uint16)
    else:
        edges = [at + near for at in (0, 0x7F800000, 0x80000000, 0xFF800000) for near in range(-3, 4)]
        others = np.random.default_rng(0).integers(0, 1 << 32, 1000)
        bits = np.concatenate([np.array(edges) % (1 << 32), [0xFFFFFFFF], others]).astype(np.uint32)
    numbers = torch.from_numpy(bits.copy()).view(dtype)
    finite = numbers.isfinite()
    assert finite.any() and not finite.all()
    for number, wanted in zip(numbers, finite.tolist(), strict=True):
        among = torch.tensor([1.0, -2.0, 0.0]).to(dtype)
        among[1] = number
        # It need not be aligned in its file.
        memory = np.concatenate([np.zeros(1, np.uint8), among.view(torch.uint8).numpy()])
        assert inspection._finite(Stretch(memory, 1, dtype, (3,))) == wanted, number
    assert inspection._finite(Stretch(np.zeros(0, np.uint8), 0, dtype, (0, 5)))


def test_a_file_that_is_replaced_while_it_is_opened_is_named(tmp_path, monkeypatch):
    """Its headers would come from the one file, and its numbers from the other."""
    path, other = tmp_path / "file.pt", tmp_path / "other.pt"
    for number, file in enumerate((path, other)):
        torch.save({"model": {"w": torch.full((6,), float(number))}}, file)

    def late(file, *how, **more):
        if "buffering" in more:
            os.replace(other, path)
        return open(file, *how, **more)

    monkeypatch.setattr(reading, "open", late, raising=False)
    with pytest.raises(ValueError, match=r"file\.pt was replaced or written to while it was opened"):
        reading.content(path, "file")
    monkeypatch.undo()
    assert reading.content(path, "file")["model"]["w"].tolist() == [1.0] * 6


def test_parameters_that_cannot_be_filled_are_no_copies(reference):
    """A stack of experts whose numbers do not lie one after the other."""
    plan = checkpoint.survey(checkpoint.find(reference / "checkpoint"))
    model = Transformer(plan.config).requires_grad_(False)
    stack = next(layer.moe.experts.w1 for layer in model.layers if layer.moe is not None)
    stack.data = torch.zeros(stack.shape[0], stack.shape[2], stack.shape[1]).transpose(1, 2)
    with pytest.raises(RuntimeError, match="view"):
        checkpoint.fill(model, plan, range(plan.config.experts))
