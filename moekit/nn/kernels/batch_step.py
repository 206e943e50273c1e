"""A decode step of 2 to 64 sequences through the whole model: ``Transformer.forward`` with fewer kernels, which overlap.

Linear layers are those of narrow.py. As in the general path, what attention and experts make stays pending until the next
norm adds it. One kernel sorts the choices by expert and makes their tiles; on Hopper, seven to 16 sequences have choice,
sorting and experts in one (streamed.py). Over ranks that reach one another's memory, the layers of experts are those of batch_peers.py.

Shape letters: B sequences, D model dim, V dictionary, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.dispatch import Local
from moekit.nn.gates import gate_of
from moekit.nn.graphs import whole
from moekit.nn.kernels import batch_peers, grid_barrier, short_step, streamed
from moekit.nn.kernels.attention import attend_one
from moekit.nn.kernels.batch_peers import Coming
from moekit.nn.kernels.cuts import cut_for, cuts_of, kind_of, shared_memory
from moekit.nn.kernels.embedding import embedded
from moekit.nn.kernels.gate import choose, keeps
from moekit.nn.kernels.gpu import since_hopper
from moekit.nn.kernels.grouped import planned_ffn
from moekit.nn.kernels.narrow import linear
from moekit.nn.kernels.peers import WRITTEN
from moekit.nn.kernels.tiles import FEW, planned
from moekit.nn.kernels.vectors import experts_linear, takes
from moekit.nn.parts import part
from moekit.nn.passes import Pass
from moekit.nn.slots import CHUNK
from moekit.nn.transformer import AddNorm, MoE, Transformer

# From so many sequences, up to so many, of models with up to so many dims. With 2,048 dims, torch's products were 1 % faster.
LEAST, MOST, DIM = 2, WRITTEN, 1024
# The bytes of shared memory that the linear layers take.
SHARED = 128 * 1024
# The most choices of which each reads the weights of its own expert, without tiles.
APART = 12


def fits(model: Transformer, sequences: int) -> bool:
    """Whether :func:`read_on` supports this model and ``sequences`` sequences per rank, and is the fastest."""
    device = model.embed.weight.device
    # It was measured where kernels overlap; other GPUs do without.
    apt = device.type != "cuda" or (
        since_hopper(device)
        and shared_memory(device) >= SHARED
        # Numbers of four bytes would take twice the memory.
        and model.embed.weight.dtype.itemsize == 2
    )
    gate = gate_of(model.config)
    if not apt or not keeps(gate) or not model.config.pre_norm or model.config.dim > DIM:
        return False
    one_place, choices = isinstance(model.dispatch, Local), gate.top_k
    if model.slots is not None and not (one_place and takes(choices) and choices <= CHUNK):
        return False
    # With experts that are fetched, a few sequences are one request of the host.
    few = model.slots is not None and short_step.fits(model, sequences)
    return LEAST <= sequences <= MOST and not few


def read_on(model: Transformer, tokens: Tensor, asked: Pass, vocab: int) -> Tensor | None:
    """Compute :func:`moekit.nn.operations.read_on`; for inference.

    With several ranks it is a collective, also for a rank where B is 0.
    """
    if len(tokens) == 0:
        return _serve(model, asked.rows_expected)
    return whole(lambda: in_parts(model, tokens, asked.cache, vocab, asked.rows_expected))


def in_parts(
    model: Transformer, tokens: Tensor, cache: Cache, vocab: int, rows: int | None
) -> Generator[Callable[[], None], None, Tensor]:
    """:func:`read_on` for B above 0, in parts, as :func:`moekit.nn.kernels.short_step.in_parts` has them.

    With slots, the host brings the experts of a few sequences at a time.
    """
    config = model.config
    with part("embedding"):
        x = embedded(model, tokens, cache)
    pending = None
    for number, layer in enumerate(model.layers):
        with part(f"layer {number}"):
            with part("attention"):
                attn = layer.attn
                x, h = _normed(layer.attn_norm, x, pending)
                qkv = linear(h, attn.qkv.weight, attn.qkv.bias).view(len(x), 3, config.heads, -1)
                seen = attend_one(qkv, cache.kv[attn.index], cache.lengths)
                x, h = layer.ffn_norm(x, linear(seen, attn.out.weight, attn.out.bias, split=True))
            if layer.moe is None:
                with part("dense"):
                    fc1, fc2 = layer.ffn.fc1, layer.ffn.fc2
                    h = linear(h, fc1.weight, fc1.bias, activation=config.activation)
                    pending = linear(h, fc2.weight, fc2.bias, split=True)
            elif model.slots is None:
                x, pending = _experts(model, layer.moe, x, h, rows)
            else:
                with part("gate"):
                    _, chosen, _, weights = choose(layer.moe.rule, linear(h, layer.moe.gate.weight))
                x, pending = (yield from short_step.fetched(layer.moe.experts, h, chosen, weights, x)), None
    if model.norm is not None:
        _, x = _normed(model.norm, x, pending)
    elif pending is not None:
        pending = batch_peers.arrived(pending) if isinstance(pending, Coming) else pending
        # The norm adds parts up in float32.
        x = x + pending.sum(dim=1, dtype=torch.float32).to(x.dtype)
    x = x if model.project_out is None else model.project_out(x)
    with part("output"):
        return linear(x, model.output_weight[:vocab])


def _normed(norm: AddNorm, x: Tensor, pending: Tensor | Coming | None) -> tuple[Tensor, Tensor]:
    """``x`` [B, D] plus what is pending, and the norm of the sum."""
    if isinstance(pending, Coming):
        with part("norm"):
            return batch_peers.collected(pending, x, norm)
    return norm(x, pending)


def _serve(model: Transformer, rows_expected: int | None) -> None:
    """Run the experts held here on the choices of other ranks."""
    nothing = model.embed.weight.new_empty(0, model.config.dim)
    logits = nothing.new_empty(0, model.config.experts)
    for moe in model.moes():
        if _written(moe, rows_expected):
            with part("dispatch"):
                batch_peers.arrived(batch_peers.sent(moe, logits, nothing, rows_expected))
        else:
            moe.serve(nothing, rows_expected)


def _written(moe: MoE, rows_expected: int | None) -> bool:
    """Whether ranks write rows to one another in this layer; all ranks find the same."""
    return rows_expected is not None and batch_peers.fits(moe, rows_expected)


def _experts(
    model: Transformer, moe: MoE, onto: Tensor, x: Tensor, rows_expected: int | None
) -> tuple[Tensor, Tensor | Coming | None]:
    """``onto`` [B, D], and what is pending: the weighted outputs [B, K, D] for ``x`` [B, D] of the experts that the gate chooses."""
    rule, experts, choices = moe.rule, moe.experts, len(x) * moe.rule.top_k
    with part("gate"):
        logits = linear(x, moe.gate.weight)
    if _written(moe, rows_expected):
        with part("dispatch"):
            return onto, batch_peers.sent(moe, logits, x, rows_expected)
    if not isinstance(model.dispatch, Local) or choices > FEW:
        with part("gate"):
            routing = rule.route(logits[:, None], fraction=None, choose=choose)
        return onto, moe.dispatched(x, routing, rows_expected).view(len(x), rule.top_k, -1)
    apart = choices <= APART and takes(rule.top_k)
    if not apart and streamed.fits(rule, experts, x):
        with part("experts"):
            return onto, streamed.chosen_ffn(rule, experts, logits, x, grid_barrier.counter(model, x.device))
    with part("gate"):
        _, chosen, _, weights = choose(rule, logits)
    if apart:
        with part("experts"):
            return experts_linear(experts, x, chosen, weights, onto), None
    cut = cut_for(choices, experts.held, cuts_of(x.device, kind_of(x.dtype, experts.w1.dtype)))
    with part("plan"):
        order, table, weights = planned(chosen, weights, experts.held, cut.up.rows, x.dtype)
    with part("experts"):
        out = torch.empty(choices, x.shape[1], dtype=x.dtype, device=x.device)
        planned_ffn(experts, x, (order, table), rule.top_k, weights, cut, out)
        return onto, out.view(len(x), rule.top_k, -1)
