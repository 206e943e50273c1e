"""Damaged, mixed-up and absurd checkpoints: one clear ValueError, or the result that the files say, to the bit.

Every mutation draws from a seed of its own, so that a failure can be repeated: its name tells mutator and seed.
``FUZZ=5000`` in the environment tries so many in place of ``COUNT``.
"""

import argparse
import collections
import gzip
import io
import itertools
import os
import pickletools
import random
import re
import shutil
import socket
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from moekit import checkpoint
from moekit.checkpoint import contents, pickles, rebuilt
from moekit.checkpoint.inspection import NonFinite
from moekit.checkpoint.objects import Call, Reference
from moekit.nn import transformer
from moekit.nn.changes import changed

COUNT = int(os.environ.get("FUZZ", 600))
NAMES = ["model-shared.pt", *(f"model-rank-{rank}.pt" for rank in range(4))]
TOKENS = torch.arange(4, 16)[None]
LINES = 700  # characters of a message, at most: a path and three values

counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)


class Told:
    """Files that say something else than the original: ``fields`` of the config, and ``edit`` of the parameters."""

    def __init__(self, edit=lambda parameters: None, **fields):
        self.edit, self.fields = edit, fields


MUTATORS = {}


def mutator(function):
    MUTATORS[function.__name__] = function
    return function


def some(rng: random.Random, folder: Path) -> Path:
    return folder / rng.choice(NAMES)


def change(path: Path, edit, **how) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path, **how)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def pack(path: Path, content, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in content:
            archive.writestr(name, data)


def positions(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of each member."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        found = {}
        for info in archive.infolist():
            lengths = struct.unpack_from("<2H", data, info.header_offset + 26)
            found[info.filename] = (info.header_offset + 30 + sum(lengths), info.file_size)
    return found


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------ bytes


@mutator
def cut(folder, rng):
    path = some(rng, folder)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return "refused"


@mutator
def insert_or_delete(folder, rng):
    path = some(rng, folder)
    data, size = path.read_bytes(), rng.choice([1, 64, 1000])
    at = rng.randrange(len(data) - size)
    path.write_bytes(
        data[:at] + (rng.randbytes(size) if rng.random() < 0.5 else b"") + data[at + rng.choice([0, size]) :]
    )
    return "either"


@mutator
def append(folder, rng):
    path = some(rng, folder)
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 64, 1000])))
    return "either"


@mutator
def bit_in_headers(folder, rng):
    path = some(rng, folder)
    inside = {at for start, size in positions(path).values() for at in range(start, start + size)}
    at = rng.choice([at for at in range(path.stat().st_size) if at not in inside])
    flip(path, at, rng.randrange(8))
    return "either"


@mutator
def bit_in_pickle(folder, rng):
    path = some(rng, folder)
    start, size = positions(path)["archive/data.pkl"]
    flip(path, rng.randrange(start, start + size), rng.randrange(8))
    return "refused"


@mutator
def bit_in_weights(folder, rng):
    path = some(rng, folder)
    start, size = rng.choice([where for name, where in positions(path).items() if "/data/" in name])
    flip(path, rng.randrange(start, start + size), rng.randrange(8))
    # Some members are never read, such as the version of the embedding.
    return "either"


@mutator
def range_of_bytes(folder, rng):
    path = some(rng, folder)
    data, size = bytearray(path.read_bytes()), rng.choice([2, 64, 4096])
    at = rng.randrange(len(data) - size)
    data[at : at + size] = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
    path.write_bytes(data)
    return "either"


# ------------------------------------------------------------------------------------------------ whole files


@mutator
def shards_swapped(folder, rng):
    """Saved under their names, as torch does since version 2; earlier files say nothing of their rank."""
    one, two = rng.sample(NAMES[1:], 2)
    for name in (one, two):
        change(folder / name, lambda state: None)
    (folder / one).rename(folder / "x")
    (folder / two).rename(folder / one)
    (folder / "x").rename(folder / two)
    return "refused"


@mutator
def shard_copied(folder, rng):
    one, two = rng.sample(NAMES[1:], 2)
    shutil.copy(folder / one, folder / two)
    return "refused"


