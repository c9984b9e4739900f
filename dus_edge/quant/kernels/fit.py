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

from typing import NamedTuple

from numba import njit

from dus_edge.quant.simd import LANES, absolute, f32, fma, greatest, least, load, nearest, where

#: Weights below this are zero to every type: half the smallest float16 is 2.98e-8.
NOTHING = 1e-9
#: A determinant below this share of its terms is rounding noise: all q are one number.
_SINGULAR = 4e-6


class Steps(NamedTuple):
    """The numbers first + i · step for i in 0 … n − 1."""

    first: float
    step: float
    n: int


class Search(NamedTuple):
    """How long to look for the scales of a type.

    Attributes:
        candidates: scales tried for a small block; the range of its weights on so many steps.
        polish: fit every candidate's d and m a second time.
        refits: times that the best candidate's scale is fitted again to the weights that it
            quantizes; symmetric blocks only.
        spacings: grids tried for the scales; the largest of them on this step.
        rounds: times that scales are put on their grid and the weights on those scales.
    """

    candidates: Steps
    polish: bool = False
    refits: int = 0
    spacings: Steps = Steps(0.0, 0.0, 0)
    rounds: int = 2


@njit(nogil=True)
def clamp(v, low, high):
    """`v` in low … high; NaN becomes a bound."""
    return greatest(least(v, high), low)


@njit(nogil=True)
def inverse(v):
    """1 / v, and 0 for 0."""
    return where((v > f32(0)) | (f32(0) > v), f32(1) / v, f32(0))


#: Sums of wq² up to here have no digits left to divide by: nothing that counts was quantized. The
#: mean of w is about one.
SLIGHT = 1e-30


class Sums(NamedTuple):
    """Weighted sums over a block, each a vector: Σw, Σwx, Σwq, Σwq², Σwqx."""

    w: object
    x: object
    q: object
    qq: object
    qx: object


@njit(nogil=True)
def affine_sums(x, w, at, n, scale, shift, top, s_w, s_x):
    """`Sums` for q = round(x · scale + shift); Σw and Σwx are given."""
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
    return Sums(s_w, s_x, s_q, s_qq, s_qx)


@njit(nogil=True)
def affine_best(s, floor):
    """Least-squares d and m > floor of these `Sums`; where there are none, d alone and m = 0."""
    zero = f32(0)
    det = s.w * s.qq - s.q * s.q
    sound = det > f32(_SINGULAR) * s.w * s.qq
    r = inverse(det)
    d = (s.w * s.qx - s.x * s.q) * r
    m = (s.q * s.qx - s.qq * s.x) * r
    free = sound & (m > floor)
    return where(free, d, s.qx * inverse(s.qq)), where(free, m, zero)


@njit(nogil=True)
def affine_error(d, m, s):
    """Σw(x − d·q + m)² less the constant Σwx², from `Sums`."""
    two = f32(2)
    return d * (d * s.qq - two * (m * s.q + s.qx)) + m * (m * s.w + two * s.x)


@njit(nogil=True)
def affine_grid(x, w, at, n, top, floor, candidates, polish):
    """The best d and m over scales `candidates` / (max − min).

    `floor` bounds m: 0 where no minimum above zero can be stored, else a large negative number.
    `polish` quantizes with every candidate's d and m and fits them again.

    Returns:
        d, m and the `Sums` of the winner.
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
    for i in range(candidates.n):
        scale = f32(candidates.first + candidates.step * i) * per
        shift = (zero - low) * scale
        for _ in range(2 if polish else 1):
            sums = affine_sums(x, w, at, n, scale, shift, top, s_w, s_x)
            d_i, m_i = affine_best(sums, floor)
            error = affine_error(d_i, m_i, sums)
            better = (error < best) & (d_i > zero)
            best = where(better, error, best)
            d = where(better, d_i, d)
            m = where(better, m_i, m)
            b_q = where(better, sums.q, b_q)
            b_qq = where(better, sums.qq, b_qq)
            b_qx = where(better, sums.qx, b_qx)
            scale = inverse(d_i)
            shift = m_i * scale
    return d, m, Sums(s_w, s_x, b_q, b_qq, b_qx)


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
def unbounded_sums(x, w, at, n, scale):
    """`symmetric_sums` where no x · scale rounds to anything outside."""
    s_qq = f32(0)
    s_qx = f32(0)
    for k in range(n):
        v = load(x, at + k * LANES)
        q = nearest(v * scale)
        wq = load(w, at + k * LANES) * q
        s_qq = fma(wq, q, s_qq)
        s_qx = fma(wq, v, s_qx)
    return s_qq, s_qx


@njit(nogil=True)
def topped_sums(x, w, at, n, scale, high):
    """`symmetric_sums` where no x · scale rounds to anything below."""
    s_qq = f32(0)
    s_qx = f32(0)
    for k in range(n):
        v = load(x, at + k * LANES)
        q = least(nearest(v * scale), high)
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
def better_scale(s_qq, s_qx, best, d, b_qq, b_qx):
    """The best gain so far, its d and its sums, or those of the candidate with these sums."""
    d_i = s_qx * inverse(s_qq)
    gain = s_qx * d_i
    better = (gain > best) & (s_qq > f32(SLIGHT))
    return (
        where(better, gain, best),
        where(better, d_i, d),
        where(better, s_qq, b_qq),
        where(better, s_qx, b_qx),
    )


@njit(nogil=True)
def symmetric_grid(x, w, at, n, reach, search):
    """The best d over scales −candidates / extreme, q in −reach … reach − 1.

    Returns:
        d and the sums of the winner: Σwq², Σwqx.
    """
    zero = f32(0)
    top = extreme(x, at, n)
    some = absolute(top) > f32(NOTHING)
    per = where(some, f32(-1) / top, zero)
    low = f32(-reach)
    high = f32(reach - 1)
    best = f32(-1)
    d = where(some, top / low, zero)
    b_qq = zero
    b_qx = zero
    for i in range(search.candidates.n):
        # No weight is further from zero than this, so it tells which ends can be met.
        furthest = search.candidates.first + search.candidates.step * i
        scale = f32(furthest) * per
        if furthest < reach - 0.51:
            s_qq, s_qx = unbounded_sums(x, w, at, n, scale)
        elif furthest < reach + 0.49:
            s_qq, s_qx = topped_sums(x, w, at, n, scale, high)
        else:
            s_qq, s_qx = symmetric_sums(x, w, at, n, scale, low, high)
        best, d, b_qq, b_qx = better_scale(s_qq, s_qx, best, d, b_qq, b_qx)
    for _ in range(search.refits):
        s_qq, s_qx = symmetric_sums(x, w, at, n, inverse(d), low, high)
        best, d, b_qq, b_qx = better_scale(s_qq, s_qx, best, d, b_qq, b_qx)
    return d, b_qq, b_qx
