"""What each type costs each matrix in its own weights: Σ(ΔW)², without a look at the model.

The control that a choice by divergence is compared with; a mix that is chosen so is what others
call a weight-error knapsack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dus_edge.checkpoint.gguf.types import stored_type
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.export.chunks import chunks
from dus_edge.export.gguf.sink import widened
from dus_edge.quant.mix.matrices import Matrix
from dus_edge.quant.quantizer import Quantizer
from dus_edge.quant.sensitivity.candidates import candidate_types
from dus_edge.quant.types import QuantType


def weight_errors(
    checkpoint: Checkpoint,
    matrices: Sequence[Matrix],
    quantizer: Quantizer,
    importance: Mapping[str, np.ndarray] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, dict[str, float]]:
    """Squared error of every matrix in every type that it may take.

    Args:
        checkpoint: the model.
        matrices: of the same.
        quantizer: prepared for the conversions, or able to be without.
        importance: by GGUF name, ``(n_cols,)`` float32: blocks are fitted by it, and errors
            weighted by it.
        advance: told of weights done, each once a matrix.

    Returns:
        by GGUF name and type name; a matrix whose weights are another's is read once.
    """
    specs = {checkpoint.config.family.gguf_name(s.name): s for s in checkpoint.specs().values()}
    known: dict[tuple[str, bytes], dict[str, float]] = {}
    found = {}
    for matrix in matrices:
        spec = specs[matrix.name]
        weights = None if importance is None else importance.get(matrix.name)
        key = (spec.source, b"" if weights is None else weights.tobytes())
        if key not in known:
            kinds = candidate_types(matrix.n_cols)
            sums = dict.fromkeys((kind.name for kind in kinds), 0.0)
            for start, stop in chunks(spec):
                rows = checkpoint.read(spec.name, start, stop)
                for kind in kinds:
                    sums[kind.name] += _error(rows, kind, quantizer, weights)
            known[key] = sums
        found[matrix.name] = known[key]
        advance(matrix.n_weights)
    return found


def _error(
    rows: np.ndarray, kind: QuantType, quantizer: Quantizer, weights: np.ndarray | None
) -> float:
    stored = stored_type(kind.ggml_id)
    assert stored is not None
    data = quantizer.quantize(rows, kind, importance=weights)
    back = stored.dequantized(data.reshape(len(rows), -1)).reshape(rows.shape)
    square = np.square(widened(rows) - back, dtype=np.float64)
    return float((square if weights is None else square * weights).sum())