@mutator
def shard_of_another_training(folder, rng):
    kind = rng.randrange(4)

    def edit(state):
        match kind:
            case 0:
                state["optimizer_history"][-1]["num_updates"] += 1
            case 1:
                state["extra_state"]["epoch"] += 1
            case 2:
                state["cfg"]["common"]["seed"] += 1
            case 3:
                state["cfg"]["model"]["dropout"] = 0.3
        for tensor in state["model"].values():
            tensor += 0.01

    change(some(rng, folder), edit)
    return "refused" if kind == 0 else "warned"


@mutator
def missing_or_extra(folder, rng):
    match rng.randrange(4):
        case 0:
            some(rng, folder).unlink()
        case 1:
            shutil.copy(folder / NAMES[1], folder / "model-rank-4.pt")
        case 2:
            shutil.copy(folder / NAMES[1], folder / f"model-rank-{10 ** rng.randrange(2, 12)}.pt")
        case 3:
            shutil.copy(
                folder / NAMES[1], folder / rng.choice(["model-rank-01.pt", "model-rank-٣.pt", "x.pt"])
            )
            return "same"
    return "refused"


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def _safetensors(size: int) -> bytes:
    header = b'{"x":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'
    return struct.pack("<Q", size) + header.ljust(size) + b"\0\0"


INSTEAD = [
    b"",
    b"\0",
    bytes(50_000),
    b"<!DOCTYPE html><html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    gzip.compress(b"x"),
    b"\x89PNG\r\n\x1a\n",
    b"\x89HDF\r\n\x1a\n",
    _tar(),
    *(_safetensors(size) for size in (60, 128, 200)),
    b"PK\x05\x06" + bytes(18),
    b"hello world",
    b"\xff" * 1000,
    b"]" * 1000,
    *(b"\x80" + bytes([protocol]) + b"}." for protocol in range(7)),
]


@mutator
def something_else(folder, rng):
    path = some(rng, folder)
    path.unlink()
    kind = rng.randrange(len(INSTEAD) + 4)
    if kind == len(INSTEAD):
        os.mkfifo(path)
    elif kind == len(INSTEAD) + 1:
        path.symlink_to("/dev/zero")
    elif kind == len(INSTEAD) + 2:
        path.mkdir()
    elif kind == len(INSTEAD) + 3:
        with socket.socket(socket.AF_UNIX) as one:
            here = os.getcwd()
            os.chdir(folder)
            one.bind(path.name)
            os.chdir(here)
    else:
        path.write_bytes(INSTEAD[kind])
    return "refused"


# ------------------------------------------------------------------------------------------------ keys and shapes


@mutator
def keys(folder, rng):
    path = some(rng, folder)

    def edit(state):
        model = state["model"]
        used = [
            key
            for key in model
            if not key.startswith(("decoder.version", "decoder.embed_pos", "decoder.out"))
        ]
        key = rng.choice(used)
        match rng.randrange(7):
            case 0:
                del model[key]
            case 1:
                model[key + rng.choice(["x", "\n", "\ud800", "." * 5000])] = model.pop(key)
            case 2:
                model["decoder.layers." + "9" * rng.choice([2, 30, 5000]) + ".fc1.weight"] = torch.zeros(2)
            case 3:
                model[rng.choice([1, b"x", None, (1, 2), 2.5])] = torch.zeros(2)
            case 4:
                model[key] = rng.choice([None, 1, [], "x", [model[key]]])
            case 5:
                model[key] = model[key][..., :-1].clone()
            case 6:
                model[key] = model[key].reshape(
                    rng.choice([(-1, 1, 1), (1, -1), ()]) if model[key].numel() == 1 else (-1, 1, 1)
                )

    change(path, edit)
    return "refused"


@mutator
def transposed(folder, rng):
    """Also a matrix that is there twice, tied, of which one is read."""
    path = some(rng, folder)

    def edit(state):
        keys = [key for key, tensor in state["model"].items() if tensor.dim() == 2]
        key = rng.choice([key for key in keys if len(set(state["model"][key].shape)) == 2])
        state["model"][key] = state["model"][key].t().contiguous()

    change(path, edit)
    return "refused"


@mutator
def members_swapped(folder, rng):
    """Two members of one size change places, and keep their checksums' places in the directory."""
    path = some(rng, folder)
    of_size = collections.defaultdict(list)
    for name, (start, size) in positions(path).items():
        if "/data/" in name:
            of_size[size].append(start)
    size = rng.choice([size for size, starts in of_size.items() if len(starts) > 1])
    one, other = rng.sample(of_size[size], 2)
    data = bytearray(path.read_bytes())
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    path.write_bytes(data)
    # The members may be equal.
    return "either"


