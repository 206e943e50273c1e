"""Matrices to numbers of one byte with a scale for each row, many in one kernel: what ``moekit.nn.quantise.quantise`` does.

Scales and numbers are the same bits, but for the numbers of a row that is not finite.

A checkpoint has thousands of matrices. A call of torch or Triton for each releases Python's lock and waits for it again, so
loading took longer than without quantising, though a GPU rounds faster than the link delivers.

Shape letters: M matrices, R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.quantise import LARGEST

# What a table has of a matrix.
ENTRIES = tl.constexpr(5)
WARPS = 4
# Adding it to a number of up to 2^22 and subtracting it rounds to the nearest whole number, and halves to the even one.
ROUNDS = tl.constexpr(1.5 * 2**23)
# The smallest power of two of a float8 that has a full mantissa.
SMALLEST = tl.constexpr(2.0**-6)
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def able(device: torch.device, source: torch.dtype, kind: torch.dtype) -> bool:
    """Whether the kernel can make numbers of ``kind`` on ``device``; Triton has no float8 on GPUs that have none."""
    known = device.type == "cuda" and source in TYPES
    return known and (kind == torch.int8 or torch.cuda.get_device_capability(device) >= (8, 9))


def entries(matrices: Sequence[tuple[int, Tensor, Tensor]]) -> list[tuple[int, int, int, int, int]]:
    """What the kernel reads of each matrix.

    Args:
        matrices: the address of a matrix [R, C], its numbers [R, C] of one byte and its scale [R] float32, to be written;
            contiguous.

    Returns:
        For each matrix: its first row, counted over all, C, and the three addresses.
    """
    found, first = [], 0
    for address, numbers, scale in matrices:
        rows, columns = numbers.shape
        found.append((first, columns, address, numbers.data_ptr(), scale.data_ptr()))
        first += rows
    return found


def quantise(
    table: Tensor, count: int, rows: int, columns: int, source: torch.dtype, kind: torch.dtype
) -> None:
    """Round all rows of the matrices in a table to numbers of one byte, in float32.

    Args:
        table: [M, 5] int64 on the device, of which the first ``count`` are :func:`entries`.
        count: the number of matrices.
        rows: of all matrices together.
        columns: the most of a matrix.
        source: the dtype of the matrices.
        kind: int8 or float8_e4m3fn.
    """
    _quantise[(rows,)](
        table,
        count,
        SOURCE=TYPES[source],
        KIND=TYPES[kind],
        LARGEST=LARGEST[kind],
        WHOLE=kind == torch.int8,
        TINY=torch.finfo(torch.float32).tiny,
        MATRICES=triton.next_power_of_2(len(table)),
        COLUMNS=triton.next_power_of_2(columns),
        num_warps=WARPS,
    )


# table [M, 5]. A program rounds a row.
@triton.jit(do_not_specialize=["count"])
def _quantise(
    table,
    count,
    SOURCE: tl.constexpr,
    KIND: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,
    TINY: tl.constexpr,
    MATRICES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    i = tl.arange(0, MATRICES)
    first = tl.load(table + i * ENTRIES, mask=i < count, other=0)
    mine = table + (tl.sum(((i < count) & (first <= row)).to(tl.int32)) - 1) * ENTRIES
    row -= tl.load(mine)
    columns = tl.load(mine + 1)
    matrix = tl.load(mine + 2).to(tl.pointer_type(SOURCE)) + row * columns
    numbers = tl.load(mine + 3).to(tl.pointer_type(KIND)) + row * columns
    scale = tl.load(mine + 4).to(tl.pointer_type(tl.float32)) + row
    column = tl.arange(0, COLUMNS)
    x = tl.load(matrix + column, mask=column < columns, other=0.0).to(tl.float32)
    # A maximum passes over NaN, and a row with NaN has to get a scale that is NaN.
    none = tl.max((x != x).to(tl.int32)) > 0
    largest = tl.where(none, float("nan"), tl.max(tl.abs(x))) * (1 / LARGEST)
    each = tl.where(largest < TINY, TINY, largest)
    tl.store(scale, each)
    exact = tl.div_rn(x, tl.zeros_like(x) + each)
    if WHOLE:
        number = (exact + ROUNDS) - ROUNDS
        number = tl.where(number != number, 0.0, number)
    else:
        number = _float8(exact)
    tl.store(numbers + column, number.to(KIND), mask=column < columns)


@triton.jit
def _float8(x):
    """float32 of up to 448 to the nearest number of e4m3, as float32: so its conversion is exact on every GPU."""
    bits = x.to(tl.int32, bitcast=True)
    # The power of two of a number has eight steps to the next one; below the smallest one, steps stay as they are.
    power = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), SMALLEST)
    rounds = power * (ROUNDS / 8)
    found = (x + rounds) - rounds
    # A negative number that becomes zero keeps its sign.
    return (found.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
