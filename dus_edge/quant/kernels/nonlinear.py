"""IQ4_NL and IQ4_XS: x ≈ d·v with v one of 16 values that lie denser near zero.

The values are close to a polynomial of their index, and the index of the nearest one to a
polynomial of the weight. So a candidate quantizes with multiplications and additions alone; where
that takes the neighbour of the nearest value, the weight lies within 3 % of a step of the middle
between the two. What is stored is quantized by comparisons.

The values end at −127 and at 113: scales of both signs are tried, by the end that the largest
weight takes.

Values: kvalues_iq4nl; layouts: block_iq4_nl, block_iq4_xs in ggml/src/ggml-common.h.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numba import njit

from dus_edge.quant.kernels.blocks import QK, emit_quants
from dus_edge.quant.kernels.fit import (
    NOTHING,
    SLIGHT,
    Steps,
    better_scale,
    clamp,
    extreme,
    inverse,
)
from dus_edge.quant.kernels.half import from_half, to_scale
from dus_edge.quant.kernels.signed_scales import settle, spaced
from dus_edge.quant.kernels.superblock import (
    QK_K,
    columns_of,
    emit_half,
    emit_words,
    gather_blocks,
    mean_square,
    weigh_importance,
    weigh_spread,
)
from dus_edge.quant.simd import (
    LANES,
    absolute,
    any_lane,
    f32,
    fma,
    i32,
    load,
    nearest,
    store,
    to_f32,
    to_i32,
    where,
)
from dus_edge.quant.types import IQ4_LEVELS

_LOW, _HIGH = float(IQ4_LEVELS[0]), float(IQ4_LEVELS[-1])
#: Index less 8 of the value nearest to y, by y⁰ … y⁵: within 0.026 wherever it changes.
_INDEX = (-0.1215645, 0.08529235, 1.950969e-06, -2.743543e-06, -6.916322e-10, 8.186579e-11)
#: The value by powers of its index less 8: within 0.44, so that rounding gives it.
_VALUE = (1.43299, 11.43981, -0.01681205, 0.08183981, 0.001586043)
#: Halfway from each value to the next.
_MIDDLES = tuple((a + b) / 2 for a, b in itertools.pairwise(IQ4_LEVELS))

_N_SUB = QK_K // QK
#: Scales of IQ4_XS: s in −32 … 31.
_LIMIT = 32
#: Below this share of the smallest step a small block is nothing but its value nearest to zero.
_NO_STEP = 0.04


class _Search(NamedTuple):
    """How long to look for scales.

    Attributes:
        below: candidates by what the largest weight becomes, at the negative end.
        above: the same at the positive end.
        refits: times that the best one's scale is fitted again to the weights quantized with it.
        spacings: grids tried for the scales of IQ4_XS; the largest of them on this step.
        rounds: times that these are put on their grid and the weights on those scales.
    """

    below: Steps
    above: Steps
    refits: int
    spacings: Steps = Steps(0.0, 0.0, 0)
    rounds: int = 1


@njit(nogil=True)
def near_value(y):
    """A value next to `y`, the nearest but within 3 % of a step of the middle between two."""
    y = clamp(y, f32(_LOW), f32(_HIGH))
    i = fma(y, f32(_INDEX[5]), f32(_INDEX[4]))
    i = fma(i, y, f32(_INDEX[3]))
    i = fma(i, y, f32(_INDEX[2]))
    i = fma(i, y, f32(_INDEX[1]))
    return value_at(nearest(fma(i, y, f32(_INDEX[0]))))


@njit(nogil=True)
def value_at(i):
    """The value with index i + 8, float32."""
    v = fma(i, f32(_VALUE[4]), f32(_VALUE[3]))
    v = fma(v, i, f32(_VALUE[2]))
    v = fma(v, i, f32(_VALUE[1]))
    return nearest(fma(v, i, f32(_VALUE[0])))


@njit(nogil=True)
def nearest_index(y):
    """Index of the value nearest to `y`, float32; the upper one of two."""
    i = f32(0)
    for middle in _MIDDLES:
        i = where(y >= f32(middle), i + f32(1), i)
    return i


@njit(nogil=True)
def _sums(x, w, at, scale):
    """Sums of a small block for v next to x · scale: Σwv², Σwvx."""
    s_vv = f32(0)
    s_vx = f32(0)
    for k in range(QK):
        u = load(x, at + k * LANES)
        v = near_value(u * scale)
        wv = load(w, at + k * LANES) * v
        s_vv = fma(wv, v, s_vv)
        s_vx = fma(wv, u, s_vx)
    return s_vv, s_vx


@njit(nogil=True)
def _fitted(x, w, at, search):
    """The best scale of a small block, and the sums that it comes from: Σwv², Σwvx."""
    zero = f32(0)
    top = extreme(x, at, QK)
    some = absolute(top) > f32(NOTHING)
    per = where(some, f32(1) / top, zero)
    best = f32(-1)
    d = where(some, top / f32(_LOW), zero)
    vv = zero
    vx = zero
    for i in range(search.below.n):
        scale = f32(-search.below.first - search.below.step * i) * per
        s_vv, s_vx = _sums(x, w, at, scale)
        best, d, vv, vx = better_scale(s_vv, s_vx, best, d, vv, vx)
    for i in range(search.above.n):
        scale = f32(search.above.first + search.above.step * i) * per
        s_vv, s_vx = _sums(x, w, at, scale)
        best, d, vv, vx = better_scale(s_vv, s_vx, best, d, vv, vx)
    for _ in range(search.refits):
        s_vv, s_vx = _sums(x, w, at, inverse(d))
        best, d, vv, vx = better_scale(s_vv, s_vx, best, d, vv, vx)
    return d, vv, vx


@njit(nogil=True, inline="always")
def _encode_small(source, importance, out, weighted, search):
    n_blocks = source.size // QK
    x = np.empty(QK * LANES, np.float32)
    w = np.empty(QK * LANES, np.float32)
    q = np.empty(QK * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    words = np.empty(5 * LANES, np.int32)
    scale = np.empty(LANES, np.int32)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK, starts, x)
        if weighted:
            columns_of(starts, importance.size, columns)
            weigh_importance(importance, columns, x, w, 0, QK, mean_square(x, QK) * f32(2))
        else:
            weigh_spread(x, w, 0, QK)
        d, _, _ = _fitted(x, w, 0, search)
        half, over = to_scale(d)
        overflow |= any_lane(over)
        store(scale, 0, half)
        per = inverse(from_half(half))
        for k in range(0, QK * LANES, LANES):
            store(q, k, to_i32(nearest_index(load(x, k) * per)))
        emit_half(scale, starts, QK, out, 18, 0)
        emit_quants(q, words, starts, out, 18, 2, 4)
    return overflow


@njit(nogil=True, inline="always")
def _encode_super(source, importance, out, weighted, search):
    n_blocks = source.size // QK_K
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(QK_K * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    # Of each small block: scale, Σwv², Σwvx.
    found = np.empty((3, _N_SUB * LANES), np.float32)
    scales = np.empty(_N_SUB * LANES, np.int32)
    words = np.empty(34 * LANES, np.int32)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK_K, starts, x)
        sigma2 = f32(0)
        if weighted:
            columns_of(starts, importance.size, columns)
            sigma2 = mean_square(x, QK_K) * f32(2)
        for j in range(_N_SUB):
            at = j * QK * LANES
            if weighted:
                weigh_importance(importance, columns, x, w, j * QK, QK, sigma2)
            else:
                weigh_spread(x, w, at, QK)
            d, vv, vx = _fitted(x, w, at, search)
            store(found[0], j * LANES, d)
            store(found[1], j * LANES, vv)
            store(found[2], j * LANES, vx)
        bits, over = spaced(found, _N_SUB, _LIMIT, search.spacings)
        overflow |= any_lane(over)
        for turn in range(search.rounds):
            if turn:
                _requantize(x, w, scales, bits, found)
            bits, over = settle(found, _N_SUB, _LIMIT, f32(_NO_STEP), bits, scales)
            overflow |= any_lane(over)
        _quantize(x, scales, bits, q)
        _pack_head(bits, scales, words)
        _pack_indices(q, words)
        emit_words(words, starts, QK_K, out, 136, 0, 34)
    return overflow


@njit(nogil=True)
def _requantize(x, w, scales, bits, found):
    """Every small block's sums and best scale for the weights quantized with what is stored."""
    big = from_half(bits)
    for j in range(_N_SUB):
        at = j * LANES
        per = inverse(to_f32(load(scales, at)) * big)
        vv, vx = _sums(x, w, QK * at, per)
        sound = (vv > f32(SLIGHT)) & (absolute(per) > f32(0))
        store(found[0], at, where(sound, vx * inverse(vv), load(found[0], at)))
        store(found[1], at, where(sound, vv, load(found[1], at)))
        store(found[2], at, where(sound, vx, load(found[2], at)))


