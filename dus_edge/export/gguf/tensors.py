"""From Hugging Face tensors to GGUF's: order, rows, and the tensors computed from the config.

Names are the family's; the rest follows `conversion/llama.py` of llama.cpp.
"""

from __future__ import annotations

import re

import numpy as np

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.gguf.rope import DIVISORS, LONGROPE_DIVISORS, llama3_factors

_BLK = re.compile(r"^blk\.(\d+)\.")


def file_order(name: str) -> tuple[int, str]:
    """Sort key that gives llama.cpp's own order: by layer, then by name.

    `llama_model_quantize` sorts its tensors so (`weight_name_comparer`); a file in this order is
    the file it would write, byte for byte.
    """
    match = _BLK.match(name)
    return (int(match[1]) if match else -1, name)


def to_interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of whole heads from transformers' rope layout to llama.cpp's.

    transformers rotates dimension i with i + head_dim/2, llama.cpp's llama rope 2i with 2i + 1.

    Args:
        rows: ``(n_heads × head_dim, …)``; the first dimension is whole heads.
        head_dim: rows of a head, even.
    """
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def rope_factors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Per-frequency divisors by GGUF's name, ``(rotary_dim / 2,)`` float32; none for most ropes.

    They are stored as llama.cpp's converter does.
    """
    p = config.rope.params
    if config.rope.kind == "longrope":
        return {name: np.array(p[key], np.float32) for name, key in LONGROPE_DIVISORS.items()}
    if config.rope.kind != "llama3":
        return {}
    return {DIVISORS: llama3_factors(config.head_dim, config.rope.theta, p)}
