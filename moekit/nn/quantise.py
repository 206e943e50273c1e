"""Matrices with numbers of one byte and a scale for each row: a weight is its number times its row's scale.

The scale of a row is its largest magnitude over the largest number of the type, so that no number is clipped.

Shape letters: R rows, C columns of a matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What ``load(..., experts=...)`` takes, and the type of the numbers.
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# The largest number that is used: -128 is not, so that the numbers are symmetric.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float16`` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def name_of(kind: torch.dtype | None) -> str | None:
    """The name in :data:`KINDS`."""
    return next((name for name, own in KINDS.items() if own == kind), None)


@torch.no_grad()
def quantise(matrix: Tensor, numbers: Tensor, scale: Tensor) -> None:
    """Round each row to numbers of one byte, in float32.

    A row with NaN or infinity gets a scale that is not finite, and its outputs are NaN.

    Args:
        matrix: [..., R, C], of any floating-point type.
        numbers: [..., R, C] int8 or float8_e4m3fn, which is written.
        scale: [..., R] float32, which is written.
    """
    largest = torch.linalg.vector_norm(matrix, math.inf, dim=-1, dtype=torch.float32)
    # GPUs divide by a number in another way than CPUs, and multiply in the same way. A row of zeros is zero with any scale.
    scale.copy_(largest.mul_(1 / LARGEST[numbers.dtype]).clamp_(min=torch.finfo(torch.float32).tiny))
    exact = matrix / scale[..., None]
    if numbers.dtype == torch.int8:
        exact = exact.round_().nan_to_num_(0.0)
    numbers.copy_(exact)


def dequantise(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [..., R, C] in ``dtype``; the product is made in float32."""
    return (numbers.float() * scale[..., None]).to(dtype)
