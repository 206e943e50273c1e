"""The accepted contents of a checkpoint's pickle: names, calls and storages; all others are refused."""

from __future__ import annotations

import enum
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moekit.checkpoint.objects import Call, Group, Name, Pairs, Reference, Unreadable
from moekit.checkpoint.pickles import Parsed


class _Cut(reprlib.Repr):
    """It cuts what a pickle makes, too. The library writes objects of classes that it does not know whole, which may never end."""

    repr_Pairs = repr_Group = reprlib.Repr.repr_list

    def repr_Call(self, call: Call, level: int) -> str:
        return "a call"

    def repr_Reference(self, reference: Reference, level: int) -> str:
        return "a reference"


_cut = _Cut()
_cut.maxlevel, _cut.maxstring, _cut.maxother, _cut.maxlong = 2, 60, 60, 40


def short(value: Any) -> str:
    """``value`` as text for a message, in at most 80 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        # Python refuses to print a number of more than 4,300 digits.
        return f"a whole number of {value.bit_length():,} bits"
    try:
        text = _cut.repr(value)
    except ValueError:
        text = f"a {type(value).__name__}"
    # A table's text has lines.
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 80 else text[:77] + "..."


def clip(text: str) -> str:
    """A name as text for a message: unchanged, unless it is long or not printable."""
    return text if text.isprintable() and len(text) <= 150 else short(text)


# ------------------------------------------------------------------------------------------------ names

STORAGES = {
    f"{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8,
    }.items()
}
# The types by torch's words; some of them have no storage of their own. Torch cannot read a number of any other type.
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()} | {
    word: getattr(torch, word) for word in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}
OLD_CODECS = ("latin1", "latin-1")


def _any(arguments: tuple) -> bool:
    return True


def _members(arguments: tuple) -> bool:
    return len(arguments) <= 1 and all(isinstance(a, (list, tuple, Group, Pairs)) for a in arguments)


def _content(arguments: tuple) -> bool:
    """Of bytes: nothing, or the bytes; protocol 2 has none, and writes text and the name of a codec, or a call with these."""
    of_bytes = len(arguments) == 1 and isinstance(arguments[0], (bytes, Call))
    return not arguments or of_bytes or (len(arguments) == 2 and arguments[1] in OLD_CODECS)


def one_value(arguments: tuple) -> bool:
    """Whether a call has one number or text as its argument, as those of enumerations have."""
    return len(arguments) == 1 and isinstance(arguments[0], (str, int, float))


# The accepted calls and their arguments. The reader calls none of them. It refuses a file with any other call, because
# such a file may be malicious.
CALLS: dict[str, Callable[[tuple], bool]] = {
    r"collections\.(OrderedDict|defaultdict|deque|Counter)": _any,
    r"argparse\.Namespace": _any,
    r"(builtins|__builtin__)\.(set|frozenset|dict|list|tuple)": _members,
    r"(builtins|__builtin__)\.(slice|complex|x?range)": _any,
    r"(builtins|__builtin__)\.(bytes|bytearray)": _content,
    r"_codecs\.encode": lambda a: len(a) == 2 and isinstance(a[0], str) and a[1] in OLD_CODECS,
    r"datetime\.(datetime|date|time|timedelta|timezone)": _any,
    r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path": lambda a: all(isinstance(part, str) for part in a),
    r"omegaconf\.(dictconfig\.DictConfig|listconfig\.ListConfig|nodes\.\w+Node)": _any,
    r"omegaconf\.base\.(Container)?Metadata": _any,
    # fairseq's options contain enumerations.
    r"fairseq\.dataclass\.\w+\.\w+": one_value,
    r"numpy\.(ndarray|dtype|dtypes\.\w+)": _any,
    r"numpy\.(_core|core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)": _any,
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)": _any,
    r"torch\._utils\._rebuild_(qtensor|sparse_tensor|meta_tensor_no_storage|nested_tensor)": _any,
    r"torch\.(device|Size)": _any,
}
# Names that are accepted without a call, such as a default factory or the type of an option.
VALUES = (
    r"typing\.\w+|torch(\.cuda|\.storage)?\.\w+Storage|torch\.(Tensor|nn\.parameter\.Parameter)"
    r"|(builtins|__builtin__)\.(int|long|float|str|unicode|bool|object|type|NoneType)|numpy\.(bool_?|u?int\d*|float\d*|complex\d*)"
    r"|fairseq\.[\w.]+\.[A-Z]\w*|omegaconf\.base\.(SCMode|Container|Node)"
)
_calls = {re.compile(pattern): fits for pattern, fits in CALLS.items()}
_values = re.compile("|".join([VALUES, *CALLS]))
_rebuilders = ("copyreg._reconstructor", "copy_reg._reconstructor")


def _known(name: str) -> Any:
    """The object called ``name`` in a module that this process has imported; None without such a module."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), "__dict__", {}).get(attribute)


