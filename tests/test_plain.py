"""The model as one plain module: names, hooks, gradients, and a loop that learns one domain."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from branch_cases import CASES, Case, build

import moekit
from moekit import checkpoint, paths, plain
from moekit.checkpoint.export import save
from moekit.data.codec import Codec
from moekit.nn.gate import Edit, balance_loss
from moekit.nn.passes import Pass
from moekit.nn.positions import sinusoids

IDS = [[5, 6, 7, 8, 9, 10, 11, 12], [40, 41, 42, 43, 44, 45, 46, 47]]


@pytest.fixture
def folder(reference):
    return reference / "checkpoint"


@pytest.fixture
def model(folder):
    return moekit.module(folder)


def test_it_computes_what_score_computes(model, folder):
    with moekit.load(folder, 2, "cpu", progress=False) as loaded:
        expected = loaded.score(IDS, capacity_token_fraction=1.0)
    # Each text begins after </s>.
    tokens = torch.tensor([[2, *ids] for ids in IDS])
    found = F.log_softmax(model(tokens, Pass(fraction=1.0)), -1)[:, :-1]
    found = found.gather(-1, tokens[:, 1:, None]).flatten()
    torch.testing.assert_close(
        found.detach(), torch.tensor(expected["logprob"].values).float(), rtol=0, atol=1e-5
    )


def test_it_can_be_loaded_and_trained_where_a_notebook_is_in_inference_mode(model, folder):
    with torch.inference_mode():
        again = moekit.module(folder)
    assert not any(p.is_inference() for p in again.parameters())
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_every_submodule_has_a_documented_name(model):
    inner = re.compile(r".*\.(activation|rule)$")
    found = {re.sub(r"^layers\.\d+", "layers.N", n) for n, _ in model.named_modules()} - {"", "layers"}
    assert {name for name in found if not inner.match(name)} <= plain.NAMES.keys()
    assert {"layers.N.moe.gate", "layers.N.attn.qkv", "layers.N.moe.experts"} <= found


def test_a_hook_on_the_gate_is_a_mask(model, folder):
    """What an editing tool does to the logits of an expert is what route(mask=...) does."""
    model.layers[1].moe.gate.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([3, 5]), -torch.inf)
    )
    tokens = torch.tensor([[2, *ids] for ids in IDS])
    found = (
        F.log_softmax(model(tokens, Pass(fraction=1.0)), -1)[:, :-1].gather(-1, tokens[:, 1:, None]).flatten()
    )
    with moekit.load(folder, 1, "cpu", progress=False) as loaded, loaded.route(mask={1: [3, 5]}):
        expected = loaded.score(IDS, capacity_token_fraction=1.0)
    torch.testing.assert_close(
        found.detach(), torch.tensor(expected["logprob"].values).float(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("learned", [False, True])
def test_hooks_that_write_to_what_comes_out_change_no_weights(learned, monkeypatch, tmp_path):
    """The places of tokens are rows of a table, which later passes and other models read, too."""
    monkeypatch.setitem(CASES, "edited", Case({"learned_positions": learned}))
    build("edited", tmp_path)
    model, tokens = moekit.module(tmp_path), torch.tensor(IDS)

    def zeroed(module, inputs, output):
        for tensor in output if isinstance(output, tuple) else (output,):
            if tensor is not None:
                tensor.zero_()

    with torch.no_grad():
        before = model(tokens)
        for name in ("embed", "positions", "layers.0.attn_norm", "layers.1.moe", "layers.1.moe.gate", "norm"):
            hook = model.get_submodule(name).register_forward_hook(zeroed)
            assert not model(tokens).equal(before), name
            hook.remove()
            assert model(tokens).equal(before), name


def test_positions_that_inference_made_take_part_in_gradients(model):
    sinusoids.cache_clear()
    with torch.inference_mode():
        model(torch.tensor(IDS))
    places = []
    model.positions.register_forward_hook(
        lambda module, inputs, output: places.append(output.requires_grad_())
    )
    model(torch.tensor(IDS)).logsumexp(dim=-1).sum().backward()
    assert places[0].grad.abs().sum() > 0


def test_an_edit_in_nnsight_is_a_mask(model, folder):
    """Of a layer's output, which another module computes without two experts, and of the logits of its gate."""
    nnsight = pytest.importorskip("nnsight")
    tokens = torch.tensor([[2, *ids] for ids in IDS])
    without = torch.zeros(8, dtype=torch.bool)
    without[[3, 5]] = True
    other, edited = moekit.module(folder), nnsight.NNsight(model)
    masked = Pass(fraction=1.0, edit=lambda layer, config: Edit(mask=without))
    with torch.no_grad():
        with edited.trace(tokens, Pass(fraction=1.0)):
            read = edited.layers[1].moe.input
            edited.layers[1].moe.output = other.layers[1].moe(read, masked)
            of_output = edited.output.save()
        with edited.trace(tokens, Pass(fraction=1.0)):
            logits = edited.layers[1].moe.gate.output
            edited.layers[1].moe.gate.output = logits.masked_fill(without, -torch.inf)
            of_gate = edited.output.save()
    with moekit.load(folder, 1, "cpu", progress=False) as loaded, loaded.route(mask={1: [3, 5]}):
        expected = torch.tensor(loaded.score(IDS, capacity_token_fraction=1.0)["logprob"].values).float()
    for found in (of_output, of_gate):
        found = F.log_softmax(found, -1)[:, :-1].gather(-1, tokens[:, 1:, None]).flatten()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_gate_that_draws_draws_from_torchs_generator(tmp_path):
    build("pads_take_places", tmp_path)
    drawn = moekit.module(tmp_path)
    for layer in drawn.layers[1::2]:
        layer.moe.rule.config = replace(drawn.config, second_expert="sampling")
    tokens = torch.tensor(IDS)
    with torch.no_grad():
        torch.manual_seed(0)
        first = drawn(tokens)
        assert not drawn(tokens).equal(first)
        torch.manual_seed(0)
        assert drawn(tokens).equal(first)


