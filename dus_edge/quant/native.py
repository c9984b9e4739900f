"""Our own quantizers: same block formats as ggml's, several times the speed, no more error.

The kernels (`dus_edge.quant.kernels`) work on 16 blocks at once in SIMD lanes and read bfloat16 as
it is stored. They need Numba and no compiler; the first use on a machine compiles them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from dus_edge.quant import kernels
from dus_edge.quant import types as t
from dus_edge.quant.imatrix import DEPENDENT, takes_importance
from dus_edge.quant.simd import LANES
from dus_edge.quant.types import QuantType

NAME = "native"

#: Types whose errors by importance count by the mean square of the whole row too, as in ggml.
_BY_ROW = (t.Q4_0, t.Q4_1, t.Q5_0, t.Q5_1)
_NONE = np.empty(0, np.float32)


def as_input(rows: np.ndarray) -> np.ndarray:
    """What `quantize` takes: rows as they are stored."""
    return rows


def quantize(
    rows: np.ndarray,
    kind: QuantType,
    importance: np.ndarray | None = None,
    *,
    validate: bool = True,
) -> np.ndarray:
    """Quantize rows of weights.

    Args:
        rows: ``(n_rows, n_cols)`` or ``(n_cols,)`` float32, float16 or uint16 (bfloat16 bits),
            C-contiguous; a row must be whole blocks of `kind`.
        kind: the target type.
        importance: ``(n_cols,)`` float32, how much an error in each column counts (an importance
            matrix's mean squares). Without meaning for F32, F16, BF16 and Q8_0; of IQ2_XS and
            IQ2_S, which have a kernel with importance alone, all columns count the same without.
        validate: refuse what the type cannot hold. Otherwise it becomes the largest that it holds.

    Returns:
        ``uint8`` bytes, rows one after the other. Finite weights never become NaN or infinite.

    Raises:
        OverflowError: a value or a scale is too large for the type (F16 ends at 65,504).
        ValueError: `importance` is not one number per column.
    """
    n_cols = rows.shape[-1]
    if importance is None and kind in DEPENDENT:
        importance = np.ones(n_cols, np.float32)
    weighted = importance is not None and takes_importance(kind)
    source = _source(rows, kind, weighted)
    if kind is t.F32:
        return source.view(np.uint8)
    if kind is t.BF16 and source.dtype == np.uint16:
        return source.copy().view(np.uint8)
    sigma2 = weights = _NONE
    if weighted:
        # A copy: for a read-only array Numba would compile again.
        weights = np.array(importance, np.float32)
        if weights.shape != (n_cols,):
            raise ValueError(f"{weights.shape} importance weights for {n_cols} columns")
        # Only ratios count; sums near the ends of float32's range would lose them. A power of two
        # changes no digit.
        if (mean := weights.mean(dtype=np.float64)) > 0:
            weights = np.ldexp(weights, -int(np.frexp(mean)[1]))
        if kind in _BY_ROW:
            table = source.reshape(-1, n_cols)
            sigma2 = np.einsum("ij,ij->i", table, table) / np.float32(n_cols)
    out = np.empty(rows.size // n_cols * kind.row_bytes(n_cols), np.uint8)
    kernel = kernels.load(_kernel_name(kind, source.dtype, weighted))
    if source.size < LANES:
        overflow = _padded(kernel, source, out)
    else:
        overflow = kernel(source, weights, sigma2, out)
    if overflow and validate:
        raise OverflowError(kind.name)
    return out


def prepare(
    wanted: Iterable[tuple[QuantType, np.dtype, bool]],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Compile the kernels for these (type, stored dtype, weighted), or load them compiled.

    Args:
        wanted: what `quantize` will be asked for.
        say: told, once, if it takes longer than a moment, and how long it took.
    """
    todo: dict[tuple[str, np.dtype], str] = {}
    for kind, dtype, weighted in wanted:
        weighted = kind in DEPENDENT or (weighted and takes_importance(kind))
        dtype = _source_dtype(np.dtype(dtype), kind, weighted)
        if kind is t.F32 or (kind is t.BF16 and dtype == np.uint16):
            continue
        name = _kernel_name(kind, dtype, weighted)
        todo[name, dtype] = kind.name
    if not todo:
        return
    with kernels.announced(", ".join(dict.fromkeys(todo.values())), say):
        for name, dtype in todo:
            # An empty call compiles what a real one will use.
            kernels.load(name)(np.empty(0, dtype), _NONE, _NONE, np.empty(0, np.uint8))


def _source_dtype(dtype: np.dtype, kind: QuantType, weighted: bool) -> np.dtype:
    """What the kernel is given for rows of `dtype`: bfloat16 as it is, float16 widened."""
    needs_f32 = weighted and kind in _BY_ROW
    if dtype == np.uint16 and kind is not t.F32 and not needs_f32:
        return dtype
    return np.dtype(np.float32)


def _source(rows: np.ndarray, kind: QuantType, weighted: bool) -> np.ndarray:
    """The weights as the kernel takes them: 1-D, C-contiguous, writable."""
    if rows.dtype not in (np.float32, np.float16, np.uint16):
        raise TypeError(f"rows of {rows.dtype} cannot be quantized")
    flat = np.ascontiguousarray(rows).reshape(-1)
    wanted = _source_dtype(rows.dtype, kind, weighted)
    if flat.dtype != wanted:
        if flat.dtype == np.uint16:
            return (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.astype(np.float32)
    # Numba compiles again for a read-only array; that is dearer than a copy.
    return flat if flat.flags.writeable else flat.copy()


def _kernel_name(kind: QuantType, dtype: np.dtype, weighted: bool) -> str:
    name = kind.name.lower()
    if kind is t.F16 and dtype == np.uint16:
        return "f16_from_bf16"
    return f"{name}_weighted" if weighted else name


def _padded(kernel: object, source: np.ndarray, out: np.ndarray) -> bool:
    """Fewer weights than lanes: only the plain types have so few."""
    wide = np.zeros(LANES, source.dtype)
    wide[: source.size] = source
    target = np.empty(LANES * 2, np.uint8)
    overflow = kernel(wide, _NONE, _NONE, target)  # type: ignore[operator]
    out[:] = target[: out.size]
    return overflow
