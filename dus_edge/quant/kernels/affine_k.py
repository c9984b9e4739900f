"""Q2_K, Q4_K and Q5_K: 256 weights as sub-blocks of x ≈ D·s·q − M·t, s and t on a small grid.

`LANES` super-blocks at once: search each sub-block's scale and minimum, choose D and M, put s and t
on their grid *jointly* (the error of every pair is known from the sums), quantize again with what
will be stored, and fit once more. ggml rounds scales and minima one by one and stops there, so it
needs a finer search for the same error.

Byte layouts: block_q2_K, block_q4_K, block_q5_K in ggml/src/ggml-common.h.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.kernels.fit import (
    affine_best,
    affine_error,
    affine_grid,
    affine_sums,
    clamp,
    inverse,
)
from dus_edge.quant.kernels.half import from_half, to_scale
from dus_edge.quant.kernels.superblock import (
    QK_K,
    emit_words,
    gather_blocks,
    pack_bits,
    pack_nibbles,
    weigh_importance,
    weigh_magnitude,
    weigh_spread,
)
from dus_edge.quant.simd import (
    LANES,
    any_lane,
    f32,
    fma,
    greatest,
    i32,
    least,
    load,
    nearest,
    store,
    to_f32,
    to_i32,
    where,
)

#: Spacings tried for a coarse grid: the largest scale on step 15 + these.
_TRIALS, _NEAREST, _APART = 8, -1.6, 0.4


@njit(nogil=True, inline="always")
def _encode(
    source,
    importance,
    out,
    weighted,
    n_sub,
    top,
    grid_top,
    first,
    step,
    n_candidates,
    rounds,
    sigma_factor,
    block_bytes,
):
    n = QK_K // n_sub
    n_blocks = source.size // QK_K
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(QK_K * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    # Per sub-block: scale, minimum, then the five sums of `fit`.
    found = np.empty((7, n_sub * LANES), np.float32)
    scales = np.empty(n_sub * LANES, np.int32)
    minima = np.empty(n_sub * LANES, np.int32)
    words = np.empty(block_bytes // 4 * LANES, np.int32)
    zero = f32(0)
    limit = f32(grid_top)
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
            sigma2 = sigma2 * f32(sigma_factor / QK_K)
        for j in range(n_sub):
            at = j * n * LANES
            if weighted:
                weigh_importance(importance, columns, x, w, j * n, n, sigma2)
            elif n_sub == 16:
                weigh_magnitude(x, w, at, n)
            else:
                weigh_spread(x, w, at, n)
            d, m, s_w, s_x, s_q, s_qq, s_qx = affine_grid(
                x, w, at, n, f32(top), zero, first, step, n_candidates
            )
            store(found[0], j * LANES, d)
            store(found[1], j * LANES, m)
            store(found[2], j * LANES, s_w)
            store(found[3], j * LANES, s_x)
            store(found[4], j * LANES, s_q)
            store(found[5], j * LANES, s_qq)
            store(found[6], j * LANES, s_qx)
        d_max = zero
        m_max = zero
        for j in range(n_sub):
            d_max = greatest(d_max, load(found[0], j * LANES))
            m_max = greatest(m_max, load(found[1], j * LANES))
        d_bits, d_over = to_scale(d_max / limit)
        m_bits, m_over = to_scale(m_max / limit)
        overflow |= any_lane(d_over | m_over)
        big_d = from_half(d_bits)
        big_m = from_half(m_bits)
        if n_sub == 16:
            # A grid of 16 steps is coarse enough for its spacing to matter: try several.
            best = _grid_error(found, n_sub, big_d, big_m, limit)
            for trial in range(_TRIALS):
                try_d = from_half(to_scale(d_max / (limit + f32(_NEAREST + _APART * trial)))[0])
                error = _grid_error(found, n_sub, try_d, big_m, limit)
                big_d = where(error < best, try_d, big_d)
                best = least(error, best)
            for trial in range(_TRIALS):
                try_m = from_half(to_scale(m_max / (limit + f32(_NEAREST + _APART * trial)))[0])
                error = _grid_error(found, n_sub, big_d, try_m, limit)
                big_m = where(error < best, try_m, big_m)
                best = least(error, best)
        for turn in range(rounds):
            per_d = inverse(big_d)
            per_m = inverse(big_m)
            # Normal equations of D and M for fixed s, t and q.
            n_dd = zero
            n_dm = zero
            n_mm = zero
            r_d = zero
            r_m = zero
            for j in range(n_sub):
                at = j * n * LANES
                d = load(found[0], j * LANES)
                m = load(found[1], j * LANES)
                s_w = load(found[2], j * LANES)
                s_x = load(found[3], j * LANES)
                s_q = load(found[4], j * LANES)
                s_qq = load(found[5], j * LANES)
                s_qx = load(found[6], j * LANES)
                if turn:
                    now_d = to_f32(load(scales, j * LANES)) * big_d
                    now_m = to_f32(load(minima, j * LANES)) * big_m
                    per = inverse(now_d)
                    s_q, s_qq, s_qx = affine_sums(x, w, at, n, per, now_m * per, f32(top))
                    d, m = affine_best(s_w, s_x, s_q, s_qq, s_qx, zero)
                s0 = clamp(nearest(d * per_d), zero, limit)
                t0 = clamp(nearest(m * per_m), zero, limit)
                s = s0
                t = t0
                error = affine_error(s * big_d, t * big_m, s_w, s_x, s_q, s_qq, s_qx)
                per_w = inverse(s_w)
                for k in range(3):
                    # The neighbours of s, each with the t that suits it best.
                    s_k = clamp(s0 + f32(k - 1), zero, limit)
                    t_k = clamp(nearest((s_k * big_d * s_q - s_x) * per_w * per_m), zero, limit)
                    error_k = affine_error(s_k * big_d, t_k * big_m, s_w, s_x, s_q, s_qq, s_qx)
                    better = error_k < error
                    error = where(better, error_k, error)
                    s = where(better, s_k, s)
                    t = where(better, t_k, t)
                n_dd = fma(s * s, s_qq, n_dd)
                n_dm = fma(s * t, s_q, n_dm)
                n_mm = fma(t * t, s_w, n_mm)
                r_d = fma(s, s_qx, r_d)
                r_m = fma(t, s_x, r_m)
                store(scales, j * LANES, to_i32(s))
                store(minima, j * LANES, to_i32(t))
            det = n_dd * n_mm - n_dm * n_dm
            per = inverse(det)
            d = (n_mm * r_d - n_dm * r_m) * per
            m = (n_dm * r_d - n_dd * r_m) * per
            # A fit far from what the search found is rounding noise.
            sound = (
                (det > f32(1e-5) * n_dd * n_mm)
                & (d > big_d * f32(0.8))
                & (m > big_m * f32(0.8))
                & (d < big_d * f32(1.25))
                & (m < big_m * f32(1.25))
            )
            d_bits, d_over = to_scale(where(sound, d, big_d))
            m_bits, m_over = to_scale(where(sound, m, big_m))
            overflow |= any_lane(d_over | m_over)
            big_d = from_half(d_bits)
            big_m = from_half(m_bits)
        for j in range(n_sub):
            at = j * n * LANES
            d = to_f32(load(scales, j * LANES)) * big_d
            m = to_f32(load(minima, j * LANES)) * big_m
            per = inverse(d)
            shift = m * per
            for k in range(n):
                v = nearest(fma(load(x, at + k * LANES), per, shift))
                store(q, at + k * LANES, to_i32(clamp(v, zero, f32(top))))
        if n_sub == 16:
            # scales, qs, d and dmin
            for g in range(4):
                word = i32(0)
                for b in range(4):
                    at = (4 * g + b) * LANES
                    byte = load(scales, at) | (load(minima, at) << i32(4))
                    word = word | (byte << i32(8 * b))
                store(words, g * LANES, word)
            pack_bits(q, words, 4, 2)
            store(words, 20 * LANES, d_bits | (m_bits << i32(16)))
        else:
            # d and dmin, scales, (qh,) qs
            store(words, 0, d_bits | (m_bits << i32(16)))
            _pack_scales(scales, minima, words)
            if top == 31:
                for g in range(8):
                    word = i32(0)
                    for b in range(4):
                        for j in range(8):
                            bit = load(q, (32 * j + 4 * g + b) * LANES) >> i32(4)
                            word = word | (bit << i32(8 * b + j))
                    store(words, (4 + g) * LANES, word)
                pack_nibbles(q, words, 12)
            else:
                pack_nibbles(q, words, 4)
        emit_words(words, starts, QK_K, out, block_bytes, 0, block_bytes // 4)
    return overflow


@njit(nogil=True)
def _grid_error(found, n_sub, big_d, big_m, limit):
    """Error of a super-block, by the sums, with its scales and minima on this grid."""
    zero = f32(0)
    per_d = inverse(big_d)
    per_m = inverse(big_m)
    total = zero
    for j in range(n_sub):
        s_w = load(found[2], j * LANES)
        s_x = load(found[3], j * LANES)
        s_q = load(found[4], j * LANES)
        s_qq = load(found[5], j * LANES)
        s_qx = load(found[6], j * LANES)
        d = clamp(nearest(load(found[0], j * LANES) * per_d), zero, limit) * big_d
        t = nearest((d * s_q - s_x) * inverse(s_w) * per_m)
        m = clamp(t, zero, limit) * big_m
        total = total + affine_error(d, m, s_w, s_x, s_q, s_qq, s_qx)
    return total


@njit(nogil=True)
def _pack_scales(scales, minima, words):
    """Eight 6-bit scales and minima in 12 bytes (get_scale_min_k4 reads them)."""
    low = i32(0)
    middle = i32(0)
    high = i32(0)
    for b in range(4):
        s = load(scales, b * LANES)
        t = load(minima, b * LANES)
        s_up = load(scales, (b + 4) * LANES)
        t_up = load(minima, (b + 4) * LANES)
        low = low | ((s | ((s_up >> i32(4)) << i32(6))) << i32(8 * b))
        middle = middle | ((t | ((t_up >> i32(4)) << i32(6))) << i32(8 * b))
        high = high | (((s_up & i32(15)) | ((t_up & i32(15)) << i32(4))) << i32(8 * b))
    store(words, LANES, low)
    store(words, 2 * LANES, middle)
    store(words, 3 * LANES, high)


@njit(nogil=True, cache=True)
def q4_k(source, importance, sigma2, out):
    """Quantize to Q4_K; see `kernels`."""
    return _encode(source, importance, out, False, 8, 15, 63, 13.0, 0.2, 15, 3, 2.0, 144)


@njit(nogil=True, cache=True)
def q4_k_weighted(source, importance, sigma2, out):
    """Quantize to Q4_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, 8, 15, 63, 13.0, 0.25, 14, 2, 2.0, 144)


@njit(nogil=True, cache=True)
def q5_k(source, importance, sigma2, out):
    """Quantize to Q5_K; see `kernels`."""
    return _encode(source, importance, out, False, 8, 31, 63, 29.0, 0.4, 10, 2, 2.0, 176)


@njit(nogil=True, cache=True)
def q5_k_weighted(source, importance, sigma2, out):
    """Quantize to Q5_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, 8, 31, 63, 28.5, 0.35, 14, 2, 2.0, 176)


@njit(nogil=True, cache=True)
def q2_k(source, importance, sigma2, out):
    """Quantize to Q2_K; see `kernels`."""
    return _encode(source, importance, out, False, 16, 3, 15, 1.8, 0.15, 14, 2, 1.0, 84)


@njit(nogil=True, cache=True)
def q2_k_weighted(source, importance, sigma2, out):
    """Quantize to Q2_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, 16, 3, 15, 1.8, 0.09, 26, 3, 1.0, 84)
