"""What a checkpoint's pickle holds beside tensors, as dicts, lists, numbers and text: its settings, above all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from moekit.checkpoint.contents import called, is_enumeration, one_value, short
from moekit.checkpoint.objects import Call, Name, Pairs, Reference, Unreadable

# The deepest config that is read, in levels; fairseq's have four.
DEEPEST = 50
# The longest config that is read, in values.
LONGEST = 200_000
# Beside so many, one in twenty values may be a container: a pickle of two bytes may name one again, which is copied.
EACH = 20


# What stays as it is, which most values are.
SIMPLE = frozenset((str, bytes, float, bool, type(None)))


class Opaque:
    """A value that is neither a tensor nor plain data, and that is therefore not built."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


def pairs(node: Any) -> list[tuple[Any, Any]] | None:
    """The (key, value) pairs of a dictionary, ordered or not; None if ``node`` is not a dictionary."""
    if isinstance(node, Pairs):
        return node
    if isinstance(node, Call) and str(called(node)[0]).startswith("collections."):
        first = node.arguments[0] if len(node.arguments) == 1 else []
        begun = first if isinstance(first, (list, Pairs)) else []
        found = [*begun, *node.items]
        return found if all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in found) else None
    return None


def plain(node: Any, tensor: Callable[[Call], Any] = lambda call: None, most: int = LONGEST) -> Any:
    """A node as plain data: dicts, lists, numbers, text; configs of omegaconf and argparse as dicts; else ``Opaque``.

    Args:
        tensor: converts a call that makes a tensor; returns None for any other call.
        most: the most values.

    Raises:
        Unreadable: the node is nested too deeply, or has too many values.
    """
    return _Plain(tensor, most).of(node, 0)


class _Plain:
    def __init__(self, tensor: Callable[[Call], Any], most: int) -> None:
        self.count, self.tensor, self.most = 0, tensor, most
        self.containers = LONGEST + most // EACH

    def of(self, node: Any, depth: int) -> Any:
        self.count += 1
        if type(node) not in SIMPLE and type(node) is not int:
            self.containers -= 1
        if depth > DEEPEST or self.count > self.most or self.containers < 0:
            raise Unreadable(
                f"has settings that are nested deeper than {DEEPEST} levels, or of more than {self.most:,} values"
            )
        if type(node) in SIMPLE:
            return node
        found = pairs(node)
        if found is not None:
            return self.dict(found, depth)
        if isinstance(node, Call):
            made = self.tensor(node)
            return self.result(node, depth) if made is None else made
        if isinstance(node, (Name, Reference)):
            return Opaque(str(node) if isinstance(node, Name) else "tensor")
        if type(node) is int and node.bit_length() > 1024:
            return Opaque(f"a whole number of {node.bit_length():,} bits")
        if isinstance(node, tuple):
            return tuple(self.of(part, depth + 1) for part in node)
        return [self.of(part, depth + 1) for part in node] if isinstance(node, list) else node

    def dict(self, found: list[tuple[Any, Any]], depth: int) -> dict:
        made: dict = {}
        for key, value in found:
            key = self.of(key, depth + 1)
            if not isinstance(key, (str, bytes, int, float, type(None))):
                key = Opaque(f"a {type(key).__name__} as key")
            if isinstance(key, int) and key.bit_length() > 64:
                raise Unreadable(f"has {short(key)} as a key; expected a name")
            made[key] = self.of(value, depth + 1)
        return made

    def result(self, call: Call, depth: int) -> Any:
        name, arguments = called(call)
        state = dict_of_text(call.state)
        if str(name) == "argparse.Namespace":
            return {key: self.of(value, depth + 1) for key, value in state.items()}
        if str(name).startswith("omegaconf."):
            for part in ("_content", "_val"):
                if part in state:
                    return self.of(state[part], depth + 1)
        if re.fullmatch(r"pathlib(\._local)?\.\w+", str(name)):
            return str(PurePosixPath(*arguments))
        if str(name) == "torch.Size" and len(arguments) == 1:
            return self.of(arguments[0], depth + 1)
        if str(name).endswith("multiarray.scalar") and len(arguments) == 2:
            return _number(*arguments)
        if str(name).endswith((".set", ".frozenset")) and arguments:
            return [self.of(part, depth + 1) for part in arguments[0]]
        if one_value(arguments) and (str(name).startswith("fairseq.") or is_enumeration(str(name))):
            return arguments[0]
        return Opaque(str(name))


def dict_of_text(node: Any) -> dict[str, Any]:
    """The entries of a dictionary whose keys are text, unchanged."""
    return {key: value for key, value in pairs(node) or [] if type(key) is str}


def _number(kind: Any, content: Any) -> Any:
    """A NumPy scalar of a plain type as a Python number."""
    if isinstance(content, Call) and str(content.function) == "_codecs.encode":
        content = content.arguments[0].encode("latin-1", "replace")
    code = kind.arguments[0] if isinstance(kind, Call) and kind.arguments else None
    if (
        not isinstance(code, str)
        or not re.fullmatch(r"[fiu][1248]|b1", code)
        or not isinstance(content, bytes)
    ):
        return Opaque("numpy scalar")
    dtype = np.dtype(code)
    if isinstance(kind.state, tuple) and len(kind.state) > 1 and kind.state[1] == ">":
        dtype = dtype.newbyteorder(">")
    return (
        np.frombuffer(content, dtype)[0].item() if len(content) == dtype.itemsize else Opaque("numpy scalar")
    )
