"""IQ2_XS: IQ2_S with 512 points, and an even number of minus signs in every eight weights.

Where the number is odd, the weight that costs least by it is given the other sign: its magnitude
is below zero then, and points are found for it as for the others. So does ggml
(quantize_row_iq2_xs_impl in ggml/src/ggml-quants.c).

Layout: block_iq2_xs in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.kernels.lattice.eights import EIGHT, encode_eights, tables_of_eights
from dus_edge.quant.kernels.lattice.odd_scales import pack_odd
from dus_edge.quant.kernels.lattice.points import IQ2_XS
from dus_edge.quant.simd import LANES, absolute, as_f32, as_i32, f32, i32, load, store, where

_TABLES = tables_of_eights(IQ2_XS)
_N_WORDS = 18
#: Points of a super-block.
_N_POINTS = 32


@njit(nogil=True)
def _split(x, w, signs):
    """Signs of 32 eights, 7 bits each; then the weights are what is left for the points."""
    for k in range(_N_POINTS):
        at = k * EIGHT * LANES
        bits = i32(0)
        odd = i32(0)
        least = f32(3e38)
        place = i32(0)
        for i in range(EIGHT):
            v = load(x, at + i * LANES)
            sign = as_i32(v) >> i32(31)
            bits = bits | (sign << i32(i))
            odd = odd ^ sign
            cost = load(w, at + i * LANES) * v * v
            better = cost < least
            least = where(better, cost, least)
            place = where(better, i32(i), place)
            store(x, at + i * LANES, absolute(v))
        flipped = where(odd > i32(0), i32(1) << place, i32(0))
        for i in range(EIGHT):
            minus = ((flipped >> i32(i)) & i32(1)) << i32(31)
            store(x, at + i * LANES, as_f32(as_i32(load(x, at + i * LANES)) ^ minus))
        store(signs, k * LANES, (bits ^ flipped) & i32(127))


@njit(nogil=True)
def _pack(q, signs, scales, words):
    """32 numbers of 9 bits and 7 bits of signs above each, multiples."""
    for g in range(_N_POINTS // 2):
        word = i32(0)
        for b in range(2):
            k = (2 * g + b) * LANES
            word = word | ((load(q, k) | (load(signs, k) << i32(9))) << i32(16 * b))
        store(words, g * LANES, word)
    pack_odd(scales, 16, words, 16)


@njit(nogil=True, cache=True)
def iq2_xs_weighted(source, importance, sigma2, out):
    """Quantize to IQ2_XS by importance; see `kernels`."""
    return encode_eights(source, importance, out, _TABLES, _split, _pack, _N_WORDS)
