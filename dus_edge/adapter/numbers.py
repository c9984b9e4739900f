"""Stored weights to float32 and back, rounded as PyTorch rounds."""

from __future__ import annotations

import numpy as np


def as_floats(rows: np.ndarray) -> np.ndarray:
    """Stored rows as float32; bf16, which comes as ``uint16``, is its upper half."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 to a stored dtype, to the nearest, ties to even; too large becomes infinity.

    Args:
        values: float32, C-contiguous.
        dtype: ``BF16`` (gives bits as ``uint16``), ``F16`` or ``F32`` (gives `values` itself).
    """
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    rounded >>= 16
    # The carry could make a number, or an infinity, of a NaN.
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype(np.uint16)
