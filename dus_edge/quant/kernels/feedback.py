"""Codes of a block's columns with error feedback, for scales that are given: rows in SIMD lanes.

The inner loop of `dus_edge.quant.feedback.solve`, which says what is computed. As in
`dus_edge.quant.gptq_kernel` rows do not depend on each other, and all matrices are
``(columns, rows)``; here d and m differ by parts of the block.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.kernels.fit import clamp, inverse
from dus_edge.quant.kernels.nonlinear import nearest_index, value_at
from dus_edge.quant.simd import LANES, f32, fma, load, nearest, store

#: Columns whose feedback is summed at once: their sums and one error stay in registers, and every
#: error that is loaded serves all of them.
_STRIP = 4


@njit(nogil=True, cache=True, error_model="numpy")
def feed_block(x, factor, part, scale, minimum, top, curved, codes, cost):
    """Choose the codes of a block, the last column first.

    Args:
        x: ``(n, rows)`` float32 weights with the errors of all earlier blocks made good; n is a
            multiple of 4, rows one of `LANES`.
        factor: ``(n, n)`` float32, inverse of the block's Cholesky factor, lower-triangular.
        part: ``(n,)`` int64, which scale each column has.
        scale, minimum: ``(parts, rows)`` float32: a weight is stored as scale · code − minimum.
        top: the largest code.
        curved: whether a code stands for its value of `nonlinear` in place of itself.
        codes: ``(n, rows)`` uint8, set.
        cost: ``(rows,)`` float32, set to the loss.
    """
    n, n_rows = x.shape
    weights = x.reshape(-1)
    strips = np.empty((n // _STRIP, n, _STRIP), np.float32)
    for i in range(n // _STRIP):
        for j in range(n):
            for k in range(_STRIP):
                strips[i, j, k] = factor[j, i * _STRIP + k]
    size = np.empty(n, np.float32)
    for i in range(n):
        size[i] = np.float32(1) / factor[i, i]
    errors = np.empty(n * LANES, np.float32)
    found = np.empty(n * LANES, np.float32)
    n_parts = len(scale)
    grid = np.empty((3, n_parts * LANES), np.float32)
    for row in range(0, n_rows, LANES):
        for j in range(n_parts):
            s = load(scale[j], row)
            store(grid[0], j * LANES, s)
            store(grid[1], j * LANES, load(minimum[j], row))
            store(grid[2], j * LANES, inverse(s))
        lost = _feed(weights, row, n_rows, strips, size, part, grid, top, curved, errors, found)
        store(cost, row, lost)
        for i in range(n):
            for lane in range(LANES):
                codes[i, row + lane] = np.uint8(found[i * LANES + lane])


@njit(nogil=True)
def _feed(x, row, stride, strips, size, part, grid, top, curved, errors, found):
    """Quantize `LANES` rows and return their costs."""
    n = len(size)
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
        e3 = _step(a3, first + 3, size, part, grid, top, curved, errors, found)
        a2 = fma(f32(-strip[first + 3, 2]), e3, a2)
        a1 = fma(f32(-strip[first + 3, 1]), e3, a1)
        a0 = fma(f32(-strip[first + 3, 0]), e3, a0)
        e2 = _step(a2, first + 2, size, part, grid, top, curved, errors, found)
        a1 = fma(f32(-strip[first + 2, 1]), e2, a1)
        a0 = fma(f32(-strip[first + 2, 0]), e2, a0)
        e1 = _step(a1, first + 1, size, part, grid, top, curved, errors, found)
        a0 = fma(f32(-strip[first + 1, 0]), e1, a0)
        e0 = _step(a0, first, size, part, grid, top, curved, errors, found)
        total = fma(e3, e3, fma(e2, e2, fma(e1, e1, fma(e0, e0, total))))
    return total


@njit(nogil=True, inline="always")
def _step(x, i, size, part, grid, top, curved, errors, found):
    """Round column `i`; its error, as later columns are told of it."""
    at = part[i] * LANES
    s = load(grid[0], at)
    m = load(grid[1], at)
    y = (x + m) * load(grid[2], at)
    if curved:
        q = nearest_index(y)
        v = value_at(q - f32(8))
    else:
        q = clamp(nearest(y), f32(0), f32(top))
        v = q
    e = (x - (s * v - m)) * f32(size[i])
    store(found, i * LANES, q)
    store(errors, i * LANES, e)
    return e
