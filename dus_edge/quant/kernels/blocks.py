"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights with a float16 scale (and minimum).

ggml searches these only under an importance matrix, and otherwise takes the extremes. Here a few
candidates are tried always, and the weights are quantized with the scale as it is *stored*.

Byte layouts: block_q4_0 … block_q8_0 in ggml/src/ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.kernels.fit import (
    NOTHING,
    Search,
    Steps,
    affine_grid,
    clamp,
    extreme,
    inverse,
    symmetric_grid,
)
from dus_edge.quant.kernels.half import from_half, to_scale
from dus_edge.quant.kernels.superblock import (
    columns_of,
    emit_half,
    emit_words,
    gather_blocks,
    weigh_importance,
    weigh_spread,
)
from dus_edge.quant.simd import (
    LANES,
    absolute,
    any_lane,
    as_i32,
    f32,
    fma,
    i32,
    least,
    load,
    nearest,
    store,
    to_i32,
    where,
)

#: Weights of a block.
QK = 32


@njit(nogil=True, inline="always")
def _weigh(importance, sigma2, weighted, n_cols, starts, columns, x, w):
    """Weights of one group: by importance, or as for Q4_K."""
    if weighted:
        columns_of(starts, n_cols, columns)
        rows = np.empty(LANES, np.float32)
        for lane in range(LANES):
            rows[lane] = sigma2[starts[lane] // n_cols]
        weigh_importance(importance, columns, x, w, 0, QK, load(rows, 0))
    else:
        weigh_spread(x, w, 0, QK)


@njit(nogil=True, inline="always")
def _encode_symmetric(source, importance, sigma2, out, weighted, bits, block_bytes, search):
    n_blocks = source.size // QK
    reach = 1 << (bits - 1)
    x = np.empty(QK * LANES, np.float32)
    w = np.empty(QK * LANES, np.float32)
    q = np.empty(QK * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    words = np.empty(5 * LANES, np.int32)
    scale = np.empty(LANES, np.int32)
    low = f32(-reach)
    high = f32(reach - 1)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK, starts, x)
        _weigh(importance, sigma2, weighted, importance.size, starts, columns, x, w)
        d, _, _ = symmetric_grid(x, w, 0, QK, reach, search)
        half, over = to_scale(d)
        overflow |= any_lane(over)
        store(scale, 0, half)
        per = inverse(from_half(half))
        # The offset that makes q unsigned, then from float to the low bits of an integer by adding
        # 1.5 · 2²³, which rounds as well.
        offset = f32(12582912.0 + reach)
        for k in range(QK):
            v = clamp(load(x, k * LANES) * per, low, high)
            store(q, k * LANES, as_i32(v + offset))
        emit_half(scale, starts, QK, out, block_bytes, 0)
        emit_quants(q, words, starts, out, block_bytes, 2, bits)
    return overflow


@njit(nogil=True, inline="always")
def _encode_affine(source, importance, sigma2, out, weighted, bits, block_bytes, search):
    n_blocks = source.size // QK
    x = np.empty(QK * LANES, np.float32)
    w = np.empty(QK * LANES, np.float32)
    q = np.empty(QK * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    words = np.empty(5 * LANES, np.int32)
    scale = np.empty(LANES, np.int32)
    minimum = np.empty(LANES, np.int32)
    top = f32((1 << bits) - 1)
    zero = f32(0)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK, starts, x)
        _weigh(importance, sigma2, weighted, importance.size, starts, columns, x, w)
        # Counted from the least weight, sums keep their digits however far the block is from zero.
        base = load(x, 0)
        for k in range(1, QK):
            base = least(load(x, k * LANES), base)
        for k in range(QK):
            store(x, k * LANES, load(x, k * LANES) - base)
        anywhere = f32(-3e38)
        d, m, _ = affine_grid(x, w, 0, QK, top, anywhere, search.candidates, search.polish)
        half, over = to_scale(d)
        overflow |= any_lane(over)
        store(scale, 0, half)
        per = inverse(from_half(half))
        half, over = to_scale(base - m)
        overflow |= any_lane(over)
        store(minimum, 0, half)
        shift = (base - from_half(half)) * per
        for k in range(QK):
            v = clamp(nearest(fma(load(x, k * LANES), per, shift)), zero, top)
            store(q, k * LANES, to_i32(v))
        emit_half(scale, starts, QK, out, block_bytes, 0)
        emit_half(minimum, starts, QK, out, block_bytes, 2)
        emit_quants(q, words, starts, out, block_bytes, 4, bits)
    return overflow


@njit(nogil=True)
def emit_quants(q, words, starts, out, block_bytes, skip, bits):
    """(qh,) qs of a block: weight k in the low nibble, k + 16 in the high one of byte k."""
    n_words = 4
    if bits == 5:
        word = i32(0)
        for k in range(QK):
            word = word | (((load(q, k * LANES) >> i32(4)) & i32(1)) << i32(k))
        store(words, 0, word)
        n_words = 5
    for g in range(4):
        word = i32(0)
        for b in range(4):
            low = load(q, (4 * g + b) * LANES) & i32(15)
            high = load(q, (16 + 4 * g + b) * LANES) & i32(15)
            word = word | ((low | (high << i32(4))) << i32(8 * b))
        store(words, (n_words - 4 + g) * LANES, word)
    emit_words(words, starts, QK, out, block_bytes, skip, n_words)


#: Steps from 0 to the largest weight. Down to 124 by halves: every whole number that the largest
#: code can become is among them, so what was Q8_0 before keeps its scales.
_Q8_0 = Steps(127.5, -0.5, 8)


@njit(nogil=True, inline="always")
def _scale_q8_0(x, peak):
    """The float16 scale of least error among `_Q8_0`'s, as bits; and which are too large."""
    reach = f32(127)
    kept, over = to_scale(peak / reach)
    least_error = f32(3e38)
    for i in range(_Q8_0.n):
        half, _ = to_scale(peak / f32(_Q8_0.first + i * _Q8_0.step))
        d = from_half(half)
        per = inverse(d)
        error = f32(0)
        for k in range(QK):
            v = load(x, k * LANES) * per
            rest = v - clamp(nearest(v), f32(0) - reach, reach)
            error = fma(rest, rest, error)
        error = error * d * d
        better = least_error > error
        least_error = where(better, error, least_error)
        kept = where(better, half, kept)
    return kept, over


@njit(nogil=True, cache=True)
def q8_0(source, importance, sigma2, out):
    """Quantize to Q8_0; see `kernels`. ggml takes the largest weight on 127 (quantize_row_q8_0)."""
    n_blocks = source.size // QK
    x = np.empty(QK * LANES, np.float32)
    starts = np.empty(LANES, np.int64)
    words = np.empty(8 * LANES, np.int32)
    scale = np.empty(LANES, np.int32)
    reach = f32(127)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK, starts, x)
        peak = absolute(extreme(x, 0, QK))
        half, over = _scale_q8_0(x, where(peak > f32(NOTHING), peak, f32(0)))
        overflow |= any_lane(over)
        store(scale, 0, half)
        per = inverse(from_half(half))
        for g in range(8):
            word = i32(0)
            for b in range(4):
                v = nearest(load(x, (4 * g + b) * LANES) * per)
                byte = to_i32(clamp(v, f32(0) - reach, reach)) & i32(255)
                word = word | (byte << i32(8 * b))
            store(words, g * LANES, word)
        emit_half(scale, starts, QK, out, 34, 0)
        emit_words(words, starts, QK, out, 34, 2, 8)
    return overflow


