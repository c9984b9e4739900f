"""The mix of types that `gguf` is asked for: by a budget, by a file, or a preset with changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.export.gguf import sink
from dus_edge.export.gguf.format import KeyValue
from dus_edge.export.gguf.metadata import build_metadata
from dus_edge.export.gguf.mix import (
    custom_preset,
    file_budget,
    mixed_preset,
    model_matrices,
    preset_types,
)
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.jobs.export.calibration import Machine, TextChoice
from dus_edge.jobs.export.sensitivity import AssumedStorage, export_sensitivity
from dus_edge.jobs.job import quiet
from dus_edge.predict.devices import Device
from dus_edge.predict.fit import settings_on
from dus_edge.predict.memory.llama import (
    check_context,
    context_warning,
    model_of_config,
    usable_bytes,
)
from dus_edge.predict.memory.mix import device_budget
from dus_edge.predict.prediction import memory_settings
from dus_edge.quant.mix.budget import Budget, best_types
from dus_edge.quant.mix.file import read_mix
from dus_edge.quant.mix.matrices import FixedType, Matrix, expected_loss, fixed_types
from dus_edge.quant.recipe import PRESETS, Preset
from dus_edge.quant.sensitivity import Sensitivity, read_sensitivity, weights_identity
from dus_edge.quant.sensitivity.candidates import candidate_types
from dus_edge.quant.types import QuantType
from dus_edge.upscale.model import ChoosePlan, Model, Say, find_model
from dus_edge.words import format_bytes

#: What the sensitivity of a model is kept under in the outputs' folder.
KEPT_SUFFIX = ".sensitivity"
#: How much longer a mix's header may be than a preset's.
_KEYS_BYTES = 1024
#: Room in a header for what is said of an importance matrix, which comes later than the choice.
_IMATRIX_BYTES = 640


@dataclass(frozen=True)
class FitGoal:
    """A device whose predicted memory is the budget.

    Attributes:
        device: where the file is to run, all layers on it.
        context: tokens of each sequence; by default 4,096 or the model's own.
        memory_gb: which of the device's memory sizes; None means the smallest.
        platform: rule of usable memory; None means the usual one.
        kv_type: of the cache.
        reserve_bytes: left to other programs.
    """

    device: Device
    context: int | None = None
    memory_gb: float | None = None
    platform: str | None = None
    kv_type: str = "f16"
    reserve_bytes: int = 0


@dataclass(frozen=True)
class MixChoice:
    """What is asked for: at most one of the first five is there.

    Attributes:
        size_bytes: of the file at most.
        bits_per_weight: of the file at most.
        like: no larger than this preset's file.
        fit: a device's memory.
        replay: a file that holds a mix.
        sensitivity: file of what each type costs; where there is none, a budget has it measured.
        fixed: matrices whose type is given.
    """

    size_bytes: int | None = None
    bits_per_weight: float | None = None
    like: Preset | None = None
    fit: FitGoal | None = None
    replay: Path | None = None
    sensitivity: Path | None = None
    fixed: tuple[FixedType, ...] = ()

    @property
    def has_goal(self) -> bool:
        """Whether the types are chosen, or read, and no preset says them."""
        goals = (self.size_bytes, self.bits_per_weight, self.like, self.fit, self.replay)
        return any(goal is not None for goal in goals)


@dataclass(frozen=True)
class Measuring:
    """How to find out what each type costs a model.

    Attributes:
        folder: where the outputs go; what is found is kept in it.
        text: what is run through the model.
        machine: where.
        storage: how weights will be stored.
    """

    folder: Path
    text: TextChoice
    machine: Machine
    storage: AssumedStorage


@dataclass(frozen=True)
class MadeMix:
    """A mix, and what is to be said of it.

    Attributes:
        preset: what files are made by.
        model: what it was made for.
        matrices: of that model.
        goal: what was asked for.
        file_bytes: of the file without what it says of an importance matrix.
        expected_kl: nats per token; None where that is not known.
        gap: how much less of it any mix within the budget could have.
        rivals: expected divergence of presets that keep the same budget, by name.
        taken: bytes of the budget that are taken, and the budget; None without one.
        notes: what the user should know.
    """

    preset: Preset
    model: Model
    matrices: tuple[Matrix, ...]
    goal: str
    file_bytes: int
    expected_kl: float | None = None
    gap: float | None = None
    rivals: Mapping[str, float] | None = None
    taken: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def make_mixes(
    base: str,
    choose: ChoosePlan,
    asked: MixChoice,
    presets: Sequence[Preset],
    measuring: Measuring,
    *,
    adapter: Path | None = None,
    has_imatrix: bool = False,
    say: Say = quiet,
) -> list[MadeMix]:
    """The mix that was asked for, or each preset with the changes that were.

    What can be refused without the weights is refused before they are fetched.

    Args:
        base: what the user calls the base.
        choose: gives the plan for a base's depth.
        asked: what is wanted.
        presets: to be changed, where no mix is asked for.
        measuring: how to find out what types cost, where no file says it.
        adapter: folder of a LoRA adapter that is merged on the way.
        has_imatrix: whether the files are quantized with importance.
        say: takes lines for the user.

    Raises:
        UsageError: a budget below the smallest mix, a wish that speaks of no matrix.
        CheckpointError: a mix or a sensitivity of another model.
    """
    model = find_model(base, choose, weights=False, say=say, adapter=adapter)
    maker = _Maker(model, asked, has_imatrix)
    if not asked.has_goal:
        return [maker.changed(preset) for preset in presets]
    if asked.replay is not None:
        return [maker.replayed(asked.replay)]
    if asked.sensitivity is not None:
        made = maker.chosen(read_sensitivity(asked.sensitivity), str(asked.sensitivity))
        whole = find_model(base, choose, weights=True, say=say, adapter=adapter)
        read_sensitivity(asked.sensitivity, weights_identity(whole.open()))
        return [made]
    maker.check()
    return [maker.chosen(*_measured(base, choose, model, measuring, adapter, say))]


def _measured(
    base: str,
    choose: ChoosePlan,
    model: Model,
    measuring: Measuring,
    adapter: Path | None,
    say: Say,
) -> tuple[Sensitivity, str]:
    """The sensitivity that is kept in the outputs' folder, measured first if it is not there."""
    path = measuring.folder / f"{model.name.stem}{KEPT_SUFFIX}"
    if path.exists():
        whole = find_model(base, choose, weights=True, say=say, adapter=adapter)
        found = read_sensitivity(path)
        if found.identity == weights_identity(whole.open()):
            say(f"What each type costs is known from {path}; remove it to measure again.")
            return found, str(path)
    export_sensitivity(
        base,
        choose,
        path,
        measuring.text,
        measuring.machine,
        measuring.storage,
        adapter=adapter,
        overwrite=True,  # what is there is of other weights
        say=say,
    )
    say(f"What each type costs is kept in {path}, for other budgets.")
    return read_sensitivity(path), str(path)


