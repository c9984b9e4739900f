"""The product of two thin matrices, summed in the order in which BLAS libraries sum it.

An element of B·A is one chain of fused multiply-adds over the rank, from the first to the last.
That is what PyTorch's matrix product gives for whole matrices on a CPU up to a rank of 192, bit for
bit; above, MKL cuts the chain into blocks of its own choice. Here it does not depend on which rows
are asked for, nor on the number of threads. See benchmarks/LOG.md.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.simd import LANES, f32, fma, load, store

#: Rows at once: every part of A that is loaded serves all of them.
ROWS = 8


def low_rank(b: np.ndarray, a: np.ndarray, scale: float) -> np.ndarray:
    """``scale * (b @ a)``.

    Args:
        b: ``(rows, rank)`` float32.
        a: ``(rank, columns)`` float32.
        scale: rounded to float32 first, as PyTorch does.

    Returns:
        ``(rows, columns)`` float32.
    """
    n_rows, n_cols = len(b), a.shape[1]
    # Whole strips of rows and lanes; what is too much is cut off again.
    padded_b = np.pad(b, ((0, -n_rows % ROWS), (0, 0))) if n_rows % ROWS else b
    padded_a = np.pad(a, ((0, 0), (0, -n_cols % LANES))) if n_cols % LANES else a
    out = np.empty((len(padded_b), padded_a.shape[1]), np.float32)
    _product(padded_b, padded_a, np.float32(scale), out)
    return out[:n_rows, :n_cols]


@njit(nogil=True, cache=True, error_model="numpy")
def _product(b, a, scale, out):
    """`low_rank` for ``b`` of strips of `ROWS` rows and ``a`` of strips of `LANES` columns."""
    n_rows, rank = b.shape
    n_cols = a.shape[1]
    columns, result = a.reshape(-1), out.reshape(-1)
    factor = f32(scale)
    for i in range(0, n_rows, ROWS):
        for j in range(0, n_cols, LANES):
            s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = f32(0.0)
            for k in range(rank):
                x = load(columns, k * n_cols + j)
                s0 = fma(f32(b[i, k]), x, s0)
                s1 = fma(f32(b[i + 1, k]), x, s1)
                s2 = fma(f32(b[i + 2, k]), x, s2)
                s3 = fma(f32(b[i + 3, k]), x, s3)
                s4 = fma(f32(b[i + 4, k]), x, s4)
                s5 = fma(f32(b[i + 5, k]), x, s5)
                s6 = fma(f32(b[i + 6, k]), x, s6)
                s7 = fma(f32(b[i + 7, k]), x, s7)
            at = i * n_cols + j
            store(result, at, s0 * factor)
            store(result, at + n_cols, s1 * factor)
            store(result, at + 2 * n_cols, s2 * factor)
            store(result, at + 3 * n_cols, s3 * factor)
            store(result, at + 4 * n_cols, s4 * factor)
            store(result, at + 5 * n_cols, s5 * factor)
            store(result, at + 6 * n_cols, s6 * factor)
            store(result, at + 7 * n_cols, s7 * factor)
