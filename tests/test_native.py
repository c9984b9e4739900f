"""Our own quantizers against ggml's: no more error, by llama.cpp's dequantizers; and hard input."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.quant import ggml, kernels, native
from dus_edge.quant import types as t
from dus_edge.quant.kernels.half import from_half, to_half
from dus_edge.quant.simd import LANES, load, store

PLAIN = (t.F16, t.BF16)
SMALL = (t.Q4_0, t.Q4_1, t.Q5_0, t.Q5_1)
K_TYPES = (t.Q2_K, t.Q3_K, t.Q4_K, t.Q5_K, t.Q6_K)
#: Types whose search can weigh errors by importance.
WEIGHTED = SMALL + K_TYPES
QUANTIZED = (t.Q8_0, *WEIGHTED)
ALL = PLAIN + QUANTIZED
#: Every (type, with importance?) that there is a kernel for.
FORMS = [(k, w) for k in ALL for w in (False, True) if not w or k in WEIGHTED]
#: Types whose kernels these tests also compile for bf16 as it is stored.
FROM_BF16 = (t.F16, t.Q8_0, t.Q4_0, t.Q4_K)
SIGMA = np.float32(0.02)


def label(value: object) -> str | None:
    if isinstance(value, t.QuantType):
        return value.name
    return {True: "importance", False: "alone"}.get(value) if isinstance(value, bool) else None


each_form = pytest.mark.parametrize(("kind", "weighted"), FORMS, ids=label)


# What the tests compare with


def validates(data: np.ndarray, kind: t.QuantType) -> bool:
    return ggml.library().ggml_validate_row_data(kind.ggml_id, data.ctypes.data, data.nbytes)


def search_weights(rows: np.ndarray, kind: t.QuantType, importance: np.ndarray) -> np.ndarray:
    """What ggml's search under an importance matrix minimizes, from ggml-quants.c, float64."""
    if kind is t.Q6_K:
        return np.broadcast_to(importance.astype(np.float64), rows.shape)
    x2 = np.square(rows, dtype=np.float64)
    n = 256 if kind in K_TYPES else rows.shape[1]
    sigma2 = np.repeat(x2.reshape(len(rows), -1, n).mean(-1), n, axis=1)
    if kind in (t.Q3_K, t.Q4_K, t.Q5_K):
        sigma2 *= 2
    return importance * np.sqrt(sigma2 + x2)


