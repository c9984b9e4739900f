"""Rows that our own quantizers take: dtypes, shapes, threads, what is compiled for them.

The last tests see what the others had compiled, so they stand in one file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dus_edge.quant import ggml, kernels, native
from dus_edge.quant import types as t
from dus_edge.quant.imatrix import DEPENDENT

from .cases import check_each
from .native_cases import (
    ALL,
    FORMS,
    FROM_BF16,
    K_TYPES,
    SMALL,
    WEIGHTED,
    bf16_bits,
    drawn_importance,
    gaussian,
    importance_of,
    widened,
)

pytestmark = pytest.mark.usefixtures("compiled")


def test_bf16_rows_give_the_bytes_of_the_same_numbers():
    bits = bf16_bits(gaussian((5, 768)))

    def check(weighted, kind):
        importance = importance_of(768) if weighted else None
        expected = native.quantize(widened(bits), kind, importance)
        np.testing.assert_array_equal(native.quantize(bits, kind, importance), expected)

    check_each(check, [False, True], (*FROM_BF16, t.BF16))


def test_f16_rows_give_the_bytes_of_the_same_numbers():
    halves = gaussian((5, 768)).astype(np.float16)

    def check(form):
        kind, weighted = form
        importance = importance_of(768) if weighted else None
        expected = native.quantize(halves.astype(np.float32), kind, importance)
        np.testing.assert_array_equal(native.quantize(halves, kind, importance), expected)

    check_each(check, FORMS)


@pytest.mark.parametrize("n_blocks", [1, 15, 16, 17, 33])
def test_a_row_does_not_depend_on_its_neighbours(n_blocks):
    """Rows of one to four blocks, so that groups of 16 end anywhere in a row."""
    per_row = next(n for n in (3, 5, 1) if n_blocks % n == 0) if n_blocks > 1 else 1

    def check(form):
        kind, weighted = form
        n_cols = per_row * max(kind.block_weights, 32)
        rows = gaussian((n_blocks // per_row, n_cols), n_blocks)
        rows *= np.random.default_rng(0).lognormal(0, 1, (len(rows), 1)).astype(np.float32)
        importance = importance_of(n_cols) if weighted else None
        whole = native.quantize(rows, kind, importance)
        alone = [native.quantize(row, kind, importance) for row in rows]
        np.testing.assert_array_equal(whole, np.concatenate(alone))

    check_each(check, FORMS)


def test_only_ratios_of_importance_count():
    x = gaussian((2, 512))
    importance = drawn_importance("spread", np.random.default_rng(0), 512)

    def check(scale, kind):
        expected = native.quantize(x, kind, importance)
        np.testing.assert_array_equal(
            native.quantize(x, kind, importance * np.float32(scale)), expected
        )

    check_each(check, [2.0**100, 2.0**-100], WEIGHTED)


def test_importance_belongs_to_columns():
    """A super-block of a row is as if it were alone with its columns' importance."""

    def check(kind, n_cols):
        rows, importance = gaussian((9, n_cols), 5), importance_of(n_cols, spread=2)
        whole = native.quantize(rows, kind, importance).reshape(9, -1, kind.block_bytes)
        for j in range(n_cols // 256):
            part = slice(256 * j, 256 * (j + 1))
            alone = native.quantize(rows[:, part], kind, importance[part])
            np.testing.assert_array_equal(whole[:, j].reshape(-1), alone)

    check_each(check, K_TYPES, [256, 512, 768, 1024])


def test_importance_belongs_to_columns_of_small_blocks():
    """The same; every block of a row has the same mean square, which counts there."""

    def check(kind, n_cols):
        rng = np.random.default_rng(6)
        first = rng.integers(-50, 50, (9, 1, 32)).astype(np.float32)
        blocks = rng.permuted(np.repeat(first, n_cols // 32, axis=1), axis=2)
        rows, importance = blocks.reshape(9, n_cols), importance_of(n_cols, spread=2)
        whole = native.quantize(rows, kind, importance).reshape(9, -1, kind.block_bytes)
        for j in range(n_cols // 32):
            part = slice(32 * j, 32 * (j + 1))
            alone = native.quantize(rows[:, part], kind, importance[part])
            np.testing.assert_array_equal(whole[:, j].reshape(-1), alone)

    check_each(check, SMALL, [32, 96, 160, 544])


def test_no_rows():
    def check(kind):
        assert native.quantize(np.empty((0, 256), np.float32), kind).shape == (0,)

    check_each(check, ALL)


# The interface


def test_importance_of_wrong_size():
    def check(kind, shape):
        with pytest.raises(ValueError, match="importance weights for 256 columns"):
            native.quantize(gaussian((2, 256)), kind, np.ones(shape, np.float32))

    check_each(check, [t.Q4_0, t.Q4_K], [(255,), (257,), (1, 256), (256, 1), ()])


def test_rows_of_wrong_dtype():
    def check(kind, dtype):
        with pytest.raises(TypeError, match=np.dtype(dtype).name):
            native.quantize(np.zeros((2, 256), dtype), kind)

    check_each(check, [t.F32, t.F16, t.BF16, t.Q4_K], [np.float64, np.int16, np.uint8, np.int32])


def test_rows_that_are_no_whole_blocks():
    with pytest.raises(ValueError, match="not whole Q4_K blocks"):
        native.quantize(gaussian((2, 128)), t.Q4_K)


def test_rows_are_only_read():
    def check(dtype, form):
        kind, weighted = form
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

    check_each(check, [np.float32, np.float16], FORMS)


def test_read_only_bf16():
    bits = bf16_bits(gaussian((3, 256)))
    before = bits.copy()
    expected = {k: native.quantize(bits, k) for k in (*FROM_BF16, t.BF16, t.F32)}
    bits.flags.writeable = False
    for kind, data in expected.items():
        np.testing.assert_array_equal(native.quantize(bits, kind), data)
    np.testing.assert_array_equal(bits, before)
    np.testing.assert_array_equal(expected[t.F32].view(np.float32), widened(bits).reshape(-1))


def test_output_of_bf16_is_not_the_input():
    bits = bf16_bits(gaussian((3, 256)))

    def check(kind):
        assert not np.shares_memory(native.quantize(bits, kind), bits)

    check_each(check, [t.F32, t.BF16])


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


def test_prepare_compiles_what_quantize_uses():
    """For each dtype of rows; read-only ones and importance included."""

    def check(form):
        kind, weighted = form
        dtypes = [np.float32, np.float16] + [np.uint16] * (kind in (*FROM_BF16, t.BF16))
        native.prepare([(kind, np.dtype(d), weighted) for d in dtypes])
        alone = [k for k in kernels._MODULES if k.startswith(kind.name.lower())]
        names = [f"{k}_weighted" for k in alone if kind in WEIGHTED]
        names += alone if kind not in DEPENDENT else []
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
        # Whatever order tests run in: no read-only or strided array, no other dtype came through.
        for name in names:
            found = kernels.load(name).signatures
            assert all(
                x.mutable and x.layout == "C" and x.ndim == 1 for args in found for x in args
            )
            assert {str(args[0].dtype) for args in found} <= {"float32", "uint16"}

    check_each(check, FORMS)


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
