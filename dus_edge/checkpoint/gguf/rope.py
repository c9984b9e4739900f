"""What a GGUF keeps of Llama 3's rotary embedding: one divisor a frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

#: GGUF's name of the tensor that has them.
DIVISORS = "rope_freqs.weight"


def llama3_factors(head_dim: int, theta: float, params: Mapping[str, Any]) -> np.ndarray:
    """Llama 3's per-frequency divisors, ``(head_dim / 2,)`` float32.

    Formula: transformers `modeling_rope_utils._compute_llama3_parameters`; stored as llama.cpp's
    converter does. The steps are in float32 as they are there.

    Args:
        head_dim: width of a head.
        theta: base of the frequencies.
        params: numbers of the scaling, under transformers' names.
    """
    factor, low, high = (
        float(params[k]) for k in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = float(params["original_max_position_embeddings"])
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelengths = 2 * math.pi * np.power(np.float32(theta), exponents)
    factors = np.empty_like(exponents)
    for i, wavelength in enumerate(wavelengths):
        if wavelength < original / high:
            factors[i] = 1
        elif wavelength > original / low:
            factors[i] = factor
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors[i] = 1 / ((1 - smooth) / factor + smooth)
    return factors
