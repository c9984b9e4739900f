"""F16 and BF16 as our own quantizers write them: every rounding, and numbers that are none."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from dus_edge.quant import ggml, native
from dus_edge.quant import types as t
from dus_edge.quant.kernels.half import from_half, to_half
from dus_edge.quant.simd import LANES, load, store

from .cases import check_each
from .native_cases import PLAIN, bf16_bits, gaussian, widened


def every_f32_kind() -> np.ndarray:
    """Random float32 bit patterns, and the ones around every place where F16 or BF16 round."""
    rng = np.random.default_rng(8)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint32)
    # Random patterns seldom fall among float16's exponents.
    near = rng.integers(0x32000000, 0x48000000, 200_000, np.uint32)
    edges = [0, 0x33000000, 0x38800000, 0x477FE000, 0x477FF000, 0x7F7F7FFF, 0x7F7F8000]
    edges += list(range(0x33000000, 0x38900000, 0x00080000))
    around = np.array(edges, np.int64)[:, None] + np.arange(-2, 3)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    ties = (halves[:-1].astype(np.int64) + halves[1:]) // 2
    ties = ties[:, None] + np.arange(-1, 2)
    extra = np.concatenate([around[around >= 0].ravel(), ties.ravel()]).astype(np.uint32)
    bits = np.concatenate([bits, near, extra, extra | np.uint32(1 << 31)])
    x = bits.view(np.float32)
    return np.ascontiguousarray(x[np.isfinite(x)])


def test_f16_of_all_bf16():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    x = widened(bits)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    over = np.isinf(expected) & np.isfinite(x)
    expected[over] = np.copysign(np.float16(65504), x[over])
    for rows in (bits, x):
        found = native.quantize(rows, t.F16, validate=False).view(np.float16)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
        number = ~np.isnan(x)
        np.testing.assert_array_equal(
            found[number].view(np.uint16), expected[number].view(np.uint16)
        )
        with pytest.raises(OverflowError, match="F16"):
            native.quantize(rows, t.F16)
        np.testing.assert_array_equal(
            native.quantize(rows[~over], t.F16), found[~over].view(np.uint8)
        )


def test_f16_of_f32():
    x = every_f32_kind()
    x = x[np.abs(x) < 65520]
    assert x.size > 200_000
    found = native.quantize(x, t.F16).view(np.uint16)
    np.testing.assert_array_equal(found, x.astype(np.float16).view(np.uint16))


def test_bf16_of_f32():
    """Except that ggml's BF16 of too large numbers is infinite."""
    x = every_f32_kind()
    fits = np.abs(x) < np.uint32(0x7F7F8000).view(np.float32)
    expected = ggml.quantize(x[fits], t.BF16)
    np.testing.assert_array_equal(native.quantize(x[fits], t.BF16), expected)
    over = x[~fits]
    assert over.size > 4
    with pytest.raises(OverflowError, match="BF16"):
        native.quantize(over, t.BF16)
    found = native.quantize(over, t.BF16, validate=False).view(np.uint16)
    np.testing.assert_array_equal(found, np.where(over < 0, 0xFF7F, 0x7F7F))


def test_nan_and_infinity_stay():
    x = np.array([[np.nan, -np.nan, np.inf, -np.inf, 1.5, -0.0]], np.float32)

    def check(kind, dtype):
        rows = bf16_bits(x) if dtype == np.uint16 else x.astype(dtype)
        found = ggml.dequantize(native.quantize(rows, kind), kind, x.shape)
        np.testing.assert_array_equal(found, x)
        assert np.signbit(found[0, 5])

    check_each(check, PLAIN, [np.float32, np.float16, np.uint16])


def test_few_weights():
    def check(kind, n):
        for x in (gaussian((n,)), gaussian((n, 1)), gaussian((1, n))):
            np.testing.assert_array_equal(native.quantize(x, kind), ggml.quantize(x, kind))
        bits = bf16_bits(gaussian((n,)))
        np.testing.assert_array_equal(native.quantize(bits, kind), ggml.quantize(bits, kind))
        big = np.full(n, np.finfo(np.float32).max)
        with pytest.raises(OverflowError):
            native.quantize(big, kind)

    check_each(check, PLAIN, [1, 2, 15, 16, 17, 31, 33])


@njit
def _halves(x, bits):
    for at in range(0, x.size, LANES):
        store(bits, at, to_half(load(x, at)))


@njit
def _floats(bits, x):
    for at in range(0, x.size, LANES):
        store(x, at, from_half(load(bits, at)))


def test_half_is_numpys_float16():
    x = every_f32_kind()
    x = np.concatenate([x, np.array([np.inf, -np.inf, 0.0, -0.0], np.float32)])
    x = np.pad(x, (0, -x.size % LANES))
    bits = np.empty(x.size, np.int32)
    _halves(x, bits)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(bits, x.astype(np.float16).view(np.uint16))


def test_float_of_half_is_exact():
    bits = np.arange(1 << 16, dtype=np.int32)
    bits = np.ascontiguousarray(bits[(bits & 0x7FFF) < 0x7C00])
    bits = np.pad(bits, (0, -bits.size % LANES))
    x = np.empty(bits.size, np.float32)
    _floats(bits, x)
    expected = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(x.view(np.uint32), expected.view(np.uint32))
