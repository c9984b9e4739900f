"""Is every weight a number? Found while streaming, said with the tensor's name."""

from __future__ import annotations

import numpy as np

from dus_edge.checkpoint.spec import TensorSpec
from dus_edge.errors import CheckpointError

_EXPONENT = {np.dtype(np.uint16): 0x7F80, np.dtype(np.float16): 0x7C00}


def check(rows: np.ndarray, spec: TensorSpec, start: int) -> None:
    """Refuse NaN and infinity.

    Args:
        rows: rows as `Checkpoint.read` gives them; ``uint16`` is bf16.
        spec: the tensor they belong to.
        start: index of the first of them, for the message.

    Raises:
        CheckpointError: with the tensor's name and the row.
    """
    bad = _nonfinite(rows)
    if bad is None:
        return
    index = np.argwhere(bad)[0]
    place = ", ".join(str(i) for i in (start + index[0], *index[1:]))
    raise CheckpointError(
        f"tensor {spec.source}[{place}] is NaN or infinite; fetch the checkpoint again, "
        "or add --allow-nonfinite to go on."
    )


def _nonfinite(rows: np.ndarray) -> np.ndarray | None:
    """A mask of the bad weights, or None if there are none."""
    if rows.dtype == np.float32:
        # A sum is finite only if every item is; it may overflow without one, so look closer then.
        with np.errstate(all="ignore"):
            if np.isfinite(rows.sum(dtype=np.float32)):
                return None
        bad = ~np.isfinite(rows)
    else:
        # Half types: all ones in the exponent. Integer compares are several times faster than
        # numpy's float16 arithmetic.
        exponent = _EXPONENT[rows.dtype]
        bad = (rows.view(np.uint16) & exponent) == exponent
    return bad if bad.any() else None
