"""The whole model: fairseq's ``transformer_lm`` decoder with mixture-of-experts layers, for inference and training.

It knows no ranks: experts may live elsewhere, and ``dispatch`` takes rows to them (see dispatch.py). It reads top to
bottom: ``Transformer`` -> ``Block`` -> ``Attention`` and ``DenseFFN`` or ``MoE``.

Shape letters: B samples, T tokens of a sample, N = B T tokens, D model dim, H heads, V dictionary, E experts,
K choices a token, G routing groups, S = N / G tokens of a group.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moekit.nn import gate
from moekit.nn.cache import Cache
from moekit.nn.config import ModelConfig
from moekit.nn.dispatch import Dispatch, Local
from moekit.nn.experts import Assignment, Experts, QuantisedExperts
from moekit.nn.gates import gate_of
from moekit.nn.operations import PLAIN, added, use
from moekit.nn.parts import is_part, part
from moekit.nn.passes import Pass
from moekit.nn.pinning import paged
from moekit.nn.positions import Positions

if TYPE_CHECKING:
    from moekit.nn.slots import Slots

Module = TypeVar("Module", bound=nn.Module)
# Without cuDNN's, which torch prefers on Hopper: texts have many lengths, and cuDNN makes a plan for every new shape, in
# 70 ms and the first in 1 s (H100).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Transformer(nn.Module):
    """Decoder-only language model; ``held`` experts a layer live here, all of them by default."""

    operations = PLAIN
    # The places on the device where experts are fetched to, where not all of them fit: see slots.py.
    slots: Slots | None = None

    def __init__(self, config: ModelConfig, held: int | None = None, dispatch: Dispatch | None = None):
        super().__init__()
        self.config = config
        held = config.experts if held is None else held
        self.dispatch = dispatch = dispatch or Local()
        # Uninitialised: drawing on the meta device makes torch import its compiler, which takes seconds.
        self.embed = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_rows, config.input_dim), freeze=False
        )
        self.project_in = _bridge(config.input_dim, config.dim)
        self.positions = Positions(config) if config.positions else None
        self.embed_norm = nn.LayerNorm(config.dim) if config.embedding_norm else None
        self.layers = nn.ModuleList(Block(config, i, held, dispatch) for i in range(config.layers))
        self.norm = AddNorm(config.dim) if config.pre_norm and config.final_norm else None
        self.project_out = _bridge(config.dim, config.output_dim)
        self.output = (
            None if config.share_output else nn.Linear(config.output_dim, config.vocab_rows, bias=False)
        )

    def forward(self, tokens: Tensor, asked: Pass | None = None) -> Tensor:
        """Features of every position.

        Args:
            tokens: [B, T] int64 dictionary ids; ``PAD`` is padding if ``asked.padding`` says so.

        Returns:
            [B, T, output_dim], for :meth:`logits`.
        """
        asked = asked or Pass()
        x = self.embedded(tokens, asked)
        if asked.cache is not None:
            visible = asked.cache.open(tokens.shape[1])
        else:
            visible = attention_mask(asked.padding)
        pending = None
        with sdpa_kernel(ATTENTION):
            for number, layer in enumerate(self.layers):
                with part(f"layer {number}"):
                    x, pending = layer(x, pending, visible, asked)
        return self.features(x, pending)

    @is_part("embedding")
    def embedded(self, tokens: Tensor, asked: Pass) -> Tensor:
        """[B, T] -> [B, T, D], what the first layer reads."""
        return self.placed(self.embed(tokens), asked)

    def placed(self, x: Tensor, asked: Pass) -> Tensor:
        """Embeddings [B, T, input_dim] -> [B, T, D] with the positions, what the first layer reads."""
        length = x.shape[1]
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.dim)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + self.positions(length, x.device, asked).to(x)
        return x if self.embed_norm is None else self.embed_norm(x)

    def features(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """What the last layer gives, [B, T, D] and what is still to be added -> features [B, T, output_dim]."""
        if self.norm is not None:
            _, x = self.norm(x, pending)
        elif pending is not None:
            x = added(x, pending)
        return x if self.project_out is None else self.project_out(x)

    def use(self, backend: str) -> Transformer:
        """Compute with ``backend`` from now on: "loop", "grouped_mm" or "triton". Returns itself.

        "loop" is what all others are checked against, and the only one that learns.
        """
        use(self, backend)
        return self

    @property
    def backend(self) -> str:
        """The name of what it computes with, see moekit/nn/operations.py."""
        return self.operations.backend

    def serve(self, rows_expected: int | None = None) -> None:
        """Take part in the exchanges of one forward pass without tokens: experts held here may get other ranks' rows.

        Args:
            rows_expected: that of the other ranks' :class:`Pass`.
        """
        for moe in self.moes():
            moe.serve(self.embed.weight, rows_expected)

    def moes(self) -> Iterator[MoE]:
        """The layers' experts with their gates, each within the range of its layer."""
        for number, layer in enumerate(self.layers):
            if layer.moe is not None:
                with part(f"layer {number}"):
                    yield layer.moe

    @is_part("output")
    def logits(self, features: Tensor, vocab: int | None = None) -> Tensor:
        """[..., output_dim] -> [..., V] for the first ``vocab`` types: rows beyond the dictionary take no part."""
        return F.linear(features, self.output_weight[:vocab])

    @property
    def output_weight(self) -> Tensor:
        """[vocab_rows, output_dim]"""
        return self.embed.weight if self.output is None else self.output.weight


