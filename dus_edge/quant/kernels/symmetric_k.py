"""Q3_K and Q6_K: 256 weights as 16 sub-blocks of x ≈ D·s·q, q and s signed.

Like `affine_k`, without minima: the sums tell each sub-block's best s for a given D, the weights
are quantized again with what will be stored, and D is fitted to that.

Byte layouts: block_q3_K, block_q6_K in ggml/src/ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.kernels.fit import (
    clamp,
    inverse,
    symmetric_grid,
    symmetric_sums,
)
from dus_edge.quant.kernels.half import from_half, to_scale
from dus_edge.quant.kernels.superblock import (
    QK_K,
    emit_half,
    emit_words,
    gather_blocks,
    pack_bits,
    weigh_importance,
    weigh_importance_alone,
    weigh_spread,
)
from dus_edge.quant.simd import (
    LANES,
    absolute,
    any_lane,
    f32,
    fma,
    i32,
    least,
    load,
    nearest,
    store,
    to_f32,
    to_i32,
    where,
)

_N_SUB = 16
_N = QK_K // _N_SUB
#: Spacings tried for a coarse grid: the largest scale on step -32 - these.
_TRIALS, _NEAREST, _APART = 10, -2.0, 0.4


@njit(nogil=True, inline="always")
def _encode(
    source,
    importance,
    out,
    weighted,
    reach,
    grid_reach,
    first,
    step,
    n_candidates,
    rounds,
    block_bytes,
):
    n_blocks = source.size // QK_K
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(QK_K * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    # Per sub-block: scale, Σwq², Σwqx.
    found = np.empty((3, _N_SUB * LANES), np.float32)
    scales = np.empty(_N_SUB * LANES, np.int32)
    words = np.empty(block_bytes // 4 * LANES, np.int32)
    last = np.empty(LANES, np.int32)
    zero = f32(0)
    low = f32(-reach)
    high = f32(reach - 1)
    grid_low = f32(-grid_reach)
    grid_high = f32(grid_reach - 1)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK_K, starts, x)
        sigma2 = zero
        if weighted:
            for lane in range(LANES):
                columns[lane] = starts[lane] % importance.size
            for k in range(QK_K):
                v = load(x, k * LANES)
                sigma2 = fma(v, v, sigma2)
            sigma2 = sigma2 * f32(2.0 / QK_K)
        peak = zero
        for j in range(_N_SUB):
            at = j * _N * LANES
            if not weighted:
                weigh_spread(x, w, at, _N)
            elif reach == 32:
                weigh_importance_alone(importance, columns, w, j * _N, _N)
            else:
                weigh_importance(importance, columns, x, w, j * _N, _N, sigma2)
            d, s_qq, s_qx = symmetric_grid(x, w, at, _N, f32(reach), first, step, n_candidates)
            store(found[0], j * LANES, d)
            store(found[1], j * LANES, s_qq)
            store(found[2], j * LANES, s_qx)
            peak = where(absolute(d) > absolute(peak), d, peak)
        # The grid reaches one further below zero: that end for the largest scale.
        bits, over = to_scale(peak / grid_low)
        overflow |= any_lane(over)
        big = from_half(bits)
        if reach == 4:
            # A grid of 64 steps is coarse enough for its spacing to matter: try several.
            best = _grid_error(found, big, grid_low, grid_high)
            for trial in range(_TRIALS):
                end = grid_low - f32(_NEAREST + _APART * trial)
                spacing = from_half(to_scale(peak / end)[0])
                error = _grid_error(found, spacing, grid_low, grid_high)
                big = where(error < best, spacing, big)
                best = least(error, best)
        for turn in range(rounds):
            per = inverse(big)
            n_dd = zero
            r_d = zero
            for j in range(_N_SUB):
                d = load(found[0], j * LANES)
                s_qq = load(found[1], j * LANES)
                s_qx = load(found[2], j * LANES)
                if turn:
                    at = j * _N * LANES
                    now = inverse(to_f32(load(scales, j * LANES)) * big)
                    s_qq, s_qx = symmetric_sums(x, w, at, _N, now, low, high)
                    d = where(s_qq > zero, s_qx * inverse(s_qq), d)
                s = clamp(nearest(d * per), grid_low, grid_high)
                # 0 never beats the smallest step: every weight may still choose q = 0.
                least_step = where(d * per < zero, f32(-1), f32(1))
                s = where(absolute(s) > zero, s, least_step)
                n_dd = fma(s * s, s_qq, n_dd)
                r_d = fma(s, s_qx, r_d)
                store(scales, j * LANES, to_i32(s))
            d = r_d * inverse(n_dd)
            # A fit far from what the search found is rounding noise.
            sound = (absolute(d) > absolute(big) * f32(0.8)) & (
                absolute(big) * f32(1.25) > absolute(d)
            )
            bits, over = to_scale(where(sound, d, big))
            overflow |= any_lane(over)
            big = from_half(bits)
        for j in range(_N_SUB):
            at = j * _N * LANES
            per = inverse(to_f32(load(scales, j * LANES)) * big)
            for k in range(_N):
                v = clamp(nearest(load(x, at + k * LANES) * per), low, high)
                store(q, at + k * LANES, to_i32(v) + i32(reach))
        if reach == 32:
            # ql, qh, scales, d
            _pack_low(q, words)
            for k in range(QK_K):
                store(q, k * LANES, load(q, k * LANES) >> i32(4))
            pack_bits(q, words, 32, 2)
            for g in range(4):
                word = i32(0)
                for b in range(4):
                    byte = load(scales, (4 * g + b) * LANES) & i32(255)
                    word = word | (byte << i32(8 * b))
                store(words, (48 + g) * LANES, word)
        else:
            # hmask, qs, scales, d
            for g in range(8):
                word = i32(0)
                for b in range(4):
                    for j in range(8):
                        bit = load(q, (32 * j + 4 * g + b) * LANES) >> i32(2)
                        word = word | (bit << i32(8 * b + j))
                store(words, g * LANES, word)
            pack_bits(q, words, 8, 2)
            _pack_scales(scales, words)
        store(last, 0, bits)
        emit_words(words, starts, QK_K, out, block_bytes, 0, block_bytes // 4)
        emit_half(last, starts, QK_K, out, block_bytes, block_bytes - 2)
    return overflow


@njit(nogil=True)
def _grid_error(found, big, grid_low, grid_high):
    """Error of a super-block, by the sums, with its scales on this grid."""
    per = inverse(big)
    total = f32(0)
    for j in range(_N_SUB):
        d = clamp(nearest(load(found[0], j * LANES) * per), grid_low, grid_high) * big
        total = total + d * (d * load(found[1], j * LANES) - f32(2) * load(found[2], j * LANES))
    return total


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


@njit(nogil=True, cache=True)
def q6_k(source, importance, sigma2, out):
    """Quantize to Q6_K; see `kernels`."""
    return _encode(source, importance, out, False, 32, 128, 30.5, 0.35, 9, 2, 210)


@njit(nogil=True, cache=True)
def q6_k_weighted(source, importance, sigma2, out):
    """Quantize to Q6_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, 32, 128, 30.5, 0.35, 9, 2, 210)


@njit(nogil=True, cache=True)
def q3_k(source, importance, sigma2, out):
    """Quantize to Q3_K; see `kernels`."""
    return _encode(source, importance, out, False, 4, 32, 3.0, 0.2, 10, 2, 110)


@njit(nogil=True, cache=True)
def q3_k_weighted(source, importance, sigma2, out):
    """Quantize to Q3_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, 4, 32, 2.8, 0.08, 28, 3, 110)
