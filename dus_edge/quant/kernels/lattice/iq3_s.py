"""IQ3_S: x ≈ ±D·m·v, m an odd number for 32 weights, v one of 512 points for every four.

Magnitudes are rounded to four codes, and of the points that `points` names for these the one of
the least weighted error is taken; six are tried while scales are searched, twelve for what is
stored. ggml (quantize_row_iq3_s_impl in ggml/src/ggml-quants.c) tries 19 scales and quantizes once
for the scale that was found, not for the one that is stored.

Layout: block_iq3_s in ggml/src/ggml-common.h.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.kernels.fit import Steps
from dus_edge.quant.kernels.lattice.encode import encode_lattice, pack_signs, split_signs
from dus_edge.quant.kernels.lattice.odd_scales import pack_odd
from dus_edge.quant.kernels.lattice.points import IQ3_S, tables_of
from dus_edge.quant.kernels.lattice.search import LatticeSearch, rounded_key
from dus_edge.quant.kernels.superblock import pack_bytes
from dus_edge.quant.simd import LANES, f32, fma, i32, load, lookup, store, to_f32, where

#: Weights of a point, and codes of a weight.
_FOUR, _CODES = 4, 8
_N_WORDS = 27
#: The point of four ones, packed.
_LEAST = 0x1111
_COARSE = Steps(27.0, 0.5, 10)
_ALONE = LatticeSearch(
    dims=_FOUR,
    n_codes=_CODES,
    size=32,
    top=15.0,
    few=3,
    many=6,
    candidates=Steps(10.5, 1.5, 5),
    refits=2,
    spacings=_COARSE,
    rounds=2,
)
_BY_IMPORTANCE = _ALONE._replace(candidates=Steps(9.5, 1.25, 7))
_TABLES = tables_of(IQ3_S, _ALONE.few, _ALONE.many)


@njit(nogil=True)
def _value(point, i):
    """Value i of a point as it is packed, float32."""
    return to_f32((point >> i32(4 * i)) & i32(15))


@njit(nogil=True)
def _code(point, i):
    """Code i of a packed point, float32."""
    return to_f32((point >> i32(4 * i + 1)) & i32(7))


@njit(nogil=True)
def _nearest(x, w, at, scale, table, n):
    """Of 2 · `n` points that `table` names the best for x · scale, packed."""
    key = rounded_key(x, at, scale, _FOUR, _CODES, 2.0) * i32(n)
    minus = scale * f32(-2)
    a0 = load(w, at)
    a1 = load(w, at + LANES)
    a2 = load(w, at + 2 * LANES)
    a3 = load(w, at + 3 * LANES)
    b0 = a0 * load(x, at) * minus
    b1 = a1 * load(x, at + LANES) * minus
    b2 = a2 * load(x, at + 2 * LANES) * minus
    b3 = a3 * load(x, at + 3 * LANES) * minus
    best = f32(3e38)
    found = i32(_LEAST)
    for i in range(n):
        pair = lookup(table, key + i32(i))
        for _ in range(2):
            # Σwv² − 2Σwvx·scale
            v0 = _value(pair, 0)
            v1 = _value(pair, 1)
            v2 = _value(pair, 2)
            v3 = _value(pair, 3)
            cost = v0 * fma(v0, a0, b0)
            cost = fma(v1, fma(v1, a1, b1), cost)
            cost = fma(v2, fma(v2, a2, b2), cost)
            cost = fma(v3, fma(v3, a3, b3), cost)
            better = cost < best
            best = where(better, cost, best)
            found = where(better, pair, found)
            pair = pair >> i32(16)
    return found


@njit(nogil=True)
def _pack(q, signs, scales, words):
    """The low 8 bits of 64 numbers, the highest of each, 256 signs, multiples."""
    pack_bytes(q, words, 0, 16)
    for g in range(2):
        word = i32(0)
        for b in range(32):
            word = word | ((load(q, (32 * g + b) * LANES) >> i32(8)) << i32(b))
        store(words, (16 + g) * LANES, word)
    pack_signs(signs, words, 18)
    pack_odd(scales, 8, words, 26)


@njit(nogil=True, inline="always")
def _encode(source, importance, out, weighted, search):
    return encode_lattice(
        source,
        importance,
        out,
        weighted,
        search,
        _TABLES,
        _nearest,
        _value,
        _code,
        split_signs,
        _pack,
        _N_WORDS,
    )


@njit(nogil=True, cache=True)
def iq3_s(source, importance, sigma2, out):
    """Quantize to IQ3_S; see `kernels`."""
    return _encode(source, importance, out, False, _ALONE)


@njit(nogil=True, cache=True)
def iq3_s_weighted(source, importance, sigma2, out):
    """Quantize to IQ3_S by importance; see `kernels`."""
    return _encode(source, importance, out, True, _BY_IMPORTANCE)
