"""A checkpoint whose learned tensors are a run's; all others are the base's bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from dus_edge.checkpoint.spec import Checkpoint, TensorSpec

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class TrainedCheckpoint(Checkpoint):
    """A view of a checkpoint with some tensors replaced.

    Args:
        below: the model as it was before.
        weights: by name, on the CPU, in the dtypes in which `below` stores them.
    """

    def __init__(self, below: Checkpoint, weights: Mapping[str, torch.Tensor]) -> None:
        self.below, self.weights = below, weights
        self.source, self.config = below.source, below.config
        # A learned tensor is no copy of anything any more.
        self._specs = {
            name: replace(spec, source=f"learned {name}") if name in weights else spec
            for name, spec in below.specs().items()
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in self.weights:
            return self.below.read(name, start, stop)
        rows = self.weights[name][start:stop].contiguous()
        if rows.dtype == torch.bfloat16:
            return rows.view(torch.int16).numpy().view(np.uint16)
        return rows.numpy()

    def check_unchanged(self) -> None:
        self.below.check_unchanged()


def in_stored_dtype(weight: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """A learned weight as its checkpoint stores it, on the CPU."""
    return weight.detach().to("cpu", _TORCH[spec.dtype])
