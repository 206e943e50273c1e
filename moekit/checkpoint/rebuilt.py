"""The instructions with which a pickle rebuilds one tensor, carried out at once: ``torch.save`` writes the same for each.

A file has thousands of tensors, each written in some 35 instructions that differ in their numbers alone. One regular
expression takes them in, and what the machine of :mod:`moekit.checkpoint.pickles` would make of them one by one is made here.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from moekit.checkpoint.objects import Call, Reference

# Instructions that fetch an object by its number, note one under a number, and make a whole number. Almost all of a file's
# objects have numbers of four bytes, and tensors with others are left to the machine.
_GET, _PUT, _NUMBER = rb"(j....|h.)", rb"r(....)", rb"(?:K.|M..|J....)"
_NUMBERS = re.compile(_NUMBER, re.DOTALL)
# A tuple of one to three numbers.
_TUPLE = rb"(%b\x85|%b{2}\x86|%b{3}\x87)" % ((_NUMBER,) * 3) + _PUT
_TENSOR = re.compile(
    # The storage: the word for it, its type, its name, its device and its length, and the reference to it.
    rb"\(\(" + _GET + _GET + rb"X(.)\0\0\0([0-9]{1,20})" + _PUT + _GET + rb"(%b)t" % _NUMBER + _PUT + rb"Q"
    # The offset, the shape, the strides, no gradient, and no hooks.
    rb"(%b)" % _NUMBER + _TUPLE * 2 + rb"\x89" + _GET + rb"\)R" + _PUT
    # All arguments, and the call.
    + rb"t" + _PUT + rb"R" + _PUT,
    re.DOTALL,
)  # fmt: skip
# The instructions of a tensor with one dimension; each more dimension has two more.
INSTRUCTIONS = 27
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
    (word, kind, size, name, put_name, device, count, put_storage, offset, shape, put_shape, strides, put_strides, hooks,
     put_hooks, put_arguments, put_call) = found.groups()
    # fmt: on
    if size[0] != len(name):
        return 0
    # A number may be that of something else before, so all is fetched and noted in the order of the instructions.
    word, kind = memo[_at(word)], memo[_at(kind)]
    memo[_unsigned(put_name, "little")] = told = name.decode()
    told = word, kind, told, memo[_at(device)], _numbers(count)[0]
    memo[_unsigned(put_storage, "little")] = told
    reference = Reference(told)
    references.append(reference)
    memo[_unsigned(put_shape, "little")] = shape = _numbers(shape)
    memo[_unsigned(put_strides, "little")] = strides = _numbers(strides)
    memo[_unsigned(put_hooks, "little")] = none = Call(memo[_at(hooks)], ())
    arguments = reference, _numbers(offset)[0], shape, strides, False, none
    memo[_unsigned(put_arguments, "little")] = arguments
    memo[_unsigned(put_call, "little")] = call = Call(stack.pop(), arguments)
    calls += none, call
    stack.append(call)
    return found.end()


# The objects that tensors fetch, their shapes and their lengths are few.
@functools.lru_cache(1024)
def _at(fetching: bytes) -> int:
    return _unsigned(fetching[1:], "little")


@functools.lru_cache(1024)
def _numbers(text: bytes) -> tuple[int, ...]:
    """The numbers that are made in ``text``; those of four bytes alone have a sign."""
    return tuple(int.from_bytes(one[1:], "little", signed=one[:1] == b"J") for one in _NUMBERS.findall(text))
