"""Feed errors forward into blocks: GPTQ with the scales of a GGUF type.

A matrix is quantized block by block (256 columns of the K types, 32 of the others), and each error
is made good, as well as the inputs' correlations allow, by the columns still to come
(Frantar et al., arXiv:2210.17323). Blocks that matter most come first; readers see no difference.

- Of a block whose turn it is, the weights are known with all earlier errors made good. On them the
  type's own search finds scales and minima, weighing each column by what an error there costs when
  all columns behind it have made up for it: L_jj², with H = L·Lᵀ as in `factor`.
- With these scales, as they are stored, the codes are chosen column by column with feedback, and
  the block's real errors are passed on.
- Then the scales' common factors are fitted to the codes, and the codes chosen again; what loses
  less is kept, row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dus_edge.quant import kernels
from dus_edge.quant.feedback.factor import PRECISION, damped_factor, spread_errors
from dus_edge.quant.feedback.layouts import LAYOUTS, Layout
from dus_edge.quant.quantizer import Quantizer
from dus_edge.quant.simd import LANES
from dus_edge.quant.types import QuantType

#: Rows that are solved together: enough for the lanes, few enough for a cache.
_ROWS = 256
#: Columns that ask for earlier errors in one product.
_ASKING = 128


@dataclass(frozen=True)
class FeedbackSettings:
    """How errors are fed forward.

    Attributes:
        damp: what is added to the Hessian's diagonal, as a share of its mean.
        refits: times that a block's scales are fitted to its codes, and the codes chosen again.
        in_sequence: whether a layer's inputs are those behind layers quantized already.
    """

    damp: float = 0.1
    refits: int = 1
    in_sequence: bool = True


@dataclass(frozen=True)
class BlockFactor:
    """What all matrices with one input and one width of blocks share.

    Attributes:
        width: columns of a block.
        columns: ``(in,)`` int64: columns in the reverse of the order in which they are visited;
            row r of the tensors below belongs to ``columns[r]``.
        spread: ``(in, in)``: the blocks' Cholesky factors L_GG, and below each L_below,G · L_GG⁻¹.
        inverses: the L_GG⁻¹, lower-triangular, from the first rows to the last.
        costs: ``(in,)``, by row: what an error there costs.
        fallback: why nothing can be solved; then `spread` is empty.
    """

    width: int
    columns: torch.Tensor
    spread: torch.Tensor
    inverses: tuple[torch.Tensor, ...]
    costs: torch.Tensor
    fallback: str | None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Rows (first, end) of each block."""
        return _spans(len(self.columns), self.width)


def prepare_blocks(hessian: torch.Tensor, width: int, settings: FeedbackSettings) -> BlockFactor:
    """Order the columns and factor the Hessian, once for all matrices with that input.

    Args:
        hessian: ``(in, in)`` float32 XᵀX, symmetric, in any scale, on the CPU.
        width: columns of a block; it divides `in`.
        settings: see `FeedbackSettings`.

    Returns:
        A factor; one with `BlockFactor.fallback` set if the Hessian has no use.
    """
    diagonal = hessian.diagonal().to(PRECISION)
    blocks = diagonal.view(-1, width)
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    order = blocks.mean(1).argsort(descending=True, stable=True)
    columns = (inside + torch.arange(0, len(diagonal), width)[:, None])[order].reshape(-1).flip(0)
    damped = damped_factor(hessian, columns, settings.damp)
    if damped.fallback is not None:
        return BlockFactor(width, columns, damped.lower, (), diagonal, damped.fallback)
    inverses = spread_errors(damped.lower, _spans(len(columns), width))
    costs = damped.lower.diagonal().square()
    # An input that was never there pulls no scale towards its weights.
    costs = torch.where(damped.dead, damped.added, costs)
    return BlockFactor(width, columns, damped.lower, inverses, costs, None)


