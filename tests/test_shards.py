"""What the branch's trainer writes on many GPUs: shards, copies and parts, beside the same model in plain files.

``data/branch_shards/shards.tar.xz`` holds checkpoints of one seed that the ``moe`` branch wrote itself (commit ebea0072,
torch 1.9.1, fairscale 0.4.0, gloo on the CPU): its ``TransformerLanguageModel`` and Adam, saved by ``Trainer.state_dict``
and ``torch_persistent_save``. ``plain`` is of pytorch_ddp, ``copies`` of fully_sharded, ``flat`` and ``wrapped`` of
fully_sharded with --use-sharded-state (``wrapped`` with every layer as a module of its own); on 4 ranks with 2 experts,
and on 3 with 3. ``logprobs.npz`` holds what the branch's model computes from ``plain``, and from what its
``consolidate_fsdp_shards`` makes of ``flat`` and ``wrapped`` of the 3 ranks, with a capacity that drops no token; of 4
ranks with 2 experts that function ends in an AssertionError.
"""

import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import moekit
from moekit import checkpoint
from moekit.checkpoint.export import save
from moekit.nn.passes import Pass
from moekit.nn.quantise import KINDS
from moekit.nn.transformer import Transformer, empty

DATA = Path(__file__).parent / "data" / "branch_shards" / "shards.tar.xz"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    with tarfile.open(DATA) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(path, ranks: int = 1) -> dict[str, torch.Tensor]:
    """All weights, put together again from what each of ``ranks`` ranks read."""
    plan = checkpoint.survey(checkpoint.find(path))
    found: dict[str, list] = {}
    for rank in range(ranks):
        held = range(rank * plan.config.experts // ranks, (rank + 1) * plan.config.experts // ranks)
        model = Transformer(plan.config, len(held)).float()
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        checkpoint.fill(model, plan, held)
        for name, parameter in model.named_parameters():
            found.setdefault(name, []).append(parameter.detach())
    return {n: torch.cat(parts) if ".moe.experts." in n else parts[0] for n, parts in found.items()}


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, one in a.items():
        assert torch.equal(one, b[name]), name


def change(path: Path, edit, to: Path | None = None) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, to or path)


@pytest.mark.parametrize("kind", ["flat", "wrapped"])
@pytest.mark.parametrize(
    "case, ranks", [("4ranks_2experts", 1), ("4ranks_2experts", 2), ("3ranks_3experts", 3)]
)
def test_sharded_state_is_the_plain_state(written, case, kind, ranks):
    plain = weights(written / case / "plain")
    assert all(not one.isnan().any() for one in plain.values())
    same(weights(written / case / kind, ranks), plain)
    same(weights(written / case / kind / "checkpoint_last.pt"), plain)
    same(weights(written / case / kind / "checkpoint_last-rank-1-shard1.pt"), plain)


@pytest.mark.parametrize("kind", ["plain", "copies", "flat", "wrapped"])
@pytest.mark.parametrize("case", ["4ranks_2experts", "3ranks_3experts"])
def test_log_probabilities_are_those_of_the_branch(written, case, kind):
    recorded = np.load(DATA.with_name("logprobs.npz"))
    model = moekit.module(written / case / kind)
    with torch.no_grad():
        logits = model(torch.from_numpy(recorded[f"{case}_ids"]), Pass(fraction=1.0))
    np.testing.assert_allclose(logits.log_softmax(-1).numpy(), recorded[case], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "one", "other"),
    [
        ("plain", "rank-0", "rank-2"),
        ("wrapped", "rank-1-shard1", "rank-2-shard2"),
        ("flat", "shared-shard0", "shared-shard1"),
    ],
)
def test_swapped_files_are_refused(written, tmp_path, folder, one, other):
    """Their archives have one name, and each tells the rank that wrote it."""
    there = shutil.copytree(written / "3ranks_3experts" / folder, tmp_path / "there")
    one, other = (there / f"checkpoint_last-{part}.pt" for part in (one, other))
    checkpoint.survey(checkpoint.find(there))
    one.rename(there / "kept")
    other.rename(one)
    (there / "kept").rename(other)
    with pytest.raises(ValueError, match=rf"{one} was written by rank \d: were files swapped"):
        checkpoint.survey(checkpoint.find(there))


