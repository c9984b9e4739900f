"""The collector of importance matrices: mean squares of every linear layer's inputs.

Semantics of llama.cpp's tools/imatrix/imatrix.cpp: for each matrix the sum of x² of every input
column over all tokens, and how many tokens there were.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dus_edge.calibrate.layer import SITES


class ImatrixCollector:
    """Sums of squares by layer and site; a `Visitor` of the engine."""

    replaces = False

    def __init__(self) -> None:
        self._sums: dict[tuple[int, str], torch.Tensor] = {}
        self._counts: dict[tuple[int, str], int] = {}

    def observe(self, layer: int, site: str, x: torch.Tensor) -> None:
        # Squares in float32, their sum over many batches in float64 on the CPU.
        part = x.float().square().sum(0).cpu().double()
        key = layer, site
        self._sums[key] = self._sums[key] + part if key in self._sums else part
        self._counts[key] = self._counts.get(key, 0) + x.shape[0]

    def finish_site(
        self, layer: int, site: str, weights: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        return {}

    def save(self, layer: int, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {site: self._sums[layer, site] for site in SITES}
        counts = {site: str(self._counts[layer, site]) for site in SITES}
        save_file(tensors, path, metadata=counts)

    def load(self, layer: int, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            for site in SITES:
                self._sums[layer, site] = file.get_tensor(site)
                self._counts[layer, site] = int(file.metadata()[site])

    def results(self) -> dict[str, tuple[torch.Tensor, int]]:
        """By Hugging Face name: Σx² ``(n_cols,)`` float64, and the number of tokens."""
        return {
            f"model.layers.{layer}.{linear}.weight": (self._sums[layer, site], count)
            for (layer, site), count in sorted(self._counts.items(), key=lambda item: item[0][0])
            for linear in SITES[site]
        }
