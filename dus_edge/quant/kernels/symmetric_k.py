"""Q3_K and Q6_K: 256 weights as 16 sub-blocks of x ≈ D·s·q, q and s signed.

Like `affine_k`, without minima: the sums tell each sub-block's best s for a given D, the weights
are quantized again with what will be stored, and D is fitted to that.

Byte layouts: block_q3_K, block_q6_K in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from dus_edge.quant.kernels.fit import (
    SLIGHT,
    Search,
    Steps,
    clamp,
    inverse,
    symmetric_grid,
    symmetric_sums,
)
from dus_edge.quant.kernels.half import from_half
from dus_edge.quant.kernels.signed_scales import settle, spaced
from dus_edge.quant.kernels.superblock import (
    QK_K,
    columns_of,
    emit_half,
    emit_words,
    gather_blocks,
    mean_square,
    pack_bytes,
    pack_pairs,
    pack_plane,
    weigh_importance,
    weigh_importance_alone,
    weigh_spread,
)
from dus_edge.quant.simd import (
    LANES,
    any_lane,
    f32,
    i32,
    load,
    nearest,
    store,
    to_f32,
    to_i32,
    where,
)

_N_SUB = 16
_N = QK_K // _N_SUB


class _Layout(NamedTuple):
    """What a type stores: q in −reach … reach − 1, s in −limit … limit − 1, bytes of a block."""

    reach: int
    limit: int
    block_bytes: int


@njit(nogil=True, inline="always")
def _encode(source, importance, out, weighted, layout, search):
    n_blocks = source.size // QK_K
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(QK_K * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    # Of each sub-block: scale, Σwq², Σwqx.
    found = np.empty((3, _N_SUB * LANES), np.float32)
    scales = np.empty(_N_SUB * LANES, np.int32)
    words = np.empty(layout.block_bytes // 4 * LANES, np.int32)
    last = np.empty(LANES, np.int32)
    # 0 never beats the smallest step: every weight may still choose q = 0.
    always = f32(-1)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK_K, starts, x)
        if weighted:
            columns_of(starts, importance.size, columns)
        _search(x, w, importance, columns, weighted, layout, search, found)
        bits, over = spaced(found, _N_SUB, layout.limit, search.spacings)
        overflow |= any_lane(over)
        for turn in range(search.rounds):
            if turn:
                _requantize(x, w, scales, bits, layout, found)
            bits, over = settle(found, _N_SUB, layout.limit, always, bits, scales)
            overflow |= any_lane(over)
        _quantize(x, scales, bits, layout, q)
        if layout.reach == 32:
            # ql, qh, scales, d
            _pack_low(q, words)
            pack_pairs(q, words, 32, 4)
            pack_bytes(scales, words, 48, 4)
        else:
            # hmask, qs, scales, d
            pack_plane(q, words, 0, 2)
            pack_pairs(q, words, 8, 0)
            _pack_scales(scales, words)
        store(last, 0, bits)
        emit_words(words, starts, QK_K, out, layout.block_bytes, 0, layout.block_bytes // 4)
        emit_half(last, starts, QK_K, out, layout.block_bytes, layout.block_bytes - 2)
    return overflow


@njit(nogil=True, inline="always")
def _search(x, w, importance, columns, weighted, layout, search, found):
    """Weigh every sub-block and find its scale, each as good as can be alone."""
    sigma2 = f32(0)
    if weighted and layout.reach == 4:
        sigma2 = mean_square(x, QK_K) * f32(2)
    for j in range(_N_SUB):
        at = j * _N * LANES
        if not weighted:
            weigh_spread(x, w, at, _N)
        elif layout.reach == 32:
            weigh_importance_alone(importance, columns, w, j * _N, _N)
        else:
            weigh_importance(importance, columns, x, w, j * _N, _N, sigma2)
        d, s_qq, s_qx = symmetric_grid(x, w, at, _N, layout.reach, search)
        store(found[0], j * LANES, d)
        store(found[1], j * LANES, s_qq)
        store(found[2], j * LANES, s_qx)


@njit(nogil=True)
def _requantize(x, w, scales, bits, layout, found):
    """Every sub-block's sums and best scale for the weights quantized with what is stored."""
    big = from_half(bits)
    low = f32(-layout.reach)
    high = f32(layout.reach - 1)
    for j in range(_N_SUB):
        at = j * LANES
        per = inverse(to_f32(load(scales, at)) * big)
        s_qq, s_qx = symmetric_sums(x, w, _N * at, _N, per, low, high)
        d = where(s_qq > f32(SLIGHT), s_qx * inverse(s_qq), load(found[0], at))
        store(found[0], at, d)
        store(found[1], at, s_qq)
        store(found[2], at, s_qx)


