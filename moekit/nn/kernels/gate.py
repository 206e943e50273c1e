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
from moekit.nn.kernels.overlap import overlapped, start, wait


def choose(
    gate: Gate,
    logits: Tensor,
    noise: Callable[[str, Tensor], Tensor] | None = None,
    edit: Edit | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:meth:`moekit.nn.gate.Gate.choose`, by the kernel where it is softmax and top-k alone; for inference."""
    if not gate.softmax_top_k or edit is not None:
        return gate.choose(logits, noise, edit)
    # The kernel writes two choices at most.
    assert gate.top_k <= 2, f"the kernel makes 1 or 2 choices a token, not {gate.top_k}"
    *shape, experts = logits.shape
    dtype = torch.float32 if gate.config.gate_fp32 else logits.dtype
    probs = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    chosen = torch.empty(*shape, gate.top_k, dtype=torch.long, device=logits.device)
    gate_probs = torch.empty(*shape, gate.top_k, dtype=dtype, device=logits.device)
    weights = gate_probs if gate.top_k == 1 else torch.empty_like(gate_probs)
    if logits.numel():
        _choose[(logits.numel() // experts,)](
            logits.contiguous(),
            probs,
            chosen,
            gate_probs,
            weights,
            torch.finfo(dtype).eps,
            E=experts,
            K=gate.top_k,
            BLOCK=triton.next_power_of_2(experts),
            num_warps=1 if experts <= 512 else 4,
            **overlapped(logits.device),
        )
    return probs, chosen, gate_probs, weights


@triton.jit
def _choose(
    logits,  # [N, E]
    probs,  # [N, E]
    chosen,  # [N, K]
    gate_probs,  # [N, K]
    weights,  # [N, K]
    eps,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    wait(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    real = expert < E
    x = tl.load(logits + token * E + expert, mask=real, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, axis=0))
    # Rounded as stored, so that ties fall as they do in what is stored.
    p = (p / tl.sum(p, axis=0)).to(probs.dtype.element_ty)
    tl.store(probs + token * E + expert, p, mask=real)
    p = tl.where(real, p.to(tl.float32), -1.0)
    # Of NaNs, a GPU may take the last lane.
    first = tl.minimum(tl.argmax(p, axis=0, tie_break_left=True), E - 1)
    tl.store(chosen + token * K, first.to(tl.int64))
    greatest = tl.max(p, axis=0)
    tl.store(gate_probs + token * K, greatest)
    if K == 2:
        # The logits decide here, as in moekit/nn/gates.py: probabilities may have rounded to the same number.
        rest = tl.where(expert == first, float("-inf"), x)
        second = tl.minimum(tl.argmax(rest, axis=0, tie_break_left=True), E - 1)
        tl.store(chosen + token * K + 1, second.to(tl.int64))
        other = tl.sum(tl.where(expert == second, p, 0.0), axis=0)
        tl.store(gate_probs + token * K + 1, other)
        total = tl.maximum((greatest + other).to(probs.dtype.element_ty).to(tl.float32), eps)
        tl.store(weights + token * K, greatest / total)
        tl.store(weights + token * K + 1, other / total)
