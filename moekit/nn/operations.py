"""What a pass computes with, in one table a back end: plain torch, torch's grouped product, or Triton.

Each function of :data:`PLAIN` is simple and slow; the same entry of the other tables is checked against it. Modules take what
they compute with from ``self.operations``; :func:`use` sets it.

Shape letters: B sequences, T tokens, H heads, C head dim, D model dim, N rows, V dictionary, K choices a token, E experts.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.arguments import Choice, check
from moekit.nn import gate
from moekit.nn.ffn import activation_fn, grouped_mm, loop
from moekit.nn.quantise import name_of
from moekit.symbols import PAD

if TYPE_CHECKING:
    from moekit.nn.cache import Cache
    from moekit.nn.experts import Assignment, Experts
    from moekit.nn.passes import Pass
    from moekit.nn.transformer import Transformer


@dataclass(frozen=True)
class Operations:
    """A back end: its name and its functions, each described where :data:`PLAIN` has it.

    Of them, only those of "loop" learn: the others are for inference.
    """

    backend: str
    attend: Callable[[Tensor, Tensor | None, Cache | None, int], Tensor]
    add_norm: Callable[[Tensor, Tensor | None, nn.LayerNorm], tuple[Tensor, Tensor]]
    linear: Callable[..., Tensor]
    choose: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    fill: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]]
    by_expert: Callable[[gate.Routing, int], tuple[Tensor, Tensor]]
    experts_ffn: Callable[[Experts, Tensor, Assignment], Tensor]
    target_log_probs: Callable[[Tensor, Tensor], Tensor]
    log_probs: Callable[[Transformer, Tensor, Tensor, int, int], Tensor]
    best: Callable[[Tensor], tuple[Tensor, Tensor]]
    feed_back: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None]
    read_on: Callable[[Transformer, Tensor, Pass, int], Tensor]
    check: Callable[[Transformer], None]


def attend(qkv: Tensor, visible: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
    """Causal attention.

    Args:
        qkv: [B, T, 3, H, C], queries, keys and values of the tokens.
        visible: [B or 1, 1, T, M] bool, which of the M keys each token looks at; None for those up to its own.
        cache: what came before; the tokens' keys and values are written to its ``layer``.

    Returns:
        [B, T, H C]
    """
    qkv = qkv.permute(2, 0, 3, 1, 4)
    # [B, H, T, C] and [2, B, H, T, C]
    q, kv = qkv[0], qkv[1:]
    if cache is not None:
        kv = cache.extend(layer, kv)
    y = F.scaled_dot_product_attention(q, *kv, attn_mask=visible, is_causal=visible is None)
    return y.transpose(1, 2).flatten(2)


def add_norm(x: Tensor, pending: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x [B, T, D], and what :func:`added` takes -> the sum and the layer norm of it, [B, T, D] each."""
    x = x if pending is None else added(x, pending)
    return x, F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def added(x: Tensor, pending: Tensor) -> Tensor:
    """x [B, T, D] and what is to be added: [B, T, D], or [B, T, K, D] from the experts of each choice."""
    return x + (pending if pending.dim() == x.dim() else pending.sum(dim=-2))


def linear(x: Tensor, layer: nn.Linear, activation: str = "linear") -> Tensor:
    """A dense layer [..., D] -> [..., F] with its activation."""
    return activation_fn(activation)(layer(x))


