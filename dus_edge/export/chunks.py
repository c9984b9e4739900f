"""How a tensor is cut into pieces of work."""

from __future__ import annotations

from collections.abc import Iterator

from dus_edge.checkpoint.spec import TensorSpec

#: Weights in one piece of work: big enough that Python's part is small, small enough for caches.
CHUNK_WEIGHTS = 1 << 20


def chunks(spec: TensorSpec, group: int = 1) -> Iterator[tuple[int, int]]:
    """Half-open ranges of rows for one piece of work each.

    Args:
        spec: a tensor; a 1-D one is taken whole.
        group: rows that must stay together (those of a head, where rope reorders them).
    """
    if len(spec.shape) == 1:
        yield 0, spec.n_rows
        return
    step = group * max(1, CHUNK_WEIGHTS // (group * (spec.n_elements // spec.n_rows)))
    for start in range(0, spec.n_rows, step):
        yield start, min(start + step, spec.n_rows)
