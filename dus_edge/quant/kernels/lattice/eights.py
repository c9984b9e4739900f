"""Points of eight magnitudes, of the values 1, 3.125 and 5.375: what IQ2_S and IQ2_XS share.

A code c of 0, 1 or 2 stands for a value that is a polynomial of it, and so does the error that the
value makes; so the error of a point takes two multiply-adds a weight.

Values: iq2s_grid and iq2xs_grid in ggml/src/ggml-common.h have 8, 25 and 43, which
dequantize_row_iq2_s in ggml/src/ggml-quants.c multiplies by (2s + 1) · D / 8. ggml's own search
takes them for 1, 3 and 5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from dus_edge.quant.kernels.fit import Steps, clamp, inverse
from dus_edge.quant.kernels.half import from_half
from dus_edge.quant.kernels.lattice.points import Lattice, numbers, pairs
from dus_edge.quant.kernels.lattice.search import LatticeSearch, search_scales
from dus_edge.quant.kernels.superblock import (
    QK_K,
    columns_of,
    emit_half,
    emit_words,
    gather_blocks,
    mean_square,
    weigh_importance,
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

#: Weights of a point, and of a scale.
EIGHT = 8
_SIXTEEN = 16
#: Points and scales of a super-block.
N_POINTS, N_SCALES = QK_K // EIGHT, QK_K // _SIXTEEN
#: v = 1 + _V1·c + _V2·c² and v² = 1 + _S1·c + _S2·c².
_V1, _V2 = 2.0625, 0.0625
_S1, _S2 = 3.5859375, 5.1796875
#: The mean step between values, for rounding.
_STEP = 2.1875
#: How long both types look for scales.
_SEARCH = LatticeSearch(
    size=_SIXTEEN,
    top=5.375,
    few=4,
    many=8,
    candidates=Steps(3.4, 0.5, 7),
    refits=1,
    spacings=Steps(27.0, 0.5, 10),
    rounds=2,
)


class Tables(NamedTuple):
    """What a type's points are found by: `points.pairs` of few and many, `points.numbers`."""

    few: np.ndarray
    many: np.ndarray
    numbers: np.ndarray


def tables_of(lattice: Lattice) -> Tables:
    """The tables of a type's points."""
    few, many = (pairs(lattice, 2 * n) for n in (_SEARCH.few, _SEARCH.many))
    return Tables(few, many, numbers(lattice))


@njit(nogil=True)
def _code(point, i):
    """Code i of a packed point, float32."""
    return to_f32((point >> i32(2 * i)) & i32(3))


@njit(nogil=True)
def _value(code):
    return fma(fma(f32(_V2), code, f32(_V1)), code, f32(1))


@njit(nogil=True)
def _nearest_eight(x, w, at, scale, table, n):
    """Of 2 · `n` points that `table` names the best for x · scale, packed."""
    key = f32(0)
    per = scale * f32(1 / _STEP)
    for i in range(EIGHT - 1, -1, -1):
        code = clamp(fma(load(x, at + i * LANES), per, f32(-1 / _STEP)), f32(0), f32(2))
        key = fma(key, f32(3), nearest(code))
    first = to_i32(key) * i32(n)
    minus = scale * f32(-2)
    best = f32(3e38)
    found = i32(0)
    for j in range(n):
        pair = lookup(table, first + i32(j))
        for _ in range(2):
            # Σwv² − 2Σwvx·scale, less what it is for eight ones.
            cost = f32(0)
            for i in range(EIGHT):
                a = load(w, at + i * LANES)
                b = a * load(x, at + i * LANES) * minus
                c = _code(pair, i)
                linear = fma(a, f32(_S1), b * f32(_V1))
                square = fma(a, f32(_S2), b * f32(_V2))
                cost = fma(c, fma(c, square, linear), cost)
            better = cost < best
            best = where(better, cost, best)
            found = where(better, pair & i32(0xFFFF), found)
            pair = pair >> i32(16)
    return found


@njit(nogil=True)
def _sums(x, w, at, scale, table, n):
    """What `search` asks of a type: Σwv² and Σwvx of 16 weights."""
    s_vv = f32(0)
    s_vx = f32(0)
    for k in range(at, at + _SIXTEEN * LANES, EIGHT * LANES):
        point = _nearest_eight(x, w, k, scale, table, n)
        for i in range(EIGHT):
            v = _value(_code(point, i))
            wv = load(w, k + i * LANES) * v
            s_vv = fma(wv, v, s_vv)
            s_vx = fma(wv, load(x, k + i * LANES), s_vx)
    return s_vv, s_vx


@njit(nogil=True)
def _quantize(x, w, scales, bits, table, numbered, q):
    """Numbers of the points of all 32 eights of a super-block, for the scales that are stored."""
    big = from_half(bits)
    for j in range(N_SCALES):
        per = inverse(load(scales, j * LANES) * big)
        for k in range(2 * j, 2 * j + 2):
            point = _nearest_eight(x, w, EIGHT * k * LANES, per, table, _SEARCH.many)
            key = f32(0)
            for i in range(EIGHT - 1, -1, -1):
                key = fma(key, f32(3), _code(point, i))
            store(q, k * LANES, lookup(numbered, to_i32(key)))


@njit(nogil=True, inline="always")
def encode_eights(source, importance, out, tables, split, pack, n_words):
    """Quantize by importance to blocks of float16 D and `n_words` words behind it.

    Args:
        split: ``(x, w, signs)``: takes the signs from 256 weights, whose magnitudes it leaves, into
            as many rows of `signs` as it needs, at most `N_POINTS`.
        pack: ``(q, signs, scales, words)``: the words of numbers, signs and multiples of D.
    """
    n_blocks = source.size // QK_K
    block_bytes = 4 * n_words + 2
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(N_POINTS * LANES, np.int32)
    signs = np.empty(N_POINTS * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    found = np.empty((3, N_SCALES * LANES), np.float32)
    scales = np.empty(N_SCALES * LANES, np.float32)
    words = np.empty(n_words * LANES, np.int32)
    half = np.empty(LANES, np.int32)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK_K, starts, x)
        columns_of(starts, importance.size, columns)
        weigh_importance(importance, columns, x, w, 0, QK_K, mean_square(x, QK_K) * f32(2))
        split(x, w, signs)
        bits, over = search_scales(
            _sums, x, w, N_SCALES, _SEARCH, tables.few, tables.many, found, scales
        )
        overflow |= over
        _quantize(x, w, scales, bits, tables.many, tables.numbers, q)
        store(half, 0, bits)
        pack(q, signs, scales, words)
        emit_half(half, starts, QK_K, out, block_bytes, 0)
        emit_words(words, starts, QK_K, out, block_bytes, 2, n_words)
    return overflow