def is_enumeration(name: str) -> bool:
    """Whether an enumeration of this name is imported in this process."""
    return isinstance(_known(name), enum.EnumMeta)


def is_known(name: str) -> bool:
    """Whether a class or function of this name is accepted in a checkpoint."""
    return (
        bool(_values.fullmatch(name))
        or name in _rebuilders
        or isinstance(_known(name), (torch.dtype, enum.EnumMeta))
    )


def refused(node: Any) -> str | None:
    """The reason to refuse a node, such as ``asks to load the class or function ...``; None if it is accepted.

    Raises:
        Unreadable: the node refers to an object outside the pickle that is not a storage.
    """
    if isinstance(node, Name) and not is_known(node):
        return f"asks to load the class or function {clip(str(node))}"
    if isinstance(node, Reference):
        stored(node)
    if not isinstance(node, Call):
        return None
    name, arguments = called(node)
    if not isinstance(name, Name):
        return "asks to call something that is not a function's name"
    if not is_known(name):
        return f"asks to load the class or function {clip(str(name))}"
    fits = isinstance(arguments, tuple) and (
        any(pattern.fullmatch(name) and fits(arguments) for pattern, fits in _calls.items())
        or (is_enumeration(name) and one_value(arguments))
    )
    return None if fits else f"asks to call {clip(str(name))} with arguments that no checkpoint needs"


def harmless(found: Parsed) -> bool:
    """Whether :func:`refused` accepts all that a pickle has made.

    If not, :func:`walk` finds what is refused, and where it is, unless the pickle has discarded it.
    """
    if not all(map(is_known, found.names)):
        return False
    # Most calls are of a few functions that take any arguments.
    free = {n for n in found.names if any(p.fullmatch(n) and fits is _any for p, fits in _calls.items())}
    for call in found.calls:
        plainly = type(call.function) is Name and type(call.arguments) is tuple and call.function in free
        if not plainly and refused(call):
            return False
    try:
        for reference in found.references:
            stored(reference)
    except Unreadable:
        return False
    return True


def called(call: Call) -> tuple[Any, Any]:
    """(function, arguments); for a class that an old protocol rebuilds, the class without arguments."""
    if call.function in _rebuilders and isinstance(call.arguments, tuple) and len(call.arguments) == 3:
        return call.arguments[0], ()
    return call.function, call.arguments


