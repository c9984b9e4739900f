"""F16 and BF16: weight by weight, rounded to nearest, ties to even.

What is finite stays finite: a number too large becomes the largest, and the overflow is told.
Infinities and NaN pass (a NaN's payload shrinks to one quiet bit, as in ggml).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.kernels.half import to_half
from dus_edge.quant.simd import (
    LANES,
    any_lane,
    as_i32,
    i32,
    load,
    load_bf16,
    store_shorts,
    where,
)


@njit(nogil=True, inline="always")
def _convert(v, exponent, quiet_bit, largest, half):
    """One vector: float16 bits of `v` if `half`, else bfloat16 bits; and which overflowed."""
    bits = as_i32(v)
    magnitude = bits & i32(0x7FFFFFFF)
    sign = (bits >> i32(16)) & i32(0x8000)
    if half:
        short = to_half(v)
    else:
        odd = (bits >> i32(16)) & i32(1)
        short = (bits + i32(0x7FFF) + odd) >> i32(16)
    infinite = (short & i32(0x7FFF)) > i32(largest)
    over = infinite & (i32(0x7F800000) > magnitude)
    quiet = i32(exponent | quiet_bit)
    short = where(over, sign | i32(largest), short)
    short = where(magnitude > i32(0x7F800000), sign | quiet, short)
    return short, over


@njit(nogil=True, inline="always")
def _encode(source, out, narrow, exponent, quiet_bit, largest, half):
    overflow = False
    shorts = out.view(np.uint16)
    n = source.size
    for at in range(0, n, LANES):
        # The last vector overlaps the one before it.
        k = min(at, n - LANES)
        v = load_bf16(source, k) if narrow else load(source, k)
        short, over = _convert(v, exponent, quiet_bit, largest, half)
        overflow |= any_lane(over)
        store_shorts(shorts, k, short)
    return overflow


@njit(nogil=True, cache=True)
def f16(source, importance, sigma2, out):
    """float32 to F16; see `kernels`. At least `LANES` weights."""
    return _encode(source, out, False, 0x7C00, 0x200, 0x7BFF, True)


@njit(nogil=True, cache=True)
def f16_from_bf16(source, importance, sigma2, out):
    """bfloat16 to F16; see `kernels`. At least `LANES` weights."""
    return _encode(source, out, True, 0x7C00, 0x200, 0x7BFF, True)


@njit(nogil=True, cache=True)
def bf16(source, importance, sigma2, out):
    """float32 to BF16; see `kernels`. At least `LANES` weights."""
    return _encode(source, out, False, 0x7F80, 0x40, 0x7F7F, False)
