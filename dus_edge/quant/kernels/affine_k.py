"""Q2_K, Q4_K and Q5_K: 256 weights as sub-blocks of x ≈ D·s·q − M·t, s and t on a small grid.

`LANES` super-blocks at once: search each sub-block's scale and minimum, choose D and M, put s and t
on their grid *jointly* (the error of every pair is known from the sums), quantize again with what
will be stored, and fit once more. ggml rounds scales and minima one by one and stops there, so it
needs a finer search for the same error.

Byte layouts: block_q2_K, block_q4_K, block_q5_K in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from dus_edge.quant.kernels.fit import (
    Search,
    Steps,
    Sums,
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
    columns_of,
    emit_words,
    gather_blocks,
    mean_square,
    pack_bytes,
    pack_nibbles,
    pack_pairs,
    pack_plane,
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


class _Layout(NamedTuple):
    """What a type stores: sub-blocks, the largest q, the largest s and t, bytes of a block."""

    n_sub: int
    top: int
    limit: int
    block_bytes: int


@njit(nogil=True, inline="always")
def _encode(source, importance, out, weighted, layout, search):
    n_sub = layout.n_sub
    n_blocks = source.size // QK_K
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(QK_K * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    # Of each sub-block: scale, minimum and its `Sums`.
    found = np.empty((7, n_sub * LANES), np.float32)
    scales = np.empty(n_sub * LANES, np.int32)
    minima = np.empty(n_sub * LANES, np.int32)
    words = np.empty(layout.block_bytes // 4 * LANES, np.int32)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK_K, starts, x)
        sigma2 = f32(0)
        if weighted:
            columns_of(starts, importance.size, columns)
            sigma2 = mean_square(x, QK_K) * f32(2)
        _search(x, w, importance, columns, sigma2, weighted, layout, search, found)
        d_bits, m_bits, over = _spaced(found, layout, search)
        overflow |= any_lane(over)
        for turn in range(search.rounds):
            if turn:
                _requantize(x, w, scales, minima, d_bits, m_bits, layout, found)
            d_bits, m_bits, over = _settle(found, layout, d_bits, m_bits, scales, minima)
            overflow |= any_lane(over)
        _quantize(x, scales, minima, d_bits, m_bits, layout, q)
        head = d_bits | (m_bits << i32(16))
        if n_sub == 16:
            # scales, qs, d and dmin
            for at in range(0, n_sub * LANES, LANES):
                store(scales, at, load(scales, at) | (load(minima, at) << i32(4)))
            pack_bytes(scales, words, 0, 4)
            pack_pairs(q, words, 4, 0)
            store(words, 20 * LANES, head)
        else:
            # d and dmin, scales, (qh,) qs
            store(words, 0, head)
            _pack_scales(scales, minima, words)
            if layout.top == 31:
                pack_plane(q, words, 4, 4)
                pack_nibbles(q, words, 12)
            else:
                pack_nibbles(q, words, 4)
        emit_words(words, starts, QK_K, out, layout.block_bytes, 0, layout.block_bytes // 4)
    return overflow


@njit(nogil=True, inline="always")
def _search(x, w, importance, columns, sigma2, weighted, layout, search, found):
    """Weigh every sub-block and find its scale and minimum, each as good as can be alone."""
    n = QK_K // layout.n_sub
    for j in range(layout.n_sub):
        at = j * n * LANES
        if weighted:
            weigh_importance(importance, columns, x, w, j * n, n, sigma2)
        elif layout.n_sub == 16:
            weigh_magnitude(x, w, at, n)
        else:
            weigh_spread(x, w, at, n)
        d, m, sums = affine_grid(
            x, w, at, n, f32(layout.top), f32(0), search.candidates, search.polish
        )
        _keep(found, j, d, m, sums)


@njit(nogil=True)
def _keep(found, j, d, m, sums):
    """Note sub-block `j`'s scale, minimum and sums."""
    at = j * LANES
    store(found[0], at, d)
    store(found[1], at, m)
    store(found[2], at, sums.w)
    store(found[3], at, sums.x)
    store(found[4], at, sums.q)
    store(found[5], at, sums.qq)
    store(found[6], at, sums.qx)


