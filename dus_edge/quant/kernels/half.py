"""float16 in SIMD lanes, as bits in int32; no F16C or other extension is needed.

Bit manipulations after Giesen, "float->half conversions" (public domain,
https://gist.github.com/rygorous/2156668), rounding to nearest, ties to even.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.simd import as_f32, as_i32, f32, i32, where

#: The largest finite float16.
LARGEST = 0x7BFF
_INFINITY = 0x7C00


@njit(nogil=True)
def to_half(v):
    """float32 lanes → float16 bits; what is too large, and NaN, becomes infinity."""
    bits = as_i32(v)
    sign = (bits >> i32(16)) & i32(0x8000)
    bits = bits & i32(0x7FFFFFFF)
    magnitude = as_f32(bits)
    odd = (bits >> i32(13)) & i32(1)
    # The exponent's bias falls from 127 to 15; 0xFFF and the odd bit make ties go to even.
    normal = (bits + i32(-(112 << 23) + 0xFFF) + odd) >> i32(13)
    # Adding 0.5 leaves a subnormal's ten bits at the end of the mantissa, rounded by the FPU.
    subnormal = as_i32(magnitude + f32(0.5)) - i32(0x3F000000)
    half = where(magnitude < f32(2.0**-14), subnormal, normal)
    return where(magnitude < f32(65520.0), half, i32(_INFINITY)) | sign


@njit(nogil=True)
def to_scale(v):
    """float32 lanes → bits of a block's scale: finite whatever comes in.

    Returns:
        the bits, and a mask of the lanes that were too large (or NaN) and became the largest.
    """
    half = to_half(v)
    over = (half & i32(0x7FFF)) > i32(LARGEST)
    return where(over, (half & i32(0x8000)) | i32(LARGEST), half), over


@njit(nogil=True)
def from_half(half):
    """Bits of finite float16 → float32 lanes, exact."""
    sign = (half & i32(0x8000)) << i32(16)
    magnitude = as_f32((half & i32(0x7FFF)) << i32(13)) * f32(2.0**112)
    return as_f32(as_i32(magnitude) | sign)
