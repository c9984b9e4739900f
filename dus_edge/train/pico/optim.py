"""Muon for the hidden matrices: momentum made orthogonal by a Newton-Schulz iteration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Executor

import torch
from torch import Tensor

# Keller Jordan's quintic coefficients: steep at zero, so that five steps are enough.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each f32 matrix (batch, rows, columns) towards one."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that AdamW's learning rates fit.

    The update of a matrix has a root mean square of 0.2 x ``lr`` (arXiv:2502.16982); the
    weight decay is decoupled. Matrices of one shape are one batch; ``pool`` runs the batches
    side by side.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        pool: Executor | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.pool = pool

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[tuple(weight.shape)].append(weight)
            jobs = sorted(by_shape.values(), key=lambda ws: -ws[0].numel() * len(ws))
            run = map if self.pool is None else self.pool.map
            list(run(lambda weights, group=group: self._update(weights, group), jobs))

    @torch.no_grad()
    def _update(self, weights: list[Tensor], group: dict) -> None:
        """Update same-shaped matrices together."""
        beta = group["momentum"]
        looks = []
        for weight in weights:
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - beta)
            looks.append(weight.grad.lerp(state["momentum"], beta))
        updates = orthogonalise(torch.stack(looks))
        scale = 0.2 * max(weights[0].shape) ** 0.5
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * scale)
