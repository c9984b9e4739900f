"""A base and its plan as one noun, and how the command line's words become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dus_edge.checkpoint.config import ModelConfig, load_config, tensor_shapes, with_layers
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Checkpoint, Source
from dus_edge.upscale import plan as plans
from dus_edge.upscale.naming import ModelName, name_model
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.view import UpscaledCheckpoint
from dus_edge.words import format_count

ChoosePlan = Callable[[int], DepthPlan]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A base and the plan applied to it, known by its configuration alone."""

    source: Source
    base_config: ModelConfig
    plan: DepthPlan

    @cached_property
    def config(self) -> ModelConfig:
        """Configuration of the result."""
        return with_layers(self.base_config, self.plan.sources)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the result's tensors."""
        return tensor_shapes(self.config)

    @property
    def n_parameters(self) -> int:
        """Parameters of the result; a tied head counts once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def name(self) -> ModelName:
        """What the result is called."""
        return name_model(self.source.name, self.n_parameters, upscaled=not self.plan.is_identity)

    def open(self) -> Checkpoint:
        """Open the weights: headers are read and checked, nothing else."""
        base = SafetensorsCheckpoint(self.source, self.base_config)
        return base if self.plan.is_identity else UpscaledCheckpoint(base, self.plan)


def plan_chooser(
    drop: int | None, layers: int | None, spelled: Sequence[str], upscale: bool
) -> ChoosePlan:
    """The plan that options ask for, once the base's depth is known."""
    return lambda n: plans.choose(
        n, drop=drop, layers=layers, plans=tuple(spelled), upscale=upscale
    )


def find_model(
    base: str,
    choose: ChoosePlan,
    *,
    weights: bool,
    say: Say,
    early: Callable[[Path, ModelConfig], object] = lambda folder, config: None,
) -> Model:
    """Resolve a base and its plan.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        weights: whether the weights are wanted.
        say: takes lines for the user.
        early: a check that the small files are enough for. Like configuration and plan it comes
            before a hub base's gigabytes are fetched.
    """

    def check(folder: Path) -> None:
        config = load_config(folder / CONFIG)
        plans.check_pattern(
            choose(config.n_layers), config.family.period, config.family.architecture
        )
        early(folder, config)

    source = resolve_base(base, weights=weights, on_config=check, progress=say)
    config = load_config(source.folder / CONFIG)
    return Model(source, config, choose(config.n_layers))


def describe(model: Model) -> str:
    """One line: ``Mistral-7B-v0.1: 32 → 48 layers (0:24,8:32), 10.73 B parameters``."""
    plan = model.plan
    depth = (
        f"{plan.depth} layers"
        if plan.is_identity
        else f"{plan.n_base} → {plan.depth} layers ({plan.spelled})"
    )
    return f"{model.source.name}: {depth}, {format_count(model.n_parameters)} parameters"
