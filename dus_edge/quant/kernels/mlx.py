"""MLX's affine codes: group by group in float32, exactly as MLX's own CPU code computes them.

Each operation is one of IEEE 754 and in MLX's order (`quantize` in mlx/backend/cpu/quantized.cpp),
so the bytes are the same. Codes are taken by the scale as it is computed, before it is rounded to
what is stored, as MLX takes them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.simd import (
    LANES,
    f32,
    greatest,
    least,
    load,
    load_bf16,
    nearest,
    store,
    to_i32,
)

#: Codes that fill whole bytes whatever their bits are.
_UNIT = 8
#: The least absolute scale.
_LEAST_SCALE = np.float32(1e-7)


@njit(nogil=True, inline="always")
def _encode(source, bits, group, out, scales, biases, narrow):
    n_groups = source.size // group
    x = np.empty(group, np.float32)
    q = np.empty(group, np.int32)
    ends = np.empty(2 * LANES, np.float32)
    top = np.float32((1 << bits) - 1)
    byte = 0
    for g in range(n_groups):
        low = f32(np.inf)
        high = f32(-np.inf)
        for k in range(0, group, LANES):
            at = g * group + k
            v = load_bf16(source, at) if narrow else load(source, at)
            store(x, k, v)
            low = least(v, low)
            high = greatest(v, high)
        store(ends, 0, low)
        store(ends, LANES, high)
        smallest = ends[0]
        largest = ends[LANES]
        for lane in range(1, LANES):
            smallest = min(smallest, ends[lane])
            largest = max(largest, ends[LANES + lane])
        scale, bias = _scale_and_bias(smallest, largest, top)
        scales[g] = scale
        biases[g] = bias
        for k in range(0, group, LANES):
            v = nearest((load(x, k) - f32(bias)) / f32(scale))
            store(q, k, to_i32(least(greatest(v, f32(0)), f32(top))))
        for k in range(0, group, _UNIT):
            word = np.uint64(0)
            for i in range(_UNIT):
                word |= np.uint64(q[k + i]) << np.uint64(bits * i)
            for _ in range(bits):
                out[byte] = np.uint8(word & np.uint64(255))
                word >>= np.uint64(8)
                byte += 1


@njit(nogil=True, error_model="numpy")
def _scale_and_bias(smallest, largest, top):
    """Of a group with these ends; the end farther from zero is met exactly."""
    below = abs(smallest) > abs(largest)
    scale = max((largest - smallest) / top, _LEAST_SCALE)
    if not below:
        scale = -scale
    edge = smallest if below else largest
    steps = np.rint(edge / scale)
    if steps == np.float32(0):
        return scale, np.float32(0)
    return edge / steps, edge


@njit(nogil=True, cache=True)
def mlx_affine(source, bits, group, out, scales, biases):
    """Codes, scales and biases of float32 weights.

    Args:
        source: float32, whole groups, C-contiguous and 1-D.
        bits: of a code.
        group: weights that share a scale; a multiple of `LANES`.
        out: uint8, set: ``bits`` for every 8 weights.
        scales: float32, one a group, set.
        biases: the same.
    """
    _encode(source, bits, group, out, scales, biases, False)


@njit(nogil=True, cache=True)
def mlx_affine_bf16(source, bits, group, out, scales, biases):
    """The same of bfloat16, as ``uint16``."""
    _encode(source, bits, group, out, scales, biases, True)
