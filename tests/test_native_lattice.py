"""Types of points: gguf-py's points, the table of those near, and what the kernels take of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from dus_edge.quant import ggml, native
from dus_edge.quant import types as t
from dus_edge.quant.kernels.lattice import points
from dus_edge.quant.kernels.lattice.points import IQ2_S, IQ2_XS, IQ3_S, Lattice

from .native_cases import gaussian, importance_of, rmse, search_weights

pytestmark = pytest.mark.usefixtures("compiled")

LATTICES = pytest.mark.parametrize("lattice", [IQ3_S, IQ2_S, IQ2_XS], ids=lambda x: x.name)
N_POINTS = {"IQ3_S": 512, "IQ2_S": 1024, "IQ2_XS": 512}
#: Weights of a scale, what a value of gguf-py's is divided by, and D's multiples in a block.
SIZES = {"IQ3_S": 32, "IQ2_S": 16, "IQ2_XS": 16}
UNITS = {"IQ3_S": 1, "IQ2_S": 8, "IQ2_XS": 8}
NIBBLES = {"IQ3_S": slice(106, 110), "IQ2_S": slice(74, 82), "IQ2_XS": slice(66, 74)}


def values_of(lattice: Lattice) -> np.ndarray:
    """Values of all points, ``(n, dims)``, from the other dequantizer's table."""
    reference = getattr(gguf.quants, lattice.name)
    reference.init_grid()
    return reference.grid.reshape(-1, lattice.dims) / UNITS[lattice.name]


