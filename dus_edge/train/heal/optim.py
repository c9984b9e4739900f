"""The learning rate over the steps, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dus_edge.packages import require

ADAMW, ADAMW8BIT = "adamw", "adamw8bit"
OPTIMIZERS = (ADAMW, ADAMW8BIT)
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Schedule:
    """Warm-up, a stable rate, decay to nothing (WSD, arXiv:2404.06395).

    The base ended its training at a low rate; the warm-up takes it up again from nothing
    (re-warming, arXiv:2308.04014).

    Attributes:
        peak: the stable rate.
        steps: of the whole run.
        warmup: share of the steps in which the rate rises linearly.
        decay: share in which it falls, as one minus a square root (arXiv:2405.18392).
    """

    peak: float
    steps: int
    warmup: float = 0.05
    decay: float = 0.2

    def rate(self, step: int) -> float:
        """The rate of a step, counted from 0; never 0 before the end."""
        rising = max(1, round(self.warmup * self.steps))
        falling = round(self.decay * self.steps)
        if step < rising:
            return self.peak * (step + 1) / rising
        if falling and step >= self.steps - falling:
            gone = (step - (self.steps - falling) + 1) / (falling + 1)
            return self.peak * (1 - math.sqrt(gone))
        return self.peak


def make_optimizer(
    name: str, parameters: Iterable[torch.nn.Parameter], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms and biases do not.

    Args:
        name: one of `OPTIMIZERS`; the 8-bit one keeps its moments in one byte each
            (bitsandbytes, arXiv:2110.02861).
        parameters: those that learn.
        weight_decay: of matrices.

    Raises:
        DependencyError: bitsandbytes is wanted and not there.
    """
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for p in parameters:
        (matrices if p.ndim > 1 else vectors).append(p)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if name == ADAMW8BIT:
        require("bnb", "--optimizer adamw8bit needs the package", "bitsandbytes")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, lr=0.0, betas=BETAS)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