@njit(nogil=True)
def _quantize(x, scales, bits, layout, q):
    """q = round(x / (D·s)) of all weights, made unsigned."""
    big = from_half(bits)
    low = f32(-layout.reach)
    high = f32(layout.reach - 1)
    for j in range(_N_SUB):
        per = inverse(to_f32(load(scales, j * LANES)) * big)
        for k in range(j * _N * LANES, (j + 1) * _N * LANES, LANES):
            v = clamp(nearest(load(x, k) * per), low, high)
            store(q, k, to_i32(v) + i32(layout.reach))


@njit(nogil=True)
def _pack_low(q, words):
    """Low four bits of 256 numbers into 32 words: a weight below, the one 64 further above."""
    for half in range(0, QK_K, 128):
        for k in range(0, 64, 4):
            word = i32(0)
            for b in range(4):
                below = load(q, (half + k + b) * LANES) & i32(15)
                above = load(q, (half + 64 + k + b) * LANES) & i32(15)
                word = word | ((below | (above << i32(4))) << i32(8 * b))
            store(words, (half // 8 + k // 4) * LANES, word)


@njit(nogil=True)
def _pack_scales(scales, words):
    """16 6-bit scales, 32 added, in 12 bytes: low halves of the first 8 and last 8, then tops."""
    for g in range(2):
        word = i32(0)
        for b in range(4):
            below = (load(scales, (4 * g + b) * LANES) + i32(32)) & i32(15)
            above = (load(scales, (8 + 4 * g + b) * LANES) + i32(32)) & i32(15)
            word = word | ((below | (above << i32(4))) << i32(8 * b))
        store(words, (24 + g) * LANES, word)
    word = i32(0)
    for b in range(4):
        for part in range(4):
            top = (load(scales, (4 * part + b) * LANES) + i32(32)) >> i32(4)
            word = word | (top << i32(8 * b + 2 * part))
    store(words, 26 * LANES, word)


#               reach, limit, bytes
_Q6_K = _Layout(32, 128, 210)
_Q3_K = _Layout(4, 32, 110)

_COARSE = Steps(30.0, 0.4, 10)

_Q6_K_SEARCH = Search(Steps(30.5, 0.35, 9))
_Q3_K_ALONE = Search(Steps(3.0, 0.2, 10), spacings=_COARSE)
_Q3_K_BY_IMPORTANCE = Search(Steps(2.8, 0.2, 12), refits=3, spacings=_COARSE, rounds=3)


@njit(nogil=True, cache=True)
def q6_k(source, importance, sigma2, out):
    """Quantize to Q6_K; see `kernels`."""
    return _encode(source, importance, out, False, _Q6_K, _Q6_K_SEARCH)


@njit(nogil=True, cache=True)
def q6_k_weighted(source, importance, sigma2, out):
    """Quantize to Q6_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, _Q6_K, _Q6_K_SEARCH)


@njit(nogil=True, cache=True)
def q3_k(source, importance, sigma2, out):
    """Quantize to Q3_K; see `kernels`."""
    return _encode(source, importance, out, False, _Q3_K, _Q3_K_ALONE)


@njit(nogil=True, cache=True)
def q3_k_weighted(source, importance, sigma2, out):
    """Quantize to Q3_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, _Q3_K, _Q3_K_BY_IMPORTANCE)
