"""The job `upscale`: base to an up-scaled checkpoint folder that transformers loads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.export import hf
from dus_edge.export.card import model_card
from dus_edge.jobs.job import Job, Result, Writing, Written, quiet, run_job
from dus_edge.progress import progress
from dus_edge.upscale.model import ChoosePlan, Model, Say
from dus_edge.words import counts_text, wrap


def export_checkpoint(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    *,
    adapter: Path | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = quiet,
) -> Result:
    """Base to an up-scaled checkpoint folder that transformers loads; see `export_gguf`."""
    job = CheckpointJob(folder, Writing(n_threads, overwrite, allow_nonfinite))
    return run_job(job, base, choose, say, adapter)


@dataclass(frozen=True)
class CheckpointJob(Job[None]):
    """See `export_checkpoint`."""

    dequantized = "F16"

    folder: Path
    writing: Writing

    def outputs(self, model: Model) -> list[Path]:
        """The folder."""
        return [self.folder]

    def check(self, model: Model, checkpoint: Checkpoint) -> None:
        """The folder's name and the disk must do."""
        hf.check_outputs(checkpoint, self.folder, self.writing.overwrite)

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: None, say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Copy the tensors under their new names."""
        _say_dequantized(model, say)
        specs = checkpoint.specs().values()
        total = sum(s.nbytes for s in specs)
        with progress("Writing", total) as tick:
            hf.write_checkpoint(
                checkpoint,
                self.folder,
                model_card(model),
                n_threads=self.writing.threads,
                overwrite=self.writing.overwrite,
                allow_nonfinite=self.writing.allow_nonfinite,
                advance=tick,
            )
        return (Written(self.folder, total, types=Counter(s.dtype for s in specs)),), ()


def _say_dequantized(model: Model, say: Say) -> None:
    gguf = model.source.gguf
    if gguf is not None and gguf.is_quantized:
        say(
            wrap(
                f"{gguf.label}: quantized tensors ({counts_text(gguf.types)}) become float16; what "
                "was lost when they were quantized stays lost."
            )
        )