@njit(nogil=True)
def _quantize(x, scales, bits, q):
    """Indices of the values nearest to x / (D·s), of all weights."""
    big = from_half(bits)
    for j in range(_N_SUB):
        per = inverse(to_f32(load(scales, j * LANES)) * big)
        for k in range(j * QK * LANES, (j + 1) * QK * LANES, LANES):
            store(q, k, to_i32(nearest_index(load(x, k) * per)))


@njit(nogil=True)
def _pack_head(bits, scales, words):
    """D, then of the scales, 32 added, the upper two bits of all and the lower four."""
    word = bits
    for j in range(_N_SUB):
        s = load(scales, j * LANES) + i32(_LIMIT)
        word = word | ((s >> i32(4)) << i32(16 + 2 * j))
    store(words, 0, word)
    word = i32(0)
    for j in range(_N_SUB):
        s = load(scales, j * LANES) + i32(_LIMIT)
        word = word | ((s & i32(15)) << i32(4 * j))
    store(words, LANES, word)


@njit(nogil=True)
def _pack_indices(q, words):
    """Indices of 256 weights into 32 words: of each 32 the first 16 below, the others above."""
    for j in range(_N_SUB):
        for g in range(4):
            word = i32(0)
            for b in range(4):
                k = QK * j + 4 * g + b
                low = load(q, k * LANES)
                high = load(q, (k + 16) * LANES)
                word = word | ((low | (high << i32(4))) << i32(8 * b))
            store(words, (2 + 4 * j + g) * LANES, word)


