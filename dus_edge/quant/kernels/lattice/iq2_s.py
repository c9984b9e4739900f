"""IQ2_S: x ≈ ±D·m·v, m an odd number for 16 weights, v one of 1,024 points for every eight.

Magnitudes are rounded to eight codes, and of the points that `points` names for these the one of
the least weighted error is taken; eight are tried while scales are searched, sixteen for what is
stored. ggml (quantize_row_iq2_s_impl in ggml/src/ggml-quants.c) tries 19 scales, and points only
where the rounded codes are none.

Layout: block_iq2_s in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.kernels.lattice.eights import encode_eights, tables_of_eights
from dus_edge.quant.kernels.lattice.encode import pack_signs, split_signs
from dus_edge.quant.kernels.lattice.odd_scales import pack_odd
from dus_edge.quant.kernels.lattice.points import IQ2_S
from dus_edge.quant.kernels.superblock import pack_bytes
from dus_edge.quant.simd import LANES, i32, load, store

_TABLES = tables_of_eights(IQ2_S)
_N_WORDS = 20


@njit(nogil=True)
def _pack(q, signs, scales, words):
    """The low 8 bits of 32 numbers, 256 signs, the 2 high bits of the numbers, multiples."""
    pack_bytes(q, words, 0, 8)
    pack_signs(signs, words, 8)
    for g in range(2):
        word = i32(0)
        for b in range(16):
            word = word | ((load(q, (16 * g + b) * LANES) >> i32(8)) << i32(2 * b))
        store(words, (16 + g) * LANES, word)
    pack_odd(scales, 16, words, 18)


@njit(nogil=True, cache=True)
def iq2_s_weighted(source, importance, sigma2, out):
    """Quantize to IQ2_S by importance; see `kernels`."""
    return encode_eights(source, importance, out, _TABLES, split_signs, _pack, _N_WORDS)