def test_results_are_those_of_the_plain_files(written):
    folder, ids = written / "4ranks_2experts", [[5, 6, 7, 8, 9], [10, 11]]
    with moekit.load(folder / "plain", 1, "cpu", progress=False) as model:
        expected = model.score(ids)
    for kind in ("flat", "wrapped"):
        with moekit.load(folder / kind, 2, "cpu", progress=False) as model:
            found = model.score(ids)["logprob"]
        # Two ranks add up rows in other numbers than one.
        np.testing.assert_allclose(found, expected["logprob"], rtol=0, atol=1e-6)


def test_other_copies_of_the_shared_part_are_not_opened(written, tmp_path):
    folder = shutil.copytree(written / "3ranks_3experts" / "copies", tmp_path / "copies")
    assert [path.name for path in checkpoint.find(folder).common] == ["checkpoint_last-shared-shard0.pt"]
    (folder / "checkpoint_last-shared-shard2.pt").write_bytes(b"damaged")
    (folder / "checkpoint_last-shared-shard1.pt").unlink()
    same(weights(folder), weights(written / "3ranks_3experts" / "plain"))


def test_whole_files_beside_the_shards_they_were_made_of_are_read(written, tmp_path):
    for kind in ("plain", "flat"):
        shutil.copytree(written / "3ranks_3experts" / kind, tmp_path, dirs_exist_ok=True)
    assert checkpoint.find(tmp_path).shared.name == "checkpoint_last-shared.pt"
    assert (
        checkpoint.find(tmp_path / "checkpoint_last-shared-shard1.pt").shared.name
        == "checkpoint_last-shared-shard0.pt"
    )


@pytest.mark.parametrize("shard", [0, 1, 3])
def test_a_shard_that_is_missing_is_named(written, tmp_path, shard):
    folder = shutil.copytree(written / "4ranks_2experts" / "flat", tmp_path / "flat")
    (folder / f"checkpoint_last-shared-shard{shard}.pt").unlink()
    said = (
        r"the 3 shards up to \S*-shard2\.pt \(is one missing\?\) have 3 layers"
        if shard == 3
        else rf"lacks \S*-shared-shard{shard}\.pt"
    )
    with pytest.raises(ValueError, match=said):
        weights(folder)


def test_half_an_expert_is_noticed(written, tmp_path):
    folder = shutil.copytree(written / "4ranks_2experts" / "flat", tmp_path / "flat")
    for rank in (2, 3):
        (folder / f"checkpoint_last-rank-{rank}-shard{rank}.pt").unlink()
    with pytest.raises(
        ValueError, match=r"of the \d+ numbers of layers\.1\.moe\.experts\.\w+ \(expert 0\) no file fills"
    ):
        weights(folder)


def drop_metadata(state):
    del state["shard_metadata"]


def break_shapes(state):
    for module in state["shard_metadata"]["param_metadata"]:
        for one in module["params"].values():
            one["shapes"] = [(-1, 2)] * len(one["names"])


def other_padding(state):
    for module in state["shard_metadata"]["param_metadata"]:
        for one in module["params"].values():
            one["padding"] += 1


def other_name(state):
    for module in state["shard_metadata"]["param_metadata"]:
        for one in module["params"].values():
            one["names"][0] = one["names"][-1]


