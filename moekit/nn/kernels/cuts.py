"""The cuts of the grouped product: its blocks by the number of choices, in one table by GPU and type.

A cut is chosen from numbers that the host knows, and never while a model runs: the built-in table was measured once with
``python -m moekit.bench tune``, and the file that ``MOEKIT_CUTS`` names comes before it. A process reads that file once, so
that one run has one table; :func:`moekit.versions.versions` says which.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from moekit import json_text, versions
from moekit.arguments import shown
from moekit.nn.kernels.gpu import is_hopper

ANY = math.inf
FORMAT = "moekit cuts 1"
ANEW = "make them with python -m moekit.bench tune"
# What a table of a user's file may have; "int8" and "fp8" are of the experts' matrices, the others of rows and matrices.
KINDS = ("float16", "bfloat16", "int8", "fp8", "float32")


@dataclass(frozen=True)
class Blocks:
    """The blocks of a product: a program computes ``rows`` x ``columns`` of the output, ``inner`` terms at a time.

    With ``specialised`` warps, for Hopper alone, two teams of ``warps`` warps compute one such tile each (specialised.py).
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    swapped: bool = False
    specialised: bool = False

    def shared(self, itemsize: int = 2, rows: int = 2) -> int:
        """The most bytes of shared memory that a program takes, with ``itemsize`` bytes a weight and ``rows`` a number of a row."""
        return self.stages * (rows * self.rows + itemsize * self.columns) * self.inner

    def __str__(self) -> str:
        flags = "".join(f", {name}" for name in FLAGS if getattr(self, name))
        return f"{self.rows} x {self.columns} x {self.inner}, {self.warps} warps, {self.stages} stages{flags}"


# The fields of Blocks that are true or false.
FLAGS = ("swapped", "specialised")


@dataclass(frozen=True)
class Cut:
    """The blocks of both products, for up to ``choices`` choices and up to ``mean`` choices per expert.

    Both products have the same ``rows``, since they use the same tiles. Both have specialised warps or neither has them.
    """

    choices: float
    mean: float
    up: Blocks
    down: Blocks


# With a few choices, columns are narrow, to keep all multiprocessors busy. With few rows per expert, reading the weights
# takes the time, so tiles are small and many loads are under way. With many rows, multiplying takes the time, so tiles
# are as large as the registers allow.
# For GPUs with less shared memory than Hopper has.
FEW_ROWS, MANY_ROWS = Blocks(16, 128, 64, 4, 3), Blocks(64, 64, 64, 4, 3)
# The first one that fits is taken.
UP_TO_16 = (
    Cut(128, 8, Blocks(16, 64, 128, 4, 4), Blocks(16, 64, 128, 4, 4)),
    Cut(16, ANY, Blocks(16, 32, 128, 4, 4), Blocks(16, 16, 256, 2, 4)),
    Cut(ANY, 8, Blocks(16, 128, 128, 4, 3), Blocks(16, 128, 128, 4, 3)),
    Cut(ANY, 16, Blocks(32, 128, 128, 8, 3), Blocks(32, 128, 128, 8, 3)),
    Cut(ANY, 16, FEW_ROWS, FEW_ROWS),
)
MORE = (
    Cut(ANY, 128, Blocks(64, 128, 64, 4, 3), Blocks(64, 128, 64, 4, 3)),
    Cut(ANY, ANY, Blocks(128, 128, 64, 8, 3), Blocks(128, 256, 64, 8, 4)),
    Cut(ANY, ANY, Blocks(64, 128, 64, 4, 3), Blocks(64, 128, 64, 4, 3)),
    Cut(ANY, ANY, MANY_ROWS, MANY_ROWS),
)
CUTS = UP_TO_16 + MORE
# With many rows on Hopper, specialised warps keep the tensor cores busier. These cuts take only some shapes.
SPECIALISED = Blocks(128, 128, 64, 4, 6, specialised=True)
HOPPER_CUTS = (*UP_TO_16, replace(MORE[0], mean=32), Cut(ANY, ANY, SPECIALISED, SPECIALISED), *MORE)
# Weights of one byte are half as many bytes under way, and they are converted between memory and multiplication.
ONE_BYTE_CUTS = (
    Cut(16, 4, Blocks(16, 64, 256, 4, 3), Blocks(16, 32, 512, 4, 3)),
    Cut(ANY, 4, Blocks(16, 64, 128, 4, 3), Blocks(16, 64, 256, 4, 3)),
    Cut(ANY, 8, Blocks(16, 128, 128, 4, 3), Blocks(16, 64, 256, 4, 3)),
    Cut(ANY, 8, FEW_ROWS, FEW_ROWS),
    Cut(ANY, 64, Blocks(32, 128, 128, 4, 3), Blocks(32, 128, 128, 4, 3)),
    Cut(ANY, ANY, Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 4, 4)),
    Cut(ANY, ANY, MANY_ROWS, MANY_ROWS),
)
# float32 takes twice the memory, and it is only used for checks.
PLAIN = Cut(ANY, ANY, Blocks(32, 64, 32, 4, 2), Blocks(32, 64, 32, 4, 2))

