"""Which types a tensor is tried in."""

from __future__ import annotations

from dus_edge.quant import types as t
from dus_edge.quant.recipe import fitting_type
from dus_edge.quant.types import QuantType

#: From the fewest bits to the most.
CANDIDATES: tuple[QuantType, ...] = (
    *(t.Q2_K, t.Q3_K, t.IQ4_XS, t.Q4_0, t.Q4_K, t.Q5_K, t.Q6_K, t.Q8_0),
)


def candidate_types(n_cols: int) -> tuple[QuantType, ...]:
    """Types for rows of `n_cols` weights, each once.

    Where blocks do not divide a row, what llama.cpp puts in their place is tried.
    """
    return tuple(dict.fromkeys(fitting_type(kind, n_cols) for kind in CANDIDATES))
