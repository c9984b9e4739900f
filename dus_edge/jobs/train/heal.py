"""The job `heal`: base and plan to an up-scaled checkpoint that was trained on."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.gguf.source import refuse_gguf
from dus_edge.checkpoint.names import RECOVERY_PLOT, TRAINING_LOG
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import UsageError
from dus_edge.export import hf
from dus_edge.files import check_free_space, check_replaceable
from dus_edge.jobs.job import Job, Result, Writing, Written, quiet, run_job
from dus_edge.jobs.train.state import work_folder
from dus_edge.machine import meminfo_kib
from dus_edge.packages import require
from dus_edge.predict.training.memory import TrainingMemory, plan_training
from dus_edge.predict.training.speed import cost_in_forwards
from dus_edge.predict.training.work import TrainingWork, work_of_mode
from dus_edge.progress import progress
from dus_edge.train.heal.mode import LORA, check_loss
from dus_edge.train.recovery.options import HealOptions
from dus_edge.upscale.methods import method_of_json
from dus_edge.upscale.model import ChoosePlan, Model, Say, find_model
from dus_edge.upscale.plan import DepthPlan
from dus_edge.upscale.view import UpscaledCheckpoint
from dus_edge.words import format_bytes

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.world import World
    from dus_edge.jobs.train.heal_card import Recovery
    from dus_edge.train.recovery.data import HealData, HealTexts

#: Checkpoints that are there at once: two are kept while the next is written.
_N_STATES = 3


def heal(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    options: HealOptions,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    say: Say = quiet,
) -> tuple[Result | None, dict[str, Any]]:
    """Train an up-scaled model on text, and write it as a checkpoint folder.

    Args:
        base: folder, hub id or the built-in base's name; an up-scaled folder too.
        choose: gives the plan for a base's depth.
        folder: the result. Beside it ``<folder>.training`` keeps what an interrupted run needs.
        options: see `HealOptions`.
        n_threads: worker threads.
        overwrite: replace an older checkpoint folder of that name.
        say: takes lines for the user.

    Returns:
        what was written, None in all processes but the first; and what was measured.

    Raises:
        DusEdgeError: base, plan, text or options cannot be used, or the loss is no number.
    """
    refuse_gguf(base, "Training")
    options.check()
    require("hf", "healing needs")
    from dus_edge.calibrate.world import joined_world

    with joined_world(options.device) as world:
        job = HealJob(folder, options, Writing(n_threads, overwrite), world, say)
        if world.first:
            return run_job(job, base, choose, say), job.figures
        model = find_model(base, choose, weights=True, say=quiet)
        job.train(model, model.open(), quiet)
        return None, {}


@dataclass(frozen=True)
class HealJob(Job[TrainingMemory]):
    """See `heal`; `figures` is filled with what was measured, `texts` by `early`."""

    folder: Path
    options: HealOptions
    writing: Writing
    world: World
    say: Say = quiet
    figures: dict[str, Any] = field(default_factory=dict)
    texts: list[HealTexts] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """Where the run keeps what it needs to go on."""
        return work_folder(self.folder)

    def need(self, say: Say) -> None:
        """Packages and the output's name."""
        if self.options.mode.kind == LORA:
            require("train", "--train lora needs", "peft")
            if self.world.many:
                raise UsageError("--train lora runs in one process; take copies, seam:K or all.")
        check_replaceable(self.folder, self.writing.overwrite, hf.REPLACEABLE)

    def early(self, folder: Path, config: ModelConfig) -> None:
        """The text must be there, a window within the context, and a loss that is the model's."""
        check_loss(config)
        if self.options.length > config.context_length:
            raise UsageError(
                f"--ctx {self.options.length} is more than the model's context of "
                f"{config.context_length:,}; choose a smaller one."
            )
        from dus_edge.train.recovery.data import find_texts

        self.texts[:] = [find_texts(self.options, self.say)]

    def outputs(self, model: Model) -> list[Path]:
        """The folder."""
        return [self.folder]

    def check(self, model: Model, checkpoint: Checkpoint) -> TrainingMemory:
        """The plan must have what is to learn, and memory and disk must do."""
        memory = planned_memory(model, self.options, self.world.size)
        hf.check_outputs(checkpoint, self.folder, self.writing.overwrite)
        check_free_space(self.folder.parent, _N_STATES * memory.checkpoint_bytes)
        free = _free_memory(self.options.device)
        if free is not None and memory.total_bytes > free:
            raise UsageError(
                f"training takes about {format_bytes(memory.total_bytes)} of memory and "
                f"{format_bytes(free)} are free; `dus-edge fit MODEL --train "
                f"{self.options.mode.spelled} --device ID` tells what takes less: a smaller "
                "--micro-batch or --ctx, --checkpointing, --train copies."
            )
        return memory

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: TrainingMemory, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Train, then write the checkpoint, its log and its picture."""
        from dus_edge.jobs.train.heal_card import gap_sentence, healed_card
        from dus_edge.train.heal.trained import TrainedCheckpoint

        state = _N_STATES * planned.checkpoint_bytes
        say(
            f"Planned: {format_bytes(planned.total_bytes)} of memory, and while it runs "
            f"{format_bytes(state)} of disk"
        )
        weights, data, recovery = self.train(model, checkpoint, say)
        trained = TrainedCheckpoint(checkpoint, weights)
        n_learned = sum(w.numel() for w in weights.values())
        extra = {TRAINING_LOG: (self.work / TRAINING_LOG).read_text(encoding="utf-8")}
        if picture := _picture(model, recovery):
            extra[RECOVERY_PLOT] = picture
        card = healed_card(
            model, healed_plan(model), self.options, data, recovery, n_learned, bool(picture)
        )
        specs = trained.specs().values()
        total = sum(s.nbytes for s in specs)
        with progress("Writing", total) as tick:
            hf.write_checkpoint(
                trained,
                self.folder,
                card,
                n_threads=self.writing.threads,
                overwrite=self.writing.overwrite,
                allow_nonfinite=False,
                advance=tick,
                extra_files=extra,
            )
        shutil.rmtree(self.work, ignore_errors=True)
        sentence = gap_sentence(recovery)
        written = Written(self.folder, total, types=Counter(s.dtype for s in specs))
        return (written,), (sentence,) if sentence else ()

    def train(
        self, model: Model, checkpoint: Checkpoint, say: Say
    ) -> tuple[Mapping[str, Any], HealData, Recovery]:
        """What every process does: all runs, to their ends."""
        from dus_edge.jobs.train.heal_card import Recovery
        from dus_edge.train.recovery.data import prepare_data
        from dus_edge.train.recovery.log import Log
        from dus_edge.train.recovery.run import Runner, control_options

        options, world, plan = self.options, self.world, healed_plan(model)
        texts = self.texts[0] if self.texts else None  # the first process alone has looked
        identity = {
            **options.identity(),
            "base": _base_identity(model),
            "plan": plan.spelled,
            **plan.method.as_json(),
            "text": world.told(texts.digest if texts else ""),
        }
        if options.restart and world.first:
            shutil.rmtree(self.work, ignore_errors=True)
        if world.first:
            self.work.mkdir(parents=True, exist_ok=True)
        world.wait()
        data = prepare_data(model, options, texts, self.work, world, say)
        log = Log(self.work / TRAINING_LOG)
        cost = _cost(model, options)
        runner = Runner(options, data, world, self.work, log, say, cost)
        base = checkpoint.base if isinstance(checkpoint, UpscaledCheckpoint) else None
        if base is not None:
            before = runner.untrained("base", base)
            say(f"held-out loss of the base: {before.mean:.4f} ({before.n_tokens:,} tokens)")
        weights = runner.train("heal", checkpoint, plan, options.mode, identity, base)
        if options.control and base is not None:
            every = control_options(options)
            alone = Runner(every, data, world, self.work, log, say, _cost(model, every))
            identity_plan = DepthPlan(model.plan.n_base, tuple(range(model.plan.n_base)))
            alone.train(
                "control",
                base,
                identity_plan,
                alone.options.mode,
                identity | {"plan": identity_plan.spelled, "train mode": "all"},
            )
        recovery = Recovery(
            log.curve("heal"),
            log.curve("base") if base is not None else None,
            log.curve("control") if options.control and base is not None else None,
        )
        if world.first:  # the log is its own
            self.figures.update(_figures(recovery))
        return weights, data, recovery


def healed_plan(model: Model) -> DepthPlan:
    """The plan of a model: the one that is asked for, or what an up-scaled folder says of itself.

    Raises:
        UsageError: the folder's own words make no plan.
    """
    said = model.base_config.raw.get(hf.PLAN_KEY)
    if not model.plan.is_identity or not isinstance(said, dict):
        return model.plan
    try:
        sources = tuple(map(int, said["sources"]))
        plan = DepthPlan(int(said["n_base_layers"]), sources, method_of_json(said))
    except (KeyError, TypeError, ValueError, UsageError):
        plan = None
    if plan is None or plan.depth != model.plan.depth:
        raise UsageError(
            f"{model.source.label}: the plan in config.json ({hf.PLAN_KEY}) does not fit the "
            "model; remove it, or up-scale the base again."
        )
    return plan


def _cost(model: Model, options: HealOptions) -> float:
    """What a token that is trained on costs, in forward passes; the teacher's is one more."""
    teacher = model.plan.n_base / model.plan.depth if options.teacher else 0.0
    return cost_in_forwards(model.config, _work(model, options, 1)) + teacher


