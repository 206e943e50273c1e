"""A file with the experts of a whole model is read like any other, and what a file may cost grows with what it holds."""

import gc
import struct

import pytest
import torch
from hostile_pickles import forget_peak, peak

import moekit
from moekit import checkpoint
from moekit.checkpoint import archive, pickles
from moekit.nn.dispatch import owned

# The 52B has as many experts; its layers are as many, too, with few dims.
EXPERTS, LAYERS, DIM = 1024, 12, 4
FORMS = {
    "as torch saves": {},
    "as torch saved before 1.6": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
    "parts of one storage": {},
    "parameters": {},
}


def number(layer: int, part: int, expert: torch.Tensor | int) -> torch.Tensor | int:
    """What a part of an expert is filled with: a whole number that float16 has."""
    return (expert + 37 * part + 101 * layer) % 2048


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """One file with 49,504 tensors, as one who joins the files of a release makes it."""
    state = {
        "decoder.version": torch.tensor([3.0]),
        "decoder.embed_tokens.weight": torch.ones(40, DIM),
        "decoder.layer_norm.weight": torch.ones(DIM),
        "decoder.layer_norm.bias": torch.ones(DIM),
    }
    shapes = {"fc1.weight": (DIM, DIM), "fc1.bias": (DIM,), "fc2.weight": (DIM, DIM), "fc2.bias": (DIM,)}
    for layer in range(2 * LAYERS):
        at = f"decoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            state |= {
                f"{at}self_attn.{name}.weight": torch.ones(DIM, DIM),
                f"{at}self_attn.{name}.bias": torch.ones(DIM),
            }
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            state |= {f"{at}{name}.weight": torch.ones(DIM), f"{at}{name}.bias": torch.ones(DIM)}
        if layer % 2 == 0:
            state |= {at + name: torch.ones(shape) for name, shape in shapes.items()}
            continue
        state[f"{at}moe_layer.gate.wg.weight"] = torch.ones(EXPERTS, DIM)
        for expert in range(EXPERTS):
            for part, (name, shape) in enumerate(shapes.items()):
                filled = torch.full(shape, number(layer, part, expert), dtype=torch.float16)
                state[f"{at}moe_layer.experts.{expert}.{name}"] = filled
    model = {
        "_name": "transformer_lm_gpt",
        "decoder_layers": 2 * LAYERS,
        "decoder_embed_dim": DIM,
        "decoder_ffn_embed_dim": DIM,
        "decoder_attention_heads": 1,
        "decoder_normalize_before": True,
        "share_decoder_input_output_embed": True,
        "moe_freq": 2,
        "moe_expert_count": EXPERTS,
    }
    path = tmp_path_factory.mktemp("large") / "model.pt"
    torch.save({"cfg": {"model": model, "task": {"tokens_per_sample": 32}}, "model": state}, path)
    return path, len(state)


def in_their_places(rank) -> int:
    """How many stacks of experts are here; each number has to be the one of its layer, part and expert."""
    held, stacks = torch.tensor(list(owned(EXPERTS, rank.world_size, rank.rank))), 0
    for layer, block in enumerate(rank.state["model"].layers):
        if block.moe is None:
            continue
        for part, name in enumerate(("w1", "b1", "w2", "b2")):
            stack = block.moe.experts.tensors[name]
            assert len(stack) == len(held)
            assert (stack.flatten(1) == number(layer, part, held)[:, None]).all(), (layer, name)
            stacks += 1
    return stacks


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_experts_of_the_52b_in_one_file(large, world_size):
    path, count = large
    assert count > 49_000
    with moekit.load(path, world_size, "cpu", progress=False, verify=world_size == 1) as model:
        assert (model.config.experts, len(model.config.moe_layers)) == (EXPERTS, LAYERS)
        assert model.ranks.call(in_their_places) == [4 * LAYERS] * world_size


def test_fifty_thousand_tensors_take_little_memory_to_read(large):
    path, count = large
    gc.collect()
    forget_peak()
    before = peak()
    assert len(checkpoint.read(path)["model"]) == count
    assert peak() - before - path.stat().st_size < 3000 * count


@pytest.fixture
def few(monkeypatch):
    """Limits that a file meets with 400 tensors, if each counts as one."""
    monkeypatch.setattr(pickles, "FEW", 3000)
    monkeypatch.setattr(pickles, "MANY", 0)
    return 400


@pytest.mark.parametrize("form", FORMS)
def test_tensors_count_as_tensors_however_they_are_written(few, tmp_path, monkeypatch, form):
    """As instructions they would be too many; and no more tensors are read than a file may have."""
    state = {f"layers.{n}.weight": torch.full((2, 3), n).float() for n in range(few)}
    if form == "parts of one storage":
        state = dict(zip(state, torch.stack(list(state.values())).unbind(), strict=True))
    if form == "parameters":
        state = {key: torch.nn.Parameter(tensor) for key, tensor in state.items()}
    path = tmp_path / "model.pt"
    torch.save({"model": state}, path, **FORMS[form])
    # Old files tell the number of their storages behind the pickle.
    storages = {"as torch saved before 1.6": 0, "parts of one storage": 1}.get(form, few)
    # The words for a storage stand with the first tensors, which are read one instruction after the other.
    monkeypatch.setattr(pickles, "MANY", few - storages)
    found = checkpoint.read(path)["model"]
    assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)
    monkeypatch.setattr(pickles, "MANY", few - storages - 10)
    with pytest.raises(ValueError, match=rf"{path} .* has more than 390 tensors in {storages} storages"):
        checkpoint.read(path)


def test_what_no_tensor_needs_is_not_read_because_there_are_storages(few, tmp_path):
    state = {f"layers.{n}.weight": torch.ones(1) for n in range(few)}
    torch.save({"model": state, "extra_state": [[] for _ in range(3000)]}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="more instructions or objects than a file of its size needs"):
        checkpoint.read(tmp_path / "model.pt")


def test_an_archive_of_too_many_members_is_refused_before_they_are_read(tmp_path):
    path, most = tmp_path / "model.pt", archive.MOST_ENTRIES
    for members, said in (
        (most + 1, rf"{path} .* {most + 1:,} members; expected {most:,}"),
        (most, "damaged"),
    ):
        directory = bytes(46 * members)
        with open(path, "wb") as file:
            file.write(archive.START + directory)
            end = file.tell()
            file.write(archive.END_64.pack(b"PK\6\6", 44, 0, 0, 0, 0, members, members, len(directory), 4))
            file.write(archive.END_64_POINTER.pack(b"PK\6\7", 0, end, 1))
            file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
        with pytest.raises(ValueError, match=said):
            checkpoint.read(path)