Table = dict[str, tuple[Cut, ...]]
FALLBACK: Table = {
    "float16": CUTS,
    "bfloat16": CUTS,
    "int8": ONE_BYTE_CUTS,
    "fp8": ONE_BYTE_CUTS,
    "float32": (PLAIN,),
}
HOPPER = FALLBACK | {"float16": HOPPER_CUTS, "bfloat16": HOPPER_CUTS}
# By a part of the GPU's name, as measured. Other GPUs fall back on FALLBACK, of whose cuts they take those that fit.
MEASURED: dict[str, Table] = {"H100": HOPPER, "H200": HOPPER}

# ----------------------------------------------------------------------------------------------------- choosing


@functools.lru_cache
def kind_of(rows: torch.dtype, weights: torch.dtype) -> str:
    """The name of the types in a table: of the rows and of the experts' matrices."""
    if rows == torch.float32:
        return "float32"
    names = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
    return names.get(weights) or str(rows).removeprefix("torch.")


def cut_for(choices: int, experts: int, cuts: Sequence[Cut], dims: tuple[int, int] | None = None) -> Cut:
    """The first of ``cuts`` for ``choices`` choices of ``experts`` experts, numbers that the host knows.

    Args:
        dims: model dim and expert width, for a cut with specialised warps, which need multiples of their columns and terms; None
            takes none of them.
    """

    def possible(cut: Cut) -> bool:
        blocks = (cut.up, cut.down)
        return not cut.up.specialised or (
            dims is not None and not any(dim % b.columns or dim % b.inner for dim in dims for b in blocks)
        )

    return next(
        cut for cut in cuts if choices <= cut.choices and choices <= cut.mean * experts and possible(cut)
    )


@functools.lru_cache
def cuts_of(device: torch.device, kind: str) -> tuple[Cut, ...]:
    """The cuts of ``device`` for the types that :func:`kind_of` names: the user's, or the built-in ones.

    Raises:
        ValueError: the user's file is damaged, or has no table for this GPU.
    """
    gpu, shared = gpu_name(device), shared_memory(device)
    text = versions.own_cuts()
    if text is None:
        return built_in(gpu, kind, shared)
    where = f"{versions.CUTS}={os.environ.get(versions.CUTS)}"
    own = tables(text, where)
    if gpu not in own:
        raise ValueError(
            f"{where}: has cuts of {shown(', '.join(own))}, and this is {gpu}; {ANEW}, or unset {versions.CUTS}"
        )
    found = own[gpu].get(kind) or built_in(gpu, kind, shared)
    if why := next((why for cut in found if (why := not_here(cut, kind, shared, is_hopper(device)))), ""):
        raise ValueError(f"{where}: {gpu}, {kind}: {why}; {ANEW}")
    return found