_Q4_0 = Search(Steps(7.8, 0.6, 2))


@njit(nogil=True, cache=True)
def q4_0(source, importance, sigma2, out):
    """Quantize to Q4_0; see `kernels`."""
    return _encode_symmetric(source, importance, sigma2, out, False, 4, 18, _Q4_0)


_Q4_0_WEIGHTED = Search(Steps(7.0, 0.15, 15))


@njit(nogil=True, cache=True)
def q4_0_weighted(source, importance, sigma2, out):
    """Quantize to Q4_0 by importance; see `kernels`."""
    return _encode_symmetric(source, importance, sigma2, out, True, 4, 18, _Q4_0_WEIGHTED)


_Q5_0 = Search(Steps(15.4, 0.5, 4))


@njit(nogil=True, cache=True)
def q5_0(source, importance, sigma2, out):
    """Quantize to Q5_0; see `kernels`."""
    return _encode_symmetric(source, importance, sigma2, out, False, 5, 22, _Q5_0)


_Q5_0_WEIGHTED = Search(Steps(14.8, 0.15, 16))


@njit(nogil=True, cache=True)
def q5_0_weighted(source, importance, sigma2, out):
    """Quantize to Q5_0 by importance; see `kernels`."""
    return _encode_symmetric(source, importance, sigma2, out, True, 5, 22, _Q5_0_WEIGHTED)


_Q4_1 = Search(Steps(14.6, 0.5, 3))


@njit(nogil=True, cache=True)
def q4_1(source, importance, sigma2, out):
    """Quantize to Q4_1; see `kernels`."""
    return _encode_affine(source, importance, sigma2, out, False, 4, 20, _Q4_1)


_Q4_1_WEIGHTED = Search(Steps(13.6, 0.18, 14), polish=True)


@njit(nogil=True, cache=True)
def q4_1_weighted(source, importance, sigma2, out):
    """Quantize to Q4_1 by importance; see `kernels`."""
    return _encode_affine(source, importance, sigma2, out, True, 4, 20, _Q4_1_WEIGHTED)


_Q5_1 = Search(Steps(30.4, 0.6, 3))


@njit(nogil=True, cache=True)
def q5_1(source, importance, sigma2, out):
    """Quantize to Q5_1; see `kernels`."""
    return _encode_affine(source, importance, sigma2, out, False, 5, 24, _Q5_1)


_Q5_1_WEIGHTED = Search(Steps(29.0, 0.4, 9), polish=True)


@njit(nogil=True, cache=True)
def q5_1_weighted(source, importance, sigma2, out):
    """Quantize to Q5_1 by importance; see `kernels`."""
    return _encode_affine(source, importance, sigma2, out, True, 5, 24, _Q5_1_WEIGHTED)
