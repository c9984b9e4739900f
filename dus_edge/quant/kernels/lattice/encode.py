"""From rows to blocks of a lattice type, and the parts of these that all have."""

from __future__ import annotations

import numpy as np
from numba import njit

from dus_edge.quant.kernels.lattice.search import number_points, search_scales
from dus_edge.quant.kernels.superblock import (
    QK_K,
    columns_of,
    emit_half,
    emit_words,
    gather_blocks,
    mean_square,
    weigh_importance,
    weigh_spread,
)
from dus_edge.quant.simd import LANES, absolute, as_i32, f32, i32, load, store


@njit(nogil=True, inline="always")
def encode_lattice(
    source, importance, out, weighted, search, tables, find, value, code, split, pack, n_words
):
    """Quantize to blocks of float16 D and `n_words` words behind it; see `kernels`.

    Args:
        weighted: whether importance counts, or how the weights spread.
        search: `LatticeSearch`.
        tables: `Tables` of the points.
        find: the type's nearest point; it, `value` and `code` are those of `search`.
        split: ``(x, w, signs)``: takes the signs from 256 weights, whose magnitudes it leaves, into
            as many rows of `signs` as it needs, at most 32.
        pack: ``(q, signs, scales, words)``: the words of numbers, signs and multiples of D.
    """
    n_blocks = source.size // QK_K
    n_sub = QK_K // search.size
    block_bytes = 4 * n_words + 2
    x = np.empty(QK_K * LANES, np.float32)
    w = np.empty(QK_K * LANES, np.float32)
    q = np.empty(QK_K // search.dims * LANES, np.int32)
    signs = np.empty(32 * LANES, np.int32)
    starts = np.empty(LANES, np.int64)
    columns = np.empty(LANES, np.int64)
    found = np.empty((3, n_sub * LANES), np.float32)
    scales = np.empty(n_sub * LANES, np.float32)
    words = np.empty(n_words * LANES, np.int32)
    half = np.empty(LANES, np.int32)
    overflow = False
    for group in range(0, n_blocks, LANES):
        gather_blocks(source, group, n_blocks, QK_K, starts, x)
        if weighted:
            columns_of(starts, importance.size, columns)
            weigh_importance(importance, columns, x, w, 0, QK_K, mean_square(x, QK_K) * f32(2))
        else:
            for j in range(n_sub):
                weigh_spread(x, w, j * search.size * LANES, search.size)
        split(x, w, signs)
        bits, over = search_scales(find, value, x, w, n_sub, search, tables, found, scales)
        overflow |= over
        number_points(find, code, x, w, n_sub, scales, bits, search, tables, q)
        store(half, 0, bits)
        pack(q, signs, scales, words)
        emit_half(half, starts, QK_K, out, block_bytes, 0)
        emit_words(words, starts, QK_K, out, block_bytes, 2, n_words)
    return overflow


@njit(nogil=True)
def split_signs(x, w, signs):
    """Signs of 256 weights into 8 words, a bit each; then the weights are their magnitudes."""
    for j in range(8):
        word = i32(0)
        for b in range(32):
            k = (j * 32 + b) * LANES
            v = load(x, k)
            word = word | ((as_i32(v) >> i32(31)) << i32(b))
            store(x, k, absolute(v))
        store(signs, j * LANES, word)


@njit(nogil=True)
def pack_signs(signs, words, to):
    """Eight words as they are."""
    for j in range(8):
        store(words, (to + j) * LANES, load(signs, j * LANES))
