"""The frame of every job: find the model, open it, check everything, say it, write.

A job checks all that can be checked before its first byte, so that what is refused leaves nothing
behind. What differs from job to job is a class of four methods.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.gguf.source import Wanted
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.files import held_outputs
from dus_edge.machine import default_threads
from dus_edge.upscale.model import ChoosePlan, Model, Say, describe, find_model

#: What a job's `check` finds out for its `write`.
Planned = TypeVar("Planned")


@dataclass(frozen=True)
class Written:
    """One finished output.

    Attributes:
        path: the file, or the folder of a checkpoint.
        nbytes: its size; for a checkpoint that of the weights.
        preset: the mix of a GGUF file.
        modelfile: the Modelfile beside it.
        types: number of tensors by storage type or dtype.
    """

    path: Path
    nbytes: int
    preset: str | None = None
    modelfile: Path | None = None
    types: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a job wrote and how long it took."""

    model: Model
    outputs: tuple[Written, ...]
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Writing:
    """How outputs are written.

    Attributes:
        n_threads: worker threads; all cores if None.
        overwrite: replace outputs of the same names.
        allow_nonfinite: go on although a weight is NaN or infinite.
    """

    n_threads: int | None = None
    overwrite: bool = False
    allow_nonfinite: bool = False

    @property
    def threads(self) -> int:
        """Worker threads."""
        return self.n_threads or default_threads()


class Job(ABC, Generic[Planned]):
    """A base goes in, files come out.

    Attributes:
        dequantized: what the blocks of a GGUF base become: ``F32``, which they are exactly, or
            ``F16`` for checkpoints.
        tokenizer: whether a GGUF base's tokenizer is wanted.
    """

    dequantized: ClassVar[str] = "F32"
    tokenizer: ClassVar[Wanted] = "always"

    def need(self, say: Say) -> None:
        """Meet a missing package, or an output that may not be written, before any work."""

    def early(self, folder: Path, config: ModelConfig) -> None:
        """Check what the small files are enough for, before a hub base's gigabytes are fetched."""

    @abstractmethod
    def outputs(self, model: Model) -> Sequence[Path]:
        """What is written: no other run may write it from `check` to the end."""

    @abstractmethod
    def check(self, model: Model, checkpoint: Checkpoint) -> Planned:
        """Plan the outputs to the byte and refuse what can be refused; nothing is written yet."""

    @abstractmethod
    def write(
        self, model: Model, checkpoint: Checkpoint, planned: Planned, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Write the outputs; returns them, and notes for the user."""


def run_job(
    job: Job, base: str, choose: ChoosePlan, say: Say, adapter: Path | None = None
) -> Result:
    """Do a job.

    Args:
        job: what to do.
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        say: takes lines for the user.
        adapter: folder of a LoRA adapter to merge on the way.

    Raises:
        DusEdgeError: base, adapter, plan, options or outputs cannot be used. Nothing half-written
            stays.
    """
    start = time.monotonic()
    job.need(say)
    model = find_model(
        base,
        choose,
        weights=True,
        say=say,
        early=job.early,
        adapter=adapter,
        tokenizer=job.tokenizer,
    )
    checkpoint = model.open(job.dequantized)
    with held_outputs(job.outputs(model)):
        planned = job.check(model, checkpoint)
        say(describe(model))
        outputs, notes = job.write(model, checkpoint, planned, say)
    return Result(model, outputs, time.monotonic() - start, notes)


def quiet(line: str) -> None:
    """A `Say` that says nothing."""


def result_json(result: Result) -> dict[str, Any]:
    """What a finished job wrote."""
    return {
        **model_json(result.model),
        "outputs": [
            {
                "path": str(o.path),
                "bytes": o.nbytes,
                "preset": o.preset,
                "tensor_types": dict(o.types),
                "modelfile": str(o.modelfile) if o.modelfile else None,
            }
            for o in result.outputs
        ],
        "notes": list(result.notes),
        "seconds": round(result.seconds, 3),
    }


def model_json(model: Model) -> dict[str, Any]:
    return {
        "model": model.source.label,
        "name": model.name.stem,
        "revision": model.source.revision,
        "licence": model.source.licence,
        "adapter": str(model.adapter.folder) if model.adapter else None,
        "n_base_layers": model.plan.n_base,
        "n_layers": model.plan.depth,
        "n_parameters": model.n_parameters,
        "plan": model.plan.spelled,
        "drop": model.plan.drop,
        "method": model.plan.method.kind,
        "branch_scale": model.plan.method.branch_scale,
    }
