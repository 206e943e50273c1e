"""Linear layers of up to 64 rows on tensor cores: reading the weights takes the time.

A program computes a few columns of all rows. With few rows its warps share the terms of the sums, since one chain of products
would take longer than reading. Where columns are too few for all multiprocessors, programs share the terms, too, and the
next norm adds up the parts: atomic additions would change the last bits from run to run.

Shape letters: B rows (sequences), K terms of a sum, N columns, S parts of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.kernels.activations import ACTIVATIONS, activate
from moekit.nn.kernels.fetch import to_cache
from moekit.nn.kernels.overlap import overlapped, start, wait

# The most rows of which warps share the terms.
FEW = 32
# The most terms of which a program keeps the weights, with others to add parts up, and without.
PART, WHOLE = 512, 1024


@dataclass(frozen=True)
class Division:
    """How a layer is divided: a program computes ``columns`` columns of a ``parts``-th of the terms, ``inner`` at a time.

    If these are all of its terms, a program keeps its weights in registers while it waits for earlier kernels. Else it only
    has them brought into the cache of the GPU if ``ahead``, and then loads rows and weights in ``stages``. Warps share the
    terms if ``shared``, else the columns.
    """

    columns: int
    inner: int
    warps: int = 8
    parts: int = 1
    stages: int = 3
    shared: bool = True
    ahead: bool = True


def division_for(rows: int, n: int, k: int, split: bool) -> Division:
    """The division of a layer of ``n`` columns and ``k`` terms; ``split``: its result may come in parts."""
    if n > 16 * k:
        return Division(64, 128, 4, shared=False, ahead=False)
    if rows > FEW:
        if n < 2048 and not split:
            return Division(16, 256, 8)
        parts = triton.cdiv(k, PART if k > WHOLE else 128) if split else 1
        return Division(64, 128, 4, parts, 4, shared=False)
    if split:
        inner = PART if k > WHOLE else 256
        return Division(32, inner, 8 if k > WHOLE else 4, triton.cdiv(k, inner))
    return Division(32 if n >= 2048 else 16, min(WHOLE, triton.next_power_of_2(k)))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "linear",
    split: bool = False,
    division: Division | None = None,
) -> Tensor:
    """Compute ``activation(x weight^T + bias)``; for inference.

    Args:
        x: [B, K].
        weight: [N, K]; it may be the first N rows of a larger matrix.
        bias: [N] or None.
        split: the result comes in parts; without an activation.
        division: for tuning.

    Returns:
        [B, N]; or if ``split`` [B, S, N], in float32 unless S is 1, whose sum over S is the result.
    """
    rows, k = x.shape
    n = len(weight)
    division = division or division_for(rows, n, k, split)
    assert x.is_contiguous() and weight.is_contiguous()
    assert activation == "linear" if split else division.parts == 1
    shape = (rows, division.parts, n) if split else (rows, n)
    out = torch.empty(shape, dtype=torch.float32 if division.parts > 1 else x.dtype, device=x.device)
    _linear[(triton.cdiv(n, division.columns), division.parts)](
        x,
        weight,
        bias,
        out,
        rows,
        ACTIVATION=ACTIVATIONS[activation],
        EXACT=x.dtype == torch.float32,
        num_warps=division.warps,
        num_stages=division.stages,
        **constants(division, rows, n, k, x.itemsize),
        **overlapped(x.device),
    )
    return out


def constants(division: Division, rows: int, n: int, k: int, itemsize: int) -> dict[str, int]:
    """What the kernel is compiled for, of a layer of ``n`` columns and ``k`` terms with ``itemsize`` bytes a weight."""
    # A multiple of 16 numbers, so that loads are of 16 bytes.
    terms = triton.cdiv(k, 16 * division.parts) * 16
    return {
        "N": n,
        "K": k,
        "TERMS": terms,
        "PARTS": division.parts,
        "ROWS": max(8, triton.next_power_of_2(rows)),
        "COLUMNS": division.columns,
        "INNER": division.inner,
        # Tensor cores multiply 16 terms at a time.
        "SHARES": min(division.warps, division.inner // 16) if division.shared else 1,
        "LINES": triton.next_power_of_2(triton.cdiv(terms * itemsize, 128)) if division.ahead else 0,
    }


# x [B, K]; w [N, K]; b [N] or None; out [B, PARTS, N]. A program computes TERMS terms. LINES: those of the cache, 128 bytes each,
# that the weights of a column take, or 0.
@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,
    w,
    b,
    out,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    TERMS: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    SHARES: tl.constexpr,
    LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    kind: tl.constexpr = x.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    fits = column < N
    first = tl.program_id(1) * TERMS
    row = tl.arange(0, ROWS)
    here = row < rows
    inner = tl.arange(0, INNER)
    w_at = w + column[:, None] * K + first + inner[None, :]
    a_at = x + row[:, None] * K + first + inner[None, :]
    if SHARES > 1:
        found = tl.zeros((SHARES, COLUMNS, ROWS), dtype=tl.float32)
    else:
        found = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    # No kernel writes the weights, so they are fetched before the wait for earlier kernels.
    if INNER >= TERMS:
        real = (inner < TERMS) & (first + inner < K)
        m = tl.load(w_at, mask=fits[:, None] & real[None, :], other=0.0)
        wait(OVERLAP)
        a = tl.load(a_at, mask=here[:, None] & real[None, :], other=0.0)
        found = multiplied(m, a, found, SHARES, EXACT)
    else:
        if LINES > 0:
            line = tl.minimum(tl.arange(0, LINES) * (1024 // kind.primitive_bitwidth), TERMS - 1)
            to_cache(w + tl.minimum(column[:, None] * K + first + line[None, :], N * K - 1), OVERLAP)
        wait(OVERLAP)
        for done in range(0, TERMS, INNER):
            real = (done + inner < TERMS) & (first + done + inner < K)
            m = tl.load(w_at + done, mask=fits[:, None] & real[None, :], other=0.0)
            a = tl.load(a_at + done, mask=here[:, None] & real[None, :], other=0.0)
            found = multiplied(m, a, found, SHARES, EXACT)
    result = added(found, SHARES)
    if b is not None:
        bias = tl.load(b + column, mask=fits, other=0.0).to(tl.float32)
        result += tl.where(first == 0, bias, 0.0)[:, None]
    result = activate(result, ACTIVATION, EXACT)
    to = out + (row[None, :] * PARTS + tl.program_id(1)) * N + column[:, None]
    tl.store(to, result.to(out.dtype.element_ty), mask=fits[:, None] & here[None, :])


@triton.jit
def multiplied(m, a, found, SHARES: tl.constexpr, EXACT: tl.constexpr):
    """``found`` plus the products of m [columns, terms] and a [rows, terms]; with several shares, each warp has one of the terms."""
    if SHARES > 1:
        EACH: tl.constexpr = m.shape[1] // SHARES
        m = tl.permute(tl.reshape(m, (m.shape[0], SHARES, EACH)), (1, 0, 2))
        a = tl.permute(tl.reshape(a, (a.shape[0], SHARES, EACH)), (1, 2, 0))
    else:
        a = tl.trans(a)
    return tl.dot(m, a, found, input_precision="ieee" if EXACT else "tf32")


@triton.jit
def added(found, SHARES: tl.constexpr):
    """The sum over the shares. Adding halves moves fewer numbers between warps than Triton's reduction does."""
    if SHARES >= 16:
        found = halved(found)
    if SHARES >= 8:
        found = halved(found)
    if SHARES >= 4:
        found = halved(found)
    if SHARES >= 2:
        found = tl.reshape(halved(found), (found.shape[1], found.shape[2]))
    return found


@triton.jit
def halved(found):
    HALF: tl.constexpr = found.shape[0] // 2
    found = tl.reshape(found, (2, HALF, found.shape[1], found.shape[2]))
    one, other = tl.split(tl.permute(found, (1, 2, 3, 0)))
    return one + other