def test_gradients_are_those_of_a_small_step(model):
    """Of an expert's weight, the gate's and the embedding's, against the difference quotient; the gate computes in float32."""
    model = model.double()
    tokens = torch.tensor(IDS)

    def loss():
        return F.cross_entropy(
            model(tokens, Pass(fraction=1.0))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )

    loss().backward()
    for name in (
        "layers.1.moe.experts.w2",
        "layers.3.moe.gate.weight",
        "embed.weight",
        "layers.0.attn.qkv.weight",
    ):
        parameter = model.get_parameter(name)
        at = parameter.grad.abs().flatten().argmax()
        numbers, step = parameter.data.view(-1), 1e-3
        numbers[at] += step
        above = loss().item()
        numbers[at] -= 2 * step
        below = loss().item()
        numbers[at] += step
        assert (above - below) / (2 * step) == pytest.approx(parameter.grad.flatten()[at].item(), rel=1e-4), (
            name
        )


def test_twenty_lines_lower_the_loss_on_one_domain_of_the_demo(tmp_path):
    torch.manual_seed(0)
    texts = (paths.DEMO_TEXT / "valid.txt").read_text().splitlines()
    domains = (paths.DEMO_TEXT / "valid.domains.txt").read_text().splitlines()
    chosen = max(set(domains), key=domains.count)
    codec = Codec.load("demo")
    ids = [
        token
        for text, domain in zip(texts, domains, strict=True)
        if domain == chosen
        for token in codec.encode(text)
    ]
    blocks = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    held_out, train = blocks[:8], blocks[8:]

    model = moekit.module("demo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

    def loss_of(tokens, asked=None):
        return F.cross_entropy(model(tokens, asked)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    with torch.no_grad():
        before = loss_of(held_out).item()
    for step in range(12):
        routings = []
        batch = train[torch.arange(8 * step, 8 * step + 8) % len(train)]
        loss = loss_of(batch, Pass(record=lambda _, routing: routings.append(routing)))  # noqa: B023
        total = loss + 0.01 * sum(map(balance_loss, routings))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        after = loss_of(held_out).item()
    assert after < before - 0.02
    assert all(parameter.grad is not None for parameter in model.parameters())
    # What was learned is a checkpoint again.
    save(model, tmp_path / "tuned", 4, dtype=torch.float32)
    again = moekit.module(tmp_path / "tuned")
    with torch.no_grad():
        assert again(held_out).equal(model(held_out))
    assert len(checkpoint.find(tmp_path / "tuned").ranks) == 4


@pytest.mark.parametrize(
    "options, said", [({"dtype": "int8"}, "dtype"), ({"device": "abacus"}, "device='abacus'")]
)
def test_arguments_that_make_no_sense_are_named(folder, options, said):
    with pytest.raises(ValueError, match=said):
        moekit.module(folder, **options)


@pytest.mark.parametrize("device", [None, [], 5, "xla", "meta", "cuda:99", "\0"])
def test_a_device_that_cannot_hold_weights(folder, device):
    with pytest.raises(ValueError, match="device="):
        moekit.module(folder, device=device)


@pytest.mark.parametrize(
    "told, said",
    [
        ({"folder": None}, "folder=None"),
        ({"folder": "a\0b"}, "folder="),
        ({"files": 1.5}, r"files=1\.5"),
        ({"files": None}, "files=None"),
        ({"files": 9}, "files=9: expected 1 to 8"),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear"),
        ({"no_such_thing": 1}, "no such option"),
    ],
)
def test_what_cannot_be_saved_is_one_sentence(model, tmp_path, told, said):
    with pytest.raises(ValueError, match=said):
        save(**({"model": model, "folder": tmp_path / "made"} | told))
    assert not (tmp_path / "made").exists()


def test_a_folder_with_another_checkpoint_is_not_mixed_with_this_one(model, folder, tmp_path):
    """Otherwise a load would read the older files in place of these, or beside them."""
    save(model, tmp_path, 4)
    with torch.no_grad():
        model.norm.weight.mul_(2)
    save(model, str(tmp_path), 4)
    with pytest.raises(ValueError, match=r"holds another checkpoint \(model-rank-2.pt\)"):
        save(model, tmp_path, 2)
    with pytest.raises(ValueError, match=r"holds another checkpoint \(model-rank-0.pt\)"):
        save(moekit.module("demo-dense"), tmp_path)
    assert torch.equal(moekit.module(tmp_path).norm.weight, model.norm.weight)


@pytest.mark.parametrize("room", [4096, 65536])
def test_files_without_room_leave_the_earlier_checkpoint(folder, model, tmp_path, room):
    """With a limit on the size of files, which the larger of the model's exceed at different places."""
    save(model, tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import resource, sys, moekit; from moekit.checkpoint.export import save\n"
        "model = moekit.module(sys.argv[1])\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "try: save(model, sys.argv[2], 1)\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.startswith(f"NotWritten {tmp_path}: the disk is full or the file too large"), ran.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_models_are_made_without_torchs_compiler():
    """Its import takes a second of each process, and no rank inherits it."""
    code = (
        "import sys, moekit\n"
        "def compiler(rank=None): return 'torch.fx.experimental.symbolic_shapes' in sys.modules\n"
        "moekit.module('demo'); found = [compiler()]\n"
        "for how in ({}, {'experts': 'int8'}, {'world_size': 2}):\n"
        "    with moekit.load('demo', device='cpu', progress=False, **how) as model:\n"
        "        model.score('Once upon a time')\n"
        "        found += [compiler(), *model.ranks.call(compiler)]\n"
        "print(found)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout == f"{[False] * 8}\n", ran.stdout + ran.stderr