def feed(
    weight: torch.Tensor,
    factor: BlockFactor,
    kind: QuantType,
    quantizer: Quantizer,
    settings: FeedbackSettings,
    n_threads: int = 1,
) -> np.ndarray:
    """Quantize a matrix with error feedback.

    Args:
        weight: ``(out, in)`` float32, finite, on the CPU.
        factor: of its inputs' Hessian, for blocks of `kind`'s width, without `fallback`.
        kind: one of `LAYOUTS`.
        quantizer: finds the scales.
        settings: see `FeedbackSettings`.
        n_threads: worker threads; the bytes do not depend on it.

    Returns:
        ``(out, row_bytes)`` uint8.

    Raises:
        ValueError: the factor is for another width of blocks or another input.
    """
    n_out, n_in = weight.shape
    if factor.width != kind.block_weights or len(factor.columns) != n_in:
        raise ValueError(f"prepared for {len(factor.columns)} columns in blocks of {factor.width}")
    out = np.empty((n_out, n_in // factor.width, kind.block_bytes), np.uint8)
    solver = _Solver(factor, kind, quantizer, settings)

    def solve(rows: slice) -> None:
        with torch.inference_mode():
            solver.rows(weight[rows], out[rows])

    _in_parts(solve, n_out, n_threads)
    return out.reshape(n_out, -1)


def quantize_rows(
    weight: torch.Tensor,
    kind: QuantType,
    quantizer: Quantizer,
    importance: np.ndarray | None,
    n_threads: int = 1,
) -> np.ndarray:
    """Quantize a matrix without feedback, on several threads; as `feed`.

    Args:
        weight: ``(out, in)`` float32 on the CPU.
        kind: any type of blocks.
        quantizer: makes the blocks.
        importance: ``(in,)`` float32; None for none.
        n_threads: worker threads.

    Raises:
        OverflowError: a scale is too large for the type.
    """
    n_out, n_in = weight.shape
    out = np.empty((n_out, kind.row_bytes(n_in)), np.uint8)

    def quantize(rows: slice) -> None:
        data = quantizer.quantize(weight[rows].numpy(), kind, importance)
        out[rows] = data.reshape(-1, out.shape[1])

    _in_parts(quantize, n_out, n_threads)
    return out


def _in_parts(work: Callable[[slice], None], n_rows: int, n_threads: int) -> None:
    parts = [slice(a, min(a + _ROWS, n_rows)) for a in range(0, n_rows, _ROWS)]
    list(_pool(n_threads).map(work, parts))


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    # Each part in one thread, so that sums do not depend on how many there are.
    return ThreadPoolExecutor(n_threads, "feedback", torch.set_num_threads, (1,))


class _Solver:
    """One matrix, rows by rows."""

    def __init__(
        self,
        factor: BlockFactor,
        kind: QuantType,
        quantizer: Quantizer,
        settings: FeedbackSettings,
    ) -> None:
        self.factor, self.kind, self.quantizer = factor, kind, quantizer
        self.layout, self.settings = LAYOUTS[kind], settings
        self.blocks = [
            _Block(factor, kind.block_weights, self.layout, i) for i in range(len(factor.spans))
        ]

    def rows(self, weight: torch.Tensor, out: np.ndarray) -> None:
        """Solve rows ``(n, in)`` into ``(n, blocks, block_bytes)``."""
        n, n_in = weight.shape
        spread = self.factor.spread
        # Weights at first; from the last row upwards they become errors.
        delta = weight.new_zeros(n_in, -(-n // LANES) * LANES)
        delta[:, :n] = weight.T.index_select(0, self.factor.columns)
        for asking in _together(self.blocks, _ASKING):
            first, end = asking[-1].first, asking[0].end
            asked = torch.addmm(delta[first:end], spread[end:, first:end].T, delta[end:])
            for block in asking:
                a, b = block.first, block.end
                x = asked[a - first : b - first]
                if b < end:
                    x = torch.addmm(x, spread[b:end, a:b].T, delta[b:end])
                data, values = self._solve(block, x.contiguous())
                out[:, block.index] = data[:n]
                delta[a:b] -= torch.from_numpy(values)

    def _solve(self, block: _Block, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A block's bytes ``(rows, block_bytes)``, and its values ``(n, rows)`` as visited."""
        weights = x.numpy()
        natural = np.ascontiguousarray(weights[block.back].T)
        data = self.quantizer.quantize(natural, self.kind, block.costs, validate=False)
        data = data.reshape(len(natural), -1)
        values, codes, cost = self._codes(block, weights, data)
        for _ in range(self.settings.refits):
            tried = data.copy()
            self._refit(block, x, values, codes, tried)
            found = self._codes(block, weights, tried)
            better = found[2] < cost
            data[better] = tried[better]
            for old, new in zip((values, codes, cost), found, strict=True):
                old[..., better] = new[..., better]
        self.layout.put(data, np.ascontiguousarray(codes[block.back].T))
        return data, values

    def _codes(
        self, block: _Block, x: np.ndarray, data: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values and codes ``(n, rows)`` for the scales in `data`, and the rows' costs."""
        scale, minimum = (np.ascontiguousarray(a.T, np.float32) for a in self.layout.grid(data))
        codes, cost = np.empty(x.shape, np.uint8), np.empty(x.shape[1], np.float32)
        top, levels = self.layout.top, self.layout.levels
        kernel, curved = kernels.load("feed_block"), levels is not None
        kernel(x, block.inverse, block.part, scale, minimum, top, curved, codes, cost)
        units = codes if levels is None else levels[codes]
        return scale[block.part] * units - minimum[block.part], codes, cost

    def _refit(
        self,
        block: _Block,
        x: torch.Tensor,
        values: np.ndarray,
        codes: np.ndarray,
        data: np.ndarray,
    ) -> None:
        """Fit the common factors of scales and minima to the codes, in the Hessian that is left."""
        _, minimum = self.layout.grid(data)
        fixed = np.ascontiguousarray(minimum.T)[block.part]
        terms = [values] if len(self.layout.halves) == 1 else [values + fixed, -fixed]
        wanted = block.lower.T @ x
        given = [block.lower.T @ torch.from_numpy(term) for term in terms]
        sums = [[(a * b).sum(0).numpy() for b in (*given, wanted)] for a in given]
        for at, factor in zip(self.layout.halves, _least_squares(sums), strict=True):
            half = np.ascontiguousarray(data[:, at : at + 2]).view("<f2")[:, 0]
            with np.errstate(over="ignore"):
                fitted = (half * factor).astype("<f2")
            sound = np.isfinite(fitted) & (factor > 0.5) & (factor < 2)
            data[:, at : at + 2] = np.where(sound, fitted, half)[:, None].view(np.uint8)


def _least_squares(sums: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Factors of one or two terms from their normal equations; 1 where there is no telling."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(sums) == 1:
            ((aa, ay),) = sums
            found = [ay / aa]
        else:
            (aa, ab, ay), (_, bb, by) = sums
            det = aa * bb - ab * ab
            det = np.where(det > 1e-4 * aa * bb, det, np.nan)
            found = [(bb * ay - ab * by) / det, (aa * by - ab * ay) / det]
    return [np.where(np.isfinite(f), f, 1) for f in found]


class _Block:
    """A block's place among the rows of the factor, as arrays for the kernel."""

    def __init__(self, factor: BlockFactor, width: int, layout: Layout, at: int) -> None:
        self.first, self.end = factor.spans[at]
        columns = factor.columns[self.first : self.end].numpy()
        self.index = int(columns[0]) // width
        inside = columns - self.index * width
        #: Rows of the block in the order of its columns.
        self.back = np.argsort(inside)
        self.part = inside // layout.part
        self.inverse = factor.inverses[at].numpy()
        self.lower = factor.spread[self.first : self.end, self.first : self.end]
        self.costs = factor.costs[self.first : self.end].numpy()[self.back]


def _together(blocks: list[_Block], columns: int) -> Iterator[list[_Block]]:
    """Blocks from the last to the first, as many at a time as have so many columns."""
    if blocks:
        n, order = max(1, columns // (blocks[0].end - blocks[0].first)), blocks[::-1]
        for i in range(0, len(order), n):
            yield order[i : i + n]


def _spans(n: int, width: int) -> list[tuple[int, int]]:
    return [(a, a + width) for a in range(0, n, width)]
