"""The table of metrics, which ``@measured`` fills."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from moekit.routing.trace import Trace

METRICS: dict[str, Callable[[Trace], Any]] = {}


def measured(metric: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``metric`` refuse a trace without tokens or layers, and list it in ``METRICS`` if it needs only a trace.

    Raises:
        ValueError: (the metric, when it is called) a trace has no tokens or no layers.
    """

    @functools.wraps(metric)
    def checked(*args: Any, **options: Any) -> Any:
        for trace in (*args, *options.values()):
            if isinstance(trace, Trace) and not (len(trace) and trace.layers):
                missing = "layers" if len(trace) else "tokens"
                raise ValueError(
                    f"metrics.{metric.__name__}: the trace has no {missing}, expected at least one; "
                    "select or record more"
                )
        return metric(*args, **options)

    _, *others = inspect.signature(metric).parameters.values()
    if all(option.default is not option.empty for option in others):
        METRICS[metric.__name__] = checked
    return checked