_ALONE = _Search(Steps(110.0, 8.0, 4), Steps(98.0, 8.0, 3), 1)


@njit(nogil=True, cache=True)
def iq4_nl(source, importance, sigma2, out):
    """Quantize to IQ4_NL; see `kernels`."""
    return _encode_small(source, importance, out, False, _ALONE)


_BY_IMPORTANCE = _Search(Steps(106.0, 6.0, 7), Steps(94.0, 6.0, 6), 2)


@njit(nogil=True, cache=True)
def iq4_nl_weighted(source, importance, sigma2, out):
    """Quantize to IQ4_NL by importance; see `kernels`."""
    return _encode_small(source, importance, out, True, _BY_IMPORTANCE)


_COARSE = Steps(29.0, 0.5, 10)
_ALONE_XS = _Search(*_ALONE[:3], _COARSE, 2)


@njit(nogil=True, cache=True)
def iq4_xs(source, importance, sigma2, out):
    """Quantize to IQ4_XS; see `kernels`."""
    return _encode_super(source, importance, out, False, _ALONE_XS)


_BY_IMPORTANCE_XS = _Search(*_BY_IMPORTANCE[:3], _COARSE, 2)


@njit(nogil=True, cache=True)
def iq4_xs_weighted(source, importance, sigma2, out):
    """Quantize to IQ4_XS by importance; see `kernels`."""
    return _encode_super(source, importance, out, True, _BY_IMPORTANCE_XS)
