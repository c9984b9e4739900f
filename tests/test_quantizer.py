"""The choice of a quantizer, and ggml's side of the interface against direct calls of ggml."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from dus_edge.errors import UsageError
from dus_edge.quant import ggml
from dus_edge.quant import types as t
from dus_edge.quant.choose import DEFAULT, QUANTIZERS, find_quantizer

COLUMNS = 512
#: Types whose search weighs errors by importance, and one whose does not.
WEIGHTED = tuple(kind for kind in t.TYPES.values() if kind.block_weights > 1 and kind != t.Q8_0)


def rows_of(seed: int) -> np.ndarray:
    """Float32 rows that bf16 and f16 both hold exactly."""
    x = np.random.default_rng(seed).standard_normal((4, COLUMNS), np.float32)
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float16).astype(np.float32)


def importance_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, COLUMNS).astype(np.float32)


def direct(rows: np.ndarray, kind: t.QuantType, importance: np.ndarray | None) -> bytes:
    """`ggml_quantize_chunk` row by row, through pointers of its own."""
    lib = ctypes.CDLL(ggml.library()._name)
    function = lib.ggml_quantize_chunk
    floats = ctypes.POINTER(ctypes.c_float)
    sizes = [ctypes.c_int64] * 3
    function.argtypes = [ctypes.c_int, floats, ctypes.c_char_p, *sizes, floats]
    function.restype = ctypes.c_size_t
    weights = None if importance is None else importance.ctypes.data_as(floats)
    out = b""
    for row in rows:
        buffer = ctypes.create_string_buffer(kind.row_bytes(COLUMNS))
        n = function(kind.ggml_id, row.ctypes.data_as(floats), buffer, 0, 1, COLUMNS, weights)
        assert n == len(buffer)
        out += buffer.raw
    return out


@pytest.mark.parametrize("name", QUANTIZERS)
def test_each_has_its_name_and_the_interface(name):
    quantizer = find_quantizer(name)
    assert name == quantizer.NAME
    quantizer.prepare(())
    rows = rows_of(0)
    wanted = [(kind, rows.dtype, False) for kind in (t.F32, t.BF16, t.Q8_0)]
    quantizer.prepare(wanted, lambda line: None)
    ready = quantizer.as_input(rows)
    for kind, _, _ in wanted:
        out = quantizer.quantize(ready, kind)
        assert out.dtype == np.uint8
        assert out.shape == (4 * kind.row_bytes(COLUMNS),)
        np.testing.assert_array_equal(out, quantizer.quantize(rows, kind))
    assert quantizer.quantize(ready, t.F32).tobytes() == rows.tobytes()


def test_the_programs_own_is_the_default():
    assert DEFAULT == "native"
    assert find_quantizer(DEFAULT).__name__ == "dus_edge.quant.native"


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="no quantizer 'exact'; choose one of native, ggml"):
        find_quantizer("exact")


@pytest.mark.parametrize("kind", WEIGHTED, ids=lambda k: k.name)
def test_importance_reaches_ggml(kind):
    rows, importance = rows_of(1), importance_of(2)
    weighted = ggml.quantize(rows, kind, importance).tobytes()
    assert weighted == direct(rows, kind, importance)
    if kind is t.IQ2_XS:
        # Without importance ggml would end the process.
        alike = ggml.quantize(rows, kind, np.ones(COLUMNS, np.float32))
        np.testing.assert_array_equal(ggml.quantize(rows, kind), alike)
        return
    assert ggml.quantize(rows, kind).tobytes() == direct(rows, kind, None)
    assert weighted != ggml.quantize(rows, kind).tobytes()


@pytest.mark.parametrize("kind", [t.F32, t.F16, t.Q8_0, t.Q4_K], ids=lambda k: k.name)
def test_stored_rows_of_any_dtype_give_the_same_bytes(kind):
    """The rows are exact in each dtype; a read-only chunk is as good as another."""
    rows = rows_of(3)
    expected = ggml.quantize(rows, kind).tobytes()
    as_bf16 = (rows.view(np.uint32) >> 16).astype(np.uint16)
    for stored in (as_bf16, rows.astype(np.float16)):
        stored.flags.writeable = False
        assert ggml.quantize(stored, kind).tobytes() == expected
        assert ggml.quantize(ggml.as_input(stored), kind).tobytes() == expected


@pytest.mark.parametrize(
    "importance",
    [
        np.ones(COLUMNS - 1, np.float32),
        np.ones((1, COLUMNS), np.float32),
        np.ones(COLUMNS, np.float64),
        np.ones(2 * COLUMNS, np.float32)[::2],
    ],
    ids=["short", "2-d", "float64", "strided"],
)
def test_importance_that_does_not_fit_is_refused(importance):
    """ggml takes a bare pointer and would read what lies behind."""
    with pytest.raises(ValueError, match="importance must be 512 contiguous float32 values"):
        ggml.quantize(rows_of(4), t.Q4_K, importance)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="int32 cannot be quantized"):
        ggml.quantize(np.zeros((1, COLUMNS), np.int32), t.Q8_0)


def test_too_large_for_the_type():
    rows = np.full((1, COLUMNS), 1e6, np.float32)
    with pytest.raises(OverflowError, match="F16"):
        ggml.quantize(rows, t.F16)
    ggml.quantize(rows, t.F16, validate=False)