def choose(
    rule: gate.Gate,
    logits: Tensor,
    noise: Callable[[str, Tensor], Tensor] | None = None,
    edit: gate.Edit | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:meth:`moekit.nn.gate.Gate.chosen` of ``rule``."""
    return rule.chosen(logits, noise, edit)


def fill(rule: gate.Gate, *given: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """:meth:`moekit.nn.gate.Gate.fill` of ``rule``."""
    return rule.fill(*given)


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits and [N] targets -> [N] float32 natural log-probabilities."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def log_probs(model: Transformer, features: Tensor, targets: Tensor, vocab: int, piece: int) -> Tensor:
    """[N, D] features and [N] targets -> [N] float32 natural log-probabilities, over ``vocab`` types.

    Args:
        piece: rows of logits in memory at a time.
    """
    parts = [
        model.operations.target_log_probs(model.logits(rows, vocab), wanted)
        for rows, wanted in zip(features.split(piece), targets.split(piece), strict=True)
    ]
    return torch.cat(parts)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[N, V] logits -> the best token of each row that is no padding, [N] int64, and its float32 log-probability [N]."""
    logprobs = F.log_softmax(logits.float(), dim=-1)
    without_padding = logits.clone()
    without_padding[:, PAD] = -torch.inf
    tokens = without_padding.argmax(dim=-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def feed_back(
    logits: Tensor, read: Tensor, lengths: Tensor, before: Tensor, words: Tensor, slots: int
) -> None:
    """End a greedy step in place: :func:`best` of ``logits`` [B, V] becomes what the next step reads.

    Args:
        read: [B] int64; the best tokens are written there.
        lengths: [B] int64, tokens in the cache; it goes up by one, but not above the last of ``slots``, so that a step beyond
            the end stays in them.
        before: [B] int64, what ``lengths`` was before the first of successive steps.
        words: [R, B] int64, of the last R of these steps: the token, and in the lower 32 bits those of its float32
            log-probability. A step writes the row of its number, from 0 on, modulo R.
    """
    tokens, logprobs = best(logits)
    bits = logprobs.view(torch.int32).long() & 0xFFFFFFFF
    words[(lengths - before) % len(words), torch.arange(len(read), device=read.device)] = tokens << 32 | bits
    read.copy_(tokens)
    lengths.add_(1).clamp_(max=slots - 1)


def read_on(model: Transformer, tokens: Tensor, asked: Pass, vocab: int) -> Tensor | None:
    """Run one more token of each of B sequences, [B] int64: the logits [B, V] of the next one; None where B is 0.

    Args:
        asked: it has the sequences' cache, each sequence is a routing group, and nothing drops, draws, edits or records.
        vocab: V, types of the dictionary.
    """
    if len(tokens) == 0:
        return model.serve(asked.rows_expected)
    return model.logits(model(tokens[:, None], asked)[:, 0], vocab)


def check_work(model: Transformer) -> None:
    """Raise an error if work of ``model`` since the last check failed silently; it may wait for the device."""
    model.dispatch.check()


PLAIN = Operations(
    backend="loop",
    attend=attend,
    add_norm=add_norm,
    linear=linear,
    choose=choose,
    fill=fill,
    by_expert=gate.by_expert,
    experts_ffn=loop,
    target_log_probs=target_log_probs,
    log_probs=log_probs,
    best=best,
    feed_back=feed_back,
    read_on=read_on,
    check=check_work,
)
GROUPED_MM = replace(PLAIN, backend="grouped_mm", experts_ffn=grouped_mm)


def triton() -> Operations:
    """The table of the Triton kernels. Triton is imported only if this is called."""
    from moekit.nn.kernels.operations import TRITON

    return TRITON


# What ``load(..., dtype=...)`` takes, and the type of the weights.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Each back end by its name, as a function that gives its table.
BACKENDS: dict[str, Callable[[], Operations]] = {
    "loop": lambda: PLAIN,
    "grouped_mm": lambda: GROUPED_MM,
    "triton": triton,
}


def use(module: nn.Module, backend: str) -> None:
    """Have ``module`` and all modules in it compute with ``backend`` from now on."""
    table = BACKENDS[backend]()
    for part in module.modules():
        if hasattr(part, "operations"):
            part.operations = table


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, kind: torch.dtype | None = None
) -> str:
    """The back end for inference on ``device`` with weights of ``dtype``: ``backend``, or for "auto" the fastest.

    Args:
        kind: of the experts' matrices, int8 or float8_e4m3fn; None: ``dtype``.

    Raises:
        ValueError: no back end has that name, or this one does not run there or with such experts.
    """
    check("backend", backend, Choice(("auto", *BACKENDS)))
    runs = _compiles(device) or os.environ.get("TRITON_INTERPRET") == "1"
    runs = runs and importlib.util.find_spec("triton") is not None
    if backend == "triton" and not runs:
        raise ValueError(
            f"backend='triton' needs the package triton and a GPU of compute capability 7.5 or more, and this is a {_name(device)}"
        )
    if backend == "grouped_mm" and kind is not None:
        raise ValueError(
            f"backend='grouped_mm' has no product with {name_of(kind)} experts: choose 'triton' or 'loop', or leave out "
            "experts"
        )
    if backend != "auto":
        return backend
    if device.type != "cuda":
        return "loop"
    if runs:
        return "triton"
    return "grouped_mm" if dtype == torch.bfloat16 and kind is None else "loop"


# Turing is the oldest generation of GPUs that Triton compiles for.
OLDEST = (7, 5)


def _compiles(device: torch.device) -> bool:
    """Whether Triton compiles for ``device``."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type == "cuda"
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


def _name(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"
