"""The job `merge`: base and LoRA adapter to a checkpoint folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.jobs.job import Result, quiet
from dus_edge.upscale.model import Say
from dus_edge.upscale.plan import identity


def export_merged(
    base: str,
    adapter: Path,
    folder: Path,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = quiet,
) -> Result:
    """Base with an adapter merged into it, of the base's depth, as a checkpoint folder.

    Args:
        base: folder, hub id or the built-in base's name.
        adapter: folder that peft's `save_pretrained` wrote.
        folder: the result.
        n_threads: worker threads; all cores by default.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite.
        say: takes lines for the user.

    Raises:
        DusEdgeError: base, adapter or output cannot be used. Nothing half-written stays.
    """
    return export_checkpoint(
        base,
        identity,
        folder,
        adapter=adapter,
        n_threads=n_threads,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        say=say,
    )
