"""What the tests of our own quantizers compare, and with what."""

from __future__ import annotations

import fcntl
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dus_edge.quant import ggml, native
from dus_edge.quant import types as t
from dus_edge.quant.imatrix import DEPENDENT

PLAIN = (t.F16, t.BF16)
SMALL = (t.Q4_0, t.Q4_1, t.Q5_0, t.Q5_1, t.IQ4_NL)
K_TYPES = (t.Q2_K, t.Q3_K, t.Q4_K, t.Q5_K, t.Q6_K, t.IQ2_XS, t.IQ2_S, t.IQ3_S, t.IQ4_XS)
#: Types whose search can weigh errors by importance.
WEIGHTED = SMALL + K_TYPES
QUANTIZED = (t.Q8_0, *WEIGHTED)
ALL = PLAIN + QUANTIZED
#: Types whose kernels these tests also compile for bf16 as it is stored.
FROM_BF16 = (t.F16, t.Q8_0, t.Q4_0, t.Q4_K)
SIGMA = np.float32(0.02)


class Form(NamedTuple):
    """A type, and whether importance is given with the rows."""

    kind: t.QuantType
    weighted: bool

    @property
    def name(self) -> str:
        return f"{self.kind.name} {'with importance' if self.weighted else 'alone'}"


#: Every form that there is a kernel for.
FORMS = [
    Form(k, w) for k in ALL for w in (False, True) if (k in WEIGHTED if w else k not in DEPENDENT)
]


def compile_once(folder: Path) -> None:
    """Compile all kernels; processes that do so at one time, given one folder, share the work."""
    dtypes = (np.dtype(np.float32), np.dtype(np.uint16))
    left = [(f.kind, d, f.weighted) for f, d in itertools.product(FORMS, dtypes)]
    left = [x for x in left if x[1] == np.float32 or x[0] in FROM_BF16]
    waiting = []
    for patience in (fcntl.LOCK_NB, 0):
        for kind, dtype, weighted in left:
            with (folder / f"compiling-{kind.name}").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | patience)
                except BlockingIOError:
                    waiting.append((kind, dtype, weighted))
                else:
                    native.prepare([(kind, dtype, weighted)])
        left = waiting


def validates(data: np.ndarray, kind: t.QuantType) -> bool:
    return ggml.library().ggml_validate_row_data(kind.ggml_id, data.ctypes.data, data.nbytes)


def search_weights(rows: np.ndarray, kind: t.QuantType, importance: np.ndarray) -> np.ndarray:
    """What ggml's search under an importance matrix minimizes, from ggml-quants.c, float64."""
    if kind is t.Q6_K:
        return np.broadcast_to(importance.astype(np.float64), rows.shape)
    x2 = np.square(rows, dtype=np.float64)
    n = kind.block_weights if kind in (*K_TYPES, t.IQ4_NL) else rows.shape[1]
    sigma2 = np.repeat(x2.reshape(len(rows), -1, n).mean(-1), n, axis=1)
    if kind not in (t.Q2_K, t.Q4_0, t.Q4_1, t.Q5_0, t.Q5_1):
        sigma2 *= 2
    return importance * np.sqrt(sigma2 + x2)


def rmse(
    rows: np.ndarray, data: np.ndarray, kind: t.QuantType, importance: np.ndarray | None
) -> float:
    """Error after llama.cpp's dequantizer: plain, or weighted as ggml's search weighs it."""
    squares = np.square(
        np.subtract(ggml.dequantize(data, kind, rows.shape), rows, dtype=np.float64)
    )
    if importance is None:
        return float(np.sqrt(squares.mean()))
    w = search_weights(rows, kind, importance)
    return float(np.sqrt((w * squares).sum() / (w.sum() or 1)))


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 → bf16 bits, cut off."""
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def gaussian(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * SIGMA


def importance_of(n_cols: int, seed: int = 1, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, spread, n_cols).astype(np.float32)


IMPORTANCES = ("none", "ones", "spread", "zeros", "all zero", "huge")


def drawn_importance(name: str, rng: np.random.Generator, n: int) -> np.ndarray | None:
    match name:
        case "none":
            return None
        case "ones":
            return np.ones(n, np.float32)
        case "spread":
            return rng.lognormal(0, 2, n).astype(np.float32)
        case "zeros":
            return (rng.lognormal(0, 1, n) * (rng.random(n) < 0.5)).astype(np.float32)
        case "all zero":
            return np.zeros(n, np.float32)
    return (10.0 ** rng.uniform(-20, 20, n)).astype(np.float32)
