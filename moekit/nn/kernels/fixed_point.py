"""Sums that do not depend on the order of their terms: numbers are integers, in units of 2**-32.

Programs add their parts of a sum by atomic additions in any order. Sums of integers are the same from run to run, and more
precise than float32 from 2**-8 on. A term that is not finite, or not below 2**19, makes the sum NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fixed(x):
    """float32 -> int64, rounded towards zero."""
    # A GPU converts to 32 bits four times as fast as to 64.
    sound = tl.abs(x) < 524288.0
    x = tl.where(sound, x, 0.0)
    whole = x.to(tl.int32)
    rest = (x - whole.to(tl.float32)) * 2147483648.0
    units = (whole.to(tl.int64) << 32) + (rest.to(tl.int32).to(tl.int64) << 1)
    # A sum is far from zero modulo 2**64 unless 4,096 terms, or a multiple of that, are 2**52.
    return tl.where(sound, units, 4503599627370496)


@triton.jit
def floating(units):
    """int64 -> float32"""
    # A GPU converts 32 bits four times as fast as 64. The lower half has a sign, too, so that small numbers stay precise.
    low = units.to(tl.int32)
    high = ((units - low) >> 32).to(tl.int32)
    x = high.to(tl.float32) + low.to(tl.float32) * 2.3283064365386963e-10
    return tl.where((high >= -524288) & (high < 524288), x, float("nan"))
