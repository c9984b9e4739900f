"""Scales of small blocks whose weights are stored by points: what all lattice types share.

`found` holds of every small block, one row each: its best scale, Σwv² and Σwvx. What a type's
points make of weights is asked of its ``sums(x, w, at, scale, table, n)``: Σwv² and Σwvx of the
small block from `at` on, x the magnitudes, for the best of 2 · `n` points that `table` names for
x · scale.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from dus_edge.quant.kernels.fit import NOTHING, SLIGHT, Steps, better_scale, inverse
from dus_edge.quant.kernels.half import from_half
from dus_edge.quant.kernels.lattice.odd_scales import settle_odd, spaced_odd
from dus_edge.quant.simd import (
    LANES,
    absolute,
    any_lane,
    as_i32,
    f32,
    greatest,
    i32,
    load,
    store,
    where,
)


class LatticeSearch(NamedTuple):
    """How long to look for scales.

    Attributes:
        size: weights of a small block.
        top: the largest value of a point.
        few: half the points that are tried while scales are searched.
        many: half those tried for what is stored.
        candidates: what the largest weight of a small block becomes.
        refits: times that the best one's scale is fitted again to the points found with it.
        spacings: the largest scale of a super-block on this multiple of D.
        rounds: times that scales are put on their grid and points found for them.
    """

    size: int
    top: float
    few: int
    many: int
    candidates: Steps
    refits: int
    spacings: Steps
    rounds: int


@njit(nogil=True, inline="always")
def _fitted(sums, x, w, at, search, table):
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
        s_vv, s_vx = sums(x, w, at, scale, table, search.few)
        # Where a type has not all signs, Σwvx can be negative, but no scale is.
        best, d, vv, vx = better_scale(s_vv, greatest(s_vx, zero), best, d, vv, vx)
    return d, vv, vx


@njit(nogil=True, inline="always")
def search_scales(sums, x, w, n_sub, search, few, every, found, scales):
    """Multiples of D for `n_sub` small blocks into `scales`, float32.

    Args:
        few: the table for the search, of `search.few` pairs a key.
        every: the one for what is stored.

    Returns:
        D as float16 bits, and whether any overflowed.
    """
    for j in range(n_sub):
        d, vv, vx = _fitted(sums, x, w, j * search.size * LANES, search, few)
        store(found[0], j * LANES, d)
        store(found[1], j * LANES, vv)
        store(found[2], j * LANES, vx)
    bits, over = spaced_odd(found, n_sub, search.spacings)
    overflow = any_lane(over)
    for turn in range(search.rounds):
        if turn:
            big = from_half(bits)
            for j in range(n_sub):
                at = j * LANES
                per = inverse(load(scales, at) * big)
                vv, vx = sums(x, w, search.size * at, per, every, search.many)
                sound = (vv > f32(SLIGHT)) & (per > f32(0))
                store(found[0], at, where(sound, vx * inverse(vv), load(found[0], at)))
                store(found[1], at, where(sound, vv, load(found[1], at)))
                store(found[2], at, where(sound, vx, load(found[2], at)))
        bits, over = settle_odd(found, n_sub, bits, scales)
        overflow |= any_lane(over)
    return bits, overflow


@njit(nogil=True)
def split_signs(x, words, to):
    """Signs of 256 weights into 8 words, a bit each; then the weights are their magnitudes."""
    for j in range(8):
        word = i32(0)
        for b in range(32):
            k = (j * 32 + b) * LANES
            v = load(x, k)
            word = word | ((as_i32(v) >> i32(31)) << i32(b))
            store(x, k, absolute(v))
        store(words, (to + j) * LANES, word)
