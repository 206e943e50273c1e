"""The table of metrics, which ``@measured`` fills, and which of a trace's tokens they count."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, Sequence, Set, Sized
from contextvars import ContextVar
from typing import Any

import numpy as np

from moekit.arguments import BYTES, Flag, Number, Whole, check, is_many
from moekit.checked import check_bound, checked
from moekit.routing.statistics import array_of
from moekit.routing.trace import TRACE, Trace, need_layers, need_tokens

METRICS: dict[str, Callable[[Trace], Any]] = {}
# What the arguments of metrics may be, by their names; "choice" is one of the trace's.
KINDS = {
    **dict.fromkeys(("trace", "before", "after"), TRACE),
    **dict.fromkeys(("dispatched", "per_expert"), Flag()),
    **dict.fromkeys(("layer", "expert", "n", "seed", "shuffles"), Whole(0)),
    **dict.fromkeys(("bins", "min_count", "resamples", "size"), Whole()),
    "level": Number(above=0, most=1),
}
# Arguments that have no item for each token, however many items they have.
OF_NO_TOKEN = ("sizes",)
# Whether the metric that calls another one counts the prompt's tokens, too: then so does the other one.
_with_prompt: ContextVar[bool] = ContextVar("_with_prompt", default=False)


def measured(metric: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``metric`` count the right tokens and refuse a trace without any, and list it if it needs only a trace.

    Of a trace of generated text it counts the new tokens; ``prompt=True``, which every metric takes, counts the prompt's too.
    Arguments with an item for each token, such as labels, are cut to the same tokens, and so is what a list or dict holds.

    Raises:
        ValueError: (the metric, when it is called) a trace has no tokens or no layers, or an argument is none of its kind.
    """
    signature = inspect.signature(metric)

    @functools.wraps(metric)
    def counting(*args: Any, prompt: bool = False, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        check_bound(bound, KINDS)
        traces = [value for value in bound.arguments.values() if isinstance(value, Trace)]
        for trace in traces:
            need_tokens(trace, f"metrics.{metric.__name__}")
            need_layers(trace, f"metrics.{metric.__name__}")
        first = traces[0]
        check_bound(bound, {"choice": Whole(0, most=first.top_k - 1)})
        whole = check("prompt", prompt, Flag()) or _with_prompt.get()
        if not whole and (new := new_tokens(first)) is not None:
            for name, value in bound.arguments.items():
                kind = signature.parameters[name].kind
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    names = names_of(bound.arguments.get("metric"), value)
                    cut = (_cut(own, one, new) for own, one in zip(names, value, strict=True))
                    bound.arguments[name] = tuple(cut)
                elif kind is inspect.Parameter.VAR_KEYWORD:
                    bound.arguments[name] = {own: _cut(own, one, new) for own, one in value.items()}
                else:
                    bound.arguments[name] = _cut(name, value, new)
        outer = _with_prompt.set(whole)
        try:
            return metric(*bound.args, **bound.kwargs)
        finally:
            _with_prompt.reset(outer)

    _, *others = signature.parameters.values()
    if all(option.default is not option.empty for option in others):
        METRICS[metric.__name__] = counting
    return counting


@checked(trace=TRACE)
def new_tokens(trace: Trace) -> np.ndarray | None:
    """[T] bool, the generated tokens of a trace that also holds others; None where all count."""
    return trace.generated if trace.generated.any() and not trace.generated.all() else None


@checked(trace=TRACE)
def counted(trace: Trace) -> Trace:
    """The trace of the tokens that metrics count: the new ones of generated text, else all."""
    new = new_tokens(trace)
    return trace if new is None else trace.select(mask=new)


def names_of(metric: Callable[..., Any] | str | None, args: Sequence[Any]) -> list[str]:
    """What ``metric``, or that of the name, calls ``args``, which follow the trace; "args" where it does not tell."""
    metric = METRICS.get(metric) if isinstance(metric, str) else metric
    try:
        _, *names = inspect.signature(metric).parameters
    except (TypeError, ValueError):
        names = []
    return (names + ["args"] * len(args))[: len(args)]


def of_tokens(
    name: str, value: Any, rows: np.ndarray, tokens: int, of_trace: Callable[[Trace], Trace]
) -> Any:
    """A metric's argument ``name`` for the ``rows`` alone, where it or what it holds has an item for each of ``tokens``.

    Args:
        of_trace: what becomes of a trace.
    """
    if name in OF_NO_TOKEN:
        return value
    if isinstance(value, Trace):
        return of_trace(value)
    if isinstance(value, Iterator):
        value = list(value)
    # A class, and an array without dimensions, say that they have a length, and have none. The keys of a dict have an order.
    unordered = isinstance(value, Mapping | Set) and not isinstance(value, KeysView | ItemsView)
    many = (
        isinstance(value, Sized) and is_many(value) and not unordered and not isinstance(value, (str, *BYTES))
    )
    if many and len(value) == tokens and not any(isinstance(part, Trace) for part in _parts(value)):
        return array_of(name, value)[rows]
    # The names of labels are the user's.
    return _with_parts(value, lambda own, part: of_tokens(f"{name}[{own!r}]", part, rows, tokens, of_trace))


def lasting(value: Any) -> Any:
    """A metric's argument with lists in place of iterators, which can be read only once, at any depth."""
    return _with_parts(list(value) if isinstance(value, Iterator) else value, lambda own, part: lasting(part))


def _with_parts(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """``value`` with ``change`` of the key or number and the value of all that it holds; itself, where nothing changes."""
    parts = value if isinstance(value, Mapping) else dict(enumerate(_parts(value)))
    made = {own: change(own, part) for own, part in parts.items()}
    if all(made[own] is part for own, part in parts.items()):
        return value
    if isinstance(value, Mapping):
        return made
    made = list(made.values())
    # A tuple with names is made of a list by a method.
    kind = getattr(value, "_make", type(value)) if isinstance(value, list | tuple) else list
    try:
        return kind(made)
    except TypeError:
        # A kind of the user's may want more than what it holds.
        return made


def _parts(value: Any) -> list:
    """What ``value`` holds, if it may hold traces or labels: a text, a table and an array of numbers do not."""
    if not isinstance(value, Collection) or not is_many(value) or isinstance(value, (str, *BYTES)):
        return []
    numbers = hasattr(value, "dtype") and getattr(value.dtype, "kind", "") != "O"
    parts = [] if numbers or hasattr(value, "columns") else list(value)
    # Long lists of these are common, and each resample would look at each item.
    plain = (str, bytes, int, float, complex, np.generic, type(None))
    return [] if all(issubclass(kind, plain) for kind in set(map(type, parts))) else parts


def _cut(name: str, value: Any, new: np.ndarray) -> Any:
    """A metric's argument, cut to the new tokens if it is a trace or has an item for each token."""
    return of_tokens(name, value, new, len(new), counted)
