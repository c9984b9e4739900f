"""The job `mlx`: base to a folder that mlx-lm and LM Studio load."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dus_edge.checkpoint.config import ModelConfig, tensor_shapes
from dus_edge.checkpoint.spec import Checkpoint, TensorSpec
from dus_edge.export import mlx
from dus_edge.export.card import model_card
from dus_edge.jobs.job import Job, Result, Writing, Written, quiet, run_job
from dus_edge.progress import progress
from dus_edge.quant.mlx.affine import compile_affine
from dus_edge.quant.mlx.format import MLXSettings
from dus_edge.upscale.model import ChoosePlan, Model, Say
from dus_edge.upscale.plan import check_pattern

#: What `Checkpoint.read` gives of each dtype.
_READ_AS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def export_mlx(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    settings: MLXSettings,
    *,
    dtype: str | None = None,
    adapter: Path | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    say: Say = quiet,
) -> Result:
    """Base to an up-scaled model in MLX's format; see `export_gguf`.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        folder: the result.
        settings: bits and group size.
        dtype: of scales, biases and norms, one of `mlx.MLX_DTYPES`; the base's by default.
        adapter: folder of a LoRA adapter to merge on the way; of the base, or of the result.
        n_threads: worker threads; all cores by default.
        overwrite: replace an older checkpoint folder of that name.
        allow_nonfinite: go on although a weight is NaN or infinite.
        say: takes lines for the user.
    """
    job = MLXJob(folder, settings, dtype, Writing(n_threads, overwrite, allow_nonfinite))
    return run_job(job, base, choose, say, adapter)


@dataclass(frozen=True)
class MLXJob(Job[list[TensorSpec]]):
    """See `export_mlx`."""

    folder: Path
    settings: MLXSettings
    dtype: str | None
    writing: Writing

    def need(self, say: Say) -> None:
        """Bits and group size must be MLX's."""
        self.settings.check()

    def early(self, folder: Path, config: ModelConfig) -> None:
        """mlx-lm must compute what the configuration means, and matrices be whole groups."""
        mlx.check_config(config)
        for name, shape in tensor_shapes(config).items():
            if len(shape) == 2:
                self.settings.check_matrix(name, shape)

    def outputs(self, model: Model) -> list[Path]:
        """The folder."""
        return [self.folder]

    def check(self, model: Model, checkpoint: Checkpoint) -> list[TensorSpec]:
        """The folder's tensors; its name and the disk must do."""
        form = self._form(model)
        config = model.config
        check_pattern(model.plan, mlx.mlx_period(config), f"mlx-lm's {config.family.model_type}")
        mlx.check_config(config)
        mlx.check_outputs(checkpoint, self.folder, form, self.writing.overwrite)
        return mlx.plan_tensors(checkpoint.specs(), form)

    def write(
        self, model: Model, checkpoint: Checkpoint, planned: list[TensorSpec], say: Say
    ) -> tuple[tuple[Written, ...], tuple[str, ...]]:
        """Quantize and write."""
        form, settings = self._form(model), self.settings
        for dtype in {form.of(spec) for spec in checkpoint.specs().values()}:
            compile_affine(np.dtype(_READ_AS[dtype]), say)
        total = sum(s.nbytes for s in planned)
        stored = f"MLX, {settings.bits} bits in groups of {settings.group_size}"
        with progress("Quantizing", total) as tick:
            mlx.write_checkpoint(
                checkpoint,
                self.folder,
                model_card(model, "mlx", stored),
                form,
                n_threads=self.writing.threads,
                overwrite=self.writing.overwrite,
                allow_nonfinite=self.writing.allow_nonfinite,
                advance=tick,
            )
        written = Written(self.folder, total, types=Counter(s.dtype for s in planned))
        return (written,), _notes(model.config)

    def _form(self, model: Model) -> mlx.MLXForm:
        return mlx.choose_form(model.config, self.settings, self.dtype)


def _notes(config: ModelConfig) -> tuple[str, ...]:
    notes = []
    window = None if config.family.mlx_window else config.sliding_window
    if window is not None and window < config.context_length and not all(config.full_layers):
        notes.append(
            f"mlx-lm gives this model no sliding window: beyond {window:,} tokens of context it "
            "computes what its base does not."
        )
    if config.rope.kind == "longrope":
        original = int(config.rope.params["original_max_position_embeddings"])
        notes.append(
            f"mlx-lm takes longrope's long factors at every length: within {original:,} tokens of "
            "context it computes what its base does not."
        )
    return tuple(notes)
