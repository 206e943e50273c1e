"""Dense layers and their activations in one kernel, for many rows on Hopper: such a layer is one expert with all rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moekit.nn.kernels import specialised
from moekit.nn.kernels.activations import ACTIVATIONS
from moekit.nn.kernels.cuts import SPECIALISED
from moekit.nn.kernels.gpu import is_hopper

# The fewest rows for which this is measured to be faster: with an activation, for which torch has another kernel, and without.
LEAST, LEAST_WITHOUT = 512, 8192


def fits(x: Tensor, layer: nn.Linear, activation: str) -> bool:
    """Whether the kernel takes ``x`` [..., D] and ``layer`` here."""
    halves = x.dtype in (torch.float16, torch.bfloat16) and layer.weight.dtype == x.dtype
    least = LEAST_WITHOUT if activation == "linear" else LEAST
    enough = x.numel() >= least * x.shape[-1]
    whole = not layer.out_features % SPECIALISED.columns and not layer.in_features % SPECIALISED.inner
    return halves and enough and whole and is_hopper(x.device)


def linear(x: Tensor, layer: nn.Linear, activation: str) -> Tensor:
    """Compute :func:`moekit.nn.operations.linear`; for inference, and where it :func:`fits`."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(len(rows), layer.out_features)
    one = layer.weight[None], layer.bias[None], None, {}
    act = ACTIVATIONS[activation]
    specialised.linear(rows, one, out, None, None, None, SPECIALISED, first=True, act=act)
    return out.view(*x.shape[:-1], -1)
