"""Shapes of real models, and what a token costs them."""

from __future__ import annotations

from typing import Any

from dus_edge.checkpoint.config import config_of_shape
from dus_edge.families.shape import Shape
from dus_edge.predict.memory.llama import model_of_config
from dus_edge.predict.speed.work import Work, work_of
from dus_edge.predict.stored_model import RunSettings
from dus_edge.quant.recipe import PRESETS

LLAMA3_8B = {
    "n_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "context_length": 8192,
}
SOLAR = {**LLAMA3_8B, "n_layers": 48, "vocab_size": 32000, "context_length": 4096}


def dense_work(preset: str, sizes: dict[str, int] = SOLAR, tied_head: bool = False) -> Work:
    """The work of a model of those sizes in a preset, with a cache of f16."""
    config = config_of_shape(Shape(**sizes), tied_head=tied_head)
    return work_of(model_of_config(config, PRESETS[preset]), RunSettings())


def attention(n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int) -> Shape:
    """A shape of which attention's part matters."""
    changes: dict[str, Any] = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    return Shape(**{**SOLAR, **changes, "n_layers": n_layers})
