"""The points of IQ3_S: gguf-py's, the table of those near, and what the kernel takes of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from dus_edge.quant import ggml, native
from dus_edge.quant import types as t
from dus_edge.quant.kernels.lattice import points

from .native_cases import gaussian, importance_of, rmse, search_weights

pytestmark = pytest.mark.usefixtures("compiled")

KEYS = np.arange(4096)[:, None] >> np.array([0, 3, 6, 9]) & 7
#: Values of all points, from the other dequantizer's table.
gguf.quants.IQ3_S.init_grid()
VALUES = gguf.quants.IQ3_S.grid.reshape(512, 4)


def test_points_are_llama_cpps():
    """Each is met by weights that lie on it, by both signs and every scale of a super-block."""
    np.testing.assert_array_equal(2 * points.points() + 1, VALUES)
    rng = np.random.default_rng(0)
    blocks = rng.permutation(np.repeat(VALUES, 16, axis=0)).reshape(-1, 8, 32)
    multiples = rng.permutation(np.tile(2 * np.arange(16) + 1, len(blocks) // 2)).reshape(-1, 8)
    multiples[:, 0] = 31
    rows = blocks * multiples[..., None] * rng.choice([-1, 1], blocks.shape) * 2.0**-10
    rows = rows.reshape(-1, 256).astype(np.float32)
    data = native.quantize(rows, t.IQ3_S, np.ones(256, np.float32))
    back = ggml.dequantize(data, t.IQ3_S, rows.shape)
    met = (np.abs(back - rows) < 1e-3 * np.abs(rows)).reshape(-1, 256).all(1)
    assert met.mean() > 0.9


def test_the_table_names_points_that_are_near():
    near = points.neighbours()
    assert near.shape == (4096, points.NEAR)
    distances = np.square(points.points()[None] - KEYS[:, None]).sum(-1)
    exact = distances.min(1) == 0
    assert exact.sum() == 512
    assert (near[exact] == distances[exact].argmin(1)[:, None]).all()
    # Elsewhere they differ, and the nearest there is stands among the first few.
    assert all(len(set(row)) == points.NEAR for row in near[~exact])
    named = np.take_along_axis(distances, near, axis=1)
    assert (named.min(1) == distances.min(1)).all()
    assert (named[:, :6].min(1) == distances.min(1)).mean() > 0.95
    # No key's points lie far: half of them within the distance of the 24th nearest.
    assert (np.median(named, 1) <= np.sort(distances, 1)[:, 23]).all()


def test_packed_tables_say_the_same():
    near = points.neighbours()
    words = points.pairs(4).view(np.uint32).reshape(4096, 2)
    for i in range(4):
        packed = words[:, i // 2] >> np.uint32(16 * (i % 2))
        for k in range(4):
            np.testing.assert_array_equal(packed >> 4 * k & 15, VALUES[near[:, i], k])
    np.testing.assert_array_equal(
        points.numbers()[(points.points() << np.array([0, 3, 6, 9])).sum(1)], np.arange(512)
    )


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_what_is_stored_is_the_best_point(spread):
    """Beside all 512 points for the scales that were stored: 1 % of the error at most is lost."""
    rows, importance = gaussian((32, 512), 4), importance_of(512, spread=spread)
    data = native.quantize(rows, t.IQ3_S, importance)
    blocks = data.reshape(-1, 110)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    steps = np.stack([blocks[:, 106:] & 15, blocks[:, 106:] >> 4], -1).reshape(-1, 8)
    scales = np.repeat(d * (2 * steps + 1), 8, axis=1).reshape(-1, 1)
    x = np.abs(rows.reshape(-1, 4).astype(np.float64))
    w = search_weights(rows, t.IQ3_S, importance).reshape(-1, 4)
    # Σw(x − dv)² of every point, by its products.
    costs = (
        (w * x**2).sum(1, keepdims=True)
        - 2 * scales * (w * x) @ VALUES.T.astype(np.float64)
        + scales**2 * (w @ np.square(VALUES.T, dtype=np.float64))
    )
    ours = rmse(rows, data, t.IQ3_S, importance) ** 2
    assert ours <= 1.01 * costs.min(1).sum() / w.sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_clearly_less_error_than_ggml(weighted):
    rows = gaussian((32, 1024), 5)
    importance = importance_of(1024) if weighted else None
    ours, theirs = (
        rmse(rows, side.quantize(rows, t.IQ3_S, importance), t.IQ3_S, importance)
        for side in (native, ggml)
    )
    assert ours < (0.94 if weighted else 0.83) * theirs
