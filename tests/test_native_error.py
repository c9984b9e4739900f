"""Our own quantizers against ggml's: no more error, by llama.cpp's dequantizers."""

from __future__ import annotations

import functools
import itertools

import gguf
import numpy as np
import pytest

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.quant import ggml, native
from dus_edge.quant import types as t
from dus_edge.quant.imatrix import DEPENDENT

from .cases import check_each
from .native_cases import (
    FORMS,
    PLAIN,
    QUANTIZED,
    SIGMA,
    WEIGHTED,
    drawn_importance,
    gaussian,
    importance_of,
    rmse,
    validates,
)

pytestmark = pytest.mark.usefixtures("compiled")


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


@pytest.mark.parametrize("data", ["gaussian", "heavy", "sparse", "pico"])
def test_no_more_error_than_ggml(data):
    def check(form):
        kind, weighted = form
        found = []
        for i, rows in enumerate(matrices(data)):
            importance = importance_of(rows.shape[1], i) if weighted else None
            ours = native.quantize(rows, kind, importance)
            assert validates(ours, kind)
            theirs = ggml.quantize(rows, kind, importance)
            found.append((rmse(rows, ours, kind, importance), rmse(rows, theirs, kind, importance)))
        ratios = [a / b if b else float(a > 0) for a, b in found]
        assert max(ratios, default=0) <= 1, ratios

    check_each(check, FORMS)


def test_the_data_of_these_tests():
    assert len(matrices("pico")) >= 4
    assert all(x.ndim == 2 and x.size >= 1 << 14 for x in matrices("pico"))


def test_gguf_package_reads_the_same():
    """A second dequantizer, in Python, agrees with ggml's about our bytes."""
    rows = gaussian((4, 512))

    def check(kind):
        data = native.quantize(rows, kind)
        there = gguf.quants.dequantize(data.reshape(4, -1), gguf.GGMLQuantizationType(kind.ggml_id))
        np.testing.assert_allclose(
            there, ggml.dequantize(data, kind, rows.shape), rtol=1e-6, atol=1e-9
        )

    check_each(check, QUANTIZED)


def test_importance_moves_error_away_from_columns_that_count():
    rows = gaussian((64, 512), 3)
    importance = np.ones(512, np.float32)
    importance[::4] = 100

    def check(kind):
        def error(data: np.ndarray) -> float:
            return float(np.square(ggml.dequantize(data, kind, rows.shape) - rows)[:, ::4].sum())

        assert error(native.quantize(rows, kind, importance)) < error(native.quantize(rows, kind))

    check_each(check, WEIGHTED)


def test_weights_that_were_q8_0_keep_their_values():
    """ggml's blocks and our own, quantized again: no weight moves, though many scales are tried.

    Scales below float16's normal numbers are too coarse for that, so ours may move there.
    """
    rows = gaussian((64, 512), 5)
    for quantize, factor in ((native.quantize, 1), (ggml.quantize, 1), (ggml.quantize, 1e-3)):
        stored = ggml.dequantize(quantize(rows * np.float32(factor), t.Q8_0), t.Q8_0, rows.shape)
        again = native.quantize(stored, t.Q8_0)
        np.testing.assert_array_equal(ggml.dequantize(again, t.Q8_0, rows.shape), stored)


def test_q8_0_is_searched():
    rows = gaussian((64, 512), 6)
    ours, theirs = (
        rmse(rows, f(rows, t.Q8_0), t.Q8_0, None) for f in (native.quantize, ggml.quantize)
    )
    assert ours < 0.93 * theirs


def test_importance_means_nothing_to_types_without_search():
    rows = gaussian((3, 64))

    def check(kind):
        with_it = native.quantize(rows, kind, importance_of(64))
        np.testing.assert_array_equal(with_it, native.quantize(rows, kind))

    check_each(check, (*PLAIN, t.Q8_0))


@pytest.mark.parametrize("importance", ["none", "ones", "spread", "zeros"])
def test_error_of_random_weights(importance):
    """No more error than ggml over many draws; one draw with a lone outlier may go either way."""

    def check(kind):
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

    check_each(check, [k for k in QUANTIZED if importance != "none" or k not in DEPENDENT])
