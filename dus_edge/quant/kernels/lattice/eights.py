"""Points of eight magnitudes, of the values 1, 3.125 and 5.375: what IQ2_S and IQ2_XS share.

A code c of 0, 1 or 2 stands for a value that is a polynomial of it, and so does the error that the
value makes; so the error of a point takes two multiply-adds a weight.

Values: iq2s_grid and iq2xs_grid in ggml/src/ggml-common.h have 8, 25 and 43, which
dequantize_row_iq2_s in ggml/src/ggml-quants.c multiplies by (2s + 1) · D / 8. ggml's own search
takes them for 1, 3 and 5.
"""

from __future__ import annotations

from numba import njit

from dus_edge.quant.kernels.fit import Steps
from dus_edge.quant.kernels.lattice.encode import encode_lattice
from dus_edge.quant.kernels.lattice.points import Lattice, Tables, tables_of
from dus_edge.quant.kernels.lattice.search import LatticeSearch, rounded_key
from dus_edge.quant.simd import LANES, f32, fma, i32, load, lookup, to_f32, where

#: Weights of a point, and codes of a weight.
EIGHT, _CODES = 8, 3
#: v = 1 + _V1·c + _V2·c² and v² = 1 + _S1·c + _S2·c².
_V1, _V2 = 2.0625, 0.0625
_S1, _S2 = 3.5859375, 5.1796875
#: The mean step between values, for rounding.
_STEP = 2.1875
_SEARCH = LatticeSearch(
    dims=EIGHT,
    n_codes=_CODES,
    size=16,
    top=5.375,
    few=4,
    many=8,
    candidates=Steps(3.4, 0.5, 7),
    refits=1,
    spacings=Steps(27.0, 0.5, 10),
    rounds=2,
)


def tables_of_eights(lattice: Lattice) -> Tables:
    """The tables of a type's points."""
    return tables_of(lattice, _SEARCH.few, _SEARCH.many)


@njit(nogil=True)
def _code(point, i):
    """Code i of a packed point, float32."""
    return to_f32((point >> i32(2 * i)) & i32(3))


@njit(nogil=True)
def _value(point, i):
    """Value i of a packed point."""
    code = _code(point, i)
    return fma(fma(f32(_V2), code, f32(_V1)), code, f32(1))


@njit(nogil=True)
def _nearest(x, w, at, scale, table, n):
    """Of 2 · `n` points that `table` names the best for x · scale, packed."""
    first = rounded_key(x, at, scale, EIGHT, _CODES, _STEP) * i32(n)
    minus = scale * f32(-2)
    best = f32(3e38)
    found = i32(0)
    for j in range(n):
        pair = lookup(table, first + i32(j))
        for _ in range(2):
            # Σwv² − 2Σwvx·scale, less what it is for eight ones.
            cost = f32(0)
            for i in range(EIGHT):
                a = load(w, at + i * LANES)
                b = a * load(x, at + i * LANES) * minus
                c = _code(pair, i)
                linear = fma(a, f32(_S1), b * f32(_V1))
                square = fma(a, f32(_S2), b * f32(_V2))
                cost = fma(c, fma(c, square, linear), cost)
            better = cost < best
            best = where(better, cost, best)
            found = where(better, pair & i32(0xFFFF), found)
            pair = pair >> i32(16)
    return found


@njit(nogil=True, inline="always")
def encode_eights(source, importance, out, tables, split, pack, n_words):
    """Quantize by importance; `split` and `pack` are those of `encode_lattice`."""
    return encode_lattice(
        source,
        importance,
        out,
        True,
        _SEARCH,
        tables,
        _nearest,
        _value,
        _code,
        split,
        pack,
        n_words,
    )
