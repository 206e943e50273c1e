"""A reader of pickles that does not execute them: it imports, calls and builds nothing.

A pickle is a program for a small stack machine. :func:`parse` is that machine, but an instruction that would call a
function only records the call: a :class:`Call` with the function's name and its arguments. The code that reads the result
interprets the calls. So a pickle cannot execute anything here. The length of a pickle bounds its cost: the machine counts
the instructions and the objects that they make.

Dictionaries become :class:`Pairs`, since a key may be any object, and hashing it may never end.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

# The most bytes of a pickle; the pickle of a file with 25,000 tensors has 5 MB.
MOST_BYTES = 64 << 20
# A pickle of n bytes may have FEW + n / EACH instructions, and make half as many objects.
FEW, EACH = 350_000, 40


class Unreadable(Exception):
    """A file is damaged or refused; the message is the end of a sentence that begins with the file's name."""


class Name(str):
    """A class or a function, as ``module.name``."""

    __slots__ = ()


class Pairs(list):
    """A dictionary: its (key, value) pairs in order."""

    __slots__ = ()


class Group(list):
    """A set, frozen or not: its members."""

    __slots__ = ()


class Call:
    """``function(*arguments)``; then ``state`` was given to the result, and ``items`` were put into it."""

    __slots__ = ("arguments", "function", "items", "state")

    def __init__(self, function: Any, arguments: Any):
        self.function, self.arguments = function, arguments
        self.state: Any = None
        self.items: list[Any] = []


class Reference(NamedTuple):
    """A reference to an object outside the pickle; ``name`` is the tuple that names it."""

    name: Any


class Parsed(NamedTuple):
    value: Any
    # The first byte after the pickle.
    end: int
    # All names in the pickle, including those that later instructions discard.
    names: set[Name]


def parse(data: bytes | memoryview, start: int = 0, each: int = EACH) -> Parsed:
    """Read the pickle of protocol 2 to 5 that begins at ``start``.

    Args:
        each: the fewest bytes per instruction after the first 350,000 instructions; 1 for a file of many small numbers.

    Raises:
        Unreadable: the pickle is damaged, too long or too large, or has another protocol.
    """
    machine = _Machine(data, start, each)
    collects = gc.isenabled()
    # The garbage collector would scan these objects repeatedly, although all of them are kept.
    gc.disable()
    try:
        return Parsed(machine.run(), machine.at, machine.names)
    except (IndexError, struct.error):
        raise Unreadable(f"has a damaged pickle (byte {machine.at:,})") from None
    finally:
        if collects:
            gc.enable()


class _Machine:
    def __init__(self, data: bytes | memoryview, start: int, each: int):
        self.data, self.at, self.each = data, start, each
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: set[Name] = set()

    def run(self) -> Any:
        data, stack, act = self.data, self.stack, ACTIONS
        most = FEW + len(data) // self.each
        for _ in range(most):
            code = data[self.at]
            self.at += 1
            if code == STOP:
                return stack.pop()
            action = act[code]
            if action is None:
                raise Unreadable(
                    f"has a pickle with the instruction {bytes([code])!r}, which is damaged or not of protocol 2 to 5"
                )
            action(self)
            if len(self.memo) + len(self.marks) > most // 2:
                break
        raise Unreadable(
            f"has a pickle of more than {most:,} instructions, more than a file of its size needs"
        )

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def counted(self, form: struct.Struct) -> bytes:
        size = self.number(form)
        if not 0 <= size <= len(self.data) - self.at:
            raise IndexError
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def line(self) -> str:
        text, found, _ = bytes(self.data[self.at : self.at + 1000]).partition(b"\n")
        if not found:
            raise IndexError
        self.at += len(text) + 1
        return decoded(text)

    def marked(self) -> list[Any]:
        """The objects above the last mark, which are removed from the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        if len(self.stack) < start:
            raise IndexError
        del self.stack[start:]
        return items

    def top(self, kinds: tuple[type, ...]) -> Any:
        """The object on top of the stack, which has to be one of ``kinds`` or the result of a call."""
        found = self.stack[-1]
        if not isinstance(found, (*kinds, Call)):
            raise IndexError
        return found.items if isinstance(found, Call) else found


def decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise Unreadable("has a damaged text in its pickle") from None


def _take(machine: _Machine, count: int) -> tuple[Any, ...]:
    if count > len(machine.stack):
        raise IndexError
    items = tuple(machine.stack[-count:])
    del machine.stack[-count:]
    return items


def _mark(machine: _Machine) -> None:
    machine.marks.append(len(machine.stack))


def _pop(machine: _Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _get(machine: _Machine, index: int) -> None:
    if index not in machine.memo:
        raise IndexError
    machine.stack.append(machine.memo[index])


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    machine.top((list,)).append(value)


def _appends(machine: _Machine) -> None:
    values = machine.marked()
    machine.top((list,)).extend(values)


def _set_item(machine: _Machine) -> None:
    pair = _take(machine, 2)
    machine.top((Pairs,)).append(pair)


def _pairs(values: list[Any]) -> Pairs:
    if len(values) % 2:
        raise IndexError
    return Pairs(zip(values[::2], values[1::2], strict=True))


def _set_items(machine: _Machine) -> None:
    pairs = _pairs(machine.marked())
    machine.top((Pairs,)).extend(pairs)


def _name(machine: _Machine, module: Any, attribute: Any) -> None:
    if not isinstance(module, str) or not isinstance(attribute, str):
        raise IndexError
    name = Name(f"{module}.{attribute}")
    machine.names.add(name)
    machine.stack.append(name)


def _global(machine: _Machine) -> None:
    _name(machine, machine.line(), machine.line())


def _stack_global(machine: _Machine) -> None:
    _name(machine, *_take(machine, 2))


def _call(machine: _Machine) -> None:
    machine.stack.append(Call(*_take(machine, 2)))


def _call_with_names(machine: _Machine) -> None:
    function, arguments, named = _take(machine, 3)
    machine.stack.append(Call(function, (arguments, named)))


def _build(machine: _Machine) -> None:
    state = machine.stack.pop()
    if not isinstance(machine.stack[-1], Call):
        raise IndexError
    machine.stack[-1].state = state


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


def _pickled_text(text: bytes) -> str:
    """Text from Python 2, which is UTF-8 or else read as Latin-1."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


