"""GPTQ: round a matrix so that the outputs, not the weights, change least.

Frantar et al., arXiv:2210.17323. Columns are rounded one after the other; each error is made good,
as well as the inputs' correlations allow, by the columns still to come. With H the damped XᵀX of
the inputs, columns in the *reverse* of the order in which they are visited, and H = L·Lᵀ:

- a step's cost is exact, tr(ΔW·H·ΔWᵀ) = Σ (error of column j · L_jj)², so a matrix' loss is known
  when it is done;
- a group G that is next has, with all errors ΔW of the columns below it (visited before) made
  good, the weights W_G + ΔW_below · L_below,G · L_GG⁻¹. Every group asks for the errors so far
  instead of handing its own on to all later columns: one matrix product a block, and one Cholesky
  factorization where the paper inverts and factors twice.

Within a group, every one of a few scales is tried with error feedback, and the one that loses
least is kept. A symmetric scale may be negative: codes reach one step further on one side, and the
sign turns that side to the group's largest weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from dus_edge.errors import CheckpointError
from dus_edge.quant.feedback.factor import PRECISION, damped_factor, spread_errors
from dus_edge.quant.gptq_format import GROUP_SIZES, GPTQSettings
from dus_edge.quant.gptq_loops import choose_scales, nearest_codes, solve_group
from dus_edge.quant.simd import LANES

__all__ = ["PRECISION", "Factor", "GPTQSettings", "Solution", "dequantize", "prepare", "solve"]

#: Rows on which rounding to nearest is measured, while GPTQ clearly wins there.
_SAMPLE = 256
_CLEAR = 0.9
#: Scales tried, as shares of the one that just covers the group's weights: from … to, by bits.
_SHARES = {2: (1.2, 0.6), 3: (1.1, 0.65), 4: (1.05, 0.75), 8: (1.02, 0.95)}
#: Sizes that float16 holds.
_HALF_MIN, _HALF_MAX = 2.0**-24, 65504.0


@dataclass(frozen=True)
class Factor:
    """What all matrices with one input share.

    Attributes:
        settings: what it was made for.
        hessian: ``(in, in)``, as given.
        columns: ``(in,)`` int64: columns in the reverse of the order in which they are visited;
            row r of the tensors below belongs to ``columns[r]``.
        g_idx: ``(in,)`` int32: group of every column as stored.
        spread: ``(in, in)``: below each group's diagonal block, L_below,G · L_GG⁻¹.
        inverses: the L_GG⁻¹, lower-triangular, from the first rows to the last.
        dead: ``(in,)`` bool, by row: inputs that were always 0.
        added: the damping that was added to the diagonal.
        fallback: why nothing can be solved; then `spread` is empty.
    """

    settings: GPTQSettings
    hessian: torch.Tensor
    columns: torch.Tensor
    g_idx: torch.Tensor
    spread: torch.Tensor
    inverses: tuple[torch.Tensor, ...]
    dead: torch.Tensor
    added: float
    fallback: str | None


@dataclass(frozen=True)
class Solution:
    """A quantized matrix; tensors are on the weight's device.

    Attributes:
        codes: ``(out, in)`` uint8.
        scales: ``(groups, out)`` float16, exactly those that were solved for. Symmetric ones may
            be negative.
        zeros: ``(groups, out)`` int32, in ``1 … 2^bits − 1``.
        g_idx: ``(in,)`` int32.
        loss: tr(ΔW·XᵀX·ΔWᵀ).
        rtn_loss: that of rounding to nearest, scales chosen by the error weighted with XᵀX's
            diagonal. In tall matrices estimated from 256 rows, unless they leave doubt which of
            the two is less.
        fallback: why the codes are rounded to nearest instead; None if they are not.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    loss: float
    rtn_loss: float
    fallback: str | None


def dequantize(solution: Solution) -> torch.Tensor:
    """The weights ``(out, in)`` float32 that readers of the format will see."""
    groups = solution.g_idx.long()
    scales = solution.scales.float().index_select(0, groups)
    zeros = solution.zeros.float().index_select(0, groups)
    return (scales * (solution.codes.T.float() - zeros)).T


