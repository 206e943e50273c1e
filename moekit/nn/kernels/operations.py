"""The table of operations with Triton: a kernel where it applies, and the plain function elsewhere."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from moekit.nn import operations as plain
from moekit.nn.cache import Cache
from moekit.nn.dispatch import Local
from moekit.nn.kernels import batch_step, dense, flash, grid_barrier, one_launch, output, short_step
from moekit.nn.kernels.attention import attend_one
from moekit.nn.kernels.counting import fill
from moekit.nn.kernels.gate import choose
from moekit.nn.kernels.grouped import grouped_ffn
from moekit.nn.kernels.logprobs import best, feed_back, target_log_probs
from moekit.nn.kernels.norm import add_norm
from moekit.nn.kernels.tiles import by_expert
from moekit.nn.kernels.trust import trusted
from moekit.nn.parts import WHOLE, part
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer


def attend(qkv: Tensor, visible: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
    """Compute :func:`moekit.nn.operations.attend`, with a kernel for whole sequences, and one for one new token of each."""
    if cache is not None and not cache.empty and qkv.shape[1] == 1:
        return attend_one(qkv[:, 0], cache.kv[layer], cache.lengths)[:, None]
    if visible is not None or not flash.fits(qkv):
        return plain.attend(qkv, visible, cache, layer)
    if cache is not None:
        cache.extend(layer, qkv[:, :, 1:].permute(2, 0, 3, 1, 4))
    return flash.attend_blocks(qkv)


def linear(x: Tensor, layer: nn.Linear, activation: str = "linear") -> Tensor:
    """Compute :func:`moekit.nn.operations.linear`, of many rows in one kernel."""
    if not dense.fits(x, layer, activation):
        return plain.linear(x, layer, activation)
    return dense.linear(x, layer, activation)


def log_probs(model: Transformer, features: Tensor, targets: Tensor, vocab: int, piece: int) -> Tensor:
    """Compute :func:`moekit.nn.operations.log_probs`, of many rows without logits."""
    weight = model.output_weight[:vocab]
    if not output.fits(features, weight):
        return plain.log_probs(model, features, targets, vocab, piece)
    return output.target_log_probs(features, weight, targets)


def read_on(model: Transformer, tokens: Tensor, asked: Pass, vocab: int) -> Tensor | None:
    """Compute :func:`moekit.nn.operations.read_on`, for one sequence in one launch, and for some with fewer, fused kernels."""
    if len(tokens) == 0 and isinstance(model.dispatch, Local):
        # Nobody else's rows come here.
        return None
    # This number is the same on every rank.
    rows = len(tokens) if asked.rows_expected is None else asked.rows_expected

    def ordinary() -> Tensor | None:
        return plain.read_on(model, tokens, asked, vocab)

    def in_one_launch() -> Tensor:
        with part(WHOLE):
            return one_launch.read_on(model, tokens, asked.cache, vocab)

    def for_many() -> Tensor | None:
        return batch_step.read_on(model, tokens, asked, vocab)

    def for_few() -> Tensor | None:
        return short_step.read_on(model, tokens, asked.cache, vocab, rows)

    forget = functools.partial(grid_barrier.forget, model)
    fused = {
        "one launch": (one_launch, in_one_launch),
        "kernels for many": (batch_step, for_many),
        "kernels for few": (short_step, for_few),
    }
    for name, (kernels, step) in fused.items():
        if kernels.fits(model, rows) and trusted(model, name, rows, step, ordinary, forget):
            return step()
    return ordinary()


def check(model: Transformer) -> None:
    """Compute :func:`moekit.nn.operations.check_work`, of kernels with a barrier, too."""
    plain.check_work(model)
    grid_barrier.check(model)


TRITON = plain.Operations(
    backend="triton",
    attend=attend,
    add_norm=add_norm,
    linear=linear,
    choose=choose,
    fill=fill,
    by_expert=by_expert,
    experts_ffn=grouped_ffn,
    target_log_probs=target_log_probs,
    log_probs=log_probs,
    best=best,
    feed_back=feed_back,
    read_on=read_on,
    check=check,
)
