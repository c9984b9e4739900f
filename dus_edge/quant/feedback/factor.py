"""A Hessian damped and factored: what GPTQ and feedback into blocks pass errors on with.

H is XᵀX of the inputs; with its columns in the *reverse* of the order in which they are visited and
H = L·Lᵀ, `dus_edge.quant.gptq` says what follows from L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Of the factorization and all arithmetic, unless the Hessian is float64.
PRECISION = torch.float32
#: Times that a Hessian which cannot be factored gets ten times the damping.
_RETRIES = 3


@dataclass(frozen=True)
class Damped:
    """A damped Hessian's factor.

    Attributes:
        lower: ``(in, in)`` Cholesky factor of the ordered Hessian; empty if there is none.
        dead: ``(in,)`` bool, by row: inputs that were always 0.
        added: the damping that was added to the diagonal.
        fallback: why there is no factor.
    """

    lower: torch.Tensor
    dead: torch.Tensor
    added: float
    fallback: str | None


def damped_factor(hessian: torch.Tensor, columns: torch.Tensor, damp: float) -> Damped:
    """Order a Hessian, damp it and factor it.

    Args:
        hessian: ``(in, in)`` XᵀX, symmetric, in any scale; float64 means arithmetic in float64.
        columns: ``(in,)`` int64, in the reverse of the order in which they are visited.
        damp: added to the diagonal, as a share of its mean.
    """
    dtype = torch.float64 if hessian.dtype == torch.float64 else PRECISION
    diagonal = hessian.diagonal().to(dtype)
    dead = (diagonal == 0)[columns]

    def useless(why: str) -> Damped:
        return Damped(hessian.new_empty(0), dead, 0.0, why)

    if not bool(torch.isfinite(diagonal).all()):
        return useless("its inputs were not finite")
    if bool(dead.all()):
        return useless("its inputs were all zero")
    if bool((diagonal < 0).any()):
        return useless("its Hessian has a negative diagonal")
    mean = float(diagonal.sum()) / int((~dead).sum())
    ordered = hessian.to(dtype).index_select(0, columns).index_select(1, columns)
    found = ordered.diagonal()
    found[dead] = mean
    added = 0.0
    for attempt in range(_RETRIES + 1):
        more = damp * 10**attempt * mean - added
        found += more
        added += more
        lower = _cholesky(ordered)
        if lower is not None:
            return Damped(lower, dead, added, None)
    return useless(
        f"its Hessian is not positive definite, even with {added / mean:g} of its mean added; "
        "calibrate with more text"
    )


def spread_errors(lower: torch.Tensor, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """Make of the Cholesky factor, in place, what passes errors on.

    Args:
        lower: the factor; below each span's diagonal block it becomes L_below,G · L_GG⁻¹.
        spans: rows (first, end) that are solved at once, from the first.

    Returns:
        the L_GG⁻¹, lower-triangular.
    """
    inverses = []
    for first, end in spans:
        block = lower[first:end, first:end]
        one = torch.eye(end - first, dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(block, one, upper=False)
        lower[end:, first:end] = lower[end:, first:end] @ inverse
        inverses.append(inverse.contiguous())
    return tuple(inverses)


def _cholesky(matrix: torch.Tensor) -> torch.Tensor | None:
    """The lower factor, or None where there is none; NaN anywhere ends on the diagonal."""
    # MPS factors in its own way, with no report of failure.
    here = matrix.cpu() if matrix.device.type == "mps" else matrix
    lower, failed = torch.linalg.cholesky_ex(here)
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    return lower.to(matrix.device)
