"""Rows of weights to the codes, scales and biases that MLX makes of them on a CPU, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dus_edge.quant import kernels
from dus_edge.quant.mlx.format import MLXSettings, quantized_shapes


def quantize_affine(
    rows: np.ndarray, settings: MLXSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize rows of a matrix.

    Args:
        rows: ``(n, in)`` float32, float16 or uint16 (bfloat16 bits), C-contiguous; `in` is a
            multiple of the group size.
        settings: bits and group size.

    Returns:
        ``weight`` uint32, and ``scales`` and ``biases`` float32, of `quantized_shapes`. MLX rounds
        the last two to the dtype of the weights.
    """
    packed_shape, groups_shape = quantized_shapes(rows.shape, settings)
    packed = np.empty(packed_shape, "<u4")
    scales, biases = np.empty((2, *groups_shape), np.float32)
    source = rows.astype(np.float32) if rows.dtype == np.float16 else rows
    # Numba compiles again for a read-only array; that is dearer than a copy.
    source = np.require(source.reshape(-1), requirements="W")
    _kernel(source.dtype)(
        source, settings.bits, settings.group_size, packed.reshape(-1).view(np.uint8),
        scales.reshape(-1), biases.reshape(-1),
    )  # fmt: skip
    return packed, scales, biases


def compile_affine(dtype: np.dtype, say: Callable[[str], None] = lambda line: None) -> None:
    """Compile the kernel for weights of a dtype, or load it compiled.

    Args:
        dtype: as `quantize_affine` takes it.
        say: told if that takes longer than a moment.
    """
    with kernels.announced("MLX", say):
        quantize_affine(np.empty((0, 32), dtype), MLXSettings(group_size=32))


def _kernel(dtype: np.dtype) -> Callable[..., None]:
    return kernels.load("mlx_affine_bf16" if dtype == np.uint16 else "mlx_affine")
