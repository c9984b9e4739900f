"""The job `bnb`: base to a checkpoint in one of bitsandbytes' formats."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.export import bnb
from dus_edge.export.card import model_card
from dus_edge.jobs.job import Job, Result, Writing, Written, quiet, run_job
from dus_edge.progress import progress
from dus_edge.upscale.model import ChoosePlan, Model, Say


def export_bnb(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    scheme_name: str,
    *,
    double_quant: bool = True,
    adapter: Path | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = quiet,
) -> Result:
    """Base to an up-scaled checkpoint in one of bitsandbytes' formats; see `export_gguf`.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        folder: the result.
        scheme_name: ``nf4`` or ``int8``.
        double_quant: of nf4, whether its scales are quantized too.
        adapter: folder of a LoRA adapter to merge on the way; of the base, or of the result.
        n_threads: worker threads; all cores by default.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite.
        say: takes lines for the user.
    """
    writing = Writing(n_threads, overwrite, allow_nonfinite)
    job = BnbJob(folder, bnb.Scheme(scheme_name, double_quant), writing)
    return run_job(job, base, choose, say, adapter)


@dataclass(frozen=True)
class BnbJob(Job[list[TensorSpec]]):
    """See `export_bnb`."""

    dequantized = "F16"

    folder: Path
    scheme: bnb.Scheme
    writing: Writing

    def need(self, say: Say) -> None:
        """bitsandbytes must be there."""
        bnb.check_available()

    def outputs(self, model: Model) -> list[Path]:
        """The folder."""
        return [self.folder]

    def check(self, model: Model, checkpoint: Checkpoint) -> list[TensorSpec]:
        """The folder's tensors; its name and the disk must do."""
        bnb.check_outputs(checkpoint, self.folder, self.scheme, self.writing.overwrite)
        return bnb.plan_tensors(model.config.family, checkpoint.specs(), self.scheme)

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: list[TensorSpec], say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Quantize and write."""
        total = sum(s.nbytes for s in planned)
        with progress("Quantizing", total) as tick:
            bnb.write_checkpoint(
                checkpoint,
                self.folder,
                model_card(model),
                self.scheme,
                n_threads=self.writing.threads,
                overwrite=self.writing.overwrite,
                allow_nonfinite=self.writing.allow_nonfinite,
                advance=tick,
            )
        return (Written(self.folder, total, types=Counter(s.dtype for s in planned)),), ()
