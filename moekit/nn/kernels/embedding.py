"""What the first layer of a decode step reads, in one kernel.

Shape letters: B sequences, D model dim, V rows of the embedding.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moekit.nn.cache import Cache
from moekit.nn.kernels.overlap import overlapped, start, wait
from moekit.nn.passes import Pass
from moekit.nn.transformer import Transformer
from moekit.symbols import PAD


def embedded(model: Transformer, tokens: Tensor, cache: Cache) -> Tensor:
    """Compute :meth:`moekit.nn.transformer.Transformer.embedded` for one token of each sequence, for inference.

    Args:
        tokens: [B] int64.

    Returns:
        [B, D]
    """
    positions, table = model.positions, model.embed.weight
    if model.project_in is not None or model.embed_norm is not None or positions is None:
        return model.embedded(tokens[:, None], Pass(cache=cache))[:, 0].contiguous()
    dim = model.config.dim
    places = positions.rows(cache.slots, tokens.device)
    out = torch.empty(len(tokens), dim, dtype=table.dtype, device=table.device)
    _embedded[(len(tokens),)](
        tokens.contiguous(),
        table,
        places,
        cache.lengths,
        out,
        math.sqrt(dim) if model.config.scale_embedding else 1.0,
        PAD + 1,
        D=dim,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
        **overlapped(table.device),
    )
    return out


# tokens and lengths [B]; table [V, D]; places [positions, D], of any type; out [B, D].
@triton.jit
def _embedded(
    tokens,
    table,
    places,
    lengths,
    out,
    scale,
    first,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    real = column < D
    kind: tl.constexpr = out.dtype.element_ty
    place = tl.load(lengths + row) + first
    x = tl.load(table + tl.load(tokens + row) * D + column, mask=real, other=0.0).to(tl.float32)
    # It rounds where torch rounds.
    x = (x * scale).to(kind).to(tl.float32)
    x += tl.load(places + place * D + column, mask=real, other=0.0).to(kind).to(tl.float32)
    tl.store(out + row * D + column, x.to(kind), mask=real)
