"""Linear layers of a few rows: reading the weights takes the time, so the operations around a layer are fused with it.

A program computes a few columns of all rows and has all loads of a sum under way at once. Each program computes the norm
before the layer again, since there are few rows. The activation, the gate's weight and the residual come last.

Shape letters: B rows (sequences), K terms of a sum, N columns, P choices, C choices per row (choice p belongs to
row p // C), E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from moekit.nn.experts import Experts
from moekit.nn.kernels import one_byte
from moekit.nn.kernels.activations import ACTIVATIONS, activate
from moekit.nn.kernels.gpu import multiprocessors
from moekit.nn.kernels.one_byte import numbers, scaled
from moekit.nn.kernels.overlap import overlapped, start, wait

WARPS = 4
# Products that a program keeps, which is 32 per thread; with several rows, twice as many.
NUMBERS = 4096
# Terms of a sum that a program reads at a time; with a norm, it reads all terms at once.
LONGEST = 1024


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: nn.LayerNorm | None = None,
    activation: str = "linear",
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``onto + activation(norm(x) weight^T + bias)`` and ``norm(x)``; for inference.

    Args:
        x: [B, K].
        weight: [N, K]; it may be the first N rows of a larger matrix.
        bias: [N] or None.
        onto: [B, N] or None.

    Returns:
        [B, N], and the normed input [B, K], which is ``x`` without a norm.
    """
    rows, k = x.shape
    n = len(weight)
    assert x.is_contiguous() and weight.is_contiguous()
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    normed = x if norm is None else torch.empty_like(x)
    padded = triton.next_power_of_2(rows)
    inner = triton.next_power_of_2(k)
    inner = inner if norm is not None else min(inner, LONGEST)
    columns = columns_of(n, padded * inner // min(padded, 2), x.device)
    _linear[(triton.cdiv(n, columns),)](
        x,
        weight,
        bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        normed,
        onto,
        out,
        rows,
        0.0 if norm is None else norm.eps,
        N=n,
        K=k,
        ACTIVATION=ACTIVATIONS[activation],
        EXACT=x.dtype == torch.float32,
        ROWS=padded,
        COLUMNS=columns,
        INNER=inner,
        num_warps=WARPS,
        **overlapped(x.device),
    )
    return out, normed


def takes(choices: int) -> bool:
    """Whether :func:`experts_linear` takes so many choices a row: a program has all of a row's, and a power of two."""
    return choices.bit_count() == 1


def experts_linear(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor, onto: Tensor) -> Tensor:
    """Add the weighted outputs of the chosen experts to ``onto``; for inference.

    Args:
        x: [B, D].
        chosen: [B, C] int64, where :func:`takes` C.
        weights: [B, C], rounded to the dtype of ``x``.
        onto: [B, D].

    Returns:
        [B, D]
    """
    rows, dim = x.shape
    choices = chosen.shape[1]
    up, down = one_byte.layers(experts)
    width = experts.width
    assert x.is_contiguous() and chosen.is_contiguous() and weights.is_contiguous() and onto.is_contiguous()
    hidden = torch.empty(rows * choices, width, dtype=x.dtype, device=x.device)
    out = torch.empty_like(onto)
    exact = x.dtype == torch.float32
    inner = min(triton.next_power_of_2(dim), LONGEST)
    columns = columns_of(width, inner, x.device, rows * choices)
    _experts_up[(triton.cdiv(width, columns), rows * choices)](
        x,
        up.weights,
        up.bias,
        up.scale,
        chosen,
        hidden,
        CHOICES=choices,
        N=width,
        K=dim,
        ACTIVATION=ACTIVATIONS[experts.activation],
        EXACT=exact,
        COLUMNS=columns,
        INNER=inner,
        **up.options,
        num_warps=WARPS,
        **overlapped(x.device),
    )
    inner = min(triton.next_power_of_2(width), LONGEST)
    columns = columns_of(dim, choices * inner, x.device, rows)
    _experts_down[(triton.cdiv(dim, columns), rows)](
        hidden,
        down.weights,
        down.bias,
        down.scale,
        chosen,
        weights,
        onto,
        out,
        CHOICES=choices,
        N=dim,
        K=width,
        COLUMNS=columns,
        INNER=inner,
        **down.options,
        num_warps=WARPS,
        **overlapped(x.device),
    )
    return out


def columns_of(n: int, each: int, device: torch.device, others: int = 1) -> int:
    """The columns per program: as many as fit, but few enough that every multiprocessor has a program."""
    fit = max(1, NUMBERS // each)
    while fit > 1 and triton.cdiv(n, fit) * others < multiprocessors(device):
        fit //= 2
    return fit


# x and normed [B, K]; w [N, K]; b [N] or None; out, and onto or None, [B, N].
# gain and shift: the norm's weight and bias, [K] or None.
@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    w,
    b,
    gain,
    shift,
    normed,
    onto,
    out,
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    kind: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < N
    row = tl.arange(0, ROWS)
    here = row < rows
    inner = tl.arange(0, INNER)
    w_at = w + column[:, None] * K + inner[None, :]
    # No kernel writes the weights, so they are read before the wait for earlier kernels.
    m = tl.load(w_at, mask=fits[:, None] & (inner < K)[None, :], other=0.0)
    if gain is not None:
        g = tl.load(gain + inner, mask=inner < K, other=0.0).to(tl.float32)
        s = tl.load(shift + inner, mask=inner < K, other=0.0).to(tl.float32)
    wait(OVERLAP)
    a_at = x + row[:, None] * K + inner[None, :]
    a = tl.load(a_at, mask=here[:, None] & (inner < K)[None, :], other=0.0).to(tl.float32)
    if gain is not None:
        mean = tl.sum(a, axis=1) / K
        off = tl.where((inner < K)[None, :], a - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(off * off, axis=1) / K + eps)
        a = (off * scale[:, None] * g[None, :] + s[None, :]).to(kind)
        if tl.program_id(0) == 0:
            at = normed + row[:, None] * K + inner[None, :]
            tl.store(at, a, mask=here[:, None] & (inner < K)[None, :])
        a = a.to(tl.float32)
    products = tl.expand_dims(a, 1) * tl.expand_dims(m.to(tl.float32), 0)
    for done in tl.static_range(INNER, K, INNER):
        rest = inner < K - done
        m = tl.load(w_at + done, mask=fits[:, None] & rest[None, :], other=0.0).to(tl.float32)
        a = tl.load(a_at + done, mask=here[:, None] & rest[None, :], other=0.0).to(tl.float32)
        products += tl.expand_dims(a, 1) * tl.expand_dims(m, 0)
    total = tl.sum(products, axis=2)
    if b is not None:
        total += tl.load(b + column, mask=fits, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION, EXACT)
    at = row[:, None] * N + column[None, :]
    written = here[:, None] & fits[None, :]
    if onto is not None:
        total = tl.load(onto + at, mask=written, other=0.0).to(tl.float32) + total.to(kind).to(tl.float32)
    tl.store(out + at, total.to(kind), mask=written)


# x [B, K]; w [E, N, K]; b, and scale if ONE_BYTE (else None), [E, N]; chosen [P]; out [P, N].
@triton.jit
def _experts_up(
    x,
    w,
    b,
    scale,
    chosen,
    out,
    CHOICES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ONE_BYTE: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    choice = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < N
    inner = tl.arange(0, INNER)
    wait(OVERLAP)
    expert = tl.load(chosen + choice)
    w_at = w + expert * (N * K) + column[:, None] * K + inner[None, :]
    a_at = x + (choice // CHOICES) * K + inner
    products = tl.zeros((COLUMNS, INNER), dtype=tl.float32)
    for done in tl.static_range(0, K, INNER):
        rest = inner < K - done
        m = tl.load(w_at + done, mask=fits[:, None] & rest[None, :], other=0)
        m = numbers(m, ONE_BYTE, PTX).to(tl.float32)
        a = tl.load(a_at + done, mask=rest, other=0.0).to(tl.float32)
        products += m * a[None, :]
    total = tl.sum(products, axis=1)
    at = expert * N + column
    if ONE_BYTE:
        total = scaled(total, tl.load(scale + at, mask=fits, other=0.0), ONE_BYTE)
    total += tl.load(b + at, mask=fits, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION, EXACT)
    tl.store(out + choice * N + column, total.to(out.dtype.element_ty), mask=fits)


# x [P, K]; w [E, N, K]; b, and scale if ONE_BYTE (else None), [E, N]; chosen and weights [P]; onto and out [B, N].
@triton.jit
def _experts_down(
    x,
    w,
    b,
    scale,
    chosen,
    weights,
    onto,
    out,
    CHOICES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ONE_BYTE: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    kind: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < N
    inner = tl.arange(0, INNER)
    choice = row * CHOICES + tl.arange(0, CHOICES)
    wait(OVERLAP)
    expert = tl.load(chosen + choice)
    w_at = w + tl.expand_dims(expert * (N * K), [1, 2]) + tl.expand_dims(column, [0, 2]) * K
    w_at += tl.expand_dims(inner, [0, 1])
    a_at = x + choice[:, None] * K + inner[None, :]
    products = tl.zeros((CHOICES, COLUMNS, INNER), dtype=tl.float32)
    for done in tl.static_range(0, K, INNER):
        rest = inner < K - done
        here = tl.expand_dims(fits, [0, 2]) & tl.expand_dims(rest, [0, 1])
        m = numbers(tl.load(w_at + done, mask=here, other=0), ONE_BYTE, PTX).to(tl.float32)
        a = tl.load(a_at + done, mask=rest[None, :], other=0.0).to(tl.float32)
        products += m * tl.expand_dims(a, 1)
    at = expert[:, None] * N + column[None, :]
    total = tl.sum(products, axis=2)
    if ONE_BYTE:
        total = scaled(total, tl.load(scale + at, mask=fits[None, :], other=0.0), ONE_BYTE)
    total += tl.load(b + at, mask=fits[None, :], other=0.0).to(tl.float32)
    total *= tl.load(weights + choice).to(kind).to(tl.float32)[:, None]
    total = tl.sum(total.to(kind).to(tl.float32), axis=0).to(kind).to(tl.float32)
    target = row * N + column
    total += tl.load(onto + target, mask=fits, other=0.0).to(tl.float32)
    tl.store(out + target, total.to(kind), mask=fits)
