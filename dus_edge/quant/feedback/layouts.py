"""Blocks of GGUF types taken apart: the steps of their scales, and their codes.

Every type stores a weight as ``d·q − m``: q is its code, an integer from 0 to the type's largest
(of IQ4_NL and IQ4_XS the level that it stands for), and d and m are shared by a *part* of a block.
Feedback chooses codes for scales that are found, so
all it needs of a type is to read d and m, and to put codes in.

Byte layouts: ggml/src/ggml-common.h, read as `dequantize_row_…` of ggml/src/ggml-quants.c does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dus_edge.quant import types as t
from dus_edge.quant.types import QuantType

#: Why a matrix that could have feedback has none.
LOSES_MORE = "it loses more on the text that was held out"
#: d and m of every part of every block, ``(n_blocks, n_parts)`` float32 each.
Grid = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """How a type's blocks are read and written.

    Attributes:
        part: weights that share d and m.
        top: the largest code.
        grid: blocks ``(n, block_bytes)`` uint8 to `Grid`.
        put: writes codes ``(n, block_weights)`` uint8 into blocks, in place; scales stay.
        levels: what the codes stand for, where not for themselves, ``(top + 1,)`` float32.
        halves: bytes at which the float16 stand that every d and every m is a multiple of: one
            for both, or two.
    """

    part: int
    top: int
    grid: Callable[[np.ndarray], Grid]
    put: Callable[[np.ndarray, np.ndarray], None]
    halves: tuple[int, ...]
    levels: np.ndarray | None = None


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """A float16 of each block as ``(n, 1)`` float32."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


# Blocks of 32


def _symmetric(middle: int) -> Callable[[np.ndarray], Grid]:
    def grid(blocks: np.ndarray) -> Grid:
        d = _half(blocks, 0)
        return d, d * np.float32(middle)

    return grid


def _affine(blocks: np.ndarray) -> Grid:
    return _half(blocks, 0), -_half(blocks, 2)


def _iq4_nl(blocks: np.ndarray) -> Grid:
    d = _half(blocks, 0)
    return d, np.zeros_like(d)


def _put_32(skip: int, bits: int) -> Callable[[np.ndarray, np.ndarray], None]:
    """(qh,) qs behind `skip` bytes: weight k in the low nibble, k + 16 in the high one."""

    def put(blocks: np.ndarray, codes: np.ndarray) -> None:
        at = skip
        if bits == 5:
            blocks[:, at : at + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
            at += 4
        blocks[:, at:] = (codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4

    return put


def _put_q8_0(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 2:] = codes - np.uint8(127)  # modulo 256: int8


# Super-blocks of 256


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Two low bits of 256 codes in 64 bytes: four weights, 32 apart, a byte."""
    q = codes.reshape(-1, 2, 4, 32) & 3
    return (q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6).reshape(-1, 64)


def _plane(codes: np.ndarray, bit: int) -> np.ndarray:
    """One bit of 256 codes in 32 bytes: eight weights, 32 apart, a byte."""
    bits = (codes >> bit & 1).reshape(-1, 8, 32)
    return np.packbits(bits, axis=1, bitorder="little")[:, 0]


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Low nibbles of 256 codes in 128 bytes: 32 weights below, the next 32 above."""
    q = codes.reshape(-1, 4, 2, 32) & 15
    return (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)


def _q2_k(blocks: np.ndarray) -> Grid:
    packed = blocks[:, :16]
    return _half(blocks, 80) * (packed & 15), _half(blocks, 82) * (packed >> 4)


def _put_q2_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 16:80] = _pairs(codes)


def _q3_k(blocks: np.ndarray) -> Grid:
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([packed[:, 8:] >> 2 * i & 3 for i in range(4)], axis=1)
    d = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - np.float32(32))
    return d, d * np.float32(4)


def _put_q3_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, :32] = _plane(codes, 2)
    blocks[:, 32:96] = _pairs(codes)


def _q4_k(blocks: np.ndarray) -> Grid:
    first, second, rest = (blocks[:, 4 + 4 * i : 8 + 4 * i] for i in range(3))
    s = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    m = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)
    return _half(blocks, 0) * s, _half(blocks, 2) * m


def _put_q4_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 16:] = _nibbles(codes)


def _put_q5_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    blocks[:, 16:48] = _plane(codes, 4)
    blocks[:, 48:] = _nibbles(codes)


def _q6_k(blocks: np.ndarray) -> Grid:
    d = _half(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return d, d * np.float32(32)


def _put_q6_k(blocks: np.ndarray, codes: np.ndarray) -> None:
    q = codes.reshape(-1, 2, 2, 64) & 15
    blocks[:, :128] = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    blocks[:, 128:192] = _pairs(codes >> 4)


def _iq4_xs(blocks: np.ndarray) -> Grid:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> 2 * np.arange(8, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    d = _half(blocks, 0) * ((low | high << 4).astype(np.float32) - np.float32(32))
    return d, np.zeros_like(d)


def _put_iq4_xs(blocks: np.ndarray, codes: np.ndarray) -> None:
    q = codes.reshape(-1, 8, 2, 16) & 15
    blocks[:, 8:] = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)


_CURVED = np.array(t.IQ4_LEVELS, np.float32)

#: Of every type that feedback can go into.
LAYOUTS: Mapping[QuantType, Layout] = {
    t.Q4_0: Layout(32, 15, _symmetric(8), _put_32(2, 4), (0,)),
    t.Q4_1: Layout(32, 15, _affine, _put_32(4, 4), (0, 2)),
    t.Q5_0: Layout(32, 31, _symmetric(16), _put_32(2, 5), (0,)),
    t.Q5_1: Layout(32, 31, _affine, _put_32(4, 5), (0, 2)),
    t.Q8_0: Layout(32, 254, _symmetric(127), _put_q8_0, (0,)),
    t.Q2_K: Layout(16, 3, _q2_k, _put_q2_k, (80, 82)),
    t.Q3_K: Layout(16, 7, _q3_k, _put_q3_k, (108,)),
    t.Q4_K: Layout(32, 15, _q4_k, _put_q4_k, (0, 2)),
    t.Q5_K: Layout(32, 31, _q4_k, _put_q5_k, (0, 2)),
    t.Q6_K: Layout(16, 63, _q6_k, _put_q6_k, (208,)),
    t.IQ4_NL: Layout(32, 15, _iq4_nl, _put_32(2, 4), (0,), _CURVED),
    t.IQ4_XS: Layout(32, 15, _iq4_xs, _put_iq4_xs, (0,), _CURVED),
}


def takes_feedback(kind: QuantType, n_in: int) -> bool:
    """Whether feedback can go into rows of that type."""
    return kind in LAYOUTS and n_in % kind.block_weights == 0


def stored_values(data: np.ndarray, kind: QuantType) -> np.ndarray:
    """The weights ``(n_rows, n_cols)`` float32 that readers see in rows ``(n_rows, row_bytes)``."""
    from gguf import GGMLQuantizationType, quants

    return quants.dequantize(data, GGMLQuantizationType(kind.ggml_id))
