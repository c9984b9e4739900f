"""A base and its plan as one noun, and how the command line's words become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dus_edge.adapter.adapter import Adapter
from dus_edge.adapter.fit import is_for_result
from dus_edge.adapter.folder import check_tokenizer, merged_name, own_tokenizer, with_adapter
from dus_edge.adapter.merged import MergedCheckpoint
from dus_edge.checkpoint.config import ModelConfig, load_config, tensor_shapes, with_layers
from dus_edge.checkpoint.gguf.source import Wanted
from dus_edge.checkpoint.gguf.weights import GGUFCheckpoint
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint, check_embedding
from dus_edge.checkpoint.spec import Checkpoint, Source
from dus_edge.upscale import plan as plans
from dus_edge.upscale.methods import parse_scale
from dus_edge.upscale.naming import ModelName, name_model
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.planfile import PlanChoice, with_files
from dus_edge.upscale.view import UpscaledCheckpoint
from dus_edge.words import format_count

ChoosePlan = Callable[[int], DepthPlan]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A base and the plan applied to it, known by its configuration alone.

    Attributes:
        source: the base; with an adapter, its small files are the merged model's.
        base_config: its configuration.
        plan: which of its layers stand where.
        adapter: merged into the base, or into the result.
        on_result: whether into the result.
    """

    source: Source
    base_config: ModelConfig
    plan: DepthPlan
    adapter: Adapter | None = None
    on_result: bool = False

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
        base = self.source.name
        if self.adapter is not None and self.on_result:
            base = merged_name(base, self.adapter)
        return name_model(base, self.n_parameters, upscaled=not self.plan.is_identity)

    def open(self, dequantized: str = "F32") -> Checkpoint:
        """Open the weights: headers are read and checked, nothing else.

        Args:
            dequantized: what a GGUF's blocks become, ``F32`` or ``F16``.
        """
        found: Checkpoint
        if self.source.gguf is not None:
            found = GGUFCheckpoint(self.source, self.base_config, dequantized)
        else:
            found = SafetensorsCheckpoint(self.source, self.base_config)
        if self.adapter is not None and not self.on_result:
            found = MergedCheckpoint(found, self.adapter)
        if not self.plan.is_identity:
            found = UpscaledCheckpoint(found, self.plan)
        if self.adapter is not None and self.on_result:
            found = MergedCheckpoint(found, self.adapter)
        return found


def plan_chooser(
    drop: int | None,
    layers: int | None,
    spelled: Sequence[str],
    upscale: bool,
    *,
    blocks: Sequence[str] = (),
    place: str | None = None,
    method: str | None = None,
    branch_scale: str | float | None = None,
) -> ChoosePlan:
    """The plan that options ask for, once the base's depth is known.

    Raises:
        UsageError: a plan's file, or a value that fits no base.
    """
    scale = None if branch_scale is None else parse_scale(branch_scale)
    asked = PlanChoice(drop, layers, tuple(spelled), tuple(blocks), place, method, scale)
    asked = with_files(asked)
    return lambda n: asked.depth_plan(n, upscale)


def find_model(
    base: str,
    choose: ChoosePlan,
    *,
    weights: bool,
    say: Say,
    early: Callable[[Path, ModelConfig], object] = lambda folder, config: None,
    adapter: Path | None = None,
    tokenizer: Wanted = "always",
) -> Model:
    """Resolve a base and its plan.

    Args:
        base: folder, hub id, the built-in base's name, a GGUF file or a model of Ollama's.
        choose: gives the plan for a base's depth.
        weights: whether the weights are wanted.
        say: takes lines for the user.
        early: a check that the small files are enough for. Like configuration and plan it comes
            before a hub base's gigabytes are fetched.
        adapter: folder of a LoRA adapter that is merged on the way: into the base if it is one of
            the base, else into the up-scaled model.
        tokenizer: of a GGUF, whether its tokenizer is wanted.
    """
    merged = None if adapter is None else Adapter(adapter)

    def check(folder: Path) -> None:
        config = load_config(folder / CONFIG)
        check_embedding(folder, config)
        plan = choose(config.n_layers)
        plans.check_pattern(plan, config.family.period, config.family.architecture)
        plans.check_averaged(plan, layer_kinds(config), config.family.architecture)
        if merged is not None:
            _is_for_result(merged, config, plan)
            check_tokenizer(merged, config)
        early(merged.folder if merged and own_tokenizer(merged) else folder, config)

    source = resolve_base(base, weights=weights, on_config=check, progress=say, tokenizer=tokenizer)
    config = load_config(source.folder / CONFIG)
    plan = choose(config.n_layers)
    if merged is None:
        return Model(source, config, plan)
    on_result = _is_for_result(merged, config, plan)
    source = with_adapter(source, merged, of_base=not on_result)
    return Model(source, config, plan, merged, on_result)


def layer_kinds(config: ModelConfig) -> dict[str, tuple[bool, ...]]:
    """What layers of a model do or not, and of each whether it does."""
    windows = tuple(config.window(i) is not None for i in range(config.n_layers))
    return {"has a window": windows, "knows no positions": config.no_rope_layers}


def _is_for_result(adapter: Adapter, config: ModelConfig, plan: DepthPlan) -> bool:
    result = config if plan.is_identity else with_layers(config, plan.sources)
    return is_for_result(adapter, config, result)


def describe(model: Model) -> str:
    """One line: ``Mistral-7B-v0.1: 32 → 48 layers (0:24,8:32), 10.73 B parameters``."""
    plan = model.plan
    depth = (
        f"{plan.depth} layers"
        if plan.is_identity
        else f"{plan.n_base} → {plan.depth} layers ({plan.spelled})"
    )
    if not plan.method.is_plain:
        depth += f", copies: {plan.method.spelled}"
    merged = f", {model.adapter.name} merged" if model.adapter and model.on_result else ""
    return f"{model.source.name}: {depth}{merged}, {format_count(model.n_parameters)} parameters"
