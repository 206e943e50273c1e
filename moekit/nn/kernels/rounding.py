"""Matrices to numbers of one byte with a scale for each row, in one kernel: what ``moekit.nn.quantise.plainly`` does.

Scales and numbers are the same bits, but for the numbers of a row that is not finite.

A checkpoint has thousands of matrices. Quantising one took a dozen calls of torch, and the threads that load wait for
Python's lock at each; so loading took longer than without quantising, though a GPU rounds faster than the link delivers.

Shape letters: R rows, C columns of a matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.quantise import LARGEST

# Numbers of a program, in whole rows.
NUMBERS = 4096
WARPS = 4
# Adding it to a number of up to 2^22 and subtracting it rounds to the nearest whole number, and halves to the even one.
ROUNDS = tl.constexpr(1.5 * 2**23)
# The smallest power of two of a float8 that has a full mantissa.
SMALLEST = tl.constexpr(2.0**-6)


def quantise(matrix: Tensor, numbers: Tensor, scale: Tensor) -> None:
    """:func:`moekit.nn.quantise.quantise` of one matrix.

    Args:
        matrix: [R, C], contiguous like the others, of any floating-point type.
        numbers: [R, C] int8 or float8_e4m3fn, which is written.
        scale: [R] float32, which is written.
    """
    assert matrix.is_contiguous() and numbers.is_contiguous() and scale.is_contiguous()
    rows, columns = matrix.shape
    padded = triton.next_power_of_2(columns)
    each = max(1, NUMBERS // padded)
    _quantise[(triton.cdiv(rows, each),)](
        matrix,
        numbers,
        scale,
        rows,
        C=columns,
        LARGEST=LARGEST[numbers.dtype],
        WHOLE=numbers.dtype == torch.int8,
        TINY=torch.finfo(torch.float32).tiny,
        ROWS=each,
        COLUMNS=padded,
        num_warps=WARPS,
    )


# matrix and numbers [R, C]; scale [R].
@triton.jit(do_not_specialize=["rows"])
def _quantise(
    matrix,
    numbers,
    scale,
    rows,
    C: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = (row < rows)[:, None] & (column < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(matrix + at, mask=here, other=0.0).to(tl.float32)
    # A maximum passes over NaN, and a row with NaN has to get a scale that is NaN.
    none = tl.max((x != x).to(tl.int32), axis=1) > 0
    largest = tl.where(none, float("nan"), tl.max(tl.abs(x), axis=1)) * (1 / LARGEST)
    each = tl.where(largest < TINY, TINY, largest)
    tl.store(scale + row, each, mask=row < rows)
    exact = tl.div_rn(x, tl.broadcast_to(each[:, None], (ROWS, COLUMNS)))
    if WHOLE:
        number = (exact + ROUNDS) - ROUNDS
        number = tl.where(number != number, 0.0, number)
    else:
        number = _float8(exact)
    tl.store(numbers + at, number.to(numbers.dtype.element_ty), mask=here)


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
