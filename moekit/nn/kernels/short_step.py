"""A decode step of a few sequences through the whole model: ``Transformer.forward`` with fewer, fused kernels.

With few rows, the number of kernels decides the time of a step. So norms, activations, residuals and the sums over
choices are fused with the neighbouring linear layers. Experts need no tiles: each choice reads the weights of its expert.

Shape letters: B sequences, D model dim, V dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.dispatch import Local
from moekit.nn.gates import gate_of
from moekit.nn.graphs import whole
from moekit.nn.kernels import short_peers
from moekit.nn.kernels.attention import attend_one
from moekit.nn.kernels.embedding import embedded
from moekit.nn.kernels.gate import choose, chooses, keeps
from moekit.nn.kernels.peer_dispatch import PeerDispatch
from moekit.nn.kernels.vectors import experts_linear, linear, takes
from moekit.nn.parts import part
from moekit.nn.slots import CHUNK
from moekit.nn.transformer import Block, MoE, Transformer

if TYPE_CHECKING:
    from moekit.nn.resident import Resident

# The most sequences of a model with up to so many dims, and none of a wider one: each program normalises all rows again.
# Steps of four sequences of the 15B took 0.65 ms, and 0.76 with the ordinary kernels (H100). Of dense models (H200), with
# 1,024 dims, four took 0.89 and 0.92 ms; with 2,048, one took 1.30 and 1.36, two 1.59 and 1.37; with 2,560, one 3.45 and 2.39.
FEW = {1024: 4, 2048: 1}


def few(dim: int) -> int:
    """The most sequences of a model with ``dim`` dims."""
    return next((most for dims, most in FEW.items() if dim <= dims), 0)


def fits(model: Transformer, sequences: int) -> bool:
    """Whether :func:`read_on` supports this model and ``sequences`` sequences per rank."""
    gate = gate_of(model.config)
    if (
        not keeps(gate)
        or not takes(gate.top_k)
        or (model.slots is not None and sequences * gate.top_k > CHUNK)
    ):
        return False
    # With peers, the gate's choice is part of a kernel of the exchange.
    through_peers = isinstance(model.dispatch, PeerDispatch) and chooses(gate)
    one_place = isinstance(model.dispatch, Local)
    # The kernel that makes the gate's choice knows experts by their own numbers.
    in_order = all(layer.moe is None or layer.moe.numbers is None for layer in model.layers)
    supported = one_place or (through_peers and in_order)
    return sequences <= few(model.config.dim) and model.config.pre_norm and supported


def read_on(
    model: Transformer, tokens: Tensor, cache: Cache, vocab: int, rows: int | None = None
) -> Tensor | None:
    """Run one token of each sequence after the tokens in the cache, without dropping any; for inference.

    With several ranks it is a collective, also for a rank where B is 0.

    Args:
        tokens: [B] int64.
        vocab: V, types of the dictionary.
        rows: the most sequences of any rank; None means B.

    Returns:
        [B, V] logits of the next token; None if B is 0.
    """
    rows = len(tokens) if rows is None else rows
    if len(tokens) == 0:
        _serve(model, rows)
        return None
    return whole(lambda: in_parts(model, tokens, cache, vocab, rows))


def in_parts(
    model: Transformer, tokens: Tensor, cache: Cache, vocab: int, rows: int
) -> Generator[Callable[[], None], None, Tensor]:
    """:func:`read_on` for B above 0, in parts.

    Yields:
        What the host has to do between two parts: it brings experts (:meth:`moekit.nn.resident.Resident.ask`). Without
        slots there is one part.

    Returns:
        [B, V] logits.
    """
    heads = model.config.heads
    with part("embedding"):
        x = embedded(model, tokens, cache)
    for number, layer in enumerate(model.layers):
        with part(f"layer {number}"):
            with part("attention"):
                attn = layer.attn
                qkv, _ = linear(x, attn.qkv.weight, attn.qkv.bias, norm=layer.attn_norm)
                seen = attend_one(qkv.view(len(x), 3, heads, -1), cache.kv[attn.index], cache.lengths)
                x, _ = linear(seen, attn.out.weight, attn.out.bias, onto=x)
            if layer.moe is None or model.slots is None:
                x = _feed_forward(model, layer, x, rows)
                continue
            with part("gate"):
                logits, h = linear(x, layer.moe.gate.weight, norm=layer.ffn_norm)
                _, chosen, _, weights = choose(layer.moe.rule, logits)
            x = yield from fetched(layer.moe.experts, h, chosen, weights, x)
    norm = model.norm
    if model.project_out is not None:
        x, norm = model.features(x), None
    with part("output"):
        logits, _ = linear(x, model.output_weight[:vocab], norm=norm)
    return logits


def fetched(
    experts: Resident, x: Tensor, chosen: Tensor, weights: Tensor, onto: Tensor
) -> Generator[Callable[[], None], None, Tensor]:
    """Compute :func:`experts_linear` with experts that the host brings, for as many rows at a time as it has room for.

    Yields:
        As :func:`in_parts`.
    """
    found, few = [], CHUNK // chosen.shape[1]
    for start in range(0, len(x), few):
        some = slice(start, start + few)
        with part("gate"):
            # What some sequences choose says nothing of what others choose in the next layer.
            ask = experts.ask(chosen[some], ahead=len(x) <= few)
        yield ask
        with part("experts"):
            places = experts.places(chosen[some])
            found.append(experts_linear(experts.slots.experts, x[some], places, weights[some], onto[some]))
    return torch.cat(found) if len(found) > 1 else found[0]


def _feed_forward(model: Transformer, layer: Block, x: Tensor, rows: int) -> Tensor:
    """``x`` [B, D] plus what the experts or the feed-forward network of ``layer`` make of its norm."""
    if layer.moe is not None:
        with part("gate"):
            logits, h = linear(x, layer.moe.gate.weight, norm=layer.ffn_norm)
        return _experts(model, layer.moe, logits, h, x, rows)
    with part("dense"):
        fc1, fc2 = layer.ffn.fc1, layer.ffn.fc2
        h, _ = linear(x, fc1.weight, fc1.bias, norm=layer.ffn_norm, activation=model.config.activation)
        return linear(h, fc2.weight, fc2.bias, onto=x)[0]


def _experts(model: Transformer, moe: MoE, logits: Tensor, h: Tensor, onto: Tensor, rows: int) -> Tensor:
    """``onto`` [B, D] plus the weighted outputs for ``h`` [B, D] of the experts chosen by ``logits`` [B, E]."""
    dispatch = model.dispatch
    if isinstance(dispatch, Local):
        with part("gate"):
            _, chosen, _, weights = choose(moe.rule, logits)
        with part("experts"):
            return experts_linear(moe.experts, h, chosen, weights, onto)
    box, fp32 = dispatch.mailbox(rows), model.config.gate_fp32
    with part("dispatch"):
        return short_peers.experts_linear(moe.experts, box, dispatch.first, rows, logits, h, onto, fp32)


def _serve(model: Transformer, rows: int) -> None:
    """Run the experts held here on the choices of other ranks."""
    nothing = model.embed.weight.new_empty(0, model.config.dim)
    logits = nothing.new_empty(0, model.config.experts)
    for moe in model.moes():
        _experts(model, moe, logits, nothing, nothing, rows)
