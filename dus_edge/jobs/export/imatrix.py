"""The job `imatrix`, and the importance matrix that `gguf --imatrix` names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.export.gguf.imatrix import write_imatrix
from dus_edge.files import check_absent, check_writable
from dus_edge.jobs.export.calibration import (
    Machine,
    TextChoice,
    forget_state,
    joined_machine,
    kept_state,
    read_chunks,
    run_collector,
    run_shared,
)
from dus_edge.jobs.export.gguf import ImatrixSource
from dus_edge.jobs.job import Job, Result, Written, quiet
from dus_edge.packages import require
from dus_edge.quant.imatrix import Importance, read_imatrix
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.model import ChoosePlan, Model, Say

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.imatrix import ImatrixCollector
    from dus_edge.calibrate.world import World


def calibrate_importance(
    model: Model,
    checkpoint: Checkpoint,
    text: TextChoice,
    machine: Machine,
    keep: Path,
    say: Say,
    world: World | None = None,
) -> Importance:
    """The importance matrix of a model that is open already.

    Args:
        model: what is calibrated.
        checkpoint: its weights.
        text: what is run through it.
        machine: where.
        keep: beside which file the state of an interrupted run is kept.
        say: takes lines for the user.
        world: processes that share the chunks; this one alone if None.
    """
    from dus_edge.calibrate import engine
    from dus_edge.calibrate.imatrix import ImatrixCollector

    chunks = read_chunks(model, text)
    compute = engine.choose_settings(machine.device, machine.dtype)
    with kept_state(keep, model, chunks, compute, "imatrix", say, world) as state:
        collector = ImatrixCollector(state.world)
        run_collector(checkpoint, chunks, collector, compute, state, say)
    return collected_importance(model, collector, chunks, text.label)


def collected_importance(
    model: Model, collector: ImatrixCollector, chunks: Chunks, label: str
) -> Importance:
    """What a collector has found, by GGUF names; `label` is the text's."""
    gguf_name = model.config.family.gguf_name
    found = {gguf_name(name): value for name, value in collector.results().items()}
    n_chunks, n_ctx = chunks.tokens.shape
    return Importance(
        sums={name: sums.float().numpy() for name, (sums, _) in found.items()},
        counts={name: count for name, (_, count) in found.items()},
        chunk_size=n_ctx,
        n_chunks=n_chunks,
        datasets=(label,),
    )


def imatrix_source(
    choice: str, text: TextChoice, machine: Machine, folder: Path, say: Say
) -> ImatrixSource:
    """The importance matrix that `--imatrix` names.

    Args:
        choice: a file, or ``auto`` to collect it from the model.
        text: what is run through the model for ``auto``.
        machine: where.
        folder: where the outputs go; the state of an interrupted collection is kept in it.
        say: takes lines for the user.

    Raises:
        CheckpointError: the file is no importance matrix.
    """
    if choice != "auto":
        read = read_imatrix(Path(choice))
        return ImatrixSource(choice, lambda model, checkpoint: read)
    require("hf", "calibration needs")

    def collect(model: Model, checkpoint: Checkpoint) -> Importance:
        keep = folder / f"{model.name.stem}.imatrix"
        found = calibrate_importance(model, checkpoint, text, machine, keep, say)
        forget_state(keep)
        return found

    return ImatrixSource("the importance matrix", collect)


def export_imatrix(
    base: str,
    choose: ChoosePlan,
    path: Path,
    text: TextChoice,
    machine: Machine,
    *,
    adapter: Path | None = None,
    overwrite: bool = False,
    say: Say = quiet,
) -> Result | None:
    """Base to the importance matrix of its up-scaled model, in llama.cpp's GGUF format.

    Under torchrun processes divide the chunks; all but the first return None.
    """
    require("hf", "calibration needs")
    with joined_machine(machine) as (world, own):
        job = ImatrixJob(path, text, own, overwrite, world)

        def take_part(model: Model, checkpoint: Checkpoint) -> None:
            calibrate_importance(model, checkpoint, text, own, path, quiet, world)

        return run_shared(job, base, choose, say, adapter, world, take_part)


@dataclass(frozen=True)
class ImatrixJob(Job[None]):
    """See `export_imatrix`."""

    path: Path
    text: TextChoice
    machine: Machine
    overwrite: bool
    world: World | None = None

    def need(self, say: Say) -> None:
        """The output's name must be free."""
        check_absent([self.path], self.overwrite)
        check_writable(self.path.parent)

    def outputs(self, model: Model) -> list[Path]:
        """The file."""
        return [self.path]

    def check(self, model: Model, checkpoint: Checkpoint) -> None:
        """Nothing more is known before the text is read."""

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: None, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Collect and write."""
        found = calibrate_importance(
            model, checkpoint, self.text, self.machine, self.path, say, self.world
        )
        write_imatrix(self.path, found)
        forget_state(self.path)
        n_bytes = self.path.stat().st_size
        return (Written(self.path, n_bytes, types={"matrices": len(found.sums)}),), ()
