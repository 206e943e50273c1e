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
        # x Phi(x) is max(x, 0) - |x| Phi(-|x|), and log2 Phi(-s) is so smooth that a polynomial of degree 5 is enough: fitted for
        # the least greatest error of s Phi(-s), which is 4.4e-7. It goes on falling, so large numbers need no limit.
        size = tl.abs(x)
        tail = -4.73294146e-4 * size + 7.08446222e-3
        tail = tail * size - 5.18271715e-2
        tail = tail * size - 0.459992642
        tail = tail * size - 1.15078777
        tail = tail * size - 1.00003763
        x = tl.maximum(x, 0.0) - size * tl.exp2(tail)
    elif ACTIVATION == 3:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == 4:
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x
