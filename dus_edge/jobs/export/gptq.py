"""The job `gptq`: base to a GPTQ checkpoint of its up-scaled model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.export import gptq as sink
from dus_edge.export import hf
from dus_edge.export.card import model_card
from dus_edge.jobs.export.calibration import (
    Machine,
    TextChoice,
    forget_state,
    joined_machine,
    kept_state,
    read_chunks,
    run_collector,
    run_shared,
    under_torchrun,
)
from dus_edge.jobs.job import Job, Result, Writing, Written, quiet, run_job
from dus_edge.packages import require
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.model import ChoosePlan, Model, Say

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.engine import State
    from dus_edge.calibrate.gptq import GptqCollector
    from dus_edge.calibrate.world import World


def export_gptq(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    settings: GPTQSettings,
    text: TextChoice,
    machine: Machine,
    *,
    adapter: Path | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    say: Say = quiet,
) -> Result | None:
    """Base to a GPTQ checkpoint of its up-scaled model; no other copy of it is written.

    Under torchrun processes divide the chunks; all but the first return None.
    """
    require("hf", "calibration needs")
    if not under_torchrun():
        # Not even PyTorch is imported before the text is read; see `GPTQJob.check`.
        job = GPTQJob(folder, settings, text, machine, Writing(n_threads, overwrite))
        return run_job(job, base, choose, say, adapter)
    with joined_machine(machine) as (world, own):
        job = GPTQJob(folder, settings, text, own, Writing(n_threads, overwrite), world)

        def take_part(model: Model, checkpoint: Checkpoint) -> None:
            with job.calibrated(model, checkpoint, read_chunks(model, text), quiet):
                pass

        return run_shared(job, base, choose, say, adapter, world, take_part)


@dataclass(frozen=True)
class GPTQPlan:
    """The folder's tensors, and the text that the model is calibrated on."""

    tensors: list[TensorSpec]
    chunks: Chunks


@dataclass(frozen=True)
class GPTQJob(Job[GPTQPlan]):
    """See `export_gptq`."""

    dequantized = "F16"

    folder: Path
    settings: GPTQSettings
    text: TextChoice
    machine: Machine
    writing: Writing
    world: World | None = None

    def need(self, say: Say) -> None:
        """PyTorch must be there."""
        require("hf", "calibration needs")

    def outputs(self, model: Model) -> list[Path]:
        """The folder."""
        return [self.folder]

    def check(self, model: Model, checkpoint: Checkpoint) -> GPTQPlan:
        """Settings, the folder's name, the disk and the text must do."""
        sink.check_settings(checkpoint, self.settings)
        planned = sink.plan_tensors(checkpoint, self.settings)
        hf.check_outputs(checkpoint, self.folder, self.writing.overwrite, planned)
        # Imports that calibration needs take one core while the text becomes tokens on another.
        with ThreadPoolExecutor(1, "load") as pool:
            ready = pool.submit(_load)
            chunks = read_chunks(model, self.text)
        ready.result()
        return GPTQPlan(planned, chunks)

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: GPTQPlan, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Calibrate layer by layer, then write the folder."""
        calibrated = self.calibrated(model, checkpoint, planned.chunks, say)
        with calibrated as (collector, state):
            sink.write_checkpoint(
                checkpoint,
                self.folder,
                model_card(model),
                self.settings,
                state.layer_files(model.config.n_layers),
                n_threads=self.writing.threads,
                overwrite=self.writing.overwrite,
            )
        forget_state(self.folder)
        notes = tuple(
            f"{o.name} was rounded to nearest: {o.fallback}"
            for o in collector.outcomes.values()
            if o.fallback
        )
        total = sum(s.nbytes for s in planned.tensors)
        types = Counter(s.dtype for s in planned.tensors)
        return (Written(self.folder, total, types=types),), notes

    @contextmanager
    def calibrated(
        self, model: Model, checkpoint: Checkpoint, chunks: Chunks, say: Say
    ) -> Iterator[tuple[GptqCollector, State]]:
        """All layers are quantized, and kept while the block runs."""
        from dus_edge.calibrate import engine
        from dus_edge.calibrate.gptq import GptqCollector

        compute = engine.choose_settings(self.machine.device, self.machine.dtype, narrow=True)
        more = f"gptq {self.settings}"
        with kept_state(self.folder, model, chunks, compute, more, say, self.world) as state:
            collector = GptqCollector(self.settings, world=state.world)
            run_collector(checkpoint, chunks, collector, compute, state, say)
            yield collector, state


def _load() -> None:
    """Import what calibration needs, and its compiled loops."""
    from dus_edge.calibrate import engine, gptq  # noqa: F401
    from dus_edge.quant import gptq_loops

    gptq_loops.load_kernels()
