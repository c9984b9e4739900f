"""What storing weights in a type is expected to cost: divergences from gradients and errors.

A small change δ of the weights moves the distribution of the next token by
KL ≈ ½ E[(g·δ)²], where g is the gradient of the log-probability of a label that is drawn from the
distribution itself (Fisher information). Labels of one chunk are drawn each for itself, so the
squares of a whole chunk's gradients add up to the sum over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from dus_edge.adapter.numbers import as_floats
from dus_edge.calibrate.layer import logits_of
from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.gguf.types import stored_type
from dus_edge.quant.imatrix import takes_importance
from dus_edge.quant.quantizer import Quantizer
from dus_edge.quant.types import QuantType

#: Bytes of gradients and errors of some rows that are in memory at once.
_BLOCK_BYTES = 256 << 20
#: Rows of the vocabulary whose logits are in memory at once.
_VOCABULARY_ROWS = 2048


@dataclass(frozen=True)
class Storing:
    """How weights would be stored.

    Attributes:
        quantizer: prepared for all types.
        pool: threads that it runs in.
        importance: by GGUF name, ``(n_cols,)`` float32.
    """

    quantizer: Quantizer
    pool: ThreadPoolExecutor
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)

    def errors(self, name: str, rows: np.ndarray, kinds: Sequence[QuantType]) -> torch.Tensor:
        """What storing does to weights, ``(n_kinds, n_rows, n_cols)`` float32.

        Args:
            name: the tensor's in GGUF.
            rows: some of its rows, as `Checkpoint.read` gives them.
            kinds: types.
        """
        ready, exact = self.quantizer.as_input(rows), as_floats(rows)
        found = np.empty((len(kinds), *exact.shape), np.float32)
        weights = self.importance.get(name)

        def store(i: int) -> None:
            kind = kinds[i]
            used = weights if takes_importance(kind) else None
            data = self.quantizer.quantize(ready, kind, importance=used, validate=False)
            np.subtract(_dequantized(data, kind, exact.shape), exact, out=found[i])

        list(self.pool.map(store, range(len(kinds))))
        return torch.from_numpy(found)


def _dequantized(data: np.ndarray, kind: QuantType, shape: tuple[int, ...]) -> np.ndarray:
    known = stored_type(kind.ggml_id)
    assert known is not None
    return known.dequantized(data.reshape(shape[0], -1)).reshape(shape)


def rows_at_once(n_cols: int, n_chunks: int, n_kinds: int) -> int:
    """How many rows of a matrix `matrix_kl` takes together."""
    return max(1, _BLOCK_BYTES // (4 * n_cols * (n_chunks + 2 * n_kinds)))


def matrix_kl(x: torch.Tensor, d: torch.Tensor, errors: torch.Tensor) -> np.ndarray:
    """Expected divergence of a matrix's rows, summed over tokens.

    Errors of different rows are taken as independent of each other, as those of rounding are: of
    the square of a sum over rows only the squares of each row are left. Of what both expect they
    vary far less.

    Args:
        x: what the matrix took in ``(n_chunks, n_ctx, n_cols)``.
        d: gradients of what these rows gave ``(n_chunks, n_ctx, n_rows)``.
        errors: of the rows ``(n_kinds, n_rows, n_cols)`` float32.

    Returns:
        ``(n_kinds,)`` float64, nats.
    """
    gradients = torch.bmm(d.float().transpose(1, 2), x.float())
    moved = torch.bmm(gradients.transpose(0, 1), errors.permute(1, 2, 0))
    return _half_squares(moved, (0, 1))


def embedding_kl(tokens: torch.Tensor, d: torch.Tensor, errors: torch.Tensor) -> np.ndarray:
    """Expected divergence of the rows of an embedding, summed over tokens.

    Args:
        tokens: ``(n_chunks, n_ctx)`` int64, which of the rows in `errors` each token takes.
        d: gradients of the rows as they were taken ``(n_chunks, n_ctx, hidden)``.
        errors: ``(n_kinds, n_rows, hidden)`` float32.

    Returns:
        ``(n_kinds,)`` float64, nats.
    """
    found = np.zeros(len(errors))
    for ids, gradients in zip(tokens, d, strict=True):
        # A chunk's tokens of one row move together.
        own, at = torch.unique(ids, return_inverse=True)
        sums = torch.zeros(len(own), d.shape[-1], device=d.device)
        sums.index_add_(0, at, gradients.float())
        found += _half_squares(torch.einsum("rj,krj->kr", sums, errors[:, own]), (1,))
    return found


def _half_squares(moved: torch.Tensor, dims: tuple[int, ...]) -> np.ndarray:
    return moved.square().sum(dims).cpu().double().numpy() / 2


def head_kl(
    x: torch.Tensor,
    part: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]],
    n_kinds: int,
    config: ModelConfig,
    advance: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Divergence that errors of the head alone make, exactly: nothing stands behind it.

    With p the model's distribution and Δ what the logits change by, it is
    log(1 + Σ p (e^Δ − 1)) − Σ p Δ; the vocabulary comes in parts.

    Args:
        x: what the head takes in ``(n, hidden)`` float32.
        part: the head's rows from one to another, and their errors: ``(n_rows, hidden)`` and
            ``(n_kinds, n_rows, hidden)`` float32.
        n_kinds: of errors.
        config: of the model.
        advance: told of rows done, out of twice the vocabulary.

    Returns:
        ``(n_kinds,)`` float64, nats per token.
    """
    n_rows = config.vocab_size
    parts = [(i, min(i + _VOCABULARY_ROWS, n_rows)) for i in range(0, n_rows, _VOCABULARY_ROWS)]
    total = torch.full((len(x),), -torch.inf, device=x.device)
    for first, end in parts:
        logits = logits_of(x, part(first, end)[0], config)
        total = torch.logaddexp(total, logits.logsumexp(-1))
        advance(end - first)
    drift = torch.zeros(n_kinds, len(x), device=x.device)
    above = drift.clone()
    for first, end in parts:
        rows, errors = part(first, end)
        logits = logits_of(x, rows, config)
        p = (logits - total[:, None]).exp()
        for i in range(n_kinds):
            change = logits_of(x, rows + errors[i], config) - logits
            drift[i] += (p * change).sum(-1)
            above[i] += (p * (change.expm1() - change)).sum(-1)
        advance(end - first)
    a, b = drift.cpu().double(), above.cpu().double()
    return (torch.log1p(a + b) - a).mean(-1).numpy()