@mutator
def dtypes(folder, rng):
    kind = rng.choice(["double", "float", "bfloat16", "int", "bool", "cfloat", "float8"])
    path = folder / rng.choice(NAMES[1:])
    key = rng.choice(list(torch.load(path, weights_only=True)["model"]))
    to = {"float8": torch.float8_e4m3fn}.get(kind) or getattr(torch, kind)

    def edit(state):
        state["model"][key] = state["model"][key].to(to)

    change(path, edit)
    if kind in ("int", "bool", "cfloat"):
        return "refused"
    if kind in ("double", "float"):
        return "same"
    rank = int(path.stem.rpartition("-")[2])
    return Told(lambda parameters: expert(parameters, key, rank).copy_(expert(parameters, key, rank).to(to)))


def expert(parameters, key: str, rank: int):
    """The part of the stacked weights that a key of the file of ``rank`` fills."""
    _, _, layer, _, _, local, which, kind = key.split(".")
    name = {"fc1weight": "w1", "fc1bias": "b1", "fc2weight": "w2", "fc2bias": "b2"}[which + kind]
    return parameters[f"layers.{layer}.moe.experts.{name}"][2 * rank + int(local)]


@mutator
def not_finite(folder, rng):
    rank = rng.randrange(4)
    path, value = folder / f"model-rank-{rank}.pt", rng.choice([float("nan"), float("inf"), -float("inf")])
    key = rng.choice(list(torch.load(path, weights_only=True)["model"]))
    change(path, lambda state: state["model"][key].view(-1)[:2].fill_(value))
    _, _, layer, _, _, local, *_ = key.split(".")
    nan, infinite = (2, 0) if value != value else (0, 2)
    told = Told(lambda parameters: expert(parameters, key, rank).view(-1)[:2].fill_(value))
    told.nonfinite = [NonFinite(path.name, key, int(layer), 2 * rank + int(local), nan, infinite)]
    return told


# ------------------------------------------------------------------------------------------------ cfg

# option -> the field of the config that it fills; None for what moekit refuses
OPTIONS = {
    "decoder_layers": "layers",
    "decoder_embed_dim": "dim",
    "decoder_ffn_embed_dim": "ffn_dim",
    "decoder_attention_heads": "heads",
    "decoder_input_dim": "input_dim",
    "decoder_output_dim": "output_dim",
    "max_target_positions": "max_positions",
    "moe_freq": "moe_freq",
    "moe_expert_count": "experts",
    "alternate_decoder_ffn_embed_dim": "alternate_ffn_dim",
    "base_layers": None,
    "quant_noise_pq": None,
    "activation_fn": "activation",
    "no_scale_embedding": "scale_embedding",
}
NESTED: list = []
for _ in range(40):
    NESTED = [NESTED, NESTED]
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]
VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 4, 7, 32, 64, 1e3, 2**31, 2**63, 10**9, 10**400, 1e308, float("nan"), float("inf"),
    0.5, 4.0, "", "4", "x", "False", "no", "9" * 5000, b"4", [4], {"a": 1}, NESTED, DEEP, (), argparse.Namespace(x=1),
    "${model.decoder_layers}", "${nowhere.at_all}", "relu", "gelu",
]  # fmt: skip


def with_option(folder: Path, option: str, value) -> None:
    """In the file whose config counts."""
    change(folder / NAMES[1], lambda state: state["cfg"]["model"].update({option: value}))


# What the config says where an option is True, and where it is False.
FLAGS = {
    "moe_top1_expert": ("gate", "top1", "top2"),
    "moe_gating_use_fp32": ("gate_fp32", True, False),
    "moe_normalize_gate_prob_before_dropping": ("normalize_before_dropping", True, False),
}


@mutator
def flag(folder, rng):
    option, (field, on, off) = rng.choice(list(FLAGS.items()))
    value = rng.choice([True, False, 0, 1, None, "False", "no", 2, 0.0, [], "true"])
    with_option(folder, option, value)
    return (
        Told(**{field: on if value else off})
        if value is None or (type(value) in (bool, int) and value != 2)
        else "refused"
    )