@pytest.mark.parametrize(
    "edit, said",
    [
        (
            drop_metadata,
            r"flat_param_0 is a part of several tensors, .*--use-sharded-state, .*consolidate_fsdp_shards",
        ),
        (break_shapes, r"its shard_metadata does not describe \S*flat_param_0"),
        (other_padding, r"is not part 0 of [\d,]+: was the file renamed"),
        (other_name, "no file holds decoder.embed_tokens.weight|is there twice"),
    ],
)
def test_what_the_metadata_must_tell(written, tmp_path, edit, said):
    folder = shutil.copytree(written / "4ranks_2experts" / "flat", tmp_path / "flat")
    change(folder / "checkpoint_last-shared-shard0.pt", edit)
    with pytest.raises(ValueError, match=said):
        weights(folder)


def test_a_shard_under_another_number_is_noticed(written, tmp_path):
    folder = shutil.copytree(written / "3ranks_3experts" / "flat", tmp_path / "flat")
    last, first = (folder / f"checkpoint_last-shared-shard{n}.pt" for n in (2, 0))
    content = last.read_bytes(), first.read_bytes()
    first.write_bytes(content[0])
    last.write_bytes(content[1])
    with pytest.raises(ValueError, match=r"is not part 0 of"):
        weights(folder)


@pytest.fixture
def sixteen(reference, tmp_path):
    """The reference model as 16 ranks write it: rank r holds expert r % 8."""
    plan = checkpoint.survey(checkpoint.find(reference / "checkpoint"))
    model = Transformer(plan.config)
    checkpoint.fill(model, plan, range(8))
    save(model, tmp_path / "sixteen", 8)
    for rank in range(8):
        change(
            tmp_path / "sixteen" / f"model-rank-{rank}.pt",
            lambda _: None,
            tmp_path / "sixteen" / f"model-rank-{rank + 8}.pt",
        )
    return tmp_path / "sixteen"


def test_of_more_ranks_than_experts_each_expert_is_read_once(sixteen, reference):
    same(weights(sixteen, 4), weights(reference / "checkpoint"))
    (sixteen / "model-rank-9.pt").write_bytes(b"never opened")
    same(weights(sixteen), weights(reference / "checkpoint"))
    # 15 ranks are no whole number of copies.
    (sixteen / "model-rank-15.pt").unlink()
    with pytest.raises(ValueError, match="a file too many|not a readable"):
        weights(sixteen)


def test_the_optimizer_s_state_is_not_read(written, tmp_path):
    folder = shutil.copytree(written / "4ranks_2experts" / "plain", tmp_path / "plain")
    expected = weights(folder)
    for path in folder.iterdir():
        state = torch.load(path, weights_only=True)
        moments = [one["exp_avg"] for one in state["last_optimizer_state"]["state"].values()]
        assert moments
        for one in moments:
            one.fill_(1 / 3)
        torch.save(state, path)
        data, number = bytearray(path.read_bytes()), torch.tensor([1 / 3]).numpy().tobytes()
        at = data.find(number * 4)
        assert at > 0
        # Damage, which the checksum of a tensor that is read would tell.
        data[at] ^= 1
        path.write_bytes(data)
    same(weights(folder), expected)


@pytest.mark.parametrize("wrap", ["module.{}", "module._fsdp_wrapped_module._fpw_module.{}"])
def test_names_that_wrappers_have_lengthened(reference, tmp_path, wrap):
    folder = shutil.copytree(reference / "checkpoint", tmp_path / "wrapped")
    for path in folder.iterdir():
        change(
            path,
            lambda state: state.update(model={wrap.format(key): one for key, one in state["model"].items()}),
        )
    same(weights(folder), weights(reference / "checkpoint"))
    key = wrap.format("decoder.layer_norm.bias")
    change(
        folder / "model-shared.pt",
        lambda state: state["model"].update({"decoder.layer_norm.bias": state["model"][key]}),
    )
    with pytest.raises(ValueError, match="has no shared part of 'model'|is there twice"):
        weights(folder)