def planned_memory(model: Model, options: HealOptions, processes: int) -> TrainingMemory:
    """What a run will take, term by term; see `dus-edge fit --train`.

    Raises:
        UsageError: the plan has nothing that could learn so.
    """
    return plan_training(model.config, _work(model, options, processes))


def _work(model: Model, options: HealOptions, processes: int) -> TrainingWork:
    return work_of_mode(
        options.mode.spelled,
        healed_plan(model),
        backend="CUDA" if options.device == "cuda" else "CPU",
        sequence=options.length,
        batch=options.micro,
        micro_batches=max(1, options.batch // (options.micro * processes)),
        precision="mixed" if options.dtype == "bfloat16" else "f32",
        optimizer=options.optimizer,
        checkpointing=options.checkpointing,
        lora_rank=options.rank if options.mode.kind == LORA else None,
        gpus=processes,
    )


def _free_memory(device: str) -> int | None:
    """Bytes that are free where a run goes; None where the system does not tell."""
    if device == "cuda":
        from dus_edge.train.heal.parallel import free_card_bytes

        return free_card_bytes()
    kib = meminfo_kib().get("MemAvailable")
    return None if kib is None else kib << 10


def _base_identity(model: Model) -> list[Any]:
    weights = sorted(model.source.folder.glob("*.safetensors"))
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights]


def _picture(model: Model, recovery: Recovery) -> str | None:
    """The plot as SVG; None where matplotlib is not there or the base's loss is not known."""
    import importlib.util

    if recovery.base is None or importlib.util.find_spec("matplotlib") is None:
        return None
    from dus_edge.train.recovery.plot import render_recovery

    curves = [recovery.healed, *([recovery.control] if recovery.control else [])]
    title = f"{model.name.title}: recovery"
    return render_recovery(curves, recovery.base.means[0], title).decode()


def _figures(recovery: Recovery) -> dict[str, Any]:
    return {
        "base_loss": recovery.base.means[0] if recovery.base else None,
        "upscaled_loss": recovery.healed.means[0],
        "healed_loss": recovery.healed.means[-1],
        "control_loss": recovery.control.means[-1] if recovery.control else None,
        "gap_closed": recovery.closed,
        "tokens": recovery.healed.tokens[-1],
    }
