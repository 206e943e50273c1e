"""What the phases of a decode step in one launch (one_phases.py) have in common: sizes, addresses, rows, and products.

Each warp computes rows of a matrix of its own, so that sums over a row need no other warp. Vectors of D numbers are tuples
of chunks, and so are rows of matrices.

Shape letters: D model dim, H heads, C head dim, F width, E experts, V dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from moekit.nn.kernels.fixed_point import fixed, floating
from moekit.nn.kernels.one_byte import numbers


def units_each(width: int, programs: int) -> int:
    """Units of a hidden layer of ``width`` that each of ``programs`` treats, so many that 16 bytes are read at a time."""
    return -(-width // (programs * 8)) * 8


@dataclass(frozen=True)
class Sizes:
    """What the kernel is compiled for: the model and how its work is cut.

    Attributes:
        d, h, c, f, e, v: D, H, C, F, E, V.
        k: choices a token.
        activation: the activation's number in activations.py.
        exact: the activation is computed as in float32.
        half, brain: the gate computes in float16, in bfloat16.
        one_byte, ptx: of the experts' weights, see one_byte.py.
        ranks: that share the experts, each with one sequence at most.
        programs: the number of programs.
        of_a_choice: programs that compute one of the K choices of a token: each choice has its own, or all take turns at each.
        warps: of a program.
        chunk: numbers of a row that a program treats at a time.
        slots: keys that a program looks at at a time.
        outputs: rows of the output projection for one head.
        rows: of the output matrix that a warp treats at a time.
        ahead: rows of the output matrix that each program fetches ahead.
    """

    d: int
    h: int
    c: int
    f: int
    e: int
    v: int
    k: int
    activation: int
    exact: bool
    half: bool
    brain: bool
    one_byte: int
    ptx: bool
    ranks: int
    programs: int
    of_a_choice: int
    warps: int
    chunk: int
    slots: int
    outputs: int
    rows: int
    ahead: int

    def each(self, n: int) -> int:
        """The most rows of ``n`` that a program treats."""
        return -(-n // self.programs)

    def units(self, programs: int) -> int:
        """Units of a hidden layer that each of ``programs`` treats."""
        return units_each(self.f, programs)

    @property
    def group(self) -> int:
        """Units that a warp treats at a time: 16 in all, which are the 32 bytes that memory gives at least."""
        return max(16 // self.warps, 1)


# The columns of the table of addresses, and where those of a phase begin: gain, shift, matrix and bias of queries, keys and
# values; matrix and bias of the output projection; gain, shift, the gate's matrix, and matrix, bias and scale of both products.
PROJECT, OUT, FFN, COLUMNS = map(tl.constexpr, (0, 4, 6, 15))


@triton.jit
def addresses(table, layer, first: tl.constexpr, number: tl.constexpr):
    """Some columns of a layer; asked for long before they are used, since each load takes its time."""
    found = ()
    for i in tl.static_range(number):
        found = found + (tl.load(table + layer * COLUMNS + (first + i)),)
    return found


@triton.jit
def pointer(address, kind: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(kind)), 16)


@triton.jit
def place_of(
    program, each: tl.constexpr, n: tl.constexpr, group: tl.constexpr, size: tl.constexpr, s: tl.constexpr
):
    """Group number ``group`` of the ``each`` rows of n that the program treats, [size, warps], and which of them there are."""
    place = (group * size + tl.arange(0, size)[:, None]) * s.warps + tl.arange(0, s.warps)[None, :]
    row = program * each + place
    return row, (place < each) & (row < n)


@triton.jit
def tiles_of_rows(w, program, each: tl.constexpr, n: tl.constexpr, size: tl.constexpr, s: tl.constexpr):
    """The rows of w [N, D] that the program treats, a tuple a group: see :func:`place_of` and :func:`tile_of_rows`."""
    groups = ()
    for group in tl.static_range((each + size * s.warps - 1) // (size * s.warps)):
        row, fits = place_of(program, each, n, group, size, s)
        groups = groups + (tile_of_rows(w, row, fits, s),)
    return groups


@triton.jit
def numbers_of_rows(v, program, each: tl.constexpr, n: tl.constexpr, size: tl.constexpr, s: tl.constexpr):
    """The numbers of v [N] for the same rows, [size, warps] a group."""
    groups = ()
    for group in tl.static_range((each + size * s.warps - 1) // (size * s.warps)):
        row, fits = place_of(program, each, n, group, size, s)
        groups = groups + (tl.load(v + row, mask=fits, other=0.0),)
    return groups


@triton.jit
def vector(v, s: tl.constexpr):
    """v [D] as chunks [chunk], as they are: a conversion would wait for the load."""
    chunks = ()
    for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
        chunks = chunks + (tl.load(v + done + tl.arange(0, s.chunk)),)
    return chunks


@triton.jit
def normed(units, gains, shifts, eps, kind: tl.constexpr, s: tl.constexpr):
    """The norm of x [D], chunks [chunk] int64, as chunks [1, chunk] float32, rounded to ``kind``; x itself without gains."""
    chunks = ()
    total = tl.zeros((tl.constexpr(s.chunk),), dtype=tl.float32)
    for i in tl.static_range(len(units)):
        chunks = chunks + (floating(units[i]),)
        total += chunks[i]
    found = ()
    if len(gains) == 0:
        for i in tl.static_range(len(chunks)):
            found = found + (chunks[i].to(kind).to(tl.float32)[None, :],)
    else:
        mean = tl.sum(total, axis=0) / s.d
        total = tl.zeros((tl.constexpr(s.chunk),), dtype=tl.float32)
        for i in tl.static_range(len(chunks)):
            total += (chunks[i] - mean) * (chunks[i] - mean)
        scale = tl.rsqrt(tl.sum(total, axis=0) / s.d + eps)
        for i in tl.static_range(len(chunks)):
            normed = (chunks[i] - mean) * scale * gains[i].to(tl.float32) + shifts[i].to(tl.float32)
            found = found + (normed.to(kind).to(tl.float32)[None, :],)
    return found


@triton.jit
def tile_of_rows(w, row, fits, s: tl.constexpr):
    """Rows [rounds, warps] of w [N, D] as chunks [rounds, warps, chunk]."""
    at = w + tl.expand_dims(row, 2) * s.d
    tiles = ()
    for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
        inner = tl.expand_dims(done + tl.arange(0, s.chunk), [0, 1])
        tiles = tiles + (tl.load(at + inner, mask=tl.expand_dims(fits, 2), other=0),)
    return tiles


@triton.jit
def products(tiles, row, one_byte: tl.constexpr, ptx: tl.constexpr, s: tl.constexpr):
    """Dot products [rounds, warps] of a matrix's rows, ``tiles``, with ``row``, chunks [1, chunk]."""
    total = numbers(tiles[0], one_byte, ptx).to(tl.float32) * tl.expand_dims(row[0], 0)
    for i in tl.static_range(1, len(tiles)):
        total += numbers(tiles[i], one_byte, ptx).to(tl.float32) * tl.expand_dims(row[i], 0)
    return tl.sum(total, axis=2)


