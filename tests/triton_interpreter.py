"""Triton's interpreter at less cost."""

import inspect
from types import SimpleNamespace


def replace_once(rank=None) -> None:
    """Replace the functions of Triton's language for good, in this process or in that of a rank.

    The interpreter replaces all of them at each launch and at each call of a function in a kernel, with the same ones. That
    takes up to two thirds of a kernel's time. Most of the rest is types, which are made anew for each operation.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if interpreter._patch_lang is not _replaced:
        # An overflow would be computed with eight operations for each one of integers, and not be looked at.
        assert not interpreter.interpreter_builder.options.debug
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
        interpreter._patch_attr = _straight
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = _replaced
        _remember_types(tl.core, interpreter)


def _replaced(function) -> SimpleNamespace:
    return SimpleNamespace(restore=lambda: None)


def _straight(owner, name, member, builder, scope) -> None:
    """Replace ``member`` by its function itself, without those around it that only look for ``_semantic``."""
    from triton.runtime.interpreter import interpreter_semantic

    function = inspect.unwrap(member)

    def call(*args, **kwargs):
        kwargs["_semantic"] = interpreter_semantic
        return function(*args, **kwargs)

    scope.set_attr(owner, name, call)


def _remember_types(core, interpreter) -> None:
    """Make what a tensor says of its shape once for each shape, and look up what a type's name tells."""
    unwrap, block, number = core._unwrap_if_constexpr, core.block_type.__init__, interpreter._get_np_dtype
    same, equal = core.dtype.__eq__, core.tuple.__eq__
    yes, no, nothing = core.constexpr(True), core.constexpr(False), (core.tuple([]), core.constexpr(1))
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}
    # By its numbers: the shape as a block has it, how many numbers there are, and both as a tensor has them.
    shapes: dict[tuple[int, ...], tuple] = {}
    numbers = {}

    def unwrapped(x):
        kind = type(x)
        return x.value if kind is core.constexpr else x if kind in plain else unwrap(x)

    def describe(self, element_ty, shape) -> None:
        sizes = tuple([unwrapped(size) for size in unwrapped(shape)])
        if sizes not in shapes or {*map(type, sizes)} != {int}:
            block(self, element_ty, shape)
            constants = core.tuple([core.constexpr(size) for size in sizes])
            shapes[sizes] = self.shape, self.numel, constants, core.constexpr(self.numel)
        self.element_ty = element_ty
        self.shape, self.numel, *self.of_tensors = shapes[sizes]

    def named(self, name):
        if name != "name":
            raise AttributeError(name)
        return f"<{self.shape}, {self.element_ty}>"

    def hold(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else nothing

    def alike(self, other):
        values = other if type(other) is list else getattr(other, "values", None)
        return equal(self, other) if values is None else yes if self.values == values else no

    def number_of(dtype):
        name = dtype.scalar.name
        if name not in numbers:
            numbers[name] = number(dtype)
        return numbers[name]

    core._unwrap_if_constexpr = unwrapped
    core.block_type.__init__, core.block_type.__getattr__ = describe, named
    core.tensor.__init__, core.tuple.__eq__ = hold, alike
    core.dtype.__eq__ = lambda self, other: self is other or same(self, other)
    interpreter._get_np_dtype = number_of
