"""Into lanes and out of them: what the kernels of every block format share.

Weights of a tensor lie one row after the other, so its blocks do too; a group is `LANES` blocks in
a row. The last group repeats the last block in the lanes that are left over: these write the same
bytes to the same place.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.simd import (
    LANES,
    TILE,
    absolute,
    f32,
    fma,
    gather,
    i32,
    load,
    root,
    store,
    store_word,
)

#: Weights of a super-block of the K types (QK_K in ggml-common.h).
QK_K = 256


@njit(nogil=True)
def gather_blocks(source, group, n_blocks, size, starts, x):
    """Blocks `group` … of `size` weights into lanes; `starts` tells where each begins."""
    for lane in range(LANES):
        starts[lane] = min(group + lane, n_blocks - 1) * size
    for k in range(0, size, TILE):
        gather(source, starts, k, x, k * LANES)


@njit(nogil=True)
def mean_square(x, n):
    """Mean of the squares of `n` weights."""
    squares = f32(0)
    for k in range(n):
        v = load(x, k * LANES)
        squares = fma(v, v, squares)
    return squares * f32(1 / n)


@njit(nogil=True)
def columns_of(starts, n_cols, columns):
    """The column of its row at which each lane's block starts."""
    for lane in range(LANES):
        columns[lane] = starts[lane] % n_cols


@njit(nogil=True)
def weigh_spread(x, w, at, n):
    """ggml's weights for Q4_K and Q5_K: root mean square + |x|."""
    squares = f32(0)
    for k in range(n):
        v = load(x, at + k * LANES)
        squares = fma(v, v, squares)
    spread = root(squares * f32(1 / n))
    for k in range(n):
        store(w, at + k * LANES, spread + absolute(load(x, at + k * LANES)))


@njit(nogil=True)
def weigh_magnitude(x, w, at, n):
    """ggml's weights for Q2_K: |x|; a little more, so that zeros do not count for nothing."""
    total = f32(0)
    for k in range(n):
        total = total + absolute(load(x, at + k * LANES))
    little = total * f32(0.01 / n)
    for k in range(n):
        store(w, at + k * LANES, little + absolute(load(x, at + k * LANES)))


@njit(nogil=True)
def weigh_importance(importance, columns, x, w, position, n, sigma2):
    """ggml's weights under an importance matrix: importance · sqrt(sigma2 + x²)."""
    for k in range(0, n, TILE):
        gather(importance, columns, position + k, w, (position + k) * LANES)
    for k in range(position, position + n):
        v = load(x, k * LANES)
        store(w, k * LANES, load(w, k * LANES) * root(fma(v, v, sigma2)))


@njit(nogil=True)
def weigh_importance_alone(importance, columns, w, position, n):
    """ggml's weights for Q6_K under an importance matrix: the importance itself."""
    for k in range(position, position + n, TILE):
        gather(importance, columns, k, w, k * LANES)


@njit(nogil=True)
def pack_nibbles(q, words, to):
    """Low four bits of 256 numbers into 32 words: 32 weights below, the next 32 above."""
    for half in range(0, QK_K, 64):
        for k in range(0, 32, 4):
            word = i32(0)
            for b in range(4):
                low = load(q, (half + k + b) * LANES) & i32(15)
                high = load(q, (half + 32 + k + b) * LANES) & i32(15)
                word = word | ((low | (high << i32(4))) << i32(8 * b))
            store(words, (to + half // 8 + k // 4) * LANES, word)


@njit(nogil=True)
def pack_pairs(q, words, to, shift):
    """Bits `shift` and `shift` + 1 of 256 numbers into 16 words: four weights, 32 apart, a byte."""
    for half in range(0, QK_K, 128):
        for k in range(0, 32, 4):
            word = i32(0)
            for b in range(4):
                for part in range(4):
                    v = load(q, (half + 32 * part + k + b) * LANES)
                    word = word | (((v >> i32(shift)) & i32(3)) << i32(8 * b + 2 * part))
            store(words, (to + half // 16 + k // 4) * LANES, word)


@njit(nogil=True)
def pack_plane(q, words, to, bit):
    """Bit `bit` of 256 numbers into 8 words: eight weights, 32 apart, a byte."""
    for g in range(8):
        word = i32(0)
        for b in range(4):
            for j in range(8):
                v = load(q, (32 * j + 4 * g + b) * LANES)
                word = word | (((v >> i32(bit)) & i32(1)) << i32(8 * b + j))
        store(words, (to + g) * LANES, word)


@njit(nogil=True)
def pack_bytes(v, words, to, n_words):
    """The low bytes of 4 · `n_words` numbers into as many words."""
    for g in range(n_words):
        word = i32(0)
        for b in range(4):
            word = word | ((load(v, (4 * g + b) * LANES) & i32(255)) << i32(8 * b))
        store(words, (to + g) * LANES, word)


@njit(nogil=True)
def emit_words(words, starts, size, out, block_bytes, skip, n_words):
    """Write every lane's words to its block, from byte `skip` of it."""
    for lane in range(LANES):
        to = starts[lane] // size * block_bytes + skip
        for k in range(n_words):
            store_word(out, to + 4 * k, words[k * LANES + lane])


@njit(nogil=True)
def emit_half(bits, starts, size, out, block_bytes, skip):
    """Write every lane's 16 bits, an int32 array, to its block."""
    for lane in range(LANES):
        to = starts[lane] // size * block_bytes + skip
        out[to] = bits[lane] & 0xFF
        out[to + 1] = (bits[lane] >> 8) & 0xFF
