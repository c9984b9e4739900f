"""The job `sensitivity`: what storing each tensor in each type is expected to cost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.export.gguf.sink import gguf_shapes
from dus_edge.files import check_absent, check_writable
from dus_edge.jobs.export.calibration import (
    Machine,
    TextChoice,
    forget_state,
    gone_forward,
    joined_machine,
    kept_state,
    progress_of,
    read_chunks,
    run_shared,
)
from dus_edge.jobs.export.imatrix import collected_importance
from dus_edge.jobs.job import Job, Result, Written, quiet
from dus_edge.machine import default_threads
from dus_edge.packages import require
from dus_edge.quant import choose as quantizers
from dus_edge.quant.imatrix import Importance, match, read_imatrix
from dus_edge.quant.sensitivity import Sensitivity, weights_identity, write_sensitivity
from dus_edge.quant.sensitivity.candidates import CANDIDATES
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.model import ChoosePlan, Model, Say

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.engine import ComputeSettings, State
    from dus_edge.calibrate.world import World

#: The `--imatrix` that is collected from the text itself.
AUTO = "auto"


@dataclass(frozen=True)
class AssumedStorage:
    """How weights would be stored.

    Attributes:
        imatrix: an importance matrix; ``auto`` is that of the text; None for none.
        quantizer: name of the quantizer.
    """

    imatrix: str | None = None
    quantizer: str = quantizers.DEFAULT

    @property
    def identity(self) -> str:
        """What costs depend on."""
        imatrix = self.imatrix
        if imatrix not in (None, AUTO):
            imatrix = hashlib.sha256(Path(str(imatrix)).read_bytes()).hexdigest()
        return f"{self.quantizer}, importance {imatrix}, {[k.name for k in CANDIDATES]}"


def measure_sensitivity(
    model: Model,
    checkpoint: Checkpoint,
    text: TextChoice,
    machine: Machine,
    storage: AssumedStorage,
    keep: Path,
    say: Say,
    world: World | None = None,
) -> Sensitivity:
    """The sensitivity of a model that is open already.

    Args:
        model: what is measured.
        checkpoint: its weights.
        text: what is run through it; its seed is that of the labels too.
        machine: where.
        storage: how weights would be stored.
        keep: beside which file the state of an interrupted run is kept.
        say: takes lines for the user.
        world: processes that share the chunks; this one alone if None.

    Raises:
        CheckpointError: the importance matrix is of another model, or states are not finite.
        OutputError: the file of hidden states does not fit on the disk.
    """
    from dus_edge.calibrate import engine
    from dus_edge.calibrate.fisher.descent import first_labelled

    given = _importance_of(model, storage)
    chunks = read_chunks(model, text)
    compute = engine.choose_settings(machine.device, machine.dtype)
    more = f"sensitivity, {storage.identity}, labels {text.seed}"
    with kept_state(keep, model, chunks, compute, more, say, world) as state:
        costs = _measure(model, checkpoint, chunks, compute, storage, given, state, keep, text, say)
    n_chunks, n_ctx = chunks.tokens.shape
    n_tokens = n_chunks * (n_ctx - first_labelled(n_ctx))
    return Sensitivity(weights_identity(checkpoint), n_tokens, text.label, costs)


def _importance_of(model: Model, storage: AssumedStorage) -> Mapping[str, np.ndarray] | None:
    """Importance by tensor; None where it is still to be collected."""
    if storage.imatrix is None:
        return {}
    if storage.imatrix == AUTO:
        return None
    return _matched(model, read_imatrix(Path(storage.imatrix)), storage.imatrix)


def _matched(model: Model, found: Importance, label: str) -> Mapping[str, np.ndarray]:
    return match(found, gguf_shapes(model.config.family, model.shapes), label).weights


def _measure(
    model: Model,
    checkpoint: Checkpoint,
    chunks: Chunks,
    compute: ComputeSettings,
    storage: AssumedStorage,
    given: Mapping[str, np.ndarray] | None,
    state: State,
    keep: Path,
    text: TextChoice,
    say: Say,
) -> dict[str, dict[str, float]]:
    """Forward once, and down again."""
    from dus_edge.calibrate.fisher import sensitivity as way
    from dus_edge.calibrate.fisher.costs import Storing
    from dus_edge.calibrate.imatrix import ImatrixCollector

    world, config = state.world, checkpoint.config
    collector = ImatrixCollector(world)
    with (
        gone_forward(checkpoint, chunks, collector, compute, state, keep, say) as (kept, down),
        ThreadPoolExecutor(default_threads()) as pool,
    ):
        if given is None:
            found = collected_importance(model, collector, chunks, text.label)
            given = _matched(model, found, "the importance matrix")
        quantizer = quantizers.find_quantizer(storage.quantizer)
        quantizer.prepare(way.storing_conversions(checkpoint, tuple(given)), say)
        if down.n_done:
            say(f"{down.n_done} of {config.n_layers + 2} steps of the way down are done already")
        own = chunks.tokens[world.share]
        with progress_of(world, "Measuring", way.downward_work(checkpoint, own)) as tick:
            return way.go_down(
                checkpoint,
                chunks.tokens,
                kept,
                Storing(quantizer, pool, given),
                compute,
                down,
                seed=text.seed,
                advance=tick,
            )


def export_sensitivity(
    base: str,
    choose: ChoosePlan,
    path: Path,
    text: TextChoice,
    machine: Machine,
    storage: AssumedStorage,
    *,
    adapter: Path | None = None,
    overwrite: bool = False,
    say: Say = quiet,
) -> Result | None:
    """Base to the sensitivities of its up-scaled model's tensors, as a file.

    Under torchrun processes divide the chunks; all but the first return None.
    """
    require("hf", "calibration needs")
    with joined_machine(machine) as (world, own):
        job = SensitivityJob(path, text, own, storage, overwrite, world)

        def take_part(model: Model, checkpoint: Checkpoint) -> None:
            measure_sensitivity(model, checkpoint, text, own, storage, path, quiet, world)

        return run_shared(job, base, choose, say, adapter, world, take_part)


@dataclass(frozen=True)
class SensitivityJob(Job[None]):
    """See `export_sensitivity`."""

    path: Path
    text: TextChoice
    machine: Machine
    storage: AssumedStorage
    overwrite: bool
    world: World | None = None

    def need(self, say: Say) -> None:
        """The quantizer must be there, the importance matrix sound, and the output's name free."""
        quantizers.find_quantizer(self.storage.quantizer).prepare((), say)
        if self.storage.imatrix not in (None, AUTO):
            read_imatrix(Path(str(self.storage.imatrix)))
        check_absent([self.path], self.overwrite)
        check_writable(self.path.parent)

    def outputs(self, model: Model) -> list[Path]:
        """The file."""
        return [self.path]

    def check(self, model: Model, checkpoint: Checkpoint) -> None:
        """The importance matrix must be of this model."""
        _importance_of(model, self.storage)

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: None, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Measure and write."""
        found = measure_sensitivity(
            model,
            checkpoint,
            self.text,
            self.machine,
            self.storage,
            self.path,
            say,
            self.world,
        )
        write_sensitivity(self.path, found)
        forget_state(self.path)
        n_bytes = self.path.stat().st_size
        return (Written(self.path, n_bytes, types={"tensors": len(found.kl)}),), ()