@dataclass(frozen=True)
class _Maker:
    """Makes mixes for one model."""

    model: Model
    asked: MixChoice
    has_imatrix: bool

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        return model_matrices(self.config, self.model.shapes)

    @cached_property
    def metadata(self) -> list[KeyValue]:
        """What every file of the model says: a vocabulary of 128,000 tokens is read once."""
        model = self.model
        vocab = read_vocab(model.source.folder, self.config.vocab_size)
        trained = model.adapter.name if model.adapter and model.on_result else None
        return build_metadata(self.config, model.source, model.name, model.plan, vocab, trained)

    def changed(self, preset: Preset) -> MadeMix:
        """A preset in which some matrices take other types."""
        matrices, model = self.matrices, self.model
        made = custom_preset(preset, self.config, matrices, self.asked.fixed, self.has_imatrix)
        return MadeMix(made, model, matrices, str(made.said["goal"]), self._file_bytes(made))

    def replayed(self, path: Path) -> MadeMix:
        """The mix of a file; types given by hand come before it."""
        matrices = self.matrices
        kinds, said = read_mix(path, matrices)
        if self.asked.fixed:
            kinds |= fixed_types(matrices, self.asked.fixed)
            said.pop("expected_kl", None)
        goal = str(said.get("goal", f"the types of {path.name}"))
        said["goal"] = goal
        preset, nbytes = self._preset(kinds, said)
        kl = said.get("expected_kl")
        return MadeMix(
            preset, self.model, matrices, goal, nbytes, kl if isinstance(kl, float) else None
        )

    def check(self) -> None:
        """See that there is a mix within the budget, whatever types cost."""
        losses = {m.name: {k.name: 0.0 for k in candidate_types(m.n_cols)} for m in self.matrices}
        self.chosen(Sensitivity("", 1, "", losses), "")

    def chosen(self, found: Sensitivity, where: str) -> MadeMix:
        """The mix of least expected divergence within the budget; `where` it was read."""
        matrices = self.matrices
        fixed = fixed_types(matrices, self.asked.fixed)
        said: dict[str, str | int | float] = {
            "goal": "",
            "expected_kl": 0.0,
            "text": found.text[:200],
            "tokens": min(found.n_tokens, (1 << 31) - 1),
        }
        budget = self._budget(said)
        said["goal"] = budget.goal
        best = best_types(matrices, found.kl, fixed, budget, where)
        kl = expected_loss(best.kinds, found.kl)
        if kl is None:  # a type given by hand was not measured
            del said["expected_kl"]
        else:
            said["expected_kl"] = kl
        preset, nbytes = self._preset(best.kinds, said)
        return MadeMix(
            preset,
            self.model,
            matrices,
            budget.goal,
            nbytes,
            kl,
            best.gap,
            self._rivals(found, budget),
            (budget.total(matrices, best.kinds), budget.nbytes),
            self._notes(),
        )

    def _budget(self, said: Mapping[str, str | int | float]) -> Budget:
        asked = self.asked
        if asked.fit is not None:
            return self._memory_budget(asked.fit)
        room = 0
        if asked.like is not None:
            most, goal = self._file_bytes(asked.like), f"like {asked.like.name}"
        elif asked.bits_per_weight is not None:
            most = int(asked.bits_per_weight * self.model.n_parameters / 8)
            goal = f"{asked.bits_per_weight:g} bits per weight"
        else:
            most = asked.size_bytes or 0
            goal = format_bytes(most)
        if self.has_imatrix and asked.like is None:  # else both say it
            room = _IMATRIX_BYTES
        header = self._planned(replace(PRESETS["f32"], said={**said, "goal": goal})).header
        return file_budget(self.config, self.model.shapes, len(header) + room, most, goal)

    def _memory_budget(self, fit: FitGoal) -> Budget:
        stored = model_of_config(self.config, PRESETS["q8_0"], self.model.name.stem)
        settings = memory_settings(stored, context=fit.context, kv_type=fit.kv_type)
        check_context(settings.context)
        usable = usable_bytes(fit.device, fit.platform, fit.memory_gb) - fit.reserve_bytes
        settings = settings_on(fit.device, settings)
        return device_budget(self.config, self.matrices, fit.device, settings, max(0, usable))

    def _notes(self) -> tuple[str, ...]:
        """What the user should know of a context that is longer than the model's own."""
        fit = self.asked.fit
        if fit is None or fit.context is None:
            return ()
        stored = model_of_config(self.config, PRESETS["q8_0"], self.model.name.stem)
        warning = context_warning(stored, fit.context)
        return (warning,) if warning else ()

    def _rivals(self, found: Sensitivity, budget: Budget) -> dict[str, float]:
        """Expected divergence of the presets that keep the budget, where all of it is known."""
        rivals = {}
        for name, preset in PRESETS.items():
            kinds = preset_types(preset, self.config, self.matrices, self.has_imatrix)
            kl = expected_loss(kinds, found.kl)
            if kl is not None and budget.total(self.matrices, kinds) <= budget.nbytes + _KEYS_BYTES:
                rivals[name] = kl
        return rivals

    def _preset(
        self, kinds: Mapping[str, QuantType], said: Mapping[str, str | int | float]
    ) -> tuple[Preset, int]:
        """The mix under its name, and the file's bytes."""
        unnamed = mixed_preset(self.matrices, kinds, said, 0)
        nbytes = self._file_bytes(unnamed)
        bits = 8 * nbytes / self.model.n_parameters
        return mixed_preset(self.matrices, kinds, said, bits), nbytes

    def _file_bytes(self, preset: Preset) -> int:
        """Of the whole file, but for what it says of an importance matrix."""
        return self._planned(preset).nbytes

    def _planned(self, preset: Preset) -> sink.GGUFFile:
        said = [] if self.has_imatrix else None
        return sink.plan_file(self.config, self.model.shapes, self.metadata, preset, Path(), said)
