"""The activations of kernels, on sums in float32."""

import triton
import triton.language as tl

ACTIVATIONS = {"linear": 0, "relu": 1, "gelu": 2, "gelu_fast": 3, "gelu_accurate": 3, "tanh": 4}


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == 1:
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == 2 and EXACT:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 2:
        # The formula is 7.1.26 of Abramowitz and Stegun: within 1.5e-7 of erf, with fewer instructions and registers.
        size = tl.abs(x)
        # 0.23164189 is 0.3275911 / sqrt(2). A reciprocal takes one instruction as a root, and eight as a division.
        t = 1.0 + 0.23164189 * size
        t = tl.rsqrt(t * t)
        # The coefficients are half of those of the formula.
        tail = 0.5307027145 * t - 0.726576013
        tail = tail * t + 0.7107068705
        tail = tail * t - 0.142248368
        # 0.72134752 is log2(e) / 2.
        tail = (tail * t + 0.127414796) * t * tl.exp2(-0.72134752 * size * size)
        x = tl.maximum(x, 0.0) - size * tail
    elif ACTIVATION == 3:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == 4:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x
