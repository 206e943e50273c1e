"""The table of metrics, which ``@measured`` fills, and which of a trace's tokens they count."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from moekit.routing.trace import Trace, need_layers

METRICS: dict[str, Callable[[Trace], Any]] = {}


def measured(metric: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``metric`` count the right tokens and refuse a trace without any, and list it if it needs only a trace.

    Of a trace of generated text it counts the new tokens; ``prompt=True``, which every metric takes, counts the prompt's too.
    Arguments with an item for each token, such as labels, are cut to the same tokens.

    Raises:
        ValueError: (the metric, when it is called) a trace has no tokens or no layers.
    """

    @functools.wraps(metric)
    def checked(*args: Any, prompt: bool = False, **options: Any) -> Any:
        for trace in (*args, *options.values()):
            if not isinstance(trace, Trace):
                continue
            if not len(trace):
                raise ValueError(
                    f"metrics.{metric.__name__}: the trace has no tokens, expected at least one; select or record more"
                )
            need_layers(trace, f"metrics.{metric.__name__}")
        first = args[0] if args else None
        if isinstance(first, Trace) and not prompt and (new := new_tokens(first)) is not None:
            tokens = len(first)
            args = tuple(_cut(value, new, tokens) for value in args)
            options = {name: _cut(value, new, tokens) for name, value in options.items()}
        return metric(*args, **options)

    _, *others = inspect.signature(metric).parameters.values()
    if all(option.default is not option.empty for option in others):
        METRICS[metric.__name__] = checked
    return checked


def new_tokens(trace: Trace) -> np.ndarray | None:
    """[T] bool, the generated tokens of a trace that also holds others; None where all count."""
    return trace.generated if trace.generated.any() and not trace.generated.all() else None


def _cut(value: Any, new: np.ndarray, tokens: int) -> Any:
    """A metric's argument, cut to the new tokens if it is a trace or has an item for each token."""
    if isinstance(value, Trace):
        own = new_tokens(value)
        return value if own is None else value.select(mask=own)
    if isinstance(value, dict):
        return {name: _cut(part, new, tokens) for name, part in value.items()}
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != tokens:
        return value
    return np.asarray(value)[new]