def prepare(hessian: torch.Tensor, settings: GPTQSettings) -> Factor:
    """Order the columns and factor the Hessian, once for all matrices with that input.

    Args:
        hessian: ``(in, in)`` XᵀX, symmetric, in any scale; float64 means arithmetic in float64.
        settings: see `GPTQSettings`; `GPTQSettings.check` has passed.

    Returns:
        A factor; one with `Factor.fallback` set if the Hessian has no use.
    """
    n = len(hessian)
    dtype = torch.float64 if hessian.dtype == torch.float64 else PRECISION
    columns = _visiting_order(hessian.diagonal().to(dtype), settings).flip(0)
    width = settings.group_width(n)
    g_idx = torch.arange(n, device=hessian.device) // width
    if settings.desc_act:
        g_idx = torch.empty_like(g_idx).index_copy_(0, columns, g_idx.flip(0))
    damped = damped_factor(hessian, columns, settings.damp)
    inverses: tuple[torch.Tensor, ...] = ()
    if damped.fallback is None:
        inverses = spread_errors(damped.lower, _chunks(n, settings))
    return Factor(
        settings,
        hessian,
        columns,
        g_idx.to(torch.int32),
        damped.lower,
        inverses,
        damped.dead,
        damped.added,
        damped.fallback,
    )


def solve(
    weight: torch.Tensor, hessian: torch.Tensor | Factor, settings: GPTQSettings, name: str = ""
) -> Solution:
    """Quantize a matrix.

    Args:
        weight: ``(out, in)``, any float dtype; on the Hessian's device.
        hessian: ``(in, in)`` XᵀX, or what `prepare` made of it.
        settings: see `GPTQSettings`.
        name: the tensor, for messages.

    Raises:
        UsageError: `settings` do not suit the shape.
        CheckpointError: the weights are not finite.
        ValueError: the Hessian is of another size, or was prepared for other settings.
    """
    settings.check(name, tuple(weight.shape))
    if isinstance(hessian, torch.Tensor):
        hessian = prepare(hessian, settings)
    factor = hessian
    if factor.settings != settings or len(factor.hessian) != weight.shape[1]:
        raise ValueError(f"{name}: prepared for other settings or another width")
    dtype = factor.spread.dtype if factor.fallback is None else PRECISION
    rows = weight.to(dtype)
    # One sum is finite only if all are; a sum that overflows is looked at more closely.
    if not math.isfinite(float(rows.sum())) and not bool(torch.isfinite(rows).all()):
        raise CheckpointError(f"{name}: weights are not finite; this checkpoint is damaged.")
    if factor.fallback is not None:
        return _nearest(rows, factor, factor.fallback)
    solution, losses = _solve(rows, factor)
    return _checked(rows, factor, solution, losses)


def _visiting_order(diagonal: torch.Tensor, settings: GPTQSettings) -> torch.Tensor:
    """Columns in the order in which they are quantized; a group's follow each other."""
    n = len(diagonal)
    if settings.desc_act:
        return diagonal.argsort(descending=True, stable=True)
    columns = torch.arange(n, device=diagonal.device)
    if not settings.act_group_aware:
        return columns
    groups = diagonal.view(-1, settings.group_width(n))
    inside = groups.argsort(dim=1, descending=True, stable=True)
    order = groups.mean(1).argsort(descending=True, stable=True)
    return columns.view_as(groups).gather(1, inside)[order].reshape(-1)


def _chunks(n: int, settings: GPTQSettings) -> list[tuple[int, int]]:
    """Rows (first, end) that are solved at once, from the first: groups, or parts of a long one.

    Counted from the end, where the first column visited stands.
    """
    width = settings.group_width(n)
    if width not in GROUP_SIZES:
        width = settings.block
    return [(max(0, end - width), end) for end in range(n, 0, -width)][::-1]