@triton.jit
def tiles_of_columns(w, program, each: tl.constexpr, s: tl.constexpr):
    """The columns of w [D, F] for the program's units, a tuple a group: as chunks [chunk, size of a group] of its rows."""
    units: tl.constexpr = s.group * s.warps
    groups = ()
    for group in tl.static_range((each + units - 1) // units):
        place = group * units + tl.arange(0, units)[None, :]
        column = program * each + place
        tiles = ()
        for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
            at = w + (done + tl.arange(0, s.chunk)[:, None]) * s.f + column
            tiles = tiles + (tl.load(at, mask=(place < each) & (column < s.f), other=0),)
        groups = groups + (tiles,)
    return groups


@triton.jit
def first_vector(v, program, s: tl.constexpr):
    """v [D] as chunks [chunk] for the first program, zeros for the others: they add up to v."""
    chunks = ()
    for done in tl.static_range(0, tl.constexpr(s.d), tl.constexpr(s.chunk)):
        at = done + tl.arange(0, s.chunk)
        chunks = chunks + (tl.load(v + at, mask=program == 0, other=0),)
    return chunks


@triton.jit
def add(x, start, sums, weight, s: tl.constexpr):
    """Add ``sums``, times ``weight``, and the integers ``start``, if there are any, to x [D] int64."""
    for i in tl.static_range(len(sums)):
        row = i * s.chunk + tl.arange(0, s.chunk)
        units = fixed(sums[i] * weight)
        if len(start) > 0:
            units += start[i]
        tl.atomic_add(x + row, units, sem="relaxed")
