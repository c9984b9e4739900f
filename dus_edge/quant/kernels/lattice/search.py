"""Scales of small blocks whose weights are stored by points: what all lattice types share.

A type is known by three functions that work on a packed point, a number of 16 bits:

- ``nearest(x, w, at, scale, table, n)``: of the 2 · `n` points that `table` names for x · scale the
  one of least weighted error, x the magnitudes of as many weights as a point is of, from `at` on;
- ``value(point, i)`` and ``code(point, i)``: its i-th value, and that value's code, float32.

`found` holds of every small block, one row each: its best scale, Σwv² and Σwvx.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from dus_edge.quant.kernels.fit import NOTHING, SLIGHT, Steps, better_scale, clamp, inverse
from dus_edge.quant.kernels.half import from_half
from dus_edge.quant.kernels.lattice.odd_scales import settle_odd, spaced_odd
from dus_edge.quant.simd import (
    LANES,
    any_lane,
    f32,
    fma,
    greatest,
    load,
    lookup,
    nearest,
    store,
    to_i32,
    where,
)


class LatticeSearch(NamedTuple):
    """What a type is, and how long to look for its scales.

    Attributes:
        dims: weights of a point.
        n_codes: codes of a weight.
        size: weights of a small block.
        top: the largest value.
        few: half the points that are tried while scales are searched.
        many: half those tried for what is stored.
        candidates: what the largest weight of a small block becomes.
        refits: times that the best one's scale is fitted again to the points found with it.
        spacings: the largest scale of a super-block on this multiple of D.
        rounds: times that scales are put on their grid and points found for them.
    """

    dims: int
    n_codes: int
    size: int
    top: float
    few: int
    many: int
    candidates: Steps
    refits: int
    spacings: Steps
    rounds: int


@njit(nogil=True)
def rounded_key(x, at, scale, dims, n_codes, step):
    """The key of the codes of `dims` magnitudes, whose values are 1, 1 + step, …, about."""
    key = f32(0)
    per = scale * f32(1 / step)
    for i in range(dims - 1, -1, -1):
        code = clamp(fma(load(x, at + i * LANES), per, f32(-1 / step)), f32(0), f32(n_codes - 1))
        key = fma(key, f32(n_codes), nearest(code))
    return to_i32(key)


@njit(nogil=True, inline="always")
def _sums(find, value, x, w, at, scale, table, n, search):
    """Sums of a small block for the points next to x · scale: Σwv², Σwvx."""
    s_vv = f32(0)
    s_vx = f32(0)
    for k in range(at, at + search.size * LANES, search.dims * LANES):
        point = find(x, w, k, scale, table, n)
        for i in range(search.dims):
            v = value(point, i)
            wv = load(w, k + i * LANES) * v
            s_vv = fma(wv, v, s_vv)
            s_vx = fma(wv, load(x, k + i * LANES), s_vx)
    return s_vv, s_vx


@njit(nogil=True, inline="always")
def _fitted(find, value, x, w, at, search, table):
    """The best scale of a small block, and the sums that it comes from: Σwv², Σwvx."""
    zero = f32(0)
    top = load(x, at)
    for k in range(1, search.size):
        top = greatest(load(x, at + k * LANES), top)
    some = top > f32(NOTHING)
    per = where(some, f32(1) / top, zero)
    best = f32(-1)
    d = where(some, top * f32(1 / search.top), zero)
    vv = zero
    vx = zero
    for i in range(search.candidates.n + search.refits):
        # Behind the candidates the best one's scale, fitted again.
        given = f32(search.candidates.first + search.candidates.step * i) * per
        scale = given if i < search.candidates.n else inverse(d)
        s_vv, s_vx = _sums(find, value, x, w, at, scale, table, search.few, search)
        # Where a type has not all signs, Σwvx can be negative, but no scale is.
        best, d, vv, vx = better_scale(s_vv, greatest(s_vx, zero), best, d, vv, vx)
    return d, vv, vx


@njit(nogil=True, inline="always")
def search_scales(find, value, x, w, n_sub, search, tables, found, scales):
    """Multiples of D for `n_sub` small blocks into `scales`, float32.

    Returns:
        D as float16 bits, and whether any overflowed.
    """
    for j in range(n_sub):
        at = j * LANES
        d, vv, vx = _fitted(find, value, x, w, search.size * at, search, tables.few)
        store(found[0], at, d)
        store(found[1], at, vv)
        store(found[2], at, vx)
    bits, over = spaced_odd(found, n_sub, search.spacings)
    overflow = any_lane(over)
    for turn in range(search.rounds):
        if turn:
            big = from_half(bits)
            for j in range(n_sub):
                at = j * LANES
                per = inverse(load(scales, at) * big)
                vv, vx = _sums(
                    find, value, x, w, search.size * at, per, tables.many, search.many, search
                )
                sound = (vv > f32(SLIGHT)) & (per > f32(0))
                store(found[0], at, where(sound, vx * inverse(vv), load(found[0], at)))
                store(found[1], at, where(sound, vv, load(found[1], at)))
                store(found[2], at, where(sound, vx, load(found[2], at)))
        bits, over = settle_odd(found, n_sub, bits, scales)
        overflow |= any_lane(over)
    return bits, overflow


@njit(nogil=True, inline="always")
def number_points(find, code, x, w, n_sub, scales, bits, search, tables, q):
    """Numbers of all points of a super-block into `q`, for the scales that are stored."""
    big = from_half(bits)
    each = search.size // search.dims
    for j in range(n_sub):
        per = inverse(load(scales, j * LANES) * big)
        for k in range(j * each, (j + 1) * each):
            point = find(x, w, search.dims * k * LANES, per, tables.many, search.many)
            key = f32(0)
            for i in range(search.dims - 1, -1, -1):
                key = fma(key, f32(search.n_codes), code(point, i))
            store(q, k * LANES, lookup(tables.numbers, to_i32(key)))
