"""The gate's choice in one pass over its logits: softmax, the best experts, their probabilities.

Shape letters: N tokens, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.gate import Edit, Gate
from moekit.nn.gates import Top2
from moekit.nn.kernels.overlap import overlapped, start, wait

# Tokens per program; one where they are few.
ROWS, FEW = 2, 2048


def chooses(gate: Gate) -> bool:
    """Whether the kernels make the choice of ``gate``: only softmax, and one or two choices."""
    return gate.says("softmax_top_k") and gate.top_k <= 2


def keeps(gate: Gate) -> bool:
    """Whether a step keeps all that ``gate`` chooses, without capacity, padding, draws and experiment: a user's gate may drop by itself."""
    # What is set on the instance has no function of a class behind it.
    dispatched, route = (getattr(method, "__func__", None) for method in (gate.dispatched, gate.route))
    return dispatched in (Gate.dispatched, Top2.dispatched) and route is Gate.route


def choose(
    gate: Gate,
    logits: Tensor,
    noise: Callable[[str, Tensor], Tensor] | None = None,
    edit: Edit | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute :meth:`moekit.nn.gate.Gate.chosen`, with the kernel if it makes the gate's choice; for inference."""
    if not chooses(gate) or edit is not None:
        return gate.chosen(logits, noise, edit)
    *shape, experts = logits.shape
    dtype = torch.float32 if gate.config.gate_fp32 else logits.dtype
    probs = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    chosen = torch.empty(*shape, gate.top_k, dtype=torch.long, device=logits.device)
    gate_probs = torch.empty(*shape, gate.top_k, dtype=dtype, device=logits.device)
    weights = gate_probs if gate.top_k == 1 else torch.empty_like(gate_probs)
    if logits.numel():
        tokens = logits.numel() // experts
        each = 1 if tokens <= FEW else ROWS
        _choose[(triton.cdiv(tokens, each),)](
            logits.contiguous(),
            probs,
            chosen,
            gate_probs,
            weights,
            tokens,
            torch.finfo(dtype).eps,
            E=experts,
            K=gate.top_k,
            ROWS=each,
            BLOCK=triton.next_power_of_2(experts),
            num_warps=1 if experts <= 512 else 4,
            **overlapped(logits.device),
        )
    return probs, chosen, gate_probs, weights


# logits and probs [N, E]; chosen, gate_probs and weights [N, K].
@triton.jit(do_not_specialize=["tokens"])
def _choose(
    logits,
    probs,
    chosen,
    gate_probs,
    weights,
    tokens,
    eps,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = token < tokens
    expert = tl.arange(0, BLOCK)
    real = here[:, None] & (expert < E)[None, :]
    at = token[:, None] * E + expert[None, :]
    x = tl.load(logits + at, mask=real, other=float("-inf")).to(tl.float32)
    kind: tl.constexpr = probs.dtype.element_ty
    p, first, second, greatest, other, one, two = top(x, eps, E, K, kind == tl.float16, kind == tl.bfloat16)
    tl.store(probs + at, p, mask=real)
    to = token * K
    tl.store(chosen + to, first.to(tl.int64), mask=here)
    tl.store(gate_probs + to, greatest, mask=here)
    if K == 2:
        tl.store(chosen + to + 1, second.to(tl.int64), mask=here)
        tl.store(gate_probs + to + 1, other, mask=here)
        tl.store(weights + to, one, mask=here)
        tl.store(weights + to + 1, two, mask=here)


@triton.jit
def top(x, eps, E: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BRAIN: tl.constexpr):
    """The choices of tokens with logits ``x`` [tokens, experts], which are -inf beyond E.

    Returns the probabilities of all experts, the experts of both choices, their probabilities and their weights. The gate
    computes in float16 if HALF, in bfloat16 if BRAIN, else in float32.
    """
    expert = tl.arange(0, x.shape[1])[None, :]
    most = tl.max(x, axis=1)
    p = tl.exp(x - most[:, None])
    whole = tl.sum(p, axis=1)
    p = tl.where(expert < E, _rounded(p / whole[:, None], HALF, BRAIN), -1.0)
    # Among NaNs, a GPU may return the last lane.
    first = tl.minimum(tl.argmax(p, axis=1, tie_break_left=True), E - 1)
    # Each reduction takes its time, so the probabilities of the choices are computed again, by the same formula. exp(most - most) is 1,
    # and NaN where the greatest logit is not finite.
    greatest = _rounded(tl.exp(most - most) / whole, HALF, BRAIN)
    second = first
    other = greatest
    one = greatest
    two = greatest
    if K == 2:
        # The logits decide here, as in moekit/nn/gates.py, because two probabilities may round to the same number.
        rest = tl.where(expert == first[:, None], float("-inf"), x)
        best, second = tl.max(rest, axis=1, return_indices=True, return_indices_tie_break_left=True)
        second = tl.minimum(second, E - 1)
        other = _rounded(tl.exp(best - most) / whole, HALF, BRAIN)
        total = tl.maximum(_rounded(greatest + other, HALF, BRAIN), eps)
        one = greatest / total
        two = other / total
    return p, first, second, greatest, other, one, two


@triton.jit
def _rounded(x, HALF: tl.constexpr, BRAIN: tl.constexpr):
    """Round ``x`` to the dtype in which it is stored, so that ties are the same as among the stored numbers."""
    if HALF:
        x = x.to(tl.float16).to(tl.float32)
    elif BRAIN:
        x = x.to(tl.bfloat16).to(tl.float32)
    return x
