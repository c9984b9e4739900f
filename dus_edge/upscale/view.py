"""An up-scaled model is a view of its base: the same bytes under more names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dus_edge.checkpoint.config import tensor_shapes, with_layers
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.families.family import Family
from dus_edge.upscale.plan import DepthPlan


class UpscaledCheckpoint(Checkpoint):
    """A checkpoint whose layer i is the base's layer ``plan.sources[i]``. It owns no bytes."""

    def __init__(self, base: Checkpoint, plan: DepthPlan) -> None:
        self.base = base
        self.plan = plan
        self.source = base.source
        self.config = with_layers(base.config, plan.sources)
        below = base.specs()
        self._names = {
            name: base_tensor_name(name, plan, self.config.family)
            for name in tensor_shapes(self.config)
        }
        self._specs = {
            name: replace(below[base_name], name=name) for name, base_name in self._names.items()
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.base.read(self._names[name], start, stop)

    def check_unchanged(self) -> None:
        self.base.check_unchanged()


def base_tensor_name(name: str, plan: DepthPlan, family: Family) -> str:
    """The base's name of a tensor of the result; what belongs to no layer keeps its own."""
    place = family.layer_of(name)
    return name if place is None else family.in_layer(name, plan.sources[place[0]])
