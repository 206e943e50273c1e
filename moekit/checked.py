"""Functions whose arguments are checked before they run.

@checked(model=Instance(Handle, "a model that moekit.load gave"), size=Whole())
def measure(model, size=4): ...

measure("demo")     # ValueError: model='demo': expected a model that moekit.load gave
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from moekit.arguments import Kind, check

Asked, Given = ParamSpec("Asked"), TypeVar("Given")


@dataclass(frozen=True)
class Instance:
    """An object of one of moekit's classes, or of another package's."""

    kind: type | tuple[type, ...]
    expected: str
    optional: bool = False

    def convert(self, value: Any) -> Any:
        if not isinstance(value, self.kind):
            raise ValueError
        return value


@dataclass(frozen=True)
class Named:
    """Objects of a class by name; None stands for one that there is not."""

    kind: type
    expected: str
    optional: bool = False

    def convert(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        if not all(
            isinstance(name, str) and isinstance(one, self.kind | None) for name, one in value.items()
        ):
            raise ValueError
        return value


def checked(**kinds: Kind | Instance | Named) -> Callable[[Callable[Asked, Given]], Callable[Asked, Given]]:
    """Check the arguments of these names, where a call gives them; None is fine where it is the default.

    Raises:
        ValueError: (the function, when it is called) an argument is none of its kind.
    """

    def wrap(function: Callable[Asked, Given]) -> Callable[Asked, Given]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Asked.args, **options: Asked.kwargs) -> Given:
            bound = signature.bind(*args, **options)
            check_bound(bound, kinds)
            return function(*bound.args, **bound.kwargs)

        return call

    return wrap


def check_bound(bound: inspect.BoundArguments, kinds: Mapping[str, Kind | Instance | Named]) -> None:
    """Each argument of a call as its kind has it."""
    for name, value in bound.arguments.items():
        may_be_none = value is None and bound.signature.parameters[name].default is None
        if name in kinds and not may_be_none:
            bound.arguments[name] = check(name, value, kinds[name])
