"""An up-scaled model is a view of its base: the same bytes under more names.

Only what the plan's method changes is computed, when its rows are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from dus_edge.checkpoint.config import tensor_shapes, with_layers
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.families.family import Family
from dus_edge.upscale.methods import made_rows
from dus_edge.upscale.plan import DepthPlan


@dataclass(frozen=True)
class _Making:
    """What a tensor is made of: the mean of the base's tensors of those names, times a number.

    `shift` is the family's, of a tensor that is scaled.
    """

    parents: tuple[str, ...]
    scale: float = 1.0
    shift: float = 0.0

    @property
    def is_copy(self) -> bool:
        return len(self.parents) == 1 and self.scale == 1

    def source(self, below: Mapping[str, TensorSpec]) -> str:
        """`TensorSpec.source`: the parent's own of a copy, else one that says what was done."""
        mean = " and ".join(below[parent].source for parent in self.parents)
        mean = mean if len(self.parents) == 1 else f"mean of {mean}"
        return mean if self.scale == 1 else f"{mean} times {self.scale!r}"


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
        self._copies = frozenset(plan.copies)
        self._made = {name: self._making(name) for name in tensor_shapes(self.config)}
        self._specs = {
            name: replace(below[made.parents[0]], name=name, source=made.source(below))
            for name, made in self._made.items()
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        made = self._made[name]
        rows = [self.base.read(parent, start, stop) for parent in made.parents]
        return (
            rows[0]
            if made.is_copy
            else made_rows(rows, self._specs[name].dtype, made.scale, made.shift)
        )

    def check_unchanged(self) -> None:
        self.base.check_unchanged()

    def _making(self, name: str) -> _Making:
        plan, family = self.plan, self.config.family
        rule, layer, _ = family.find(name)
        if layer is None:
            return _Making((name,))
        parents = tuple(family.in_layer(name, source) for source in plan.parents(layer))
        if layer not in self._copies or rule.role not in family.branch_roles:
            return _Making(parents)
        return _Making(parents, plan.method.branch_scale, family.shift(name))


def base_tensor_name(name: str, plan: DepthPlan, family: Family) -> str:
    """The base's name of a tensor of the result; what belongs to no layer keeps its own."""
    place = family.layer_of(name)
    return name if place is None else family.in_layer(name, plan.sources[place[0]])