@njit(nogil=True)
def _kept(found, j):
    """Sub-block `j`'s scale, minimum and sums."""
    at = j * LANES
    sums = Sums(
        load(found[2], at),
        load(found[3], at),
        load(found[4], at),
        load(found[5], at),
        load(found[6], at),
    )
    return load(found[0], at), load(found[1], at), sums


@njit(nogil=True, inline="always")
def _spaced(found, layout, search):
    """D and M as float16 bits, and which overflowed.

    The largest scale need not take the last step of its grid: where another spacing lets the
    smaller ones fall better, the whole super-block gains.
    """
    limit = f32(layout.limit)
    d_max = f32(0)
    m_max = f32(0)
    for j in range(layout.n_sub):
        d_max = greatest(d_max, load(found[0], j * LANES))
        m_max = greatest(m_max, load(found[1], j * LANES))
    d_bits, d_over = to_scale(d_max / limit)
    m_bits, m_over = to_scale(m_max / limit)
    if search.spacings.n:
        best = _grid_error(found, layout, d_bits, m_bits)
        for i in range(search.spacings.n):
            steps = f32(search.spacings.first + search.spacings.step * i)
            bits, _ = to_scale(d_max / steps)
            error = _grid_error(found, layout, bits, m_bits)
            d_bits = where(error < best, bits, d_bits)
            best = least(error, best)
        for i in range(search.spacings.n):
            steps = f32(search.spacings.first + search.spacings.step * i)
            bits, _ = to_scale(m_max / steps)
            error = _grid_error(found, layout, d_bits, bits)
            m_bits = where(error < best, bits, m_bits)
            best = least(error, best)
    return d_bits, m_bits, d_over | m_over


@njit(nogil=True)
def _grid_error(found, layout, d_bits, m_bits):
    """Error of a super-block, by the sums, with its scales and minima on this grid."""
    zero = f32(0)
    limit = f32(layout.limit)
    big_d = from_half(d_bits)
    big_m = from_half(m_bits)
    per_d = inverse(big_d)
    per_m = inverse(big_m)
    total = zero
    for j in range(layout.n_sub):
        d, _, sums = _kept(found, j)
        d = clamp(nearest(d * per_d), zero, limit) * big_d
        t = nearest((d * sums.q - sums.x) * inverse(sums.w) * per_m)
        total = total + affine_error(d, clamp(t, zero, limit) * big_m, sums)
    return total


@njit(nogil=True)
def _requantize(x, w, scales, minima, d_bits, m_bits, layout, found):
    """Every sub-block's sums and best scale for the weights quantized with what is stored."""
    n = QK_K // layout.n_sub
    big_d = from_half(d_bits)
    big_m = from_half(m_bits)
    for j in range(layout.n_sub):
        _, _, sums = _kept(found, j)
        per = inverse(to_f32(load(scales, j * LANES)) * big_d)
        shift = to_f32(load(minima, j * LANES)) * big_m * per
        sums = affine_sums(x, w, j * n * LANES, n, per, shift, f32(layout.top), sums.w, sums.x)
        d, m = affine_best(sums, f32(0))
        _keep(found, j, d, m, sums)


