"""Fit a scale (and a minimum) to the weights of one small block per lane.

Two models of a block of weights x with importances w:

- affine: x ≈ d·q − m with q in 0 … top and m ≥ 0;
- symmetric: x ≈ d·q with q in −n … n − 1.

Once q is chosen, the best d and m follow from a few sums (weighted least squares), and the error
of *any* d and m is a quadratic form in the same sums. So a candidate costs one pass over the
weights, not two, and choosing scales on a coarse grid afterwards costs no pass at all. ggml's
searches (make_qkx2_quants, make_qkx3_quants, make_qx_quants in ggml/src/ggml-quants.c) walk more
candidates and measure each with a second pass.

Scratch arrays are float32, position by position, `LANES` lanes each; `at` is where a block starts.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.simd import LANES, absolute, f32, fma, greatest, least, load, nearest, where

#: Weights below this are zero to every type: half the smallest float16 is 2.98e-8.
NOTHING = 1e-9
#: A determinant below this share of its terms is rounding noise: all q are one number.
_SINGULAR = 4e-6


@njit(nogil=True)
def clamp(v, low, high):
    """`v` in low … high; NaN becomes a bound."""
    return greatest(least(v, high), low)


@njit(nogil=True)
def inverse(v):
    """1 / v, and 0 for 0."""
    return where((v > f32(0)) | (f32(0) > v), f32(1) / v, f32(0))


@njit(nogil=True)
def affine_sums(x, w, at, n, scale, shift, top):
    """Sums for q = round(x · scale + shift): Σwq, Σwq², Σwqx."""
    s_q = f32(0)
    s_qq = f32(0)
    s_qx = f32(0)
    for k in range(n):
        v = load(x, at + k * LANES)
        q = clamp(nearest(fma(v, scale, shift)), f32(0), top)
        wq = load(w, at + k * LANES) * q
        s_q = s_q + wq
        s_qq = fma(wq, q, s_qq)
        s_qx = fma(wq, v, s_qx)
    return s_q, s_qq, s_qx


@njit(nogil=True)
def affine_best(s_w, s_x, s_q, s_qq, s_qx, floor):
    """Least-squares d and m > floor of these sums; where there are none, d alone and m = 0."""
    zero = f32(0)
    det = s_w * s_qq - s_q * s_q
    sound = det > f32(_SINGULAR) * s_w * s_qq
    r = inverse(det)
    d = (s_w * s_qx - s_x * s_q) * r
    m = (s_q * s_qx - s_qq * s_x) * r
    free = sound & (m > floor)
    return where(free, d, s_qx * inverse(s_qq)), where(free, m, zero)


@njit(nogil=True)
def affine_error(d, m, s_w, s_x, s_q, s_qq, s_qx):
    """Σw(x − d·q + m)² less the constant Σwx²."""
    two = f32(2)
    return d * (d * s_qq - two * (m * s_q + s_qx)) + m * (m * s_w + two * s_x)


@njit(nogil=True)
def affine_grid(x, w, at, n, top, floor, first, step, n_candidates):
    """The best d and m over scales (first + i · step) / (max − min).

    `floor` bounds m: 0 where no minimum above zero can be stored, else a large negative number.

    Returns:
        d, m and the sums of the winner: Σw, Σwx, Σwq, Σwq², Σwqx.
    """
    zero = f32(0)
    low = load(x, at)
    high = low
    s_w = zero
    s_x = zero
    for k in range(n):
        v = load(x, at + k * LANES)
        u = load(w, at + k * LANES)
        low = least(v, low)
        high = greatest(v, high)
        s_w = s_w + u
        s_x = fma(u, v, s_x)
    low = least(low, zero)
    span = high - low
    per = where(span > f32(NOTHING), f32(1) / span, zero)
    best = f32(3e38)
    # Where no candidate stands (no weight at all): from minimum to maximum, as ggml.
    d = where(span > f32(NOTHING), span / top, zero)
    m = zero - low
    b_q = zero
    b_qq = zero
    b_qx = zero
    for i in range(n_candidates):
        scale = f32(first + step * i) * per
        shift = (zero - low) * scale
        s_q = zero
        s_qq = zero
        s_qx = zero
        for k in range(n):
            v = load(x, at + k * LANES)
            # From the minimum on, q cannot be negative: one clamp is enough.
            q = least(nearest(fma(v, scale, shift)), top)
            wq = load(w, at + k * LANES) * q
            s_q = s_q + wq
            s_qq = fma(wq, q, s_qq)
            s_qx = fma(wq, v, s_qx)
        d_i, m_i = affine_best(s_w, s_x, s_q, s_qq, s_qx, floor)
        error = affine_error(d_i, m_i, s_w, s_x, s_q, s_qq, s_qx)
        better = (error < best) & (d_i > zero)
        best = where(better, error, best)
        d = where(better, d_i, d)
        m = where(better, m_i, m)
        b_q = where(better, s_q, b_q)
        b_qq = where(better, s_qq, b_qq)
        b_qx = where(better, s_qx, b_qx)
    return d, m, s_w, s_x, b_q, b_qq, b_qx


@njit(nogil=True)
def symmetric_sums(x, w, at, n, scale, low, high):
    """Sums for q = round(x · scale) in low … high: Σwq², Σwqx."""
    s_qq = f32(0)
    s_qx = f32(0)
    for k in range(n):
        v = load(x, at + k * LANES)
        q = clamp(nearest(v * scale), low, high)
        wq = load(w, at + k * LANES) * q
        s_qq = fma(wq, q, s_qq)
        s_qx = fma(wq, v, s_qx)
    return s_qq, s_qx


@njit(nogil=True)
def extreme(x, at, n):
    """The weight of the largest magnitude, with its sign."""
    found = load(x, at)
    for k in range(1, n):
        v = load(x, at + k * LANES)
        found = where(absolute(v) > absolute(found), v, found)
    return found


@njit(nogil=True)
def symmetric_grid(x, w, at, n, reach, first, step, n_candidates):
    """The best d over scales −(first + i · step) / extreme, q in −reach … reach − 1.

    Returns:
        d and the sums of the winner: Σwq², Σwqx.
    """
    zero = f32(0)
    top = extreme(x, at, n)
    some = absolute(top) > f32(NOTHING)
    per = where(some, f32(-1) / top, zero)
    low = zero - reach
    high = reach - f32(1)
    best = f32(-1)
    d = where(some, top / low, zero)
    b_qq = zero
    b_qx = zero
    for i in range(n_candidates):
        s_qq, s_qx = symmetric_sums(x, w, at, n, f32(first + step * i) * per, low, high)
        d_i = s_qx * inverse(s_qq)
        gain = s_qx * d_i
        better = (gain > best) & (s_qq > zero)
        best = where(better, gain, best)
        d = where(better, d_i, d)
        b_qq = where(better, s_qq, b_qq)
        b_qx = where(better, s_qx, b_qx)
    return d, b_qq, b_qx