@mutator
def section(folder, rng):
    """Odd things in the place of whole sections."""
    import omegaconf

    odd = rng.choice(
        [
            None,
            1,
            "x",
            [],
            {},
            {1: 2},
            {b"x": 1},
            {"model": None},
            {"model": 3},
            {"model": {1: 2}},
            {"model": {10**5000: 1}},
        ]
        + [
            omegaconf.DictConfig("???"),
            omegaconf.DictConfig(None),
            omegaconf.ListConfig([1]),
            torch.zeros(2),
            {(1, 2): 3},
        ]
    )
    where = rng.choice(["cfg", "model"])

    def edit(state):
        if where == "cfg":
            state["cfg"] = odd
        else:
            state["cfg"]["model"] = odd

    change(folder / NAMES[1], edit)
    return "either" if odd == {} else "refused"


# ------------------------------------------------------------------------------------------------ archives


@mutator
def archive(folder, rng):
    path = some(rng, folder)
    content = list(members(path).items())
    number = rng.randrange(len(content))
    name, data = content[number]
    match rng.randrange(8):
        case 0:
            pack(path, content, zipfile.ZIP_DEFLATED)
        case 1:
            pack(path, content, zipfile.ZIP_BZIP2)
        case 2:
            pack(path, [*content, (name, data)])
        case 3:
            content[number] = (name, data[: len(data) // 2])
            pack(path, content)
            return "either"
        case 4:
            del content[number]
            pack(path, content)
            return "either"
        case 5:
            pack(path, [(n.replace("archive/", "a/b/"), d) for n, d in content])
        case 6:
            pack(path, [(n.replace("archive/", ""), d) for n, d in content])
        case 7:
            rng.shuffle(content)
            pack(path, [*content, ("archive/notes.txt", b"x")])
            return "same"
    return "refused"


@mutator
def without_checksums(folder, rng):
    torch.serialization.set_crc32_options(False)
    try:
        path = some(rng, folder)
        change(path, lambda state: None)
    finally:
        torch.serialization.set_crc32_options(True)
    return "same"


class Pretender:
    """Pickled as a call of torch's rebuilder with arguments of the test's choice."""

    def __init__(self, tensor, offset, shape, strides):
        self.arguments = (tensor._typed_storage(), offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@mutator
def views(folder, rng):
    path = folder / rng.choice(NAMES[1:])

    def edit(state):
        key = rng.choice([k for k, tensor in state["model"].items() if tensor.ndim == 2])
        tensor = state["model"][key]
        rows, columns = tensor.shape
        shape, strides = tuple(tensor.shape), (columns, 1)
        odd = [
            (1, shape, strides),
            (rows * columns, shape, strides),
            (-1, shape, strides),
            (2**62, shape, strides),
            (0, shape, (columns + 1, 1)),
            (0, shape, (-columns, 1)),
            (0, shape, (2**62, 2**62)),
            (0, (-1, columns), strides),
            (0, (2**40, columns), (0, 0)),
            (0, shape, (1,)),
            (0, [rows, columns], strides),
            (0, (rows, 1.5), strides),
            (0, (True, columns), strides),
            (0, shape, None),
        ]
        state["model"][key] = Pretender(tensor, *rng.choice(odd))

    change(path, edit)
    return "refused"


@mutator
def saved_by_others(folder, rng):
    """Forms that say the same: nothing but the bytes of the file differ."""
    import datetime
    import enum
    import pathlib

    del enum
    extra = rng.choice(
        [
            np.arange(3),
            np.float32(1.5),
            np.int64(2),
            np.array(["a", "bc"]),
            np.zeros((2, 2), bool),
            np.array(1 + 2j),
        ]
        + [
            slice(1, 2),
            frozenset([1]),
            {1, 2},
            complex(1, 2),
            datetime.datetime(2022, 1, 1),
            datetime.timedelta(1),
        ]
        + [
            pathlib.Path("a/b"),
            torch.float16,
            socket.AF_INET,
            np.dtype("int32"),
            b"bytes",
            bytearray(b"x"),
            range(3),
        ]
        + [
            collections.defaultdict(list, {"a": [1]}),
            collections.deque([1]),
            collections.Counter("aab"),
            torch.zeros(2),
        ]
        + [
            np.array(["2020-01-01"], "datetime64[D]"),
            torch.nn.Parameter(torch.zeros(2)),
            torch.device("cpu"),
            10**400,
        ]
        + [np.arange(6, dtype=">i2").reshape(2, 3).T, np.uint8(3), torch.Size([1, 2])]
    )

    def edit(state):
        state["extra_state"]["more"] = {"here": extra}
        state["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.zeros(3)}}, 1: extra}
        if rng.random() < 0.3:
            state["model"] = dict(state["model"])

    old = rng.random() < 0.4
    change(
        some(rng, folder),
        edit,
        pickle_protocol=rng.choice([2, 3, 4, 5]),
        _use_new_zipfile_serialization=not old,
    )
    return "same"


@mutator
def old_file_damaged(folder, rng):
    """Such files have no checksums: whatever is not noticed has been warned of."""
    path = some(rng, folder)
    change(path, lambda state: None, _use_new_zipfile_serialization=False)
    if rng.random() < 0.5:
        flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))
    else:
        path.write_bytes(path.read_bytes()[: -rng.randrange(1, 20_000)])
    return "warned"


# ------------------------------------------------------------------------------------------------ the trial


def result(folder: Path):
    """Features of a few tokens, and what `fill` said of the weights."""
    plan = checkpoint.survey(checkpoint.find(folder))
    model = transformer.empty(plan.config, torch.device("cpu"))
    filled = checkpoint.fill(model, plan, range(plan.config.experts))
    return plan.config, dict(model.named_parameters()), filled.nonfinite


def features(config, parameters):
    model = transformer.empty(config, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        parameter.copy_(parameters[name])
    with torch.inference_mode():
        return model(TOKENS)


@pytest.fixture(scope="module")
def original(reference):
    config, parameters, nonfinite = result(reference / "checkpoint")
    assert nonfinite == []
    return config, parameters


# Nothing of torch's own text: it advises to switch its protection off.
FOREIGN = (
    "weights_only",
    "PytorchStreamReader",
    "miniz",
    "enforce fail",
    "unpickl",
    "safe_globals",
    "Errno",
    "Traceback",
)


def trial(folder: Path, expected, original) -> str:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            config, parameters, nonfinite = result(folder)
        except ValueError as error:
            text = str(error)
            assert type(error) is ValueError, f"{type(error).__name__}: {text}"
            assert str(folder) in text, f"names no file: {text}"
            assert len(text) < LINES and "\n" not in text and text.isprintable(), (
                f"is long or odd: {text[:2000]}"
            )
            assert not any(word in text for word in FOREIGN), f"has torch's words: {text}"
            assert expected in ("refused", "either", "warned"), f"refused: {text}"
            return "a clear error"
    assert expected != "refused", "was not refused"
    if expected == "warned":
        words = ("no checksums", "may be of another training")
        assert any(word in str(one.message) for one in warned for word in words), "nothing was said"
        return "warned of"
    told = expected if isinstance(expected, Told) else Told()
    wanted = {name: parameter.clone() for name, parameter in original[1].items()}
    told.edit(wanted)
    assert config == changed(original[0], told.fields)
    for name, parameter in parameters.items():
        assert parameter.view(torch.uint8).equal(wanted[name].view(torch.uint8)), f"{name} is another"
    features(config, parameters)
    assert nonfinite == getattr(told, "nonfinite", [])
    return "as the files say" if isinstance(expected, Told) else "the reference to the bit"


CASES = [(name, seed) for seed in range(1 + COUNT // len(MUTATORS)) for name in MUTATORS][:COUNT]


@pytest.mark.parametrize("name", list(MUTATORS))
def test_a_mutated_checkpoint_is_refused_or_says_what_it_says(
    name, reference, original, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in (seed for other, seed in CASES if other == name):
        folder = shutil.copytree(reference / "checkpoint", tmp_path / f"{seed}")
        expected = MUTATORS[name](folder, random.Random(f"{name} {seed}"))
        try:
            counts[name][trial(folder, expected, original)] += 1
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_odd_option_is_refused_with_file_and_option_or_means_what_it_says(
    option, reference, original, tmp_path
):
    config, parameters = original
    for number, value in enumerate(VALUES):
        folder = shutil.copytree(reference / "checkpoint", tmp_path / f"{number}")
        try:
            with_option(folder, option, value)
            found, weights, _ = result(folder)
        except ValueError as error:
            text = str(error)
            assert str(folder) in text and len(text) < LINES and text.isprintable(), text[:2000]
            counts["the grid of options"]["a clear error"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"{option}={str(value)[:50]}: {type(error).__name__}: {error}") from error
        assert all(parameter.equal(parameters[name]) for name, parameter in weights.items())
        field = OPTIONS[option]
        if value in ("${model.decoder_layers}", "${nowhere.at_all}"):
            value = 4 if "decoder_layers" in value else None
        if field is None or value is None:
            assert not value or (isinstance(value, (int, float)) and value <= 0), value
        elif option == "no_scale_embedding":
            assert type(value) in (bool, int) and found.scale_embedding is not bool(value), value
        else:
            assert type(value) in (int, float, str) and getattr(found, field) == value, value
        features(found, weights)
        same = found == config
        counts["the grid of options"]["the reference to the bit" if same else "as the files say"] += 1
        shutil.rmtree(folder)


def test_pickles_with_a_right_checksum_are_read_as_torch_reads_them(reference, tmp_path):
    """Damage from before the checksum was made: refused, or the very tensors that torch would build."""
    path = tmp_path / "model-rank-0.pt"
    content = members(reference / "checkpoint" / "model-rank-0.pt")
    for seed in range(max(200, COUNT // 4)):
        rng = random.Random(seed)
        data = bytearray(content["archive/data.pkl"])
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        pack(path, (content | {"archive/data.pkl": bytes(data)}).items())
        try:
            mine = checkpoint.read(path)["model"]
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < LINES, str(error)
            counts["pickles with a right checksum"]["a clear error"] += 1
            continue
        try:
            theirs = torch.load(path, weights_only=True)["model"]
        except Exception:
            # What it stumbled over is no weight, and was not built here.
            counts["pickles with a right checksum"]["read by moekit alone"] += 1
            continue
        assert list(mine) == list(theirs)
        assert all(mine[key].view(torch.uint8).equal(theirs[key].view(torch.uint8)) for key in mine), seed
        counts["pickles with a right checksum"]["as torch reads them"] += 1


def test_a_tensor_read_at_once_is_what_its_instructions_make_one_by_one(reference, monkeypatch):
    """The machine with and without the expression for a whole tensor, on the pickles of files and on damaged ones."""
    state = torch.load(reference / "checkpoint" / "model-rank-0.pt", weights_only=True)
    state["model"] |= {f"part.{n}": part for n, part in enumerate(torch.zeros(8, 2, 3).unbind())}
    state["model"] |= {f"gradient.{n}": torch.zeros(2, requires_grad=True) for n in range(4)}
    datas = [members(reference / "checkpoint" / "model-rank-0.pt")["archive/data.pkl"]]
    for how in ({}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}):
        file = io.BytesIO()
        torch.save(state, file, **how)
        if how.get("_use_new_zipfile_serialization", True):
            with zipfile.ZipFile(file) as archive:
                datas.append(archive.read("archive/data.pkl"))
        else:
            content, at = file.getvalue(), 0
            # The number, the version and the machine come first.
            for _ in range(3):
                at = pickles.parse(content, at).end
            datas.append(content[at:])
    taken = 0

    def counting(*how) -> int:
        nonlocal taken
        found = rebuilt.tensor(*how)
        taken += found > 0
        return found

    def made(mutated: bytes) -> object:
        """All that the machine has made, and which of it is one object; or the kind of error."""
        try:
            found = pickles.parse(mutated)
        except pickles.Unreadable as error:
            return re.sub(r"byte [0-9,]+", "byte", str(error))
        seen: dict[int, int] = {}

        def told(node) -> object:
            # Tuples never change, so that nobody can tell one from an equal one.
            if isinstance(node, (list, Call, Reference)):
                if id(node) in seen:
                    return "again", seen[id(node)]
                seen[id(node)] = len(seen)
            if isinstance(node, Call):
                parts = [node.function, node.arguments, node.state, node.items]
            else:
                parts = [node.name] if isinstance(node, Reference) else node
            if isinstance(parts, (list, tuple)):
                return type(node).__name__, [told(part) for part in parts]
            return type(node).__name__, repr(node)

        everything = [found.value, found.calls, found.references, sorted(found.names), found.end]
        return [told(part) for part in everything]

    # Numbers of one object are taken by another one between its instructions.
    words = b"\x80\x02X\x07\0\0\0storageq\x010ctorch\nFloatStorage\nq\x020X\x03\0\0\0cpuq\x030"
    words += b"ccollections\nOrderedDict\nq\x040ctorch._utils\n_rebuild_tensor_v2\nq\x050h\x05"
    numbers = list(itertools.product((1, 2, 3, 10), (1, 2, 4, 10), (2, 4, 5, 10)))
    lengths = [b"M\x06\0", b"J\x06\0\0\0", b"J\xff\xff\xff\xff", b"\x8a\5\6\0\0\0\1", b"\x8a\5\6\0\0\0\xff"]
    for (name, storage, shape), length in [
        *((taken_by, b"K\x06") for taken_by in numbers),
        *(((10, 10, 10), length) for length in lengths),
    ]:
        put = [b"r" + number.to_bytes(4, "little") for number in (name, storage, shape, 11)]
        rest = (
            b"Q"
            + length
            + length
            + b"\x85"
            + put[2]
            + b"K\x01\x85"
            + put[3]
            + b"\x89h\x04)R"
            + put[3]
            + b"t"
            + put[3]
            + b"R"
            + put[3]
        )
        one = words + b"((h\x01h\x02X\x01\0\0\x000" + put[0] + b"h\x03" + length + b"t" + put[1] + rest + b"."
        monkeypatch.setattr(pickles, "tensor", counting)
        before, found = taken, made(one)
        assert length == b"K\x06" or taken == before + 1
        monkeypatch.setattr(pickles, "tensor", lambda *_: 0)
        assert found == made(one), (name, storage, shape, length)
    assert taken > 20
    taken = 0
    ends: collections.Counter = collections.Counter()
    for seed in range(300):
        rng, mutated = random.Random(seed), bytearray(datas[seed % len(datas)])
        before = taken
        for _ in range(rng.choice([0, 1, 1, 3, 8]) if seed >= len(datas) else 0):
            mutated[rng.randrange(len(mutated) // 3, len(mutated))] = rng.choice(
                [rng.randrange(256), *b"(jrKMJ\x85\x86tQR)X\x8c\x94\x8aqhN"]
            )
        monkeypatch.setattr(pickles, "tensor", counting)
        at_once = made(bytes(mutated))
        if seed < len(datas):
            assert taken > before + 10
        monkeypatch.setattr(pickles, "tensor", lambda *_: 0)
        assert made(bytes(mutated)) == at_once, seed
        ends["an error" if isinstance(at_once, str) else "the same objects"] += 1
    assert min(ends.values()) > 30 and taken > 1000, (ends, taken)


def test_what_is_harmless_at_once_is_so_node_by_node(reference):
    """The fast look at all calls and names finds whatever the slow walk from object to object refuses."""
    data = members(reference / "checkpoint" / "model-rank-0.pt")["archive/data.pkl"]
    starts = [at for _, _, at in pickletools.genops(data)]
    odd = [
        b"cos\nsystem\n",
        b"cbuiltins\nlist\n",
        b"cargparse\nNamespace\n",
        b"K\1\x85R",
        b"(K\1tR",
        b")",
        b"0",
        b"Q",
        b"R",
    ]

    def refused_slowly(found) -> bool:
        try:
            return any(map(contents.refused, (node for node, _ in contents.walk(found.value))))
        except pickles.Unreadable:
            return True

    seen = collections.Counter()
    for seed in range(1500):
        rng = random.Random(seed)
        at = rng.choice(starts)
        mutated = data[:at] + b"".join(rng.choices(odd, k=rng.choice([1, 2, 3]))) + data[at:]
        try:
            harmless, refused = (
                contents.harmless(pickles.parse(mutated)),
                refused_slowly(pickles.parse(mutated)),
            )
        except pickles.Unreadable:
            continue
        seen[harmless, refused] += 1
    assert not seen[True, True] and seen[True, False] > 10 and seen[False, True] > 100, seen


def test_what_was_tried(counted):
    """For the table at the end of the run; it says nothing of what was not run."""
    if not counts:
        pytest.skip("nothing was tried in this process")
    total = collections.Counter()
    for name, found in counts.items():
        total += found
        print(f"{name}: {sum(found.values())}, {', '.join(f'{n} {what}' for what, n in found.most_common())}")
        for outcome, times in found.items():
            counted("mutated checkpoints" if name in MUTATORS else name, outcome, times)
    assert set(total) <= {
        "a clear error", "the reference to the bit", "as the files say", "warned of", "as torch reads them", "read by moekit alone"
    }  # fmt: skip
