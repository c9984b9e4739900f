"""MLX's affine format: what is stored of a matrix, what it means, what config.json says of it.

A matrix ``(out, in)`` is cut into groups of `group_size` inputs, each with a scale s and a bias β:
``weight[o, i] = s[o, g] · q[o, i] + β[o, g]``. Stored are, by the name of the layer,

- ``weight`` uint32 ``(out, in · bits / 32)``: a row's codes as one string of bits, lowest first;
- ``scales`` and ``biases`` ``(out, in / group_size)``: in the dtype of what is not quantized.

A scale may be negative: the end of the group that is farther from zero is stored exactly, as β.

References: `affine_quantize` in mlx/ops.cpp and `quantize` in mlx/backend/cpu/quantized.cpp (MLX
0.32); `quantize_model` and `save_model` in mlx_lm/utils.py (mlx-lm 0.32). NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dus_edge.errors import UsageError

MLX_BITS = (2, 3, 4, 5, 6, 8)
#: Inputs that share a scale and a bias.
MLX_GROUPS = (32, 64, 128)
#: The method's name in config.json; the others that MLX has are of FP4 and FP8.
MODE = "affine"


@dataclass(frozen=True)
class MLXSettings:
    """How matrices are quantized.

    Attributes:
        bits: of a code, one of `MLX_BITS`.
        group_size: inputs that share a scale and a bias, one of `MLX_GROUPS`.
    """

    bits: int = 4
    group_size: int = 64

    def check(self) -> None:
        """Refuse what MLX has not.

        Raises:
            UsageError: other bits or another group size.
        """
        if self.bits not in MLX_BITS:
            raise UsageError(f"MLX has no {self.bits}-bit codes; choose one of {_or(MLX_BITS)}.")
        if self.group_size not in MLX_GROUPS:
            raise UsageError(
                f"MLX has no groups of {self.group_size}; choose one of {_or(MLX_GROUPS)}."
            )

    def check_matrix(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a matrix whose rows are not whole groups.

        Args:
            name: the tensor, for the message.
            shape: its ``(out, in)``.

        Raises:
            UsageError: they are not; the group sizes that would do are named.
        """
        width = shape[-1]
        if width % self.group_size == 0:
            return
        usable = [g for g in MLX_GROUPS if width % g == 0]
        remedy = f"use --group-size {_or(usable)}" if usable else "use a GGUF preset for this model"
        raise UsageError(
            f"{name}: groups of {self.group_size} do not divide its {width} inputs; {remedy}."
        )


def quantized_shapes(
    shape: tuple[int, ...], settings: MLXSettings
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of ``weight``, and of ``scales`` and ``biases``, of a matrix ``(out, in)``."""
    n_out, n_in = shape
    return (n_out, n_in * settings.bits // 32), (n_out, n_in // settings.group_size)


def mlx_quantization(settings: MLXSettings) -> dict[str, Any]:
    """``quantization`` of config.json, and its ``quantization_config``: as mlx-lm writes them."""
    return {"group_size": settings.group_size, "bits": settings.bits, "mode": MODE}


def affine_weights(
    packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int
) -> np.ndarray:
    """The weights ``(out, in)`` float32 that stored tensors mean.

    Args:
        packed: ``weight``, uint32.
        scales: float32 ``(out, groups)``.
        biases: the same.
        bits: of a code.
    """
    n_out = len(packed)
    string = np.unpackbits(packed.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    powers = (1 << np.arange(bits)).astype(np.float32)
    codes = string.reshape(n_out, scales.shape[1], -1, bits) @ powers
    weights = codes * scales[..., None] + biases[..., None]
    return weights.reshape(n_out, -1)


def _or(values: Sequence[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
