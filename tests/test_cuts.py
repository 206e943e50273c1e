"""Cuts of the grouped product: which one is taken, and a user's file that is right, damaged, foreign or too large."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from moekit import versions
from moekit.nn.kernels import cuts
from moekit.nn.kernels.cuts import ANY, CUTS, FEW_ROWS, ONE_BYTE_CUTS, Blocks, Cut, built_in, cut_for

CPU = torch.device("cpu")
SMALL = Cut(ANY, ANY, Blocks(32, 64, 32, 4, 2), Blocks(32, 32, 64, 4, 3, swapped=True))
OWN = (replace(SMALL, choices=16), replace(SMALL, mean=8, up=Blocks(32, 16, 16, 1, 1)), SMALL)


def text(gpu: str = "interpreter", kind: str = "float16", own=OWN) -> str:
    return cuts.written({gpu: {kind: own}}, {gpu: {kind: {"shape": "tiny"}}})


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Make a file with this text the user's table of this process."""

    def write(content: str | bytes, name: str = "own.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setenv("MOEKIT_CUTS", str(path))
        return path

    def forget():
        versions.own_cuts.cache_clear()
        cuts.cuts_of.cache_clear()

    forget()
    yield write
    monkeypatch.undo()
    forget()


def test_the_cut_follows_the_rows_an_expert():
    hopper = built_in("NVIDIA H200", "float16", 227 * 1024)
    taken = [cut_for(places, 512, hopper) for places in (2, 128, 4096, 131_072)]
    assert [cut.up.rows for cut in taken] == [16, 16, 16, 128]
    assert [cut.up.columns for cut in taken[:3]] == [64, 64, 128]
    assert cut_for(8192, 512, hopper).up.rows == 32
    many = Cut(ANY, ANY, Blocks(128, 128, 64, 8, 3), Blocks(128, 256, 64, 8, 4))
    assert cut_for(131_072, 512, hopper, (768, 3072)).up.specialised
    assert [cut_for(places, 512, hopper, (768, 3072)).up.rows for places in (16_384, 16_385)] == [64, 128]
    assert cut_for(131_072, 512, hopper, (768, 3000)) == many == cut_for(131_072, 512, hopper)
    assert cut_for(131_072, 512, built_in("NVIDIA B200", "float16", 227 * 1024)) == many
    small = built_in("NVIDIA L40S", "float16", 99 * 1024)
    assert cut_for(131_072, 512, small).up.rows == 64, "a GPU with less shared memory"
    assert cut_for(128, 512, built_in("NVIDIA T4", "float16", 64 * 1024)).up == FEW_ROWS
    for kind, all_of in (("float16", CUTS), ("int8", ONE_BYTE_CUTS)):
        fitting = {kib: built_in("", kind, kib * 1024) for kib in (64, 99, 163, 227)}
        assert set(all_of) == {cut for found in fitting.values() for cut in found}
        for kib, found in fitting.items():
            most = [cut_for(n, 512, found) for n in (2, 128, 4096, 20_000, 131_072)]
            assert not any(cuts.too_large(cut, kind, kib * 1024) for cut in most)


def test_every_built_in_cut_is_possible_on_hopper():
    for table in (*cuts.MEASURED.values(), cuts.FALLBACK):
        assert set(table) == set(cuts.KINDS)
        for kind, found in table.items():
            assert [cuts.why_not(cut, kind, 227 * 1024) for cut in found] == [""] * len(found)
            assert found[-1].choices == found[-1].mean == ANY


def test_the_type_is_that_of_the_rows_and_of_the_matrices():
    half, wide = torch.float16, torch.float32
    named = [(half, half), (torch.bfloat16, torch.bfloat16), (half, torch.int8), (wide, torch.int8)]
    assert [cuts.kind_of(*kinds) for kinds in named] == ["float16", "bfloat16", "int8", "float32"]
    assert cuts.kind_of(half, torch.float8_e4m3fn) == "fp8"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 24}, "rows is 24, expected a power of two from 16 to 256"),
        ({"rows": 512}, "rows is 512"),
        ({"columns": 8}, "columns is 8"),
        ({"inner": 0}, "inner is 0"),
        ({"warps": 3}, "warps is 3, expected a power of two from 1 to 16"),
        ({"stages": 9}, "stages is 9, expected 1 to 8"),
        ({"rows": 128, "columns": 256, "warps": 4}, "a thread would hold 256 sums, expected at most 128"),
        ({"rows": 64}, "up has 64 rows and down 32, expected the same"),
    ],
)
def test_what_the_kernel_cannot_do(change, said):
    up = replace(SMALL.up, **change)
    down = SMALL.down if said.startswith("up has") else replace(SMALL.down, rows=up.rows)
    assert said in cuts.why_not(replace(SMALL, up=up, down=down), "float16")


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({}, "float16", ""),
        ({"warps": 8}, "bfloat16", ""),
        ({"rows": 64, "columns": 256, "stages": 5}, "float16", ""),
        ({"columns": 256, "warps": 8}, "float16", "expected 32 to 128 columns"),
        ({"rows": 256, "warps": 8}, "float16", "at most 64 sums a thread"),
        ({"rows": 64, "warps": 8}, "float16", "expected at least 128 rows"),
        ({"warps": 16}, "float16", "expected teams of 4 or 8 warps"),
        ({"inner": 128, "stages": 3}, "float16", "expected 32 or 64 terms"),
        ({"swapped": True}, "float16", "expected no swapped operands"),
        ({"stages": 17}, "float16", "stages is 17, expected 1 to 16"),
        ({"stages": 8}, "float16", "takes 262144 bytes of shared memory"),
        ({}, "int8", "expected float16 or bfloat16 with specialised warps, found int8"),
        ({}, "float32", "expected float16 or bfloat16"),
    ],
)
def test_what_specialised_warps_cannot_do(change, kind, said):
    blocks = replace(cuts.SPECIALISED, **change)
    why = cuts.why_not(Cut(ANY, ANY, blocks, blocks), kind, 227 * 1024)
    assert said in why if said else why == ""
    one = Cut(ANY, ANY, cuts.SPECIALISED, replace(cuts.SPECIALISED, specialised=False))
    assert "expected both or neither" in cuts.why_not(one, "float16")
    both = Cut(ANY, ANY, cuts.SPECIALISED, cuts.SPECIALISED)
    assert "this GPU is not of Hopper" in cuts.why_not(both, "float16", hopper=False)