def keys_of(lattice: Lattice) -> np.ndarray:
    n = len(lattice.values)
    return np.stack([np.arange(lattice.n_keys) // n**i % n for i in range(lattice.dims)], 1)


@LATTICES
def test_points_are_llama_cpps(lattice):
    """Each is met by weights that lie on it, by signs and every scale of a super-block."""
    values, size = values_of(lattice), SIZES[lattice.name]
    codes = points.points(lattice)
    assert codes.shape == (N_POINTS[lattice.name], lattice.dims)
    np.testing.assert_array_equal(np.array(lattice.values)[codes], values * UNITS[lattice.name])
    rng = np.random.default_rng(0)
    blocks = rng.permutation(np.repeat(values, 16, axis=0)).reshape(-1, 256 // size, size)
    n = blocks.shape[0] * blocks.shape[1]
    multiples = rng.permutation(np.resize(2 * np.arange(16) + 1, n)).reshape(blocks.shape[:2])
    multiples[:, 0] = 31
    signs = rng.choice([-1, 1], (n * size // 8, 8))
    if lattice is IQ2_XS:
        signs[:, 7] = signs[:, :7].prod(1)
    rows = blocks * multiples[..., None] * signs.reshape(blocks.shape) * 2.0**-10
    rows = rows.reshape(-1, 256).astype(np.float32)
    kind = t.TYPES[lattice.name]
    data = native.quantize(rows, kind, np.ones(256, np.float32))
    back = ggml.dequantize(data, kind, rows.shape)
    met = (np.abs(back - rows) < 1e-3 * np.abs(rows)).reshape(-1, 256).all(1)
    assert met.mean() > 0.9


@LATTICES
def test_the_table_names_points_that_are_near(lattice):
    near = points.neighbours(lattice)
    assert near.shape == (lattice.n_keys, lattice.near)
    distances = np.square(points.points(lattice)[None] - keys_of(lattice)[:, None]).sum(-1)
    exact = distances.min(1) == 0
    assert exact.sum() == N_POINTS[lattice.name]
    assert (near[exact] == distances[exact].argmin(1)[:, None]).all()
    # Elsewhere they differ, and the nearest there is stands among the first few.
    assert all(len(set(row)) == lattice.near for row in near[~exact])
    named = np.take_along_axis(distances, near, axis=1)
    assert (named.min(1) == distances.min(1)).all()
    assert (named[:, :6].min(1) == distances.min(1)).mean() > 0.95
    # No key's points lie far: half of them within the distance of the 24th nearest.
    assert (np.median(named, 1) <= np.sort(distances, 1)[:, 23]).all()


@LATTICES
def test_packed_tables_say_the_same(lattice):
    near = points.neighbours(lattice)
    words = points.pairs(lattice, 4).view(np.uint32).reshape(-1, 2)
    codes, bits = points.points(lattice), 16 // lattice.dims
    for i in range(4):
        packed = words[:, i // 2] >> np.uint32(16 * (i % 2))
        for k in range(lattice.dims):
            field = packed >> bits * k & ((1 << bits) - 1)
            np.testing.assert_array_equal(field, np.array(lattice.packed)[codes[near[:, i], k]])
    places = len(lattice.values) ** np.arange(lattice.dims)
    np.testing.assert_array_equal(
        points.numbers(lattice)[codes @ places], np.arange(N_POINTS[lattice.name])
    )


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
@LATTICES
def test_what_is_stored_is_the_best_point(lattice, spread):
    """Beside all points for the scales and signs that were stored: 1 % of the error is lost at
    most, with 512 points of eight weights 2 %.
    """
    kind, values, dims = t.TYPES[lattice.name], values_of(lattice), lattice.dims
    rows, importance = gaussian((32, 512), 4), importance_of(512, spread=spread)
    data = native.quantize(rows, kind, importance)
    blocks = data.reshape(-1, kind.block_bytes)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    nibbles = blocks[:, NIBBLES[lattice.name]]
    steps = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(len(blocks), -1)
    scales = np.repeat(d * (2 * steps + 1), SIZES[lattice.name] // dims, axis=1).reshape(-1, 1)
    back = ggml.dequantize(data, kind, rows.shape)
    x = (rows * np.sign(back)).reshape(-1, dims).astype(np.float64)
    w = search_weights(rows, kind, importance).reshape(-1, dims)
    # Σw(x − dv)² of every point, by its products.
    costs = (
        (w * x**2).sum(1, keepdims=True)
        - 2 * scales * (w * x) @ values.T
        + scales**2 * (w @ np.square(values.T))
    )
    ours = rmse(rows, data, kind, importance) ** 2
    most = 1.02 if lattice is IQ2_XS else 1.01
    assert ours <= most * costs.min(1).sum() / w.sum()


def test_a_sign_that_iq2_xs_cannot_hold_costs_least():
    """Every eight weights have an even number of minus signs; the cheapest one gives way."""
    rows, importance = gaussian((16, 512), 7), importance_of(512)
    back = ggml.dequantize(native.quantize(rows, t.IQ2_XS, importance), t.IQ2_XS, rows.shape)
    flipped = (np.sign(back) != np.sign(rows)).reshape(-1, 8)
    odd = (rows < 0).reshape(-1, 8).sum(1) % 2 == 1
    np.testing.assert_array_equal(flipped.sum(1), odd)
    w = search_weights(rows, t.IQ2_XS, importance)
    costs = (w * np.square(rows)).reshape(-1, 8)
    np.testing.assert_array_equal(flipped[odd].argmax(1), costs[odd].argmin(1))


#: Of the types without importance and with: at most this share of ggml's error.
SHARES = {
    ("IQ3_S", False): 0.83,
    ("IQ3_S", True): 0.94,
    ("IQ2_S", True): 0.97,
    ("IQ2_XS", True): 0.96,
}


@pytest.mark.parametrize(("name", "weighted"), SHARES)
def test_clearly_less_error_than_ggml(name, weighted):
    rows, kind = gaussian((32, 1024), 5), t.TYPES[name]
    importance = importance_of(1024) if weighted else None
    ours, theirs = (
        rmse(rows, side.quantize(rows, kind, importance), kind, importance)
        for side in (native, ggml)
    )
    assert ours < SHARES[name, weighted] * theirs
