"""The collector of GPTQ: XᵀX of every site, solved as soon as the site has seen all tokens.

Frantar et al., arXiv:2210.17323. Matrices that share an input share one XᵀX and one factorization.
The engine goes on with the quantized matrices, so later sites see what the quantized model will
see, within a layer too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dus_edge.calibrate.world import ALONE, World
from dus_edge.quant import gptq, gptq_format
from dus_edge.quant.feedback.gram import add_gram, mirror


@dataclass(frozen=True)
class Outcome:
    """How one matrix came out.

    Attributes:
        name: Hugging Face name without ``.weight``.
        loss: tr(ΔW·XᵀX·ΔWᵀ), the squared error of the layer's outputs over all tokens.
        rtn_loss: that of rounding to nearest on the same groups.
        fallback: why it was rounded to nearest after all; None where it was solved.
    """

    name: str
    loss: float
    rtn_loss: float
    fallback: str | None


class GptqCollector:
    """XᵀX by site over all processes, then quantized matrices; a `Visitor` of the engine."""

    replaces = True

    def __init__(
        self,
        settings: gptq.GPTQSettings,
        on_fallback: Callable[[Outcome], None] = lambda o: None,
        world: World = ALONE,
    ) -> None:
        self.settings = settings
        self._world = world
        self.outcomes: dict[str, Outcome] = {}
        self._on_fallback = on_fallback
        self._hessian: torch.Tensor | None = None
        # Of the layer that is not saved yet.
        self._arrays: dict[str, np.ndarray] = {}
        self._unsaved: list[Outcome] = []

    def observe(self, layer: int, site: str, x: torch.Tensor) -> None:
        if self._hessian is None:
            self._hessian = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        add_gram(self._hessian, x.float())

    def finish_site(
        self, layer: int, site: str, weights: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        hessian, self._hessian = self._hessian, None
        assert hessian is not None
        mirror(hessian)
        # All processes solve the same, from the same bits.
        hessian = self._world.summed(hessian)
        factor = gptq.prepare(hessian, self.settings)
        replaced = {}
        for tensor, weight in weights.items():
            name = tensor.removesuffix(".weight")
            solution = gptq.solve(
                weight.to(hessian.device, torch.float32), factor, self.settings, name
            )
            outcome = Outcome(name, solution.loss, solution.rtn_loss, solution.fallback)
            self.outcomes[name] = outcome
            self._unsaved.append(outcome)
            if outcome.fallback:
                self._on_fallback(outcome)
            for part, array in gptq_format.stored(solution, self.settings).items():
                self._arrays[f"{name}.{part}"] = array
            replaced[tensor] = gptq.dequantize(solution)
        return replaced

    def save(self, layer: int, path: Path) -> None:
        from safetensors.numpy import save_file

        facts = json.dumps([asdict(outcome) for outcome in self._unsaved])
        save_file(self._arrays, path, metadata={"outcomes": facts})
        self._arrays, self._unsaved = {}, []

    def load(self, layer: int, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            for facts in json.loads(file.metadata()["outcomes"]):
                self.outcomes[facts["name"]] = Outcome(**facts)
