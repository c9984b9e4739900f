"""Scales D · (2s + 1) of small blocks, s in 0 … 15, chosen by sums.

`found` holds of every small block, one row each: its best scale, Σwv² and Σwvx; with these the
error of any other scale costs no pass over the weights.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.kernels.fit import clamp, inverse
from dus_edge.quant.kernels.half import from_half, to_scale
from dus_edge.quant.simd import (
    LANES,
    f32,
    fma,
    greatest,
    i32,
    least,
    load,
    nearest,
    store,
    to_i32,
    where,
)

#: The largest multiple of D.
TOP = 31


@njit(nogil=True)
def _multiple(v):
    """The odd number in 1 … `TOP` nearest to `v`."""
    s = nearest(fma(v, f32(0.5), f32(-0.5)))
    return fma(clamp(s, f32(0), f32(TOP // 2)), f32(2), f32(1))


@njit(nogil=True)
def _grid_error(found, n_sub, bits):
    """Error of a super-block, by the sums, with its scales on this grid."""
    big = from_half(bits)
    per = inverse(big)
    total = f32(0)
    for j in range(n_sub):
        d = _multiple(load(found[0], j * LANES) * per) * big
        total = total + d * (d * load(found[1], j * LANES) - f32(2) * load(found[2], j * LANES))
    return total


@njit(nogil=True, inline="always")
def spaced_odd(found, n_sub, spacings):
    """D as float16 bits, and which overflowed: the best of the grids that `spacings` names.

    The largest scale is `TOP` times D, or in turn each of `spacings` times.
    """
    peak = f32(0)
    for j in range(n_sub):
        peak = greatest(load(found[0], j * LANES), peak)
    bits, over = to_scale(peak / f32(TOP))
    best = _grid_error(found, n_sub, bits)
    for i in range(spacings.n):
        tried, _ = to_scale(peak / f32(spacings.first + spacings.step * i))
        error = _grid_error(found, n_sub, tried)
        bits = where(error < best, tried, bits)
        best = least(error, best)
    return bits, over


@njit(nogil=True)
def settle_odd(found, n_sub, bits, scales):
    """Put scales on the grid of D, then fit D to them; `scales` becomes their multiples, float32.

    Returns:
        the new D as float16 bits, and which overflowed.
    """
    big = from_half(bits)
    per = inverse(big)
    n_dd = f32(0)
    r_d = f32(0)
    for j in range(n_sub):
        m = _multiple(load(found[0], j * LANES) * per)
        n_dd = fma(m * m, load(found[1], j * LANES), n_dd)
        r_d = fma(m, load(found[2], j * LANES), r_d)
        store(scales, j * LANES, m)
    d = r_d * inverse(n_dd)
    # A fit far from what the search found is rounding noise.
    sound = (d > big * f32(0.8)) & (big * f32(1.25) > d)
    return to_scale(where(sound, d, big))


@njit(nogil=True)
def pack_odd(scales, n_sub, words, to):
    """s of the multiples 2s + 1, four bits each, eight to a word."""
    for g in range(n_sub // 8):
        word = i32(0)
        for b in range(8):
            s = to_i32(load(scales, (8 * g + b) * LANES)) >> i32(1)
            word = word | (s << i32(4 * b))
        store(words, (to + g) * LANES, word)