def _solve(rows: torch.Tensor, factor: Factor) -> tuple[Solution, torch.Tensor]:
    """The codes, and every row's loss."""
    settings = factor.settings
    n_out, n_in = rows.shape
    n_groups = n_in // settings.group_width(n_in)
    # Weights at first; from the last row upwards they become errors.
    delta = rows.T.contiguous().index_select(0, factor.columns)
    delta.masked_fill_(factor.dead[:, None], 0)
    codes = torch.empty(n_in, n_out, dtype=torch.uint8, device=rows.device)
    scales = rows.new_empty(n_groups, n_out)
    zeros = torch.empty_like(scales)
    cost = rows.new_zeros(n_out)
    group_of = factor.g_idx[factor.columns].tolist()
    chunks = list(zip(_chunks(n_in, settings), factor.inverses, strict=True))
    # Trying a scale with error feedback takes a group that is solved at once.
    whole = len(chunks) == n_groups
    if not whole:
        weights = torch.cat([inverse.diagonal() for inverse in factor.inverses]) ** -2
        scales[0], zeros[0] = _best_scales(delta, weights, settings)
    while chunks:
        end = chunks[-1][0][1]
        together = max(1, settings.block // (end - chunks[-1][0][0]))
        chunks, block = chunks[:-together], chunks[-together:]
        first = block[0][0][0]
        # The block asks for the errors below it in one product, its chunks for those in it.
        spread = factor.spread[:, first:end]
        asked = torch.addmm(delta[first:end], spread[end:].T, delta[end:])
        for (a, b), inverse in reversed(block):
            x = asked[a - first : b - first]
            if b < end:
                x = torch.addmm(x, spread[b:end, a - first : b - first].T, delta[b:end])
            tried = _candidates(x, settings) if whole else (scales, zeros)
            group = group_of[a]
            scales[group], zeros[group] = solve_group(
                x, inverse, *tried, settings.top, codes[a:b], delta[a:b], cost
            )
    solution = Solution(
        torch.empty_like(codes).index_copy_(0, factor.columns, codes).T,
        scales.half(),
        zeros.to(torch.int32),
        factor.g_idx,
        math.nan,
        math.nan,
        None,
    )
    # The cost is that of the damped Hessian.
    return solution, cost - factor.added * delta.square_().sum(0)


def _candidates(x: torch.Tensor, settings: GPTQSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points worth a try for a group ``(n, rows)``: ``(candidates, rows)`` each.

    Scales are numbers that float16 holds, and never 0.
    """
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    shares = torch.linspace(*_SHARES[settings.bits], settings.candidates, dtype=x.dtype)
    steps = shares[:, None].to(x.device)
    middle = 2 ** (settings.bits - 1)
    if settings.sym:
        largest = torch.where(high > -low, high, low)
        scales = _half(steps * (largest / -middle))
        return scales, torch.full_like(scales, middle)
    scales = _half(steps * ((high - low) / settings.top))
    return scales, (-low * steps / scales).round().clamp(1, settings.top)


def _half(scales: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, away from 0 and infinity."""
    size = scales.abs().clamp(_HALF_MIN, _HALF_MAX).half().to(scales.dtype)
    return torch.where(scales < 0, -size, size)


def _best_scales(
    x: torch.Tensor, weights: torch.Tensor, settings: GPTQSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point ``(rows,)`` of least weighted error for a group ``(n, rows)``."""
    scales, zeros = _candidates(x, settings)
    return choose_scales(x, weights, scales, zeros, settings.top)


# Rounding to nearest


def _nearest(rows: torch.Tensor, factor: Factor, why: str | None) -> Solution:
    """Round to nearest, group by group; `Solution.loss` is its own."""
    settings = factor.settings
    n_out, n_in = rows.shape
    width = settings.group_width(n_in)
    diagonal = factor.hessian.diagonal().to(rows.dtype)
    if not bool(torch.isfinite(diagonal).all()) or not bool((diagonal > 0).any()):
        diagonal = torch.ones_like(diagonal)
    # Members of each group side by side; a stable sort keeps their order.
    members = factor.g_idx.argsort(stable=True)
    x = rows.T.contiguous().index_select(0, members)
    weights = diagonal.clamp(min=0)[members]
    codes = torch.empty_like(x, dtype=torch.uint8)
    scales = rows.new_empty(n_in // width, n_out)
    zeros = torch.empty_like(scales)
    for g in range(n_in // width):
        a, b = g * width, (g + 1) * width
        scale, zero = scales[g], zeros[g] = _best_scales(x[a:b], weights[a:b], settings)
        codes[a:b] = nearest_codes(x[a:b], scale, zero, settings.top).to(torch.uint8)
    codes = torch.empty_like(codes).index_copy_(0, members, codes).T
    found = Solution(
        codes, scales.half(), zeros.to(torch.int32), factor.g_idx, math.nan, math.nan, why
    )
    delta = rows - dequantize(found).to(rows.dtype)
    loss = _total((delta @ factor.hessian.to(rows.dtype)).mul_(delta))
    return replace(found, loss=loss, rtn_loss=loss)


def _checked(
    rows: torch.Tensor, factor: Factor, solution: Solution, losses: torch.Tensor
) -> Solution:
    """With the losses filled in; rounded to nearest instead if that loses less."""
    n_out = len(rows)
    step = max(1, n_out // _SAMPLE)
    n = n_out // step // LANES * LANES
    nearest = _nearest(rows[::step][:n], factor, None)
    loss, rtn_loss = _total(losses), nearest.loss * n_out / n
    if n < n_out and _total(losses[::step][:n]) > _CLEAR * nearest.loss:
        nearest = _nearest(rows, factor, None)
        rtn_loss, n = nearest.loss, n_out
    if n == n_out and loss > rtn_loss:
        return replace(nearest, fallback="rounding to nearest loses less on the calibration text")
    return replace(solution, loss=max(loss, 0.0), rtn_loss=rtn_loss)


def _total(x: torch.Tensor) -> float:
    return float(x.sum(dtype=_wide(x)))


def _wide(x: torch.Tensor) -> torch.dtype:
    """For sums of many: float64 where there is such."""
    return torch.float32 if x.device.type == "mps" else torch.float64