@njit(nogil=True)
def _settle(found, layout, d_bits, m_bits, scales, minima):
    """Put scales and minima on the grid of D and M, then fit D and M to them.

    Returns:
        the new D and M as float16 bits, and which overflowed.
    """
    zero = f32(0)
    limit = f32(layout.limit)
    big_d = from_half(d_bits)
    big_m = from_half(m_bits)
    per_d = inverse(big_d)
    per_m = inverse(big_m)
    # Normal equations of D and M for fixed s, t and q.
    n_dd = zero
    n_dm = zero
    n_mm = zero
    r_d = zero
    r_m = zero
    for j in range(layout.n_sub):
        d, m, sums = _kept(found, j)
        s0 = clamp(nearest(d * per_d), zero, limit)
        s = s0
        t = clamp(nearest(m * per_m), zero, limit)
        error = affine_error(s * big_d, t * big_m, sums)
        per_w = inverse(sums.w)
        for k in range(3):
            # The neighbours of s, each with the t that suits it best.
            s_k = clamp(s0 + f32(k - 1), zero, limit)
            t_k = nearest((s_k * big_d * sums.q - sums.x) * per_w * per_m)
            t_k = clamp(t_k, zero, limit)
            error_k = affine_error(s_k * big_d, t_k * big_m, sums)
            better = error_k < error
            error = where(better, error_k, error)
            s = where(better, s_k, s)
            t = where(better, t_k, t)
        n_dd = fma(s * s, sums.qq, n_dd)
        n_dm = fma(s * t, sums.q, n_dm)
        n_mm = fma(t * t, sums.w, n_mm)
        r_d = fma(s, sums.qx, r_d)
        r_m = fma(t, sums.x, r_m)
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
    return d_bits, m_bits, d_over | m_over


@njit(nogil=True)
def _quantize(x, scales, minima, d_bits, m_bits, layout, q):
    """q = round(x / (D·s) + M·t / (D·s)) of all weights."""
    n = QK_K // layout.n_sub
    big_d = from_half(d_bits)
    big_m = from_half(m_bits)
    for j in range(layout.n_sub):
        per = inverse(to_f32(load(scales, j * LANES)) * big_d)
        shift = to_f32(load(minima, j * LANES)) * big_m * per
        for k in range(j * n * LANES, (j + 1) * n * LANES, LANES):
            v = nearest(fma(load(x, k), per, shift))
            store(q, k, to_i32(clamp(v, f32(0), f32(layout.top))))


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


#              sub-blocks, top, limit, bytes
_Q4_K = _Layout(8, 15, 63, 144)
_Q5_K = _Layout(8, 31, 63, 176)
_Q2_K = _Layout(16, 3, 15, 84)

#: Where the largest scale may fall on a grid of 15 or of 63 steps.
_COARSE = Steps(13.4, 0.4, 8)
_FINE = Steps(45.0, 1.8, 11)

_Q4_K_ALONE = Search(Steps(13.0, 0.2, 15), spacings=_FINE, rounds=3)
_Q4_K_BY_IMPORTANCE = Search(Steps(13.2, 0.35, 9), True, _FINE)
_Q5_K_ALONE = Search(Steps(29.0, 0.4, 10), spacings=_FINE)
_Q5_K_BY_IMPORTANCE = Search(Steps(28.8, 0.5, 9), True, _FINE)
_Q2_K_ALONE = Search(Steps(1.8, 0.15, 14), spacings=_COARSE)
_Q2_K_BY_IMPORTANCE = Search(Steps(1.8, 0.15, 16), True, _COARSE, rounds=3)


@njit(nogil=True, cache=True)
def q4_k(source, importance, sigma2, out):
    """Quantize to Q4_K; see `kernels`."""
    return _encode(source, importance, out, False, _Q4_K, _Q4_K_ALONE)


@njit(nogil=True, cache=True)
def q4_k_weighted(source, importance, sigma2, out):
    """Quantize to Q4_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, _Q4_K, _Q4_K_BY_IMPORTANCE)


@njit(nogil=True, cache=True)
def q5_k(source, importance, sigma2, out):
    """Quantize to Q5_K; see `kernels`."""
    return _encode(source, importance, out, False, _Q5_K, _Q5_K_ALONE)


@njit(nogil=True, cache=True)
def q5_k_weighted(source, importance, sigma2, out):
    """Quantize to Q5_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, _Q5_K, _Q5_K_BY_IMPORTANCE)


@njit(nogil=True, cache=True)
def q2_k(source, importance, sigma2, out):
    """Quantize to Q2_K; see `kernels`."""
    return _encode(source, importance, out, False, _Q2_K, _Q2_K_ALONE)


@njit(nogil=True, cache=True)
def q2_k_weighted(source, importance, sigma2, out):
    """Quantize to Q2_K by importance; see `kernels`."""
    return _encode(source, importance, out, True, _Q2_K, _Q2_K_BY_IMPORTANCE)
