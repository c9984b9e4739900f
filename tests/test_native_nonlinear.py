"""The values of IQ4_NL and IQ4_XS: polynomials beside the table in gguf-py, and what they spare."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numba import njit

from dus_edge.quant import ggml, native
from dus_edge.quant import types as t
from dus_edge.quant.kernels import nonlinear
from dus_edge.quant.kernels.nonlinear import near_value, nearest_index
from dus_edge.quant.simd import LANES, load, store
from dus_edge.quant.types import IQ4_LEVELS

from .cases import check_each
from .native_cases import gaussian

MIDDLES = np.add(IQ4_LEVELS[1:], IQ4_LEVELS[:-1]) / 2


@njit
def _near(y, v):
    for at in range(0, y.size, LANES):
        store(v, at, near_value(load(y, at)))


@njit
def _indices(y, v):
    for at in range(0, y.size, LANES):
        store(v, at, nearest_index(load(y, at)))


def through(function, y: np.ndarray) -> np.ndarray:
    y = np.pad(y.astype(np.float32), (0, -y.size % LANES))
    out = np.empty_like(y)
    function(y, out)
    return out


def everywhere() -> np.ndarray:
    """Multiples of 1/64 from −140 to 140: exact in float32, and the middles are among them."""
    return np.arange(-140 * 64, 140 * 64) / 64


def test_values_are_llama_cpps():
    assert list(IQ4_LEVELS) == list(gguf.quants.IQ4_NL.kvalues)
    rows = np.repeat(np.array(IQ4_LEVELS, np.float32), 2)[None]
    for kind, n in ((t.IQ4_NL, 1), (t.IQ4_XS, 8)):
        data = native.quantize(np.tile(rows, n), kind)
        # Every one of them can be met, by a scale of one.
        np.testing.assert_allclose(
            ggml.dequantize(data, kind, (1, 32 * n)), np.tile(rows, n), rtol=2e-3
        )


def test_what_is_stored_is_the_nearest():
    y = everywhere()
    found = through(_indices, y)[: y.size].astype(int)
    error = np.abs(y[:, None] - np.array(IQ4_LEVELS))
    np.testing.assert_array_equal(error[np.arange(y.size), found], error.min(1))


def test_a_candidate_takes_a_neighbour_only_at_the_middle():
    y = everywhere()
    found = through(_near, y)[: y.size]
    assert set(found.astype(int)) == set(IQ4_LEVELS)
    nearest = np.array(IQ4_LEVELS)[through(_indices, y)[: y.size].astype(int)]
    wrong = found != nearest
    steps = np.diff(IQ4_LEVELS)
    for at, value, best in zip(y[wrong], found[wrong], nearest[wrong], strict=True):
        lower = IQ4_LEVELS.index(int(min(value, best)))
        assert max(value, best) == IQ4_LEVELS[lower + 1]
        assert abs(at - MIDDLES[lower]) <= 0.03 * steps[lower]
    assert 0 < wrong.mean() < 0.03


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38])
def test_what_lies_outside_takes_an_end(value):
    for function in (_near, _indices):
        (found,) = set(through(function, np.full(LANES, value)))
        assert int(found) in {IQ4_LEVELS[0], IQ4_LEVELS[-1], 0, 15}


def test_scales_of_both_signs():
    """A block whose largest weight would overshoot one end is turned round."""
    rows = np.full((1, 256), 0.01, np.float32)
    rows[0, ::32] = 1.27

    def check(kind, sign):
        data = native.quantize(sign * rows, kind)
        back = ggml.dequantize(data, kind, rows.shape)
        theirs = ggml.dequantize(ggml.quantize(sign * rows, kind), kind, rows.shape)
        ours, other = (float(np.square(x - sign * rows).sum()) for x in (back, theirs))
        assert ours <= other * 1.001

    check_each(check, [t.IQ4_NL, t.IQ4_XS], [np.float32(1), np.float32(-1)])


def test_small_blocks_beside_a_large_one_keep_their_weights():
    """ggml rounds a scale of less than half a step to zero, and the block with it."""
    rows = gaussian((16, 256))
    rows[:, :32] *= 100

    def rest(quantize) -> float:
        back = ggml.dequantize(quantize(rows, t.IQ4_XS), t.IQ4_XS, rows.shape)
        return float(np.square(back - rows)[:, 32:].sum())

    assert rest(native.quantize) < 0.5 * rest(ggml.quantize)
    assert nonlinear._NO_STEP < 0.5
