"""The instructions with which a pickle rebuilds one tensor, carried out at once: ``torch.save`` writes the same for each.

A file has thousands of tensors, each written in some 35 instructions that differ in their numbers alone. One regular
expression takes them in, and what the machine of :mod:`moekit.checkpoint.pickles` would make of them one by one is made here.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from moekit.checkpoint.objects import Call, Reference

# Instructions that fetch an object by its number, note one under a number or under the next one, and make a whole number.
_GET, _PUT, _NUMBER = rb"(j....|h.)", rb"(r....|q.|\x94)", rb"(?:K.|M..|J....|\x8a\x05.{5})"
_NUMBERS = re.compile(_NUMBER, re.DOTALL)
# A tuple of one to three numbers.
_TUPLE = rb"(%b\x85|%b{2}\x86|%b{3}\x87)" % ((_NUMBER,) * 3) + _PUT
_TENSOR = re.compile(
    # The storage: the word for it, its type, its name, which is fetched where a tensor before has it, too, ...
    rb"\(\(" + _GET + _GET + rb"(?:(X.\0\0\0|\x8c.)([0-9]{1,20})" + _PUT + rb"|" + _GET + rb")"
    # ... its device, its length, in old files that it is no part of another one, and the reference to it.
    + _GET + rb"(%b)(N?)t" % _NUMBER + _PUT + rb"Q"
    # The offset, the shape, the strides, whether it has a gradient, and no hooks.
    rb"(%b)" % _NUMBER + _TUPLE * 2 + rb"([\x88\x89])" + _GET + rb"\)R" + _PUT
    # All arguments, and the call.
    + rb"t" + _PUT + rb"R" + _PUT,
    re.DOTALL,
)  # fmt: skip
MEMOIZE = b"\x94"
_unsigned = int.from_bytes


def tensor(
    data: bytes | memoryview,
    at: int,
    stack: list[Any],
    memo: dict[int, Any],
    calls: list[Call],
    references: list[Reference],
) -> int:
    """Carry out the instructions of a tensor that begin at ``at``, after the one that fetches the function.

    Returns:
        The first byte after them; 0 if something else stands there, and nothing is carried out.

    Raises:
        IndexError, KeyError: the pickle is damaged, as the machine raises them.
    """
    found = _TENSOR.match(data, at)
    if found is None:
        return 0
    # fmt: off
    (word, kind, head, name, put_name, get_name, device, count, old, put_storage, offset, shape, put_shape, strides,
     put_strides, gradient, hooks, put_hooks, put_arguments, put_call) = found.groups()
    # fmt: on
    if name is not None and head[1] != len(name):
        return 0
    # A number may be that of something else before, so all is fetched and noted in the order of the instructions.
    word, kind = memo[_at(word)], memo[_at(kind)]
    if name is None:
        told = memo[_at(get_name)]
    else:
        told = name.decode()
        _note(memo, put_name, told)
    told = word, kind, told, memo[_at(device)], _numbers(count)[0]
    if old:
        told = *told, None
    _note(memo, put_storage, told)
    reference = Reference(told)
    references.append(reference)
    shape = _numbers(shape)
    _note(memo, put_shape, shape)
    strides = _numbers(strides)
    _note(memo, put_strides, strides)
    none = Call(memo[_at(hooks)], ())
    _note(memo, put_hooks, none)
    arguments = reference, _numbers(offset)[0], shape, strides, gradient == b"\x88", none
    _note(memo, put_arguments, arguments)
    call = Call(stack.pop(), arguments)
    _note(memo, put_call, call)
    calls += none, call
    stack.append(call)
    return found.end()


def _note(memo: dict[int, Any], put: bytes, made: Any) -> None:
    memo[len(memo) if put == MEMOIZE else _unsigned(put[1:], "little")] = made


# The objects that tensors fetch, their shapes and their lengths are few.
@functools.lru_cache(1024)
def _at(fetching: bytes) -> int:
    return _unsigned(fetching[1:], "little")


@functools.lru_cache(1024)
def _numbers(text: bytes) -> tuple[int, ...]:
    """The numbers that are made in ``text``; those of one and two bytes have no sign."""
    return tuple(_number(one) for one in _NUMBERS.findall(text))


def _number(made: bytes) -> int:
    # What has five bytes tells so in another byte.
    content = made[2 if made[:1] == b"\x8a" else 1 :]
    return int.from_bytes(content, "little", signed=len(content) > 2)
