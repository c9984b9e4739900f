"""The inner loops of GPTQ for a CPU, compiled by Numba: one group of columns, many rows.

Rows of a matrix do not depend on each other, so they are the SIMD lanes and all matrices here are
``(columns, rows)``, float32 and C-contiguous. `dus_edge.quant.gptq` says what is computed, and has
the same as tensor operations for other devices.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.simd import LANES, any_lane, f32, fma, greatest, least, load, nearest, store
from dus_edge.quant.simd import where as choose

#: Columns whose feedback is summed at once: their sums and one error stay in registers, and every
#: error that is loaded serves all of them.
_STRIP = 4


@njit(nogil=True, cache=True, error_model="numpy")
def solve_group(x, inverse, scales, zeros, codes, delta, cost, scale, zero, top, start, stop):
    """Quantize a group with error feedback, by the scale with which that goes best.

    Args:
        x: ``(n, rows)`` weights with the errors of all earlier columns made good; n is a multiple
            of 4.
        inverse: ``(n, n)`` lower-triangular; the last column is quantized first.
        scales, zeros: ``(candidates, rows)``.
        codes: ``(n, rows)`` uint8, set.
        delta: ``(n, rows)`` weights; what was stored is subtracted.
        cost: ``(rows,)``; the loss is added.
        scale, zero: ``(rows,)``, set to the candidate chosen.
        top: the largest code.
        start, stop: the rows to work on, a multiple of `LANES`.
    """
    n, n_rows = x.shape
    weights = x.reshape(-1)
    strips = np.empty((n // _STRIP, n, _STRIP), np.float32)
    for i in range(n // _STRIP):
        for j in range(n):
            for k in range(_STRIP):
                strips[i, j, k] = inverse[j, i * _STRIP + k]
    inverse_diagonal = np.empty(n, np.float32)
    for i in range(n):
        inverse_diagonal[i] = np.float32(1) / inverse[i, i]
    errors = np.empty(n * LANES, np.float32)
    found = np.empty(n * LANES, np.float32)
    n_candidates = len(scales)
    for row in range(start, stop, LANES):
        s = load(scales[0], row)
        z = load(zeros[0], row)
        if n_candidates > 1:
            best = f32(np.inf)
            for k in range(n_candidates):
                tried_s = load(scales[k], row)
                tried_z = load(zeros[k], row)
                total = _round(
                    weights, row, n_rows, strips, inverse_diagonal, tried_s, tried_z, top, best,
                    errors, found,
                )  # fmt: skip
                better = total < best
                s = choose(better, tried_s, s)
                z = choose(better, tried_z, z)
                best = least(total, best)
        total = _round(
            weights, row, n_rows, strips, inverse_diagonal, s, z, top, f32(np.inf), errors, found
        )
        store(cost, row, load(cost, row) + total)
        store(scale, row, s)
        store(zero, row, z)
        for i in range(n):
            q = load(found, i * LANES)
            store(delta[i], row, load(delta[i], row) - s * (q - z))
            for lane in range(LANES):
                codes[i, row + lane] = np.uint8(found[i * LANES + lane])


@njit(nogil=True)
def _round(x, row, stride, strips, inverse_diagonal, s, z, top, best, errors, found):
    """Quantize `LANES` rows and return their costs; stop early where none is below `best`."""
    n = len(inverse_diagonal)
    at = row + (n - 1) * stride
    total = f32(0)
    for first in range(n - _STRIP, -1, -_STRIP):
        strip = strips[first // _STRIP]
        a3 = load(x, at)
        a2 = load(x, at - stride)
        a1 = load(x, at - 2 * stride)
        a0 = load(x, at - 3 * stride)
        at -= 4 * stride
        for k in range(n - 1, first + 3, -1):
            e = load(errors, k * LANES)
            a3 = fma(f32(-strip[k, 3]), e, a3)
            a2 = fma(f32(-strip[k, 2]), e, a2)
            a1 = fma(f32(-strip[k, 1]), e, a1)
            a0 = fma(f32(-strip[k, 0]), e, a0)
        e3 = _step(a3, first + 3, inverse_diagonal, s, z, top, errors, found)
        a2 = fma(f32(-strip[first + 3, 2]), e3, a2)
        a1 = fma(f32(-strip[first + 3, 1]), e3, a1)
        a0 = fma(f32(-strip[first + 3, 0]), e3, a0)
        e2 = _step(a2, first + 2, inverse_diagonal, s, z, top, errors, found)
        a1 = fma(f32(-strip[first + 2, 1]), e2, a1)
        a0 = fma(f32(-strip[first + 2, 0]), e2, a0)
        e1 = _step(a1, first + 1, inverse_diagonal, s, z, top, errors, found)
        a0 = fma(f32(-strip[first + 1, 0]), e1, a0)
        e0 = _step(a0, first, inverse_diagonal, s, z, top, errors, found)
        total = fma(e3, e3, fma(e2, e2, fma(e1, e1, fma(e0, e0, total))))
        if not any_lane(total < best):
            break
    return total


@njit(nogil=True, inline="always")
def _step(x, i, inverse_diagonal, s, z, top, errors, found):
    """Round column `i`; its error, as later columns are told of it."""
    q = greatest(least(nearest(x / s) + z, f32(top)), f32(0))
    e = (x - s * (q - z)) * f32(inverse_diagonal[i])
    store(found, i * LANES, q)
    store(errors, i * LANES, e)
    return e


@njit(nogil=True, cache=True, error_model="numpy")
def choose_scales(x, weights, scales, zeros, scale, zero, top, start, stop):
    """The candidate with the least weighted squared error of a group, without feedback.

    Args:
        x: ``(n, rows)``.
        weights: ``(n,)``, how much an error in each column counts.
        scales, zeros: ``(candidates, rows)``.
        scale, zero: ``(rows,)``, set to the candidate chosen.
        top: the largest code.
        start, stop: the rows to work on, a multiple of `LANES`.
    """
    n, stride = x.shape
    values = x.reshape(-1)
    for row in range(start, stop, LANES):
        s = load(scales[0], row)
        z = load(zeros[0], row)
        best = f32(np.inf)
        for k in range(len(scales)):
            tried_s = load(scales[k], row)
            tried_z = load(zeros[k], row)
            total = f32(0)
            for i in range(n):
                y = load(values, row + i * stride)
                q = greatest(least(nearest(y / tried_s) + tried_z, f32(top)), f32(0))
                e = y - tried_s * (q - tried_z)
                total = fma(f32(weights[i]) * e, e, total)
            better = total < best
            s = choose(better, tried_s, s)
            z = choose(better, tried_z, z)
            best = least(total, best)
        store(scale, row, s)
        store(zero, row, z)
