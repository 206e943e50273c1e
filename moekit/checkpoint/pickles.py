"""A reader of pickles that does not execute them: it imports, calls and builds nothing.

A pickle is a program for a small stack machine. :func:`parse` is that machine, but an instruction that would call a
function only records the call: a :class:`Call` with the function's name and its arguments. The code that reads the result
interprets the calls. So a pickle cannot execute anything here. What a pickle may cost grows with what a file needs: with its
bytes, and with its tensors, which have to be written as torch writes them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from moekit.checkpoint.collecting import no_collector
from moekit.checkpoint.objects import Call, Group, Name, Pairs, Reference, Unreadable
from moekit.checkpoint.rebuilt import tensor

# The most bytes of a pickle; the pickle of a file with 50,000 tensors has 7 MB.
MOST_BYTES = 64 << 20
# A pickle of n bytes may have FEW + n / EACH instructions, and make half as many objects, beside those of its tensors. Where
# a reader allows more instructions, these are small numbers, texts and what was made before: all others are still as few.
FEW, EACH = 350_000, 40
# Beside the instructions that rebuild it, a tensor has some for its key and for the function; and it makes some objects.
AROUND, OBJECTS = 4, 8
# The most tensors beyond the storages that are known: old files tell theirs behind the pickle, and tensors may share one.
MANY = 80_000
# The most bytes that are copied to be read, as bytes are read faster than a view of a file.
COPIED = 4 << 20


class Parsed(NamedTuple):
    """What a pickle makes, and everything in it that a reader may refuse, discarded by later instructions or not."""

    value: Any
    # The first byte after the pickle.
    end: int
    names: set[Name]
    calls: list[Call]
    references: list[Reference]


@no_collector()
def parse(data: bytes | memoryview, start: int = 0, each: int = EACH, storages: int = 0) -> Parsed:
    """Read the pickle of protocol 2 to 5 that begins at ``start``.

    Args:
        each: the fewest bytes per instruction after the first 350,000 instructions; 2 for a file of many small numbers, which
            take as many.
        storages: that the file has, as far as is known.

    Raises:
        Unreadable: the pickle is damaged, too long or too large, or has another protocol.
    """
    machine = _Machine(bytes(data) if len(data) <= COPIED else data, start, each, storages)
    try:
        return Parsed(machine.run(), machine.at, machine.names, machine.calls, machine.references)
    except (IndexError, KeyError, struct.error):
        raise Unreadable(f"has a damaged pickle (byte {machine.at:,})") from None


class _Machine:
    def __init__(self, data: bytes | memoryview, start: int, each: int, storages: int):
        self.data, self.at, self.each, self.storages = data, start, each, storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.names: set[Name] = set()
        self.calls: list[Call] = []
        self.references: list[Reference] = []

    def run(self) -> Any:
        """Carry out all instructions; returns the object that the pickle makes.

        Most instructions are of these few kinds, and where tensors are not written as rebuilt.py knows them a file has a million
        of them, so they stand here in a loop without calls. All others are in ``ACTIONS``.
        """
        data, size, stack, marks, memo, act = (
            self.data,
            len(self.data),
            self.stack,
            self.marks,
            self.memo,
            ACTIONS,
        )
        push, pop, u16, u32 = stack.append, stack.pop, U16.unpack_from, U32.unpack_from
        note_call, note_reference = self.calls.append, self.references.append
        left, others = FEW + size // self.each, FEW + size // EACH
        made, at, tensors = left // 2, self.at, MANY + self.storages
        try:
            while left and others > 0:
                left -= 1
                code = data[at]
                at += 1
                if code == LONG_PUT:
                    index = u32(data, at)[0]
                    at += 4
                    memo[index] = stack[-1]
                    if len(memo) + len(marks) > made:
                        break
                elif code == LONG_GET:
                    index = u32(data, at)[0]
                    at += 4
                    push(memo[index])
                elif code == BYTE:
                    push(data[at])
                    at += 1
                elif code == TEXT:
                    length = u32(data, at)[0]
                    at += 4
                    if length > size - at:
                        raise IndexError
                    at += length
                    push(decoded(data[at - length : at]))
                elif code == MARK:
                    if data[at] == MARK and (
                        after := tensor(data, at - 1, stack, memo, self.calls, self.references)
                    ):
                        at = after
                        tensors -= 1
                        left += AROUND
                        others += AROUND
                        made += OBJECTS
                        if tensors < 0:
                            raise Unreadable(
                                f"has more than {MANY + self.storages:,} tensors in {self.storages:,} storages: it may be hostile"
                            )
                    else:
                        marks.append(len(stack))
                    if len(memo) + len(marks) > made:
                        break
                elif code == TUPLE:
                    start = marks.pop()
                    if len(stack) < start:
                        raise IndexError
                    items = tuple(stack[start:])
                    del stack[start:]
                    push(items)
                    others -= 1
                elif code == CALL:
                    arguments = pop()
                    call = Call(pop(), arguments)
                    note_call(call)
                    push(call)
                    others -= 1
                elif code == FALSE:
                    push(False)
                elif code == PUT:
                    index = data[at]
                    at += 1
                    memo[index] = stack[-1]
                    if len(memo) + len(marks) > made:
                        break
                elif code == REFERENCE:
                    reference = Reference(pop())
                    note_reference(reference)
                    push(reference)
                    others -= 1
                elif code == TUPLE_1:
                    push((pop(),))
                    others -= 1
                elif code == TUPLE_2:
                    second = pop()
                    push((pop(), second))
                    others -= 1
                elif code == EMPTY_TUPLE:
                    push(())
                elif code == SHORT:
                    push(u16(data, at)[0])
                    at += 2
                elif code == GET:
                    index = data[at]
                    at += 1
                    push(memo[index])
                elif code == STOP:
                    return pop()
                else:
                    self.at = at
                    action = act[code]
                    if action is None:
                        raise Unreadable(
                            f"has a pickle with the instruction {bytes([code])!r}, which is damaged or not of protocol 2 to 5"
                        )
                    action(self)
                    at = self.at
                    others -= 1
                    if len(memo) + len(marks) > made:
                        break
        finally:
            self.at = max(self.at, at)
        raise Unreadable(
            "has a pickle of more instructions or objects than a file of its size needs: it may be hostile"
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

    def top(self, kind: type) -> Any:
        """The object on top of the stack, which has to be of this very ``kind`` or the result of a call."""
        found = self.stack[-1]
        if type(found) is Call:
            if type(found.items) is tuple:
                found.items = []
            return found.items
        # Dictionaries and sets are lists here, too.
        if type(found) is not kind:
            raise IndexError
        return found


def decoded(text: bytes | memoryview) -> str:
    try:
        return str(text, "utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise Unreadable("has a damaged text in its pickle") from None


def _take(machine: _Machine, count: int) -> tuple[Any, ...]:
    if count > len(machine.stack):
        raise IndexError
    items = tuple(machine.stack[-count:])
    del machine.stack[-count:]
    return items


def _pop(machine: _Machine) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _append(machine: _Machine) -> None:
    value = machine.stack.pop()
    machine.top(list).append(value)


def _appends(machine: _Machine) -> None:
    values = machine.marked()
    machine.top(list).extend(values)


def _add_members(machine: _Machine) -> None:
    values = machine.marked()
    machine.top(Group).extend(values)


def _set_item(machine: _Machine) -> None:
    pair = _take(machine, 2)
    machine.top(Pairs).append(pair)


def _pairs(values: list[Any]) -> Pairs:
    if len(values) % 2:
        raise IndexError
    return Pairs(zip(values[::2], values[1::2], strict=True))


def _set_items(machine: _Machine) -> None:
    pairs = _pairs(machine.marked())
    machine.top(Pairs).extend(pairs)


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


def _note_call(machine: _Machine, function: Any, arguments: Any) -> None:
    call = Call(function, arguments)
    machine.calls.append(call)
    machine.stack.append(call)


def _new(machine: _Machine) -> None:
    _note_call(machine, *_take(machine, 2))


def _call_with_names(machine: _Machine) -> None:
    function, arguments, named = _take(machine, 3)
    _note_call(machine, function, (arguments, named))


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

# The instructions that a file of torch.save consists of, for the most part.
LONG_PUT, LONG_GET, PUT, GET = b"rjqh"
BYTE, SHORT, TEXT, FALSE = b"KMX\x89"
MARK, TUPLE, EMPTY_TUPLE, TUPLE_1, TUPLE_2 = b"(t)\x85\x86"
CALL, REFERENCE, STOP = b"RQ."

# The others.
ACTIONS: list[Callable[[_Machine], None] | None] = [None] * 256
for _code, _action in {
    # The number of the protocol.
    b"\x80": lambda m: m.number(U8),
    # The length of a frame.
    b"\x95": lambda m: m.number(U64),
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"J": _push(lambda m: m.number(I32)),
    b"G": _push(lambda m: m.number(F64)),
    b"\x8a": _push(lambda m: int.from_bytes(m.counted(U8), "little", signed=True)),
    b"\x8b": _push(lambda m: int.from_bytes(m.counted(I32), "little", signed=True)),
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
    b"l": _push(lambda m: m.marked()),
    b"d": _push(lambda m: _pairs(m.marked())),
    # A frozenset.
    b"\x91": _push(lambda m: Group(m.marked())),
    b"\x87": _push(lambda m: _take(m, 3)),
    b"2": _push(lambda m: m.stack[-1]),
    b"0": _pop,
    b"1": lambda m: m.marked() and None,
    b"\x94": _memoize,
    b"a": _append,
    b"e": _appends,
    # The members of a set.
    b"\x90": _add_members,
    b"s": _set_item,
    b"u": _set_items,
    b"c": _global,
    b"\x93": _stack_global,
    # A new object of a class.
    b"\x81": _new,
    b"\x92": _call_with_names,
    b"b": _build,
}.items():
    ACTIONS[_code[0]] = _action