def test_shared_memory_by_hand():
    cut = Cut(ANY, ANY, Blocks(16, 32, 64, 4, 3), Blocks(16, 32, 64, 4, 3))
    for kind, needed in (("float16", 3 * 64 * 96), ("int8", 3 * 64 * 64), ("float32", 3 * 64 * 192)):
        assert not cuts.too_large(cut, kind, needed)
        assert f"takes {needed} bytes" in cuts.too_large(cut, kind, needed - 1)


# -------------------------------------------------------------------------------------------- the user's file


def test_a_file_is_read_as_it_was_written():
    tables = {"A": {"float16": OWN, "int8": (SMALL,)}, "B 80GB": {"fp8": OWN}}
    made = {"A": {"float16": {"date": "2026-11-26"}, "int8": None}, "B 80GB": {"fp8": {"shape": "15b"}}}
    written = cuts.written(tables, made)
    assert cuts.tables(written, "x") == tables and cuts.made(written) == made


def test_the_users_table_comes_before_the_built_in_one(use):
    assert cuts.cuts_of(CPU, "float16") == built_in("interpreter", "float16")
    assert versions.versions()["cuts"] == "built-in"
    versions.own_cuts.cache_clear()
    cuts.cuts_of.cache_clear()
    path = use(text())
    assert cuts.cuts_of(CPU, "float16") == OWN
    assert cuts.cuts_of(CPU, "bfloat16") == built_in("", "bfloat16"), (
        "types that it does not have are the built-in ones"
    )
    name, digest = versions.cuts().split(", SHA-256 ")
    assert name == "own.json" and len(digest) == 12
    # A process reads it once.
    path.write_text(text(own=(SMALL,)))
    cuts.cuts_of.cache_clear()
    assert cuts.cuts_of(CPU, "float16") == OWN and versions.cuts().endswith(digest)


def test_another_gpus_table_is_refused(use):
    use(text("NVIDIA A100"))
    with pytest.raises(
        ValueError, match="own.json: has cuts of 'NVIDIA A100', and this is interpreter; make them"
    ):
        cuts.cuts_of(CPU, "float16")


def test_specialised_warps_are_refused_elsewhere_than_on_hopper(use):
    use(text(own=(Cut(ANY, ANY, cuts.SPECIALISED, cuts.SPECIALISED), SMALL)))
    with pytest.raises(ValueError, match="specialised warps, and this GPU is not of Hopper; make them"):
        cuts.cuts_of(CPU, "float16")