def empty(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    held: int | None = None,
    dispatch: Dispatch | None = None,
    kind: torch.dtype | None = None,
    at_home: bool = False,
) -> Transformer:
    """A :class:`Transformer` for inference on ``device`` whose weights are uninitialised memory, to be filled.

    Args:
        kind: of the experts' matrices, int8 or float8_e4m3fn (:mod:`moekit.nn.quantise`); None: ``dtype``.
        at_home: the experts' weights are in host memory, for :mod:`moekit.nn.resident`.
    """
    with torch.device("meta"):
        model = Transformer(config, held, dispatch)
    if not at_home:
        return allocated(model, device, dtype, kind).eval()
    model = allocated(model, torch.device("meta"), dtype, kind).eval()
    for layer in config.moe_layers:
        model.layers[layer].moe.experts._apply(paged)
    return with_room(model, device)


def allocated(
    module: Module, device: torch.device, dtype: torch.dtype, kind: torch.dtype | None = None
) -> Module:
    """``module``, made on the meta device, with uninitialised memory for its weights, which do not learn."""
    module = module.to(dtype)
    if kind is not None:
        for part in module.modules():
            if isinstance(part, MoE):
                part.experts = QuantisedExperts(part.experts, kind)
    return with_room(module, device).requires_grad_(False)


def with_room(module: Module, device: torch.device) -> Module:
    """``module`` with uninitialised memory on ``device`` for its weights on the meta device.

    ``Module.to_empty`` asks for a tensor like one there, which imports torch's compiler, and that takes a second.
    """

    def room(weight: Tensor) -> Tensor:
        if not weight.is_meta:
            return weight
        return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)

    return module._apply(room)


# Planning asks for the same number for every rank and at every step of its search; a model without memory takes 15 ms.
@functools.lru_cache(maxsize=32)
def parameters(config: ModelConfig, held: int | None = None) -> int:
    """The number of parameters of a model with ``held`` experts a layer, all of them by default."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config, held).parameters())


def weight_bytes(
    config: ModelConfig, held: int | None, dtype: torch.dtype, kind: torch.dtype | None = None
) -> int:
    """The bytes of the weights of :func:`empty`, with the scales of quantised experts."""
    model = empty(config, torch.device("meta"), dtype, held, kind=kind)
    return sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))


def _bridge(inner: int, outer: int) -> nn.Linear | None:
    return nn.Linear(inner, outer, bias=False) if inner != outer else None


def attention_mask(padding: Tensor | None) -> Tensor | None:
    """[B, 1, T, T] bool, the keys each query attends to: up to its own, without padding. None where nothing is padding."""
    if padding is None:
        return None
    length = padding.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=padding.device).tril()
    return causal & ~padding[:, None, None, :]


class AddNorm(nn.LayerNorm):
    """A layer norm that first adds what is pending: an output that is still to be added to its input."""

    operations = PLAIN

    def __init__(self, dim: int):
        super().__init__(dim)

    @is_part("norm")
    def forward(self, x: Tensor, pending: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, T, D], and what :func:`~moekit.nn.operations.added` takes -> the sum and its norm, [B, T, D] each."""
        return self.operations.add_norm(x, pending, self)


