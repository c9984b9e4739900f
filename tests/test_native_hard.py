"""Our own quantizers on blocks that are hard: outliers, offsets, denormals, too large numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dus_edge.quant import ggml, native
from dus_edge.quant import types as t

from .cases import check_each
from .draws import examples
from .native_cases import (
    ALL,
    FORMS,
    IMPORTANCES,
    SIGMA,
    drawn_importance,
    gaussian,
    importance_of,
    rmse,
    validates,
)

pytestmark = pytest.mark.usefixtures("compiled")


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


@pytest.mark.parametrize("case", CASES)
def test_hard_blocks(case):
    rows = hard_rows(case)

    def check(form):
        kind, weighted = form
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

    check_each(check, FORMS)


def assert_zeros(form, rows: np.ndarray) -> None:
    kind, weighted = form
    importance = importance_of(256) if weighted else None
    assert not ggml.dequantize(native.quantize(rows, kind, importance), kind, rows.shape).any()


def test_zeros_stay_zeros():
    rows = np.zeros((18, 256), np.float32)
    rows[9:] = -0.0
    check_each(assert_zeros, FORMS, [rows])


def test_denormals_become_zeros():
    rows = np.random.default_rng(0).integers(0, 1 << 23, (18, 256)).astype(np.uint32)
    rows = (rows | np.uint32(1 << 31) * (rows & 1)).view(np.float32)
    assert (np.abs(rows) < np.finfo(np.float32).tiny).all()
    check_each(assert_zeros, [f for f in FORMS if f.kind is not t.BF16], [rows])


#: No type has to refuse weights up to here; most hold larger ones.
SAFE = 6e4


@given(
    kind=st.sampled_from(ALL),
    importance=st.sampled_from(IMPORTANCES),
    seed=st.integers(0, 1 << 32),
    exponents=st.tuples(st.floats(-46, 38.5), st.floats(-46, 38.5)),
    zero_share=st.sampled_from([0.0, 0.1, 0.9]),
    offset=st.sampled_from([0.0, 1.0, -1.0]),
)
@example(t.Q3_K, "huge", 0, (0.0, -25.0), 0.9, 0.0)  # sums of importance without digits
@example(t.F16, "none", 0, (0.0, -0.0), 0.0, 0.0)
@examples(500)
def test_any_finite_weights(kind, importance, seed, exponents, zero_share, offset):
    """Magnitudes from denormal to the largest float32, alike or mixed in a block."""
    rng = np.random.default_rng(seed)
    low, high = sorted(e + 0.0 for e in exponents)  # no −0, which numpy takes for less than 0
    x = rng.choice([-1.0, 1.0], (3, 512)) * 10 ** rng.uniform(low, high, (3, 512))
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


def test_too_large():
    def check(form):
        kind, weighted = form
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

    check_each(check, FORMS)


def test_one_block_too_large_among_others():
    """Wherever it stands, it is noticed, and it does its neighbours no harm."""

    def check(form):
        kind, weighted = form
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

    check_each(check, FORMS)