def test_what_is_too_large_for_the_gpu_is_refused(use, monkeypatch):
    use(text())
    monkeypatch.setattr(cuts, "shared_memory", lambda device: 16 * 1024)
    with pytest.raises(ValueError, match="interpreter, float16: a cut takes 24576 bytes of shared memory"):
        cuts.cuts_of(CPU, "float16")


def changed(**cut) -> str:
    content = json.loads(text())
    content["gpus"]["interpreter"]["float16"]["cuts"][0].update(cut)
    return json.dumps(content)


UP = vars(SMALL.up)
DAMAGED = {
    "nothing": ("", "found no table of cuts"),
    "no JSON": (text()[:-30], "found no table of cuts"),
    "a list": ("[1]", "found no table of cuts"),
    "deep": ("[" * 100_000, "found no table of cuts"),
    "another format": (text().replace("cuts 1", "cuts 2"), "expected JSON with the format 'moekit cuts 1'"),
    "no GPU": (json.dumps({"format": cuts.FORMAT}), "'gpus' is None"),
    "no type": (text(kind="float16").replace('"float16"', '"float61"'), "'float61' is no type"),
    "no cuts": (text().replace('"cuts": [', '"cut": ['), "the cuts of float16 are None"),
    "an odd number": (changed(up={**UP, "columns": 48}), "columns is 48, expected a power of two"),
    "a negative number": (changed(up={**UP, "stages": -1}), "stages is -1"),
    "a huge number": (changed(up={**UP, "warps": 2**70}), "warps is 1180591620717411303424"),
    "a text": (changed(up={**UP, "inner": "64"}), "inner is '64', expected a whole number"),
    "a truth": (changed(up={**UP, "warps": True}), "warps is True, expected a whole number"),
    "no truth": (changed(up={**UP, "swapped": 1}), "swapped is 1, expected true or false"),
    "NaN": (changed(mean=math.nan), "mean is nan"),
    "no bound": (changed(choices=0), "choices is 0"),
    "more": (changed(extra=1), "a cut has ['choices', 'down', 'extra', 'mean', 'up']"),
    "only specialised": (
        text(own=(Cut(ANY, ANY, cuts.SPECIALISED, cuts.SPECIALISED),)),
        "expected the last cut, and no other, to take any number of choices of any shape",
    ),
    "two that take anything": (changed(choices=None), "expected the last cut, and no other"),
    "other tiles": (changed(up={**UP, "rows": 64}), "up has 64 rows and down 32"),
    "no text": (b"\xff\xfe\x00", "is no text"),
    "too much": (b" " * (2**20 + 1), "has more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_one_sentence(use, damage):
    content, said = DAMAGED[damage]
    path = use(content)
    with pytest.raises(ValueError) as error:
        cuts.cuts_of(CPU, "float16")
    message = str(error.value)
    assert said in message and f"MOEKIT_CUTS={path}" in message and "\n" not in message and len(message) < 500


def test_a_file_that_is_not_there(use, tmp_path, monkeypatch):
    for path in (tmp_path / "none.json", tmp_path):
        monkeypatch.setenv("MOEKIT_CUTS", str(path))
        with pytest.raises(ValueError, match=f"MOEKIT_CUTS={path} cannot be read"):
            cuts.cuts_of(CPU, "float16")
        assert versions.cuts() == "unknown"


def test_a_mutated_file_is_refused_or_gives_possible_cuts(counted):
    rng, whole = random.Random(1), text()
    refused = 0
    for _ in range(400):
        at = rng.randrange(len(whole))
        kind = rng.choice(("cut", "drop", "digit", "twice"))
        damaged = {
            "cut": whole[:at],
            "drop": whole[:at] + whole[at + 1 :],
            "digit": whole[:at] + rng.choice('0123456789-.e"{}[]') + whole[at + 1 :],
            "twice": whole[:at] + whole[at : at + 20] + whole[at:],
        }[kind]
        try:
            for table in cuts.tables(damaged, "x").values():
                for name, found in table.items():
                    assert not any(cuts.why_not(cut, name) for cut in found)
                    assert cut_for(10**9, 1, found) == found[-1]
        except ValueError as error:
            refused += 1
            assert str(error).startswith("x: ") and "\n" not in str(error)
    counted("files of cuts with a changed place", "refused, or possible cuts", 400)
    assert refused > 200