def test_parts_of_megatron_are_named_as_what_they_are(written, tmp_path):
    shutil.copy(
        written / "3ranks_3experts" / "plain" / "checkpoint_last-shared.pt",
        tmp_path / "checkpoint_last-model_part-0.pt",
    )
    for path in (tmp_path, tmp_path / "checkpoint_last-model_part-0.pt"):
        with pytest.raises(
            ValueError, match=r"model_part-0\.pt is one part of a model that Megatron's --model-parallel-size"
        ):
            checkpoint.find(path)
    # Another checkpoint in the same folder is found.
    shutil.copytree(written / "3ranks_3experts" / "plain", tmp_path, dirs_exist_ok=True)
    assert checkpoint.find(tmp_path).shared.name == "checkpoint_last-shared.pt"


def test_a_dense_model_whose_first_shard_holds_all(tmp_path, written):
    plan = checkpoint.survey(checkpoint.find(written / "3ranks_3experts" / "plain"))
    config = type(plan.config)(**{**vars(plan.config), "moe_freq": 1, "layers": 2, "alternate_ffn_dim": 20})
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    save(model, tmp_path / "plain", 1)
    folder = tmp_path / "shards"
    folder.mkdir()
    change(tmp_path / "plain" / "model.pt", lambda state: None, folder / "checkpoint_last-shard0.pt")
    change(
        folder / "checkpoint_last-shard0.pt",
        lambda state: state.update(model={}),
        folder / "checkpoint_last-shard1.pt",
    )
    same(weights(folder), weights(tmp_path / "plain" / "model.pt"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_matrices_that_are_cut_are_quantised_whole(written, kind):
    """The parts of a matrix end within rows; its scales are those of the matrix in one file."""
    found = []
    for how in ("plain", "flat"):
        plan = checkpoint.survey(checkpoint.find(written / "4ranks_2experts" / how))
        for held in (range(plan.config.experts), range(1, plan.config.experts)):
            model = empty(plan.config, torch.device("cpu"), held=len(held), kind=kind)
            checkpoint.fill(model, plan, held, threads=2)
            found.append(model.state_dict())
    assert any(weights.cut for weights in map(plan.open, plan.sources))
    for one, other in zip(found[:2], found[2:], strict=True):
        assert one.keys() == other.keys() and any(name.endswith("w1_scale") for name in one)
        for name, tensor in one.items():
            assert tensor.view(torch.uint8).equal(other[name].view(torch.uint8)), name


def test_the_table_of_files_tells_shards(written):
    rows = checkpoint.describe(written / "4ranks_2experts" / "flat")
    assert [(row["kind"], row["rank"]) for row in rows] == [("shared", None)] * 4 + [
        ("rank", r) for r in range(4)
    ]
    assert all(re.search(r"-shard\d\.pt$", row["file"]) for row in rows)


@pytest.mark.parametrize("kind", ["rank-{0}-shard{0}", "shared-shard{0}"])
def test_shards_that_were_swapped_are_refused(written, tmp_path, kind):
    """torch writes a file's name into it, if it is given a name and not an open file."""
    folder = shutil.copytree(written / "3ranks_3experts" / "flat", tmp_path / "flat")
    first, second = (folder / f"checkpoint_last-{kind.format(number)}.pt" for number in (0, 1))
    for path in (first, second):
        change(path, lambda state: None)
    same(weights(folder), weights(written / "3ranks_3experts" / "plain"))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    with pytest.raises(
        ValueError, match=rf"{first.stem}\.pt was written as {second.stem}: were files swapped"
    ):
        weights(folder)


@pytest.mark.parametrize("kind", ["flat", "wrapped"])
def test_a_part_copied_over_another_is_refused(written, tmp_path, kind):
    folder = shutil.copytree(written / "3ranks_3experts" / kind, tmp_path / "copied")
    shutil.copy(folder / "checkpoint_last-shared-shard0.pt", folder / "checkpoint_last-shared-shard1.pt")
    with pytest.raises(ValueError, match="shared-shard1.pt holds the same part as .*shared-shard0.pt"):
        checkpoint.survey(checkpoint.find(folder))
