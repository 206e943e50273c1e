"""Whether a fused decode step computes on this GPU what the ordinary kernels compute: each is compared once before it is used.

The tests compare every kernel with the plain path, and most machines that run them have no GPU. A GPU, a driver or a
compiler that no test has seen must not make a generation silently wrong: where a step is far off or fails, a warning says
so and the ordinary kernels are used.

Shape letters: B sequences, V dictionary.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from moekit.headlines import headline
from moekit.nn.dispatch import Local
from moekit.nn.transformer import Transformer

# The most that a row of logits may differ, as the norm of the difference over the norm, without the mean of the row.
# Rounding makes 0.001 in float16 and ten times as much in bfloat16, and a choice of experts near a tie a few hundredths;
# logits of another text differ by 1.4.
FAR = 0.2

_trusted: weakref.WeakKeyDictionary[Transformer, dict[tuple[str, int], bool]] = weakref.WeakKeyDictionary()


def trusted(
    model: Transformer,
    name: str,
    rows: int,
    step: Callable[[], Tensor],
    slow: Callable[[], Tensor],
    forget: Callable[[], object] = lambda: None,
) -> bool:
    """Whether ``step`` may be used for ``rows`` sequences; the first question of a model compares it with ``slow``.

    Ranks that exchange rows decide together which kernels they use, so there nothing is compared; nor is it on the CPU, or with
    experts that are fetched.

    Args:
        name: what warnings call the step.
        step, slow: they compute logits [B, V] of the same tokens, and may be called several times.
        forget: called once after a comparison that failed, since what ``step`` left behind is no failure of what comes later.
    """
    if not compares(model):
        return True
    known = _trusted.setdefault(model, {})
    if (name, rows) not in known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        why = apart(step, slow)
        if why:
            warnings.warn(
                f"a decode step of {rows} sequences in {name} {why}: the ordinary kernels are used, which are slower",
                stacklevel=2,
            )
            forget()
        known[name, rows] = not why
    return known[name, rows]


def compares(model: Transformer) -> bool:
    # Experts that are fetched are counted, and a comparison would ask for them twice.
    return model.embed.weight.is_cuda and isinstance(model.dispatch, Local) and model.slots is None


def apart(step: Callable[[], Tensor], slow: Callable[[], Tensor]) -> str:
    """What is wrong with what ``step`` computes; "" if it is close to what ``slow`` does."""
    wanted = centred(slow())
    try:
        found = centred(step())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"fails on this GPU ({headline(error)})"
    size, off = wanted.norm(dim=-1), (found - wanted).norm(dim=-1)
    # A model that computes NaN has no logits to be close to; else NaN is not close to anything.
    close = (off <= FAR * size) | ~size.isfinite()
    if close.all():
        return ""
    worst = float((off / size).nan_to_num(math.inf, posinf=math.inf).max())
    return f"is off by {worst:.2g} on this GPU, expected at most {FAR}"


def centred(logits: Tensor) -> Tensor:
    logits = logits.float()
    return logits - logits.mean(dim=-1, keepdim=True)
