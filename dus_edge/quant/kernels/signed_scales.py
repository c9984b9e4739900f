"""Signed scales of small blocks on the grid D · s of their super-block, chosen by sums.

`found` holds of every small block, one row each: its best scale, Σwq² and Σwqx; with these the
error of any other scale costs no pass over the weights. s goes from −limit to limit − 1.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.kernels.fit import clamp, inverse
from dus_edge.quant.kernels.half import from_half, to_scale
from dus_edge.quant.simd import (
    LANES,
    absolute,
    f32,
    fma,
    least,
    load,
    nearest,
    store,
    to_i32,
    where,
)


@njit(nogil=True, inline="always")
def spaced(found, n_sub, limit, spacings):
    """D as float16 bits, and which overflowed: the best of the grids that `spacings` names.

    The largest scale takes the step −limit, or in turn each of −`spacings`.
    """
    peak = f32(0)
    for j in range(n_sub):
        d = load(found[0], j * LANES)
        peak = where(absolute(d) > absolute(peak), d, peak)
    # The grid reaches one further below zero: that end for the largest scale.
    bits, over = to_scale(peak / f32(-limit))
    if spacings.n:
        best = _grid_error(found, n_sub, limit, bits)
        for i in range(spacings.n):
            end = f32(-spacings.first - spacings.step * i)
            tried, _ = to_scale(peak / end)
            error = _grid_error(found, n_sub, limit, tried)
            bits = where(error < best, tried, bits)
            best = least(error, best)
    return bits, over


@njit(nogil=True)
def _grid_error(found, n_sub, limit, bits):
    """Error of a super-block, by the sums, with its scales on this grid."""
    big = from_half(bits)
    per = inverse(big)
    total = f32(0)
    for j in range(n_sub):
        d = _on_grid(load(found[0], j * LANES) * per, limit) * big
        total = total + d * (d * load(found[1], j * LANES) - f32(2) * load(found[2], j * LANES))
    return total


@njit(nogil=True)
def _on_grid(v, limit):
    """`v` rounded to an s of the grid."""
    return clamp(nearest(v), f32(-limit), f32(limit - 1))


@njit(nogil=True)
def settle(found, n_sub, limit, nothing, bits, scales):
    """Put scales on the grid of D, then fit D to them.

    `nothing` is the share of a step below which a scale becomes 0; all others are a step at least.

    Returns:
        the new D as float16 bits, and which overflowed.
    """
    zero = f32(0)
    big = from_half(bits)
    per = inverse(big)
    n_dd = zero
    r_d = zero
    for j in range(n_sub):
        d = load(found[0], j * LANES) * per
        s = _on_grid(d, limit)
        step = where(absolute(d) > nothing, where(d < zero, f32(-1), f32(1)), zero)
        s = where(absolute(s) > zero, s, step)
        n_dd = fma(s * s, load(found[1], j * LANES), n_dd)
        r_d = fma(s, load(found[2], j * LANES), r_d)
        store(scales, j * LANES, to_i32(s))
    d = r_d * inverse(n_dd)
    # A fit far from what the search found is rounding noise.
    sound = (absolute(d) > absolute(big) * f32(0.8)) & (absolute(big) * f32(1.25) > absolute(d))
    return to_scale(where(sound, d, big))
