"""Placeholder while the kernels are written: same interface, ggml underneath."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from dus_edge.quant import ggml
from dus_edge.quant.types import QuantType

NAME = "native"


def as_input(rows: np.ndarray) -> np.ndarray:
    """Stored rows as `quantize` works on them: as they are."""
    return rows


def quantize(
    rows: np.ndarray,
    kind: QuantType,
    importance: np.ndarray | None = None,
    *,
    validate: bool = True,
) -> np.ndarray:
    return ggml.quantize(ggml.to_f32(rows), kind, validate=validate)


def prepare(
    wanted: Iterable[tuple[QuantType, np.dtype, bool]],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Compile or load every kernel (type, stored dtype, weighted by importance) before the work."""
