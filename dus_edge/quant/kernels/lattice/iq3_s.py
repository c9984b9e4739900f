"""IQ3_S: x ≈ ±D·m·v, m an odd number for 32 weights, v one of 512 points for every four.

Magnitudes are rounded to four codes, and of the points that `points` names for these the one of
the least weighted error is taken; six are tried while scales are searched, twelve for what is
stored. ggml (quantize_row_iq3_s_impl in ggml/src/ggml-quants.c) tries 19 scales and quantizes once
for the scale that was found, not for the one that is stored.

Layout: block_iq3_s in ggml/src/ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.kernels.blocks import QK
from dus_edge.quant.kernels.fit import Steps, clamp, inverse
from dus_edge.quant.kernels.half import from_half
from dus_edge.quant.kernels.lattice.odd_scales import pack_odd
from dus_edge.quant.kernels.lattice.points import IQ3_S, numbers, pairs
from dus_edge.quant.kernels.lattice.search import LatticeSearch, search_scales, split_signs
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
    f32,
    fma,
    i32,
    load,
    lookup,
    nearest,
    store,
    to_f32,
    to_i32,
    where,
)

_BLOCK_BYTES = 110
_N_SUB = QK_K // QK
#: Weights of a point.
_FOUR = 4
#: Half the points tried while scales are searched, and for what is stored.
_FEW, _MANY = 3, 6
#: The point of four ones, packed.
_LEAST = 0x1111
_FEW_PAIRS, _ALL_PAIRS, _NUMBERS = pairs(IQ3_S, 2 * _FEW), pairs(IQ3_S, 2 * _MANY), numbers(IQ3_S)


@njit(nogil=True)
def _key(x, at, scale):
    """Four codes of magnitudes from `at` on, as one number."""
    key = f32(0)
    half = scale * f32(0.5)
    for i in range(_FOUR - 1, -1, -1):
        code = clamp(fma(load(x, at + i * LANES), half, f32(-0.5)), f32(0), f32(7))
        key = fma(key, f32(8), nearest(code))
    return to_i32(key)


@njit(nogil=True)
def _value(point, i):
    """Value i of a point as it is packed, float32."""
    return to_f32((point >> i32(4 * i)) & i32(15))


@njit(nogil=True)
def _nearest_point(x, w, at, scale, table, n):
    """Of 2 · `n` points that `table` names the best for x · scale, packed."""
    key = _key(x, at, scale) * i32(n)
    minus = scale * f32(-2)
    a0 = load(w, at)
    a1 = load(w, at + LANES)
    a2 = load(w, at + 2 * LANES)
    a3 = load(w, at + 3 * LANES)
    b0 = a0 * load(x, at) * minus
    b1 = a1 * load(x, at + LANES) * minus
    b2 = a2 * load(x, at + 2 * LANES) * minus
    b3 = a3 * load(x, at + 3 * LANES) * minus
    best = f32(3e38)
    found = i32(_LEAST)
    for i in range(n):
        pair = lookup(table, key + i32(i))
        for _ in range(2):
            # Σwv² − 2Σwvx·scale
            v0 = _value(pair, 0)
            v1 = _value(pair, 1)
            v2 = _value(pair, 2)
            v3 = _value(pair, 3)
            cost = v0 * fma(v0, a0, b0)
            cost = fma(v1, fma(v1, a1, b1), cost)
            cost = fma(v2, fma(v2, a2, b2), cost)
            cost = fma(v3, fma(v3, a3, b3), cost)
            better = cost < best
            best = where(better, cost, best)
            found = where(better, pair, found)
            pair = pair >> i32(16)
    return found


@njit(nogil=True)
def _sums(x, w, at, scale, table, n):
    """Sums of 32 weights for the points next to x · scale: Σwv², Σwvx."""
    s_vv = f32(0)
    s_vx = f32(0)
    for k in range(at, at + QK * LANES, _FOUR * LANES):
        point = _nearest_point(x, w, k, scale, table, n)
        for i in range(_FOUR):
            v = _value(point, i)
            wv = load(w, k + i * LANES) * v
            s_vv = fma(wv, v, s_vv)
            s_vx = fma(wv, load(x, k + i * LANES), s_vx)
    return s_vv, s_vx


@njit(nogil=True)
def _quantize(x, w, scales, bits, table, numbered, q):
    """Numbers of the points of all 64 fours, for the scales that are stored."""
    big = from_half(bits)
    for j in range(_N_SUB):
        per = inverse(load(scales, j * LANES) * big)
        for k in range(j * QK // _FOUR, (j + 1) * QK // _FOUR):
            point = _nearest_point(x, w, _FOUR * k * LANES, per, table, _MANY)
            key = i32(0)
            for i in range(_FOUR):
                key = key | (((point >> i32(4 * i + 1)) & i32(7)) << i32(3 * i))
            store(q, k * LANES, lookup(numbered, key))


@njit(nogil=True)
def _pack_points(q, words):
    """64 numbers of 9 bits: the low 8 into 16 words, the highest into 2 more."""
    for g in range(16):
        word = i32(0)
        for b in range(4):
            word = word | ((load(q, (4 * g + b) * LANES) & i32(255)) << i32(8 * b))
        store(words, g * LANES, word)
    for g in range(2):
        word = i32(0)
        for b in range(32):
            word = word | ((load(q, (32 * g + b) * LANES) >> i32(8)) << i32(b))
        store(words, (16 + g) * LANES, word)


@njit(nogil=True, inline="always")
def _encode(source, importance, out, weighted, search, few, every, numbered):
    n_blocks = source.size // QK_K
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(QK_K // _FOUR * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    found = np.empty((3, _N_SUB * LANES), np.float32)
    scales = np.empty(_N_SUB * LANES, np.float32)
    words = np.empty(27 * LANES, np.int32)
    half = np.empty(LANES, np.int32)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK_K, starts, x)
        split_signs(x, words, 18)
        if weighted:
            columns_of(starts, importance.size, columns)
            sigma2 = mean_square(x, QK_K) * f32(2)
            weigh_importance(importance, columns, x, w, 0, QK_K, sigma2)
        else:
            for j in range(_N_SUB):
                weigh_spread(x, w, j * QK * LANES, QK)
        bits, over = search_scales(_sums, x, w, _N_SUB, search, few, every, found, scales)
        overflow |= over
        _quantize(x, w, scales, bits, every, numbered, q)
        store(half, 0, bits)
        _pack_points(q, words)
        pack_odd(scales, _N_SUB, words, 26)
        emit_half(half, starts, QK_K, out, _BLOCK_BYTES, 0)
        emit_words(words, starts, QK_K, out, _BLOCK_BYTES, 2, 27)
    return overflow


_COARSE = Steps(27.0, 0.5, 10)
_ALONE = LatticeSearch(QK, 15.0, _FEW, _MANY, Steps(10.5, 1.5, 5), 2, _COARSE, 2)


@njit(nogil=True, cache=True)
def iq3_s(source, importance, sigma2, out):
    """Quantize to IQ3_S; see `kernels`."""
    return _encode(source, importance, out, False, _ALONE, _FEW_PAIRS, _ALL_PAIRS, _NUMBERS)


_BY_IMPORTANCE = LatticeSearch(QK, 15.0, _FEW, _MANY, Steps(9.5, 1.25, 7), 2, _COARSE, 2)


@njit(nogil=True, cache=True)
def iq3_s_weighted(source, importance, sigma2, out):
    """Quantize to IQ3_S by importance; see `kernels`."""
    return _encode(source, importance, out, True, _BY_IMPORTANCE, _FEW_PAIRS, _ALL_PAIRS, _NUMBERS)
