"""An up-scaled model is a view of its base: the same bytes under more names.

Only what the plan's method changes is computed, when its rows are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from dus_edge.checkpoint.config import tensor_shapes, with_layers
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.families.family import Family
from dus_edge.upscale.methods import BRANCH_ROLES, scaled_rows
from dus_edge.upscale.plan import DepthPlan


class UpscaledCheckpoint(Checkpoint):
    """A checkpoint whose layer i is the base's layer ``plan.sources[i]``. It owns no bytes.

    A tensor that the method changes has a source of its own, which copies that are changed alike
    share: sinks read and quantize it once, and all others as before.
    """

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
        self._scaled = frozenset(self._changed())
        for name in self._scaled:
            spec, scale = self._specs[name], plan.method.branch_scale
            self._specs[name] = replace(spec, source=f"{spec.source} times {scale!r}")

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = self.base.read(self._names[name], start, stop)
        if name not in self._scaled:
            return rows
        return scaled_rows(rows, self._specs[name].dtype, self.plan.method.branch_scale)

    def check_unchanged(self) -> None:
        self.base.check_unchanged()

    def _changed(self) -> Iterator[str]:
        """Tensors of copies whose branches are scaled."""
        if self.plan.method.branch_scale == 1:
            return
        copies, family = set(self.plan.copies), self.config.family
        for name in self._specs:
            rule, layer, _ = family.find(name)
            if layer in copies and rule.role in BRANCH_ROLES:
                yield name


def base_tensor_name(name: str, plan: DepthPlan, family: Family) -> str:
    """The base's name of a tensor of the result; what belongs to no layer keeps its own."""
    place = family.layer_of(name)
    return name if place is None else family.in_layer(name, plan.sources[place[0]])
