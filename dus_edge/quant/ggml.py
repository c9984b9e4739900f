"""ggml's own quantizers, called through the library that llama-cpp-python installs.

`libggml-base` exports `ggml_quantize_chunk` (ggml/include/ggml.h). ctypes releases the GIL during
the call, so threads quantize side by side. Importing llama_cpp is not needed for it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import numpy as np

from dus_edge.errors import DependencyError
from dus_edge.quant.types import QuantType

_LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(
    sys.platform, "libggml-base.so"
)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded `libggml-base`, its functions declared.

    Raises:
        DependencyError: llama-cpp-python is not installed or carries no such library.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(
            "llama-cpp-python is not installed; `pip install llama-cpp-python` brings ggml's "
            "quantizers."
        )
    path = Path(spec.submodule_search_locations[0]) / "lib" / _LIBRARY
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
    return lib


def version() -> str:
    """Release of the llama-cpp-python whose ggml is used."""
    return importlib.metadata.version("llama_cpp_python")


def to_f32(rows: np.ndarray) -> np.ndarray:
    """Rows as float32, C-contiguous; ``uint16`` is taken for bf16 bit patterns. Exact."""
    if rows.dtype == np.float32:
        return np.ascontiguousarray(rows)
    rows = np.ascontiguousarray(rows)
    out = np.empty(rows.shape, np.float32)
    lib = library()
    convert = lib.ggml_bf16_to_fp32_row if rows.dtype == np.uint16 else lib.ggml_fp16_to_fp32_row
    convert(rows.ctypes.data, out.ctypes.data, rows.size)
    return out


def quantize(rows: np.ndarray, kind: QuantType, *, validate: bool = True) -> np.ndarray:
    """Quantize float32 rows.

    Args:
        rows: ``(n_rows, n_cols)`` or ``(n_cols,)`` float32, C-contiguous; a row must be whole
            blocks of `kind`.
        kind: the target type.
        validate: look for values that the type cannot hold, as llama-quantize does.

    Returns:
        ``uint8`` bytes, rows one after the other.

    Raises:
        OverflowError: a value or a scale is too large for the type (F16 ends at 65,504).
    """
    n_cols = rows.shape[-1]
    n_rows = rows.size // n_cols
    out = np.empty(n_rows * kind.row_bytes(n_cols), np.uint8)
    lib = library()
    written = lib.ggml_quantize_chunk(
        kind.ggml_id, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_cols, None
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind.name}, expected {out.nbytes}")
    # llama-quantize checks every chunk too: finite input can overflow an f16 value or scale.
    if validate and not lib.ggml_validate_row_data(kind.ggml_id, out.ctypes.data, out.nbytes):
        raise OverflowError(kind.name)
    return out
