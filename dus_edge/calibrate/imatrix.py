"""The collector of importance matrices: mean squares of every linear layer's inputs.

Semantics of llama.cpp's tools/imatrix/imatrix.cpp: for each matrix the sum of x² of every input
column over all tokens, and how many tokens there were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dus_edge.calibrate.world import ALONE, World


@dataclass
class _Sums:
    """Of one site in one layer.

    Attributes:
        squares: Σx² ``(width,)`` float64.
        n_tokens: how many inputs were summed.
        names: the matrices that the site feeds; empty until it is finished.
    """

    squares: torch.Tensor
    n_tokens: int
    names: tuple[str, ...] = ()


class ImatrixCollector:
    """Sums of squares by layer and site, over all processes; a `Visitor` of the engine."""

    replaces = False

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._sums: dict[int, dict[str, _Sums]] = {}

    def observe(self, layer: int, site: str, x: torch.Tensor) -> None:
        # Squares in float32, their sum over many batches in float64 on the CPU.
        part = x.float().square().sum(0).cpu().double()
        sites = self._sums.setdefault(layer, {})
        if site in sites:
            sites[site].squares += part
            sites[site].n_tokens += x.shape[0]
        else:
            sites[site] = _Sums(part, x.shape[0])

    def finish_site(
        self, layer: int, site: str, weights: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        sums = self._sums[layer][site]
        sums.names = tuple(weights)
        sums.squares = self._world.summed(sums.squares)
        sums.n_tokens = round(self._world.sum(sums.n_tokens)[0])
        return {}

    def save(self, layer: int, path: Path) -> None:
        from safetensors.torch import save_file

        sites = self._sums[layer]
        facts = {site: json.dumps([s.n_tokens, *s.names]) for site, s in sites.items()}
        save_file({site: s.squares for site, s in sites.items()}, path, metadata=facts)

    def load(self, layer: int, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            sites = self._sums[layer] = {}
            for site, facts in file.metadata().items():
                n_tokens, *names = json.loads(facts)
                sites[site] = _Sums(file.get_tensor(site), n_tokens, tuple(names))

    def results(self) -> dict[str, tuple[torch.Tensor, int]]:
        """By Hugging Face name: Σx² ``(n_cols,)`` float64, and the number of tokens."""
        return {
            name: (s.squares, s.n_tokens)
            for _, sites in sorted(self._sums.items())
            for s in sites.values()
            for name in s.names
        }
