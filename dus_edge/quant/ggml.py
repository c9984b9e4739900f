"""ggml's own quantizers, called through the library that llama-cpp-python installs: the reference.

`libggml-base` exports `ggml_quantize_chunk` (ggml/include/ggml.h). ctypes releases the GIL during
the call, so threads quantize side by side. Importing llama_cpp is not needed for it.

The functions that a `quantizer.Quantizer` has are here as there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from dus_edge.errors import DependencyError
from dus_edge.packages import require
from dus_edge.quant import types as t
from dus_edge.quant.quantizer import Conversion
from dus_edge.quant.types import QuantType

NAME = "ggml"

_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(
    sys.platform, "libggml-base.so"
)


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml/include/ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded `libggml-base`, its functions declared.

    Raises:
        DependencyError: llama-cpp-python is not installed or carries no such library.
    """
    require("llama", "ggml's quantizers need", instead="or use --quantizer native")
    spec = importlib.util.find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0] if places else "llama_cpp") / "lib" / _LIBRARY
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        raise DependencyError(
            f"{path} cannot be loaded ({e}); reinstall llama-cpp-python."
        ) from None
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    lib.ggml_bf16_to_fp32_row.restype = None
    lib.ggml_fp16_to_fp32_row.restype = None
    for convert in (lib.ggml_bf16_to_fp32_row, lib.ggml_fp16_to_fp32_row):
        convert.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    lib.ggml_type_size.restype = ctypes.c_size_t
    lib.ggml_type_size.argtypes = [ctypes.c_int]
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_blck_size.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return lib


def version() -> str:
    """Release of the llama-cpp-python whose ggml is used."""
    return importlib.metadata.version("llama_cpp_python")


def prepare(
    wanted: Iterable[Conversion] = (), say: Callable[[str], None] = lambda line: None
) -> None:
    """Load the library, which can do every conversion; see `Quantizer.prepare`."""
    library()


def to_f32(rows: np.ndarray) -> np.ndarray:
    """Rows as float32, C-contiguous; ``uint16`` is taken for bf16 bit patterns. Exact.

    Raises:
        TypeError: rows are neither float32, float16 nor uint16.
    """
    rows = np.ascontiguousarray(rows)
    if rows.dtype == np.float32:
        return rows
    lib = library()
    if rows.dtype == np.uint16:
        convert = lib.ggml_bf16_to_fp32_row
    elif rows.dtype == np.float16:
        convert = lib.ggml_fp16_to_fp32_row
    else:
        raise TypeError(f"weights of dtype {rows.dtype} cannot be quantized")
    out = np.empty(rows.shape, np.float32)
    convert(rows.ctypes.data, out.ctypes.data, rows.size)
    return out


def as_input(rows: np.ndarray) -> np.ndarray:
    """Stored rows as `quantize` works on them: ggml knows float32 only."""
    return to_f32(rows)


def quantize(
    rows: np.ndarray,
    kind: QuantType,
    importance: np.ndarray | None = None,
    *,
    validate: bool = True,
) -> np.ndarray:
    """Quantize rows.

    Args:
        rows: ``(n_rows, n_cols)`` or ``(n_cols,)`` float32, float16 or uint16 (bf16 bit
            patterns), C-contiguous; a row must be whole blocks of `kind`.
        kind: the target type.
        importance: ``(n_cols,)`` float32, C-contiguous: ggml's importance matrix for these rows.
        validate: look for values that the type cannot hold, as llama-quantize does.

    Returns:
        ``uint8`` bytes, rows one after the other. For F32 rows of type F32 they are a view.

    Raises:
        OverflowError: a value or a scale is too large for the type (F16 ends at 65,504).
        TypeError: rows are of another dtype.
        ValueError: rows are no whole blocks, or importance is not one float32 for each column.
    """
    rows = to_f32(rows)
    if kind == t.F32:
        return rows.reshape(-1).view(np.uint8)
    n_cols = rows.shape[-1]
    n_rows = rows.size // n_cols
    out = np.empty(n_rows * kind.row_bytes(n_cols), np.uint8)
    lib = library()
    if importance is None and lib.ggml_quantize_requires_imatrix(kind.ggml_id):
        importance = np.ones(n_cols, np.float32)  # without, ggml ends the process
    written = lib.ggml_quantize_chunk(
        kind.ggml_id,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        n_rows,
        n_cols,
        None if importance is None else _checked(importance, n_cols).ctypes.data,
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind.name}, expected {out.nbytes}")
    # llama-quantize checks every chunk too: finite input can overflow an f16 value or scale.
    if validate and not lib.ggml_validate_row_data(kind.ggml_id, out.ctypes.data, out.nbytes):
        raise OverflowError(kind.name)
    return out


def dequantize(data: np.ndarray, kind: QuantType, shape: tuple[int, ...]) -> np.ndarray:
    """ggml's reading of quantized bytes: float32 weights of that shape.

    Args:
        data: uint8, C-contiguous, all blocks of the weights.
        kind: their type; not F32.
        shape: whole blocks in the last dimension.

    Raises:
        ValueError: the bytes are not as many as the weights need.
    """
    out = np.empty(shape, np.float32)
    if data.nbytes * kind.block_weights != out.size * kind.block_bytes:
        raise ValueError(f"{data.nbytes} bytes are not {out.size} weights of {kind.name}")
    traits = library().ggml_get_type_traits(kind.ggml_id).contents
    # These would differ if the structure had changed, and the function would be another.
    if (traits.blck_size, traits.type_size) != (kind.block_weights, kind.block_bytes):
        raise RuntimeError(f"ggml's traits of {kind.name} are not where they are expected")
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def _checked(importance: np.ndarray, n_cols: int) -> np.ndarray:
    # ggml takes a bare pointer: anything else than this it would read past the end or as noise.
    fits = importance.dtype == np.float32 and importance.shape == (n_cols,)
    if not (fits and importance.flags.c_contiguous):
        raise ValueError(
            f"importance must be {n_cols} contiguous float32 values, "
            f"not {importance.dtype} of shape {importance.shape}"
        )
    return importance