def built_in(gpu: str, kind: str, shared: float = ANY) -> tuple[Cut, ...]:
    """The built-in cuts that fit into ``shared`` bytes of shared memory, up to the first one that takes any number."""
    table = next((table for part, table in MEASURED.items() if part in gpu), FALLBACK)
    found = []
    for cut in table[kind]:
        if not too_large(cut, kind, shared):
            found.append(cut)
            if takes_all(cut):
                break
    return tuple(found)


@functools.lru_cache
def shared_memory(device: torch.device) -> float:
    """The bytes of shared memory that a program may have on ``device``."""
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if device.type == "cuda"
        else ANY
    )


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


# ----------------------------------------------------------------------------------------------- what is possible

# The fewest and the most of each number of Blocks. Products of tensor cores have 16 rows, columns and terms at least.
BOUNDS = {"rows": (16, 256), "columns": (16, 256), "inner": (16, 512), "warps": (1, 16)}
STAGES, SPECIALISED_STAGES = 8, 16
# Sums of a program that a thread may hold, of 255 registers.
SUMS = 128


def why_not(cut: Cut, kind: str, shared: float = ANY, hopper: bool = True) -> str:
    """What the kernel cannot do with ``cut`` on a GPU like this; "" if it can."""
    if cut.up.rows != cut.down.rows:
        return f"up has {cut.up.rows} rows and down {cut.down.rows}, expected the same"
    if cut.up.specialised != cut.down.specialised:
        return "one product has specialised warps, expected both or neither"
    for blocks in (cut.up, cut.down):
        for name, (least, most) in BOUNDS.items():
            value = getattr(blocks, name)
            if not least <= value <= most or value & (value - 1):
                return f"{name} is {shown(value)}, expected a power of two from {least} to {most}"
        most = SPECIALISED_STAGES if blocks.specialised else STAGES
        if not 1 <= blocks.stages <= most:
            return f"stages is {shown(blocks.stages)}, expected 1 to {most}"
        if (sums := blocks.rows * blocks.columns // (32 * blocks.warps)) > SUMS:
            return f"{blocks}: a thread would hold {sums} sums, expected at most {SUMS}"
        if blocks.specialised and (why := _not_specialised(blocks, kind)):
            return f"{blocks}: {why}"
    return not_here(cut, kind, shared, hopper)


def _not_specialised(blocks: Blocks, kind: str) -> str:
    """What the kernel with specialised warps cannot do. Its loader copies 64 rows at a time, of 64 or 128 bytes."""
    if kind not in ("float16", "bfloat16"):
        return f"expected float16 or bfloat16 with specialised warps, found {kind}"
    if blocks.swapped:
        return "expected no swapped operands with specialised warps"
    if blocks.inner not in (32, 64):
        return "expected 32 or 64 terms at a time with specialised warps"
    if blocks.warps not in (4, 8):
        return "expected teams of 4 or 8 warps"
    if blocks.rows < 16 * blocks.warps:
        return f"expected at least {16 * blocks.warps} rows for {blocks.warps} specialised warps"
    # A thread has 240 registers in teams of four warps, and 112 in teams of eight.
    most = 1024 // blocks.warps
    sums = blocks.rows * blocks.columns // (32 * blocks.warps)
    if not 32 <= blocks.columns <= most or sums > most // 2:
        return f"expected 32 to {most} columns and at most {most // 2} sums a thread"
    return ""


def not_here(cut: Cut, kind: str, shared: float, hopper: bool) -> str:
    """Why a GPU with ``shared`` bytes of shared memory, which is of Hopper or not, does not run ``cut``; "" if it does."""
    if cut.up.specialised and not hopper:
        return "a cut has specialised warps, and this GPU is not of Hopper"
    return too_large(cut, kind, shared)


def takes_all(cut: Cut) -> bool:
    """Whether ``cut`` takes any number of choices, of any shape."""
    return cut.choices == cut.mean == ANY and not cut.up.specialised


def too_large(cut: Cut, kind: str, shared: float) -> str:
    """Why ``cut`` takes more than ``shared`` bytes of shared memory; "" if it does not."""
    wide = 4 if kind == "float32" else 2
    itemsize = 1 if kind in ("int8", "fp8") else wide
    most = max(blocks.shared(itemsize, wide) for blocks in (cut.up, cut.down))
    return f"a cut takes {most} bytes of shared memory, and this GPU has {shared:g}" if most > shared else ""


# ------------------------------------------------------------------------------------------------- the user's file


def tables(text: str, where: str) -> dict[str, Table]:
    """The tables in the text of a file, by the GPU's name.

    Args:
        where: what messages call the file.

    Raises:
        ValueError: it is no such file, or a cut in it is none.
    """
    try:
        content = json_text.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{where}: found no table of cuts, expected JSON with the format {FORMAT!r}; {ANEW}")
    try:
        found = {}
        for gpu, table in _dict(content.get("gpus"), "gpus").items():
            found[gpu] = {kind: _cuts(kind, entry) for kind, entry in _dict(table, gpu).items()}
        return found
    except _Bad as bad:
        raise ValueError(f"{where}: the cuts are damaged: {bad}; {ANEW}") from None


def written(content: dict[str, Table], made: dict[str, dict[str, Any]]) -> str:
    """The text of a file with these tables; ``made`` says by GPU and type how each was made, for people."""
    gpus = {
        gpu: {
            kind: {
                "made": made.get(gpu, {}).get(kind),
                "cuts": [
                    {
                        "choices": None if cut.choices == ANY else cut.choices,
                        "mean": None if cut.mean == ANY else cut.mean,
                        "up": asdict(cut.up),
                        "down": asdict(cut.down),
                    }
                    for cut in cuts
                ],
            }
            for kind, cuts in table.items()
        }
        for gpu, table in content.items()
    }
    return json.dumps({"format": FORMAT, "gpus": gpus}, indent=1) + "\n"


def made(text: str) -> dict[str, dict[str, Any]]:
    """How each table in the text of a file was made, by the GPU's name and the type."""
    return {
        gpu: {kind: entry.get("made") for kind, entry in table.items()}
        for gpu, table in json_text.loads(text)["gpus"].items()
    }


class _Bad(Exception):
    """A part of a file is not what it should be."""


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise _Bad(f"{shown(what)} is {shown(value)}, expected names and what they have")
    return value


def _cuts(kind: str, entry: Any) -> tuple[Cut, ...]:
    if kind not in KINDS:
        raise _Bad(f"{shown(kind)} is no type, expected one of {', '.join(KINDS)}")
    listed = _dict(entry, kind).get("cuts")
    if not isinstance(listed, list) or not listed:
        raise _Bad(f"the cuts of {kind} are {shown(listed)}, expected a list")
    cuts = tuple(_cut(part) for part in listed)
    for cut in cuts:
        if why := why_not(cut, kind):
            raise _Bad(f"{kind}: {why}")
    if [takes_all(cut) for cut in cuts] != [False] * (len(cuts) - 1) + [True]:
        raise _Bad(f"{kind}: expected the last cut, and no other, to take any number of choices of any shape")
    return cuts


def _cut(part: Any) -> Cut:
    part = _dict(part, "a cut")
    if set(part) != {field.name for field in fields(Cut)}:
        raise _Bad(f"a cut has {shown(sorted(part))}, expected choices, mean, up and down")
    bounds = []
    for name in ("choices", "mean"):
        value = part[name]
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise _Bad(f"{name} is {shown(value)}, expected a whole number of at least 1 or null")
        bounds.append(ANY if value is None else value)
    return Cut(*bounds, _blocks(part["up"]), _blocks(part["down"]))


def _blocks(part: Any) -> Blocks:
    part = _dict(part, "up or down")
    if set(part) != {field.name for field in fields(Blocks)}:
        raise _Bad(f"blocks have {shown(sorted(part))}, expected {', '.join(f.name for f in fields(Blocks))}")
    for name, value in part.items():
        if type(value) is not (bool if name in FLAGS else int):
            raise _Bad(
                f"{name} is {shown(value)}, expected {'true or false' if name in FLAGS else 'a whole number'}"
            )
    return Blocks(**part)
