"""Weights of one byte, converted in registers: int8 or float8 (e4m3fn) to float16, without a loss.

A kernel multiplies with the numbers as they are, and multiplies each sum by the scale of its row at the end, since the
scale of a row is a factor of the whole dot product.

Both conversions are bit operations on four numbers at a time, which is a third of the instructions of the hardware's own
conversions of integers, and runs on GPUs without float8, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from moekit.nn.experts import Experts

KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2}

# A byte below the byte 0x64 is the float16 1024 + byte; 1152 is 1024 + 128, and the xor has added 128 to each number.
INT8 = tl.constexpr(
    """
    {
    .reg .b32 raised, low, high, offset;
    xor.b32 raised, $2, 0x80808080;
    prmt.b32 low, raised, 0x64646464, 0x4140;
    prmt.b32 high, raised, 0x64646464, 0x4342;
    mov.b32 offset, 0x64806480;
    sub.f16x2 $0, low, offset;
    sub.f16x2 $1, high, offset;
    }
    """
)
# Sign, exponent and mantissa go to their places in a float16, whose exponent has another bias: the result is
# 1 / 256 of the number.
FLOAT8 = tl.constexpr(
    """
    {
    .reg .b32 low, high, a, b;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 a, low, 0x7f007f00;
    and.b32 b, high, 0x7f007f00;
    shr.b32 a, a, 1;
    shr.b32 b, b, 1;
    lop3.b32 $0, low, 0x80008000, a, 0xea;
    lop3.b32 $1, high, 0x80008000, b, 0xea;
    }
    """
)


class Layer(NamedTuple):
    """A linear layer of all experts, as a kernel reads it."""

    # [E, N, K]; float8 as int8, since Triton does not have float8 on all GPUs.
    weights: Tensor
    # [E, N]
    bias: Tensor
    # [E, N], or None where the weights are not of one byte.
    scale: Tensor | None
    # How the kernel converts the weights.
    options: dict[str, int | bool]


def layers(experts: Experts) -> tuple[Layer, Layer]:
    """Both layers of the experts."""
    kind = KINDS.get(experts.w1.dtype, 0)
    on_nvidia = experts.w1.device.type == "cuda" and torch.version.hip is None
    options = {"ONE_BYTE": kind, "PTX": bool(kind) and on_nvidia}
    w1, b1, w2, b2 = experts.tensors.values()
    if kind:
        w1, w2 = w1.view(torch.int8), w2.view(torch.int8)
    scale1, scale2 = experts.scales
    return Layer(w1, b1, scale1, options), Layer(w2, b2, scale2, options)


@triton.jit
def numbers(m, ONE_BYTE: tl.constexpr, PTX: tl.constexpr):
    """Weights as they multiply: those of one byte as float16, others as they are."""
    if ONE_BYTE == 1:
        if PTX:
            m = tl.inline_asm_elementwise(INT8, "=r,=r,r", [m], dtype=tl.float16, is_pure=True, pack=4)
        else:
            m = m.to(tl.float16)
    elif ONE_BYTE == 2:
        if PTX:
            m = tl.inline_asm_elementwise(FLOAT8, "=r,=r,r", [m], dtype=tl.float16, is_pure=True, pack=4)
        else:
            bits = m.to(tl.int16)
            m = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return m


@triton.jit
def scaled(total, scale, ONE_BYTE: tl.constexpr):
    """Sums of products times the scales of their rows, which ``numbers`` has left out."""
    if ONE_BYTE == 2:
        scale *= 256.0
    return total * scale
