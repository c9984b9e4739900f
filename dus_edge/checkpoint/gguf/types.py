"""The types that GGUF files store weights in: all that gguf-py knows, dequantized by it.

Wider than `dus_edge.quant.types`, which has those that are written: what other programs made of a
model can be copied and read whether or not we make the like.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StoredType:
    """One storage type.

    Attributes:
        name: ggml's, in capitals.
        ggml_id: its number in ``enum ggml_type``.
        block_weights: weights in a block; a row is whole blocks.
        block_bytes: bytes of a block.
    """

    name: str
    ggml_id: int
    block_weights: int
    block_bytes: int

    @property
    def is_quantized(self) -> bool:
        """Whether several weights share a block."""
        return self.block_weights > 1

    @property
    def dtype(self) -> str | None:
        """The safetensors dtype of weights that are stored one by one; None of all others."""
        return self.name if self.name in ("F32", "F16", "BF16") else None

    @property
    def is_readable(self) -> bool:
        """Whether `dequantized` knows it."""
        if self.dtype is not None:
            return True
        try:
            self.dequantized(np.zeros((1, self.block_bytes), np.uint8))
        except NotImplementedError:
            return False
        return True

    def row_bytes(self, n_weights: int) -> int:
        """Bytes of a row of whole blocks."""
        return n_weights // self.block_weights * self.block_bytes

    def dequantized(self, blocks: np.ndarray) -> np.ndarray:
        """The weights of blocks.

        Args:
            blocks: ``(n_rows, row_bytes)`` uint8.

        Returns:
            ``(n_rows, n_cols)`` float32.
        """
        from gguf import GGMLQuantizationType, quants

        # Infinite scales of a damaged file: found by who looks at the weights.
        with np.errstate(all="ignore"):
            return quants.dequantize(blocks, GGMLQuantizationType(self.ggml_id))


@functools.cache
def stored_type(ggml_id: int) -> StoredType | None:
    """The type of that number in ``enum ggml_type``; None if gguf-py does not know it."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(ggml_id)
        weights, n_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return None
    return StoredType(kind.name, ggml_id, weights, n_bytes)