U8, U16, U32, U64 = (struct.Struct("<" + letter) for letter in "BHIQ")
I32, F64 = struct.Struct("<i"), struct.Struct(">d")
STOP = ord(".")

ACTIONS: list[Callable[[_Machine], None] | None] = [None] * 256
for _code, _action in {
    # The number of the protocol.
    b"\x80": lambda m: m.number(U8),
    # The length of a frame.
    b"\x95": lambda m: m.number(U64),
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"J": _push(lambda m: m.number(I32)),
    b"K": _push(lambda m: m.number(U8)),
    b"M": _push(lambda m: m.number(U16)),
    b"G": _push(lambda m: m.number(F64)),
    b"\x8a": _push(lambda m: int.from_bytes(m.counted(U8), "little", signed=True)),
    b"\x8b": _push(lambda m: int.from_bytes(m.counted(I32), "little", signed=True)),
    b"X": _push(lambda m: decoded(m.counted(U32))),
    b"\x8c": _push(lambda m: decoded(m.counted(U8))),
    b"\x8d": _push(lambda m: decoded(m.counted(U64))),
    b"B": _push(lambda m: m.counted(U32)),
    b"C": _push(lambda m: m.counted(U8)),
    b"\x8e": _push(lambda m: m.counted(U64)),
    # A bytearray.
    b"\x96": _push(lambda m: m.counted(U64)),
    b"T": _push(lambda m: _pickled_text(m.counted(I32))),
    b"U": _push(lambda m: _pickled_text(m.counted(U8))),
    b"]": _push(lambda m: []),
    b"}": _push(lambda m: Pairs()),
    b"\x8f": _push(lambda m: Group()),
    b")": _push(lambda m: ()),
    b"t": _push(lambda m: tuple(m.marked())),
    b"l": _push(lambda m: m.marked()),
    b"d": _push(lambda m: _pairs(m.marked())),
    # A frozenset.
    b"\x91": _push(lambda m: Group(m.marked())),
    b"\x85": _push(lambda m: _take(m, 1)),
    b"\x86": _push(lambda m: _take(m, 2)),
    b"\x87": _push(lambda m: _take(m, 3)),
    b"2": _push(lambda m: m.stack[-1]),
    b"Q": _push(lambda m: Reference(m.stack.pop())),
    b"(": _mark,
    b"0": _pop,
    b"1": lambda m: m.marked() and None,
    b"q": lambda m: _put(m, m.number(U8)),
    b"r": lambda m: _put(m, m.number(U32)),
    b"\x94": lambda m: _put(m, len(m.memo)),
    b"h": lambda m: _get(m, m.number(U8)),
    b"j": lambda m: _get(m, m.number(U32)),
    b"a": _append,
    b"e": _appends,
    # The members of a set.
    b"\x90": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _call,
    # A new object of a class.
    b"\x81": _call,
    b"\x92": _call_with_names,
    b"b": _build,
}.items():
    ACTIONS[_code[0]] = _action
