"""Damaged data sets: each is refused in one sentence that names a file, or gives what its files say, to the bit."""

import os
import random
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
from test_data_verify import texts_of, write_cached

import moekit
from moekit.symbols import PAD

TRIALS = int(os.environ.get("FUZZ", "300"))
HEADER = 26
MODES = ("none", "eos", "complete")


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    """The tiny model with its own dictionary beside it, so that another one is noticed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for path in (reference / "checkpoint").iterdir():
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(reference / "data-bin" / "dict.txt", folder / "dict.txt")
    with moekit.load(folder, device="cpu", progress=False) as model:
        yield model


def flip(data: bytearray, start: int, end: int, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 3))):
        data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)


def put(data: bytearray, form: str, offset: int, value: int) -> None:
    data[offset : offset + struct.calcsize(form)] = struct.pack(form, value)


def truncated(files, rng):
    name = rng.choice(("valid.bin", "valid.idx", "dict.txt"))
    files[name] = files[name][: rng.randrange(len(files[name]))]


def longer(files, rng):
    name = rng.choice(("valid.bin", "valid.idx"))
    files[name] += rng.randbytes(rng.choice((1, 2, 8, 12, 100)))


def header_bits(files, rng):
    flip(files["valid.idx"], 0, HEADER, rng)


def header_numbers(files, rng):
    form, offset = rng.choice((("<Q", 9), ("<B", 17), ("<Q", 18)))
    values = (
        (0, 1, 2, 3, 4, 5, 8, 9, 10, 59, 61, 255)
        if form == "<B"
        else (0, 1, 2, 59, 61, 2**31, 2**62, 2**64 - 1)
    )
    put(files["valid.idx"], form, offset, rng.choice(values))


def size_bits(files, rng):
    flip(files["valid.idx"], HEADER, HEADER + 4 * lines_of(files), rng)


def sizes_set(files, rng):
    place = HEADER + 4 * rng.randrange(lines_of(files))
    put(files["valid.idx"], "<i", place, rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 64, 65)))


def sizes_moved(files, rng):
    """One line's ids to another's: the sum stays."""
    one, other = (HEADER + 4 * n for n in rng.sample(range(lines_of(files)), 2))
    by = rng.choice((1, -1, 5))
    for place, change in ((one, by), (other, -by)):
        (size,) = struct.unpack_from("<i", files["valid.idx"], place)
        put(files["valid.idx"], "<i", place, size + change)


def pointer_bits(files, rng):
    flip(files["valid.idx"], HEADER + 4 * lines_of(files), len(files["valid.idx"]), rng)


def pointers_set(files, rng):
    place = HEADER + 4 * lines_of(files) + 8 * rng.randrange(lines_of(files))
    put(files["valid.idx"], "<q", place, rng.choice((0, 2, 1, -2, len(files["valid.bin"]), 2**40, -(2**63))))


def id_bits(files, rng):
    flip(files["valid.bin"], 0, len(files["valid.bin"]), rng)


def ids_set(files, rng):
    values = (0, 1, 2, 3, 199, 200, 65_535) if rng.random() < 0.5 else range(200)
    for _ in range(rng.choice((1, 20))):
        put(files["valid.bin"], "<H", 2 * rng.randrange(len(files["valid.bin"]) // 2), rng.choice(values))


def another_file(files, rng):
    text, other = b"What is this?\n" * 30, rng.choice(("valid.bin", "valid.idx", "dict.txt"))
    formats = (
        b"",
        text,
        b"PK\x03\x04" + rng.randbytes(500),
        b"\x89PNG\r\n" + rng.randbytes(500),
        b"\0" * 1000,
    )
    formats += (b"TNTIDX\0\0" + rng.randbytes(500), b"HUFFIDX\0\0" + rng.randbytes(500), files[other])
    files[rng.choice(("valid.bin", "valid.idx", "dict.txt"))] = bytearray(rng.choice(formats))


def missing(files, rng):
    del files[rng.choice(("valid.bin", "valid.idx", "dict.txt"))]


def dictionary_lines(files, rng):
    lines = bytes(files["dict.txt"]).split(b"\n")
    place = rng.randrange(len(lines) - 1)
    symbol = lines[place].split(b" ")[0]
    lines[place] = rng.choice(
        (b"", b"\xff 1", symbol, symbol + b" -5", symbol + b" one", symbol + b"x 1", lines[0])
    )
    if rng.random() < 0.2:
        del lines[place]
    files["dict.txt"] = bytearray(b"\n".join(lines))


def lines_of(files) -> int:
    return struct.unpack_from("<Q", files["valid.idx"], 18)[0]


MUTATIONS = (
    truncated, longer, header_bits, header_numbers, size_bits, sizes_set, sizes_moved, pointer_bits, pointers_set,
    id_bits, ids_set, another_file, missing, dictionary_lines,
)  # fmt: skip


def test_damaged_data_is_refused_or_read_as_it_is(model, reference, tmp_path, counted):
    how = {"tokens_per_sample": 64, "progress": False}
    original = {p.name: p.read_bytes() for p in (reference / "data-bin").iterdir() if p.name[0] in "vd"}
    wanted = {
        mode: model.evaluate(reference / "data-bin", sample_break_mode=mode, **how).tokens for mode in MODES
    }
    outcomes: Counter[str] = Counter()
    for seed in range(TRIALS):
        rng = random.Random(seed)
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        files = {name: bytearray(data) for name, data in original.items()}
        mutate(files, rng)
        folder = tmp_path / f"{seed}-{mutate.__name__}"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        mode = rng.choice(MODES)
        try:
            found = model.evaluate(folder, sample_break_mode=mode, **how).tokens
        except ValueError as error:
            said = str(error)
            assert str(folder) in said and "\n" not in said and len(said) < 700, f"{folder.name}: {said}"
            outcomes["refused"] += 1
        else:
            if found.equals(wanted[mode]):
                outcomes["the same"] += 1
            else:  # no other file than the ids may say another text
                assert all(files[name] == original[name] for name in files if name != "valid.bin"), (
                    folder.name
                )
                ids = np.frombuffer(files["valid.bin"], "<u2")
                assert found["token"].tolist() == ids[ids != PAD].tolist(), folder.name
                outcomes["as the ids say"] += 1
        shutil.rmtree(folder)
    for outcome, times in outcomes.items():
        counted("damaged data sets", outcome, times)
    assert outcomes["refused"] > TRIALS / 2 and outcomes["the same"] and outcomes["as the ids say"]
    same = model.evaluate(reference / "data-bin", sample_break_mode="none", **how).tokens
    assert same.equals(wanted["none"]), "the model is as it was"


def test_damaged_data_of_the_older_format_is_refused_or_read_as_it_is(model, reference, tmp_path, counted):
    """``--dataset-impl cached``: numbers of 8 bytes in the index, ids of 4 bytes that are one too large."""
    write_cached(tmp_path / "valid", texts_of(reference / "data-bin" / "valid"))
    original = {name: (tmp_path / name).read_bytes() for name in ("valid.bin", "valid.idx")}
    how = {"tokens_per_sample": 64, "progress": False}
    wanted = model.evaluate(reference / "data-bin", **how).tokens
    shutil.copyfile(reference / "data-bin" / "dict.txt", tmp_path / "dict.txt")
    outcomes: Counter[str] = Counter()
    for seed in range(TRIALS // 2):
        rng = random.Random(seed)
        name = rng.choice(("valid.bin", "valid.idx", "valid.idx"))
        data = bytearray(original[name])
        kind = rng.choice(("cut", "longer", "bits", "number"))
        if kind == "cut":
            del data[rng.randrange(len(data)) :]
        elif kind == "longer":
            data += rng.randbytes(rng.choice((1, 4, 8, 24)))
        elif kind == "bits":
            flip(data, 0, len(data), rng)
        else:
            form, width = ("<i", 4) if name == "valid.bin" else ("<q", 8)
            value = rng.choice((0, 1, 2, -1, 60, 200, 201, 2**31 - 1, len(data)))
            put(data, form, width * rng.randrange(len(data) // width), value)
        for other in original:
            (tmp_path / other).write_bytes(data if other == name else original[other])
        try:
            found = model.evaluate(tmp_path, **how).tokens
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), f"{seed}: {error}"
            outcomes["refused"] += 1
        else:
            ids = np.frombuffer((tmp_path / "valid.bin").read_bytes(), "<i4") - 1
            assert found["token"].tolist() == ids[ids != PAD].tolist(), seed
            outcomes["the same" if found.equals(wanted) else "as the ids say"] += 1
    for outcome, times in outcomes.items():
        counted("damaged data sets of the older format", outcome, times)
    assert outcomes["refused"] > TRIALS / 4 and outcomes["as the ids say"]
