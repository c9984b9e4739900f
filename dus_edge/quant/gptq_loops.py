"""GPTQ's inner loops, over the rows of a group: compiled on a CPU, tensor operations elsewhere."""

from __future__ import annotations

import functools
import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dus_edge.quant import kernels
from dus_edge.quant.simd import LANES


def solve_group(
    x: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    top: int,
    codes: torch.Tensor,
    delta: torch.Tensor,
    cost: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a group; see `gptq_kernel.solve_group`. Returns each row's scale and zero point."""
    if not _has_kernel(x):
        return solve_group_by_tensors(x, inverse, scales, zeros, top, codes, delta, cost)
    chosen = torch.empty_like(cost), torch.empty_like(cost)
    arrays = (x, inverse, scales, zeros, codes, delta, cost, *chosen)
    _in_parts("solve_group", x.shape[1], arrays, top)
    return chosen


def solve_group_by_tensors(
    x: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    top: int,
    codes: torch.Tensor,
    delta: torch.Tensor,
    cost: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gptq_kernel.solve_group` as tensor operations, for any device and dtype."""
    work = x.expand(len(scales), *x.shape).clone()
    costs = torch.zeros_like(scales)
    found = torch.empty_like(work)
    for i in range(len(x) - 1, -1, -1):
        found[:, i] = nearest_codes(work[:, i], scales, zeros, top)
        error = (work[:, i] - scales * (found[:, i] - zeros)) / inverse[i, i]
        costs += error.square()
        work[:, :i] -= inverse[i, :i, None] * error[:, None]
    least, choice = costs.min(0)
    cost += least
    best = found.gather(0, choice.expand(1, *x.shape))[0]
    scale, zero = _pick(scales, choice), _pick(zeros, choice)
    codes.copy_(best)
    delta -= scale * (best - zero)
    return scale, zero


def choose_scales(
    x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's scale and zero point of least error; see `gptq_kernel.choose_scales`."""
    if not _has_kernel(x):
        return choose_scales_by_tensors(x, weights, scales, zeros, top)
    chosen = torch.empty_like(scales[0]), torch.empty_like(scales[0])
    _in_parts("choose_scales", x.shape[1], (x, weights, scales, zeros, *chosen), top)
    return chosen


def choose_scales_by_tensors(
    x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gptq_kernel.choose_scales` as tensor operations, for any device and dtype."""
    costs = [
        (weights[:, None] * (x - s * (nearest_codes(x, s, z, top) - z)).square()).sum(0)
        for s, z in zip(scales, zeros, strict=True)
    ]
    choice = torch.stack(costs).argmin(0)
    return _pick(scales, choice), _pick(zeros, choice)


def nearest_codes(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Nearest codes, as floats."""
    return ((x / scale).round() + zero).clamp(0, top)


def _pick(values: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
    """Of ``(candidates, rows)`` each row's choice."""
    return values.gather(0, choice[None])[0]


def load_kernels() -> None:
    """Have the compiled loops ready: on the first matrix they would take half a second."""
    x = torch.zeros(LANES, LANES)
    ones, codes = torch.ones(1, LANES), torch.empty(LANES, LANES, dtype=torch.uint8)
    solve_group(x, torch.eye(LANES), ones, ones, 1, codes, x.clone(), ones[0].clone())
    choose_scales(x, ones[0], ones, ones, 1)


@functools.cache
def _kernel(name: str) -> Any:
    with kernels.cached_code():
        return getattr(importlib.import_module("dus_edge.quant.gptq_kernel"), name)


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "gptq")


def _in_parts(name: str, n_rows: int, arrays: tuple[torch.Tensor, ...], top: int) -> None:
    """Run a kernel, which releases the GIL, on as many parts of the rows as torch has threads."""
    kernel, given = _kernel(name), [array.numpy() for array in arrays]
    n_threads = min(torch.get_num_threads(), n_rows // LANES)
    ends = [n_rows // LANES * i // n_threads * LANES for i in range(n_threads + 1)]
    parts = list(itertools.pairwise(ends))
    running = [_pool(n_threads).submit(kernel, *given, top, a, b) for a, b in parts[1:]]
    kernel(*given, top, *parts[0])
    for future in running:
        future.result()


def _has_kernel(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32