class Block(nn.Module):
    """Attention, then a feed-forward network or experts, each with a residual and a norm before or after."""

    def __init__(self, config: ModelConfig, index: int, held: int, dispatch: Dispatch):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attn_norm = AddNorm(config.dim)
        self.attn = Attention(config, index)
        self.ffn_norm = AddNorm(config.dim)
        is_moe = config.is_moe(index)
        self.moe = MoE(config, index, held, dispatch) if is_moe else None
        self.ffn = None if is_moe else DenseFFN(config, index)

    def forward(
        self, x: Tensor, pending: Tensor | None, visible: Tensor | None, asked: Pass
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream [B, T, D] and what the next norm is to add to it -> the same after this block."""
        feed_forward = self.ffn if self.moe is None else (lambda h: self.moe(h, asked))
        if self.pre_norm:
            x, h = self.attn_norm(x, pending)
            x, h = self.ffn_norm(x, self.attn(h, visible, asked.cache))
            return x, feed_forward(h)
        _, x = self.attn_norm(x, self.attn(x, visible, asked.cache))
        _, x = self.ffn_norm(x, feed_forward(x))
        return x, None


class Attention(nn.Module):
    """Causal multi-head self-attention; ``qkv`` holds fairseq's three projections one below the other."""

    operations = PLAIN

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.heads, self.index = config.heads, index
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    @is_part("attention")
    def forward(self, x: Tensor, visible: Tensor | None, cache: Cache | None) -> Tensor:
        b, t, d = x.shape
        qkv = self.operations.linear(x, self.qkv).view(b, t, 3, self.heads, d // self.heads)
        seen = self.operations.attend(qkv, visible, cache, self.index)
        return self.operations.linear(seen, self.out)


class DenseFFN(nn.Module):
    operations = PLAIN

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.dense_dim(index))
        self.fc2 = nn.Linear(config.dense_dim(index), config.dim)
        self.activation = config.activation

    @is_part("dense")
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.operations.linear(x, self.fc1, self.activation))


class MoE(nn.Module):
    """Gate, dispatch, experts, combine."""

    operations = PLAIN

    def __init__(self, config: ModelConfig, index: int, held: int, dispatch: Dispatch):
        super().__init__()
        self.config, self.index, self.dispatch = config, index, dispatch
        # The matrix that gives the logits, and the rule that makes choices of them.
        self.gate = nn.Linear(config.dim, config.experts, bias=False)
        self.rule = gate_of(config)
        self.experts = Experts(held, config.dim, config.ffn_dim, config.activation)
        # [E] int64, the number that the dispatch knows each expert by (load's ``placement``). None: it is the expert's own.
        self.numbers: Tensor | None = None

    def forward(self, x: Tensor, asked: Pass) -> Tensor:
        """[B, T, D] -> [B, T, K, D], the weighted output of each choice's expert, zero where it was dropped."""
        rows = x.flatten(0, 1)
        routing = self.route(rows, asked)
        if asked.record is not None:
            asked.record(self.index, routing)
        done = self.dispatched(rows, routing, asked.rows_expected)
        return done.view(*x.shape[:-1], self.rule.top_k, x.shape[-1])

    def dispatched(self, rows: Tensor, routing: gate.Routing, rows_expected: int | None) -> Tensor:
        """What :meth:`forward` makes of ``rows`` [N, D] with this routing of them: [N K, D]."""
        with part("plan"):
            if self.numbers is not None:
                routing = replace(routing, experts=self.numbers[routing.experts], sorted=None)
            order, counts = routing.sorted or self.operations.by_expert(routing, self.config.experts)
            assignment = Assignment(order, counts, self.rule.top_k, routing.weights.flatten())
        with part("dispatch"):
            return self.dispatch(self.experts, rows, assignment, rows_expected)

    def serve(self, like: Tensor, rows_expected: int | None) -> None:
        """Dispatch no row, while other ranks dispatch theirs; ``like`` has the dtype and the device of rows."""
        counts = torch.zeros(self.config.experts, dtype=torch.long, device=like.device)
        rows, weights = like.new_empty(0, self.config.dim), like.new_empty(0)
        assignment = Assignment(counts[:0], counts, self.rule.top_k, weights)
        with part("dispatch"):
            self.dispatch(self.experts, rows, assignment, rows_expected)

    @is_part("gate")
    def route(self, rows: Tensor, asked: Pass) -> gate.Routing:
        """[N, D] -> the routing of G groups of S tokens."""
        logits = self.gate(rows).view(asked.groups, -1, self.config.experts)
        padding = None
        if self.config.mask_padding and asked.padding is not None:
            padding = asked.padding.reshape(asked.groups, -1)
        noise = None if asked.noise is None else functools.partial(asked.noise, self.index)
        edit = None if asked.edit is None else asked.edit(self.index, self.config)
        return self.rule.route(
            logits,
            fraction=asked.fraction,
            padding=padding,
            noise=noise,
            edit=edit,
            choose=self.operations.choose,
            fill=self.operations.fill,
        )