def walk(root: Any) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Each node once, and a function that gives its path, such as ``extra_state.best[0]``."""
    seen: set[int] = set()
    waiting: list[tuple[Any, tuple]] = [(root, ())]
    while waiting:
        node, place = waiting.pop()
        if isinstance(node, (list, tuple, Call, Reference)):
            if id(node) in seen:
                continue
            seen.add(id(node))
            waiting += ((part, (place, step)) for step, part in _parts(node))
        elif not isinstance(node, Name):
            continue
        yield node, lambda place=place: _spelled(place)


def _parts(node: Any) -> list[tuple[Any, Any]]:
    """(step of the path, part) for each part of a node, the last one first."""
    if isinstance(node, Call):
        parts = [(None, node.function), (None, node.arguments), (None, node.state)]
        parts += [(item[0], item[1]) if _is_pair(item) else (None, item) for item in node.items]
    elif isinstance(node, Pairs):
        parts = [part for key, value in node for part in ((key, value), (None, key))]
    elif isinstance(node, Reference):
        parts = [(None, node.name)]
    else:
        parts = list(enumerate(node))
    return parts[::-1]


def _is_pair(item: Any) -> bool:
    return type(item) is tuple and len(item) == 2


def _spelled(place: tuple) -> str:
    steps = []
    while place and len(steps) < 10:
        place, step = place
        if step is not None:
            steps.append(
                f"[{step}]" if isinstance(step, int) else f".{step if isinstance(step, str) else '?'}"
            )
    text = "".join(reversed(steps)).lstrip(".")
    return text if len(text) <= 100 else "..." + text[-97:]


# ------------------------------------------------------------------------------------------------ tensors


class Stored:
    """A storage that a pickle refers to: its name in the file, its dtype, its length in numbers and its bytes."""

    __slots__ = ("bytes", "count", "dtype", "name")

    def __init__(self, reference: Reference):
        parts = reference.name
        if not isinstance(parts, tuple) or len(parts) not in (5, 6) or parts[0] != "storage":
            raise Unreadable("is damaged: it refers to something outside that is no storage")
        kind, name, count = parts[1], parts[2], parts[4]
        if len(parts) == 6 and parts[5] is not None:
            raise Unreadable("has storages that are parts of others, as torch before version 0.4 wrote them")
        dtype = STORAGES.get(kind.rpartition(".")[2]) if type(kind) is Name else None
        if dtype is None or type(name) is not str:
            raise Unreadable(f"is damaged, or has a storage of an unknown kind: {short(kind)}")
        if type(count) is not int or not 0 <= count < 2**48:
            raise Unreadable(f"is damaged: the length of a storage is {short(count)}")
        self.name, self.count, self.dtype = name, count, dtype
        self.bytes: int = count * dtype.itemsize


def stored(reference: Reference) -> Stored:
    """The storage that ``reference`` refers to.

    Raises:
        Unreadable: it refers to something else.
    """
    if reference.meaning is None:
        reference.meaning = Stored(reference)
    return reference.meaning


def is_shape(shape: tuple | list) -> bool:
    """Whether a tensor can have this shape: torch counts its numbers in 64 bits, and takes a dimension of 0 for 1 at times."""
    if len(shape) > 8:
        return False
    numbers = 1
    for n in shape:
        if type(n) is not int or not 0 <= n < 2**48:
            return False
        numbers *= n or 1
    return numbers < 2**63


# The functions that rebuild a tensor, and that put one into a parameter.
_TENSORS = ("tensor", "tensor_v2", "tensor_v3")
_PARAMETERS = ("parameter", "parameter_with_state")


def layout_of(call: Call) -> tuple[Stored, int, tuple[int, ...], tuple[int, ...], torch.dtype] | None:
    """(storage, offset, shape, strides, dtype) of a tensor that torch would rebuild; None for any other call.

    Raises:
        Unreadable: the tensor reaches beyond its storage.
    """
    name, arguments = called(call)
    kind = str(name).rpartition("_rebuild_")[2]
    if kind in _PARAMETERS and arguments and isinstance(arguments[0], Call):
        name, arguments = called(arguments[0])
        kind = str(name).rpartition("_rebuild_")[2]
    if kind not in _TENSORS or not isinstance(arguments, tuple) or len(arguments) < 4:
        return None
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Reference):
        return None
    there = stored(storage)
    dtype = there.dtype
    if kind == "tensor_v3":
        word = str(arguments[6]).removeprefix("torch.") if len(arguments) > 6 else None
        if word not in DTYPES:
            raise Unreadable(f"is damaged, or has a tensor of an unknown type: {short(word)}")
        dtype = DTYPES[word]
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise Unreadable("is damaged: a tensor has no shape")
    if not is_shape(shape) or type(offset) is not int or not 0 <= offset < 2**48:
        raise Unreadable("is damaged: a tensor's shape is not made of whole numbers")
    last = offset
    for n, step in zip(shape, strides, strict=True):
        if type(step) is not int or not 0 <= step < 2**48:
            raise Unreadable("is damaged: a tensor's shape is not made of whole numbers")
        last += (n - 1) * step
    if (last + 1) * dtype.itemsize > there.bytes and 0 not in shape:
        raise Unreadable(
            f"is damaged: a tensor of shape {short(list(shape))} is larger than its storage of {there.count:,} numbers"
        )
    return there, offset, shape, strides, dtype


def storage_sizes(found: Parsed) -> dict[str, int]:
    """The bytes per number of each storage that a pickle refers to."""
    return {one.name: one.dtype.itemsize for one in map(stored, found.references)}