def rmse(
    rows: np.ndarray, data: np.ndarray, kind: t.QuantType, importance: np.ndarray | None
) -> float:
    """Error after llama.cpp's dequantizer: plain, or weighted as ggml's search weighs it."""
    squares = np.square(
        np.subtract(ggml.dequantize(data, kind, rows.shape), rows, dtype=np.float64)
    )
    if importance is None:
        return float(np.sqrt(squares.mean()))
    w = search_weights(rows, kind, importance)
    return float(np.sqrt((w * squares).sum() / (w.sum() or 1)))


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 → bf16 bits, cut off."""
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def gaussian(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * SIGMA


def importance_of(n_cols: int, seed: int = 1, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, spread, n_cols).astype(np.float32)


@functools.cache
def matrices(name: str) -> list[np.ndarray]:
    """Matrices of weights; 2^18 of each where they are drawn."""
    if name == "gaussian":
        return [gaussian((256, 1024), 11)]
    if name == "heavy":
        rng = np.random.default_rng(12)
        return [(rng.standard_t(3, (256, 1024)) * (SIGMA / np.sqrt(3))).astype(np.float32)]
    if name == "sparse":
        return [gaussian((256, 1024), 13) * (np.random.default_rng(14).random((256, 1024)) < 0.1)]
    checkpoint = SafetensorsCheckpoint(resolve_base(BUILTIN, weights=True))
    names = [s.name for s in checkpoint.specs().values() if len(s.shape) == 2]
    found = [ggml.to_f32(checkpoint.read(n)) for n in sorted(names)]
    return [x for x in found if x.shape[1] % 256 == 0][::4]


# Error


@each_form
@pytest.mark.parametrize("data", ["gaussian", "heavy", "sparse", "pico"])
def test_no_more_error_than_ggml(kind, weighted, data):
    found = []
    for i, rows in enumerate(matrices(data)):
        importance = importance_of(rows.shape[1], i) if weighted else None
        ours = native.quantize(rows, kind, importance)
        assert validates(ours, kind)
        theirs = ggml.quantize(rows, kind, importance)
        found.append((rmse(rows, ours, kind, importance), rmse(rows, theirs, kind, importance)))
    ratios = [a / b if b else float(a > 0) for a, b in found]
    assert max(ratios, default=0) <= 1, ratios


def test_the_data_of_these_tests():
    assert len(matrices("pico")) >= 4
    assert all(x.ndim == 2 and x.size >= 1 << 14 for x in matrices("pico"))


@pytest.mark.parametrize("kind", QUANTIZED, ids=label)
def test_gguf_package_reads_the_same(kind):
    """A second dequantizer, in Python, agrees with ggml's about our bytes."""
    rows = gaussian((4, 512))
    data = native.quantize(rows, kind)
    there = gguf.quants.dequantize(data.reshape(4, -1), gguf.GGMLQuantizationType(kind.ggml_id))
    np.testing.assert_allclose(there, ggml.dequantize(data, kind, rows.shape), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", WEIGHTED, ids=label)
def test_importance_moves_error_away_from_columns_that_count(kind):
    rows = gaussian((64, 512), 3)
    importance = np.ones(512, np.float32)
    importance[::4] = 100

    def error(data: np.ndarray) -> float:
        return float(np.square(ggml.dequantize(data, kind, rows.shape) - rows)[:, ::4].sum())

    assert error(native.quantize(rows, kind, importance)) < error(native.quantize(rows, kind))


@pytest.mark.parametrize("kind", (*PLAIN, t.Q8_0), ids=label)
def test_importance_means_nothing_to_types_without_search(kind):
    rows = gaussian((3, 64))
    with_it = native.quantize(rows, kind, importance_of(64))
    np.testing.assert_array_equal(with_it, native.quantize(rows, kind))


# Dtypes, shapes, lanes


@pytest.mark.parametrize("kind", (*FROM_BF16, t.BF16), ids=label)
@pytest.mark.parametrize("weighted", [False, True], ids=label)
def test_bf16_rows_give_the_bytes_of_the_same_numbers(kind, weighted):
    bits = bf16_bits(gaussian((5, 768)))
    importance = importance_of(768) if weighted else None
    expected = native.quantize(widened(bits), kind, importance)
    np.testing.assert_array_equal(native.quantize(bits, kind, importance), expected)


@each_form
def test_f16_rows_give_the_bytes_of_the_same_numbers(kind, weighted):
    halves = gaussian((5, 768)).astype(np.float16)
    importance = importance_of(768) if weighted else None
    expected = native.quantize(halves.astype(np.float32), kind, importance)
    np.testing.assert_array_equal(native.quantize(halves, kind, importance), expected)


@each_form
@pytest.mark.parametrize("n_blocks", [1, 15, 16, 17, 33])
def test_a_row_does_not_depend_on_its_neighbours(kind, weighted, n_blocks):
    """Rows of one to four blocks, so that groups of 16 end anywhere in a row."""
    per_row = next(n for n in (3, 5, 1) if n_blocks % n == 0) if n_blocks > 1 else 1
    n_cols = per_row * max(kind.block_weights, 32)
    rows = gaussian((n_blocks // per_row, n_cols), n_blocks)
    rows *= np.random.default_rng(0).lognormal(0, 1, (len(rows), 1)).astype(np.float32)
    importance = importance_of(n_cols) if weighted else None
    whole = native.quantize(rows, kind, importance)
    alone = [native.quantize(row, kind, importance) for row in rows]
    np.testing.assert_array_equal(whole, np.concatenate(alone))


@pytest.mark.parametrize("kind", WEIGHTED, ids=label)
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100], ids=["huge", "tiny"])
def test_only_ratios_of_importance_count(kind, scale):
    x = gaussian((2, 512))
    importance = drawn_importance("spread", np.random.default_rng(0), 512)
    expected = native.quantize(x, kind, importance)
    np.testing.assert_array_equal(
        native.quantize(x, kind, importance * np.float32(scale)), expected
    )


@pytest.mark.parametrize("n_cols", [256, 512, 768, 1024])
@pytest.mark.parametrize("kind", K_TYPES, ids=label)
def test_importance_belongs_to_columns(kind, n_cols):
    """A super-block of a row is as if it were alone with its columns' importance."""
    rows, importance = gaussian((9, n_cols), 5), importance_of(n_cols, spread=2)
    whole = native.quantize(rows, kind, importance).reshape(9, -1, kind.block_bytes)
    for j in range(n_cols // 256):
        part = slice(256 * j, 256 * (j + 1))
        alone = native.quantize(rows[:, part], kind, importance[part])
        np.testing.assert_array_equal(whole[:, j].reshape(-1), alone)


@pytest.mark.parametrize("n_cols", [32, 96, 160, 544])
@pytest.mark.parametrize("kind", SMALL, ids=label)
def test_importance_belongs_to_columns_of_small_blocks(kind, n_cols):
    """The same; every block of a row has the same mean square, which counts there."""
    rng = np.random.default_rng(6)
    first = rng.integers(-50, 50, (9, 1, 32)).astype(np.float32)
    blocks = rng.permuted(np.repeat(first, n_cols // 32, axis=1), axis=2)
    rows, importance = blocks.reshape(9, n_cols), importance_of(n_cols, spread=2)
    whole = native.quantize(rows, kind, importance).reshape(9, -1, kind.block_bytes)
    for j in range(n_cols // 32):
        part = slice(32 * j, 32 * (j + 1))
        alone = native.quantize(rows[:, part], kind, importance[part])
        np.testing.assert_array_equal(whole[:, j].reshape(-1), alone)


@pytest.mark.parametrize("kind", ALL, ids=label)
def test_no_rows(kind):
    assert native.quantize(np.empty((0, 256), np.float32), kind).shape == (0,)


# Hard blocks


def hard_rows(case: str) -> np.ndarray:
    """20 rows of 256."""
    x = gaussian((20, 256), 7)
    unit = x / SIGMA
    match case:
        case "positive":
            return np.full_like(x, 0.0217)
        case "negative":
            return np.full_like(x, -0.0217)
        case "outlier":
            x[np.arange(20), np.arange(20) * 12] = 1e4
        case "negative outlier":
            x[np.arange(20), np.arange(20) * 12] = -1e4
        case "all negative":
            return -np.abs(x)
        case "all positive":
            return np.abs(x)
        case "signed zeros":
            x[:, ::2] = -0.0
        case "tiny":
            return unit * np.float32(2e-7)
        case "smallest f16":
            return unit * np.float32(6e-8)
        case "small":
            return unit * np.float32(1e-5)
        case "offset":
            return unit + np.float32(1000)
        case "negative offset":
            return unit - np.float32(1000)
        case "far offset":
            return x + np.float32(2e4)
        case "one weight":
            x[:, 1:] = 0
        case "two values":
            return np.where(x > 0, np.float32(0.03), np.float32(-0.01))
        case "large":
            return unit * np.float32(3000)
        case "half zero":
            x[:, 128:] = 0
        case "mixed":
            x *= np.float32(10.0) ** np.arange(-4, 4).repeat(32).astype(np.float32)
    return x


CASES = [
    "positive", "negative", "outlier", "negative outlier", "all negative", "all positive",
    "signed zeros", "tiny", "smallest f16", "small", "offset", "negative offset", "far offset",
    "one weight", "two values", "large", "half zero", "mixed",
]  # fmt: skip


@each_form
@pytest.mark.parametrize("case", CASES)
def test_hard_blocks(kind, weighted, case):
    rows = hard_rows(case)
    importance = np.ones(256, np.float32) if weighted else None
    ours = native.quantize(rows, kind, importance)
    assert np.isfinite(ggml.dequantize(ours, kind, rows.shape)).all()
    assert validates(ours, kind)
    theirs = ggml.quantize(rows, kind, importance)
    a, b = rmse(rows, ours, kind, importance), rmse(rows, theirs, kind, importance)
    # Where a block fits but for the rounding of its scales, both errors are that rounding: of
    # float16, and of the K types' 63 steps, half of one at most.
    exact = case in ("positive", "negative", "two values") or "offset" in case
    rounding = 1 / 126 if exact and kind in (t.Q4_K, t.Q5_K) else 2**-11
    assert a <= 1.01 * b + rounding * np.abs(rows).max(), a / b


@each_form
def test_zeros_stay_zeros(kind, weighted):
    rows = np.zeros((18, 256), np.float32)
    rows[9:] = -0.0
    importance = importance_of(256) if weighted else None
    assert not ggml.dequantize(native.quantize(rows, kind, importance), kind, rows.shape).any()


@pytest.mark.parametrize(("kind", "weighted"), [f for f in FORMS if f[0] is not t.BF16], ids=label)
def test_denormals_become_zeros(kind, weighted):
    rows = np.random.default_rng(0).integers(0, 1 << 23, (18, 256)).astype(np.uint32)
    rows = (rows | np.uint32(1 << 31) * (rows & 1)).view(np.float32)
    assert (np.abs(rows) < np.finfo(np.float32).tiny).all()
    importance = importance_of(256) if weighted else None
    assert not ggml.dequantize(native.quantize(rows, kind, importance), kind, rows.shape).any()


#: No type has to refuse weights up to here; most hold larger ones.
SAFE = 6e4
IMPORTANCES = ("none", "ones", "spread", "zeros", "all zero", "huge")


def drawn_importance(name: str, rng: np.random.Generator, n: int) -> np.ndarray | None:
    match name:
        case "none":
            return None
        case "ones":
            return np.ones(n, np.float32)
        case "spread":
            return rng.lognormal(0, 2, n).astype(np.float32)
        case "zeros":
            return (rng.lognormal(0, 1, n) * (rng.random(n) < 0.5)).astype(np.float32)
        case "all zero":
            return np.zeros(n, np.float32)
    return (10.0 ** rng.uniform(-20, 20, n)).astype(np.float32)


@given(
    kind=st.sampled_from(ALL),
    importance=st.sampled_from(IMPORTANCES),
    seed=st.integers(0, 1 << 32),
    exponents=st.tuples(st.floats(-46, 38.5), st.floats(-46, 38.5)),
    zero_share=st.sampled_from([0.0, 0.1, 0.9]),
    offset=st.sampled_from([0.0, 1.0, -1.0]),
)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_any_finite_weights(kind, importance, seed, exponents, zero_share, offset):
    """Magnitudes from denormal to the largest float32, alike or mixed in a block."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], (3, 512)) * 10 ** rng.uniform(*sorted(exponents), (3, 512))
    x = x + offset * 10 ** max(exponents)
    x[rng.random((3, 512)) < zero_share] = 0
    rows = np.clip(x, -3.4e38, 3.4e38).astype(np.float32)
    weights = drawn_importance(importance, rng, 512)
    free = native.quantize(rows, kind, weights, validate=False)
    assert np.isfinite(ggml.dequantize(free, kind, rows.shape)).all()
    assert validates(free, kind)
    try:
        checked = native.quantize(rows, kind, weights)
    except OverflowError:
        assert np.abs(rows).max() > SAFE
    else:
        np.testing.assert_array_equal(checked, free)


@pytest.mark.parametrize("importance", ["none", "ones", "spread", "zeros"])
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda k: k.name)
def test_error_of_random_weights(kind, importance):
    """No more error than ggml over many draws; one draw with a lone outlier may go either way."""
    logs = []
    draws = itertools.product(range(3), (0.0, 3.0, -20.0), (2, 3, 30))
    for seed, offset, dof in draws:
        rng = np.random.default_rng(seed)
        x = (rng.standard_t(dof, (4, 1024)) + offset) * 10.0 ** rng.uniform(-3, 1)
        rows = x.astype(np.float32)
        weights = drawn_importance(importance, rng, 1024) if kind in WEIGHTED else None
        a = rmse(rows, native.quantize(rows, kind, weights), kind, weights)
        b = rmse(rows, ggml.quantize(rows, kind, weights), kind, weights)
        assert a <= 3 * b + 1e-6 * np.abs(rows).max()
        logs.append(np.log(a / b))
    assert np.mean(logs) <= 0.01


@each_form
def test_too_large(kind, weighted):
    if kind is t.BF16:
        rows = np.full((17, 256), np.finfo(np.float32).max)
    else:
        rows = gaussian((17, 256)) * np.float32(1e36)
    importance = importance_of(256) if weighted else None
    with pytest.raises(OverflowError, match=kind.name):
        native.quantize(rows, kind, importance)
    data = native.quantize(rows, kind, importance, validate=False)
    assert validates(data, kind)
    back = ggml.dequantize(data, kind, rows.shape)
    assert np.isfinite(back).all()
    assert np.abs(back).max() > 30_000


@each_form
def test_one_block_too_large_among_others(kind, weighted):
    """Wherever it stands, it is noticed, and it does its neighbours no harm."""
    size = max(kind.block_weights, 32)
    rows = gaussian((19, size))
    importance = importance_of(size) if weighted else None
    expected = native.quantize(rows, kind, importance).reshape(19, -1)
    for i in (0, 15, 16, 18):
        hard = rows.copy()
        hard[i] *= np.float32(1e36)
        hard[i, 0] = np.finfo(np.float32).max
        with pytest.raises(OverflowError):
            native.quantize(hard, kind, importance)
        found = native.quantize(hard, kind, importance, validate=False).reshape(19, -1)
        others = np.arange(19) != i
        np.testing.assert_array_equal(found[others], expected[others])


# F16 and BF16


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


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", PLAIN, ids=label)
def test_nan_and_infinity_stay(kind, dtype):
    x = np.array([[np.nan, -np.nan, np.inf, -np.inf, 1.5, -0.0]], np.float32)
    rows = bf16_bits(x) if dtype == np.uint16 else x.astype(dtype)
    found = ggml.dequantize(native.quantize(rows, kind), kind, x.shape)
    np.testing.assert_array_equal(found, x)
    assert np.signbit(found[0, 5])


@pytest.mark.parametrize("kind", PLAIN, ids=label)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 33])
def test_few_weights(kind, n):
    for x in (gaussian((n,)), gaussian((n, 1)), gaussian((1, n))):
        np.testing.assert_array_equal(native.quantize(x, kind), ggml.quantize(x, kind))
    bits = bf16_bits(gaussian((n,)))
    np.testing.assert_array_equal(native.quantize(bits, kind), ggml.quantize(bits, kind))
    big = np.full(n, np.finfo(np.float32).max)
    with pytest.raises(OverflowError):
        native.quantize(big, kind)


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


# The interface


@pytest.mark.parametrize("shape", [(255,), (257,), (1, 256), (256, 1), ()], ids=str)
@pytest.mark.parametrize("kind", [t.Q4_0, t.Q4_K], ids=label)
def test_importance_of_wrong_size(kind, shape):
    with pytest.raises(ValueError, match="importance weights for 256 columns"):
        native.quantize(gaussian((2, 256)), kind, np.ones(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8, np.int32])
@pytest.mark.parametrize("kind", [t.F32, t.F16, t.BF16, t.Q4_K], ids=label)
def test_rows_of_wrong_dtype(kind, dtype):
    with pytest.raises(TypeError, match=np.dtype(dtype).name):
        native.quantize(np.zeros((2, 256), dtype), kind)


def test_rows_that_are_no_whole_blocks():
    with pytest.raises(ValueError, match="not whole Q4_K blocks"):
        native.quantize(gaussian((2, 128)), t.Q4_K)


@each_form
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=lambda d: d.__name__)
def test_rows_are_only_read(kind, weighted, dtype):
    rows = gaussian((3, 256)).astype(dtype)
    before = rows.copy()
    importance = importance_of(256) if weighted else None
    weights = None if importance is None else importance.copy()
    expected = native.quantize(rows, kind, importance)
    rows.flags.writeable = False
    if importance is not None:
        importance.flags.writeable = False
    np.testing.assert_array_equal(native.quantize(rows, kind, importance), expected)
    np.testing.assert_array_equal(rows, before)
    if importance is not None:
        np.testing.assert_array_equal(importance, weights)


def test_read_only_bf16():
    bits = bf16_bits(gaussian((3, 256)))
    before = bits.copy()
    expected = {k: native.quantize(bits, k) for k in (*FROM_BF16, t.BF16, t.F32)}
    bits.flags.writeable = False
    for kind, data in expected.items():
        np.testing.assert_array_equal(native.quantize(bits, kind), data)
    np.testing.assert_array_equal(bits, before)
    np.testing.assert_array_equal(expected[t.F32].view(np.float32), widened(bits).reshape(-1))


@pytest.mark.parametrize("kind", [t.F32, t.BF16], ids=label)
def test_output_of_bf16_is_not_the_input(kind):
    bits = bf16_bits(gaussian((3, 256)))
    assert not np.shares_memory(native.quantize(bits, kind), bits)


def test_as_input_changes_nothing():
    for dtype in (np.float32, np.float16, np.uint16):
        rows = np.ones((2, 32), dtype)
        assert native.as_input(rows) is rows


def test_threads_do_not_disturb_each_other():
    rows = gaussian((64, 1024))
    importance = importance_of(1024)
    for kind, weights in ((t.Q4_K, None), (t.Q6_K, importance), (t.Q4_0, importance)):
        expected = native.quantize(rows, kind, weights).tobytes()
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(native.quantize, rows, kind, weights) for _ in range(16)]
            assert {job.result().tobytes() for job in jobs} == {expected}


# Compiling


@each_form
def test_prepare_compiles_what_quantize_uses(kind, weighted):
    """For each dtype of rows; read-only ones and importance included."""
    dtypes = [np.float32, np.float16] + [np.uint16] * (kind in (*FROM_BF16, t.BF16))
    native.prepare([(kind, np.dtype(d), weighted) for d in dtypes])
    names = [k for k in kernels._MODULES if k.startswith(kind.name.lower())]
    names += [f"{k}_weighted" for k in names if kind in WEIGHTED]
    before = {k: len(kernels.load(k).signatures) for k in names}
    importance = importance_of(256) if weighted else None
    for dtype in dtypes:
        x = gaussian((2, 256))
        rows = bf16_bits(x) if dtype == np.uint16 else x.astype(dtype)
        rows.flags.writeable = False
        native.quantize(rows, kind, importance)
        native.quantize(rows.reshape(-1), kind, np.repeat(importance, 2) if weighted else None)
    assert {k: len(kernels.load(k).signatures) for k in names} == before
    assert any(before.values())
    # Whatever order tests run in: no read-only array, strided array or other dtype came through.
    for name in names:
        found = kernels.load(name).signatures
        assert all(x.mutable and x.layout == "C" and x.ndim == 1 for args in found for x in args)
        assert {str(args[0].dtype) for args in found} <= {"float32", "uint16"}


SCRIPT = """
import json, sys
import numpy as np
from dus_edge.quant import kernels, native
from dus_edge.quant import types as t
native.prepare([(t.BF16, np.dtype(np.float32), False)])
kernel = kernels.load("bf16")
stats = kernel.stats
out = native.quantize(np.arange(32, dtype=np.float32), t.BF16)
print(json.dumps({
    "hits": sum(stats.cache_hits.values()),
    "misses": sum(stats.cache_misses.values()),
    "signatures": len(kernel.signatures),
    "folder": str(kernels.cache_folder()),
    "out": out.tolist(),
}))
"""


def in_a_process(cache: Path, **env: str) -> dict:
    inherited = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env=inherited | {"XDG_CACHE_HOME": str(cache)} | env,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "darwin", reason="the cache stands elsewhere")
def test_compiled_code_is_kept(tmp_path):
    first = in_a_process(tmp_path)
    assert (first["hits"], first["misses"], first["signatures"]) == (0, 1, 1)
    folder = Path(first["folder"])
    assert folder.parent == tmp_path / "dus-edge"
    assert list(folder.rglob("*bf16*.nbc"))
    second = in_a_process(tmp_path)
    assert (second["hits"], second["misses"]) == (1, 0)
    assert second["out"] == first["out"]


@pytest.mark.skipif(sys.platform == "darwin", reason="the cache stands elsewhere")
def test_without_a_cache_that_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    found = in_a_process(tmp_path / "file", TMPDIR=str(tmp_path / "tmp"))
    assert found["signatures"] == 1
    assert found["out"] == ggml.quantize(np.arange(32, dtype=np.float32), t.BF16).tolist()
    assert (tmp_path / "file").read_text() == ""
