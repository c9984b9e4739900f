"""Half of XᵀX, which is symmetric: products above its diagonal are spared.

BLAS has this as ``ssyrk``, which PyTorch does not offer. Strips of rows, each up to the diagonal,
come to (1 + 1/strips) / 2 of the full product's operations.
"""

from __future__ import annotations

import torch

#: Rows of a strip at least: narrower products are slower than what they spare.
_ROWS = 128
#: Strips at most: from 16 on little is left to be spared.
_STRIPS = 16


def add_gram(gram: torch.Tensor, x: torch.Tensor) -> None:
    """Add XᵀX, in place, on and below the diagonal; what stands above it has no meaning then.

    Args:
        gram: ``(width, width)``.
        x: ``(n_tokens, width)``, same dtype and device.
    """
    for first, end in _strips(len(gram)):
        gram[first:end, :end].addmm_(x[:, first:end].T, x[:, :end])


def mirror(gram: torch.Tensor) -> None:
    """Make a matrix that `add_gram` has added to symmetric, in place."""
    for first, end in _strips(len(gram)):
        gram[:first, first:end] = gram[first:end, :first].T
        # Within a strip both halves were computed, perhaps with other roundings.
        block = gram[first:end, first:end]
        block.copy_(block.tril() + block.tril(-1).T)


def _strips(width: int) -> list[tuple[int, int]]:
    """Rows (first, end) of each strip."""
    rows = max(_ROWS, -(-width // _STRIPS))
    return [(first, min(first + rows, width)) for first in range(0, width, rows)]
