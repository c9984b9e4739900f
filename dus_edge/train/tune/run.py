"""Tuning by trl's trainers, on tokens of our own.

trl finds the ends of answers by the exact text of templates that it knows. Here tokens and loss
masks come ready (`examples`), and of trl remain the losses and the loop. Its own defaults, bfloat16
and activation checkpointing, are for GPUs.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dus_edge.errors import DusEdgeError, OutputError, UsageError
from dus_edge.progress import progress
from dus_edge.train.tune.examples import Example, Pair
from dus_edge.train.tune.model import adapter_config
from dus_edge.train.tune.settings import TuneSettings
from dus_edge.train.tune.watch import Watch, stop_gently, whole_checkpoints


def tune(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example] | Sequence[Pair],
    settings: TuneSettings,
    work: Path,
) -> tuple[Any, bool]:
    """Tune a model, from the last whole checkpoint in `work` if there is one; shows progress.

    Args:
        model: from `open_trainable`.
        tokenizer: its tokenizer, for padding.
        rows: examples for SFT, pairs for DPO.
        settings: of the run.
        work: folder for the trainer's checkpoints and the log.

    Returns:
        the model, an adapter of peft's around it if one was trained, and whether the run came to
        its end; where it did not, a checkpoint was written.

    Raises:
        DusEdgeError: the loss or a gradient is NaN or infinite.
        OutputError: a checkpoint cannot be written.
    """
    kept = whole_checkpoints(work)
    for folder in work.glob("checkpoint-*"):
        if folder not in kept:
            shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _trainer(model, tokenizer, rows, settings, work)
        with progress("Training", settings.n_steps, unit="steps") as tick:
            watch = Watch(work, tick)
            trainer.add_callback(watch)
            with stop_gently(watch):
                trainer.train(resume_from_checkpoint=str(kept[-1]) if kept else None)
    return trainer.model, trainer.state.global_step >= settings.n_steps


@contextlib.contextmanager
def lacks_explained(work: Path, settings: TuneSettings) -> Iterator[None]:
    """Say in a sentence what a machine may lack: memory, room on the disk, a GPU to itself.

    Raises:
        OutputError: files of the run cannot be written.
        DusEdgeError: the model does not fit the device.
        UsageError: several GPUs are visible.
    """
    if settings.device == "cuda" and torch.cuda.device_count() > 1:
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs are visible and one is used; choose it with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    try:
        yield
    except OSError as e:
        raise OutputError(
            f"{work}: the run cannot go on ({e.strerror or e}); make room, and repeat the command."
        ) from None
    except torch.OutOfMemoryError:
        raise DusEdgeError(
            f"the memory of {settings.device} is too small for this; take --qlora, "
            "--micro-batch 1 or a smaller --max-tokens."
        ) from None


def _trainer(
    model: Any, tokenizer: Any, rows: Sequence[Any], settings: TuneSettings, work: Path
) -> Any:
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    class SFT(_Careful, trl.SFTTrainer):
        pass

    class DPO(_Careful, trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset  # it has tokens already

        def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
            with progress("Reference", len(dataset), unit="pairs") as self.tick:
                return super()._precompute_ref_logps(dataset, *rest)

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            found = super().compute_ref_log_probs(model, inputs)
            self.tick(len(found[0]))
            return found

    common = {
        "model": model,
        "processing_class": tokenizer,
        "peft_config": adapter_config(settings),
    }
    if settings.goal == "sft":
        data = Dataset.from_list([{"input_ids": list(e.ids), "labels": e.labels} for e in rows])
        args = trl.SFTConfig(**_arguments(settings, work))
        trainer = SFT(args=args, train_dataset=data, **common)
    else:
        data = Dataset.from_list(
            [
                {
                    "prompt_ids": list(p.prompt),
                    "chosen_ids": list(p.chosen),
                    "rejected_ids": list(p.rejected),
                }
                for p in rows
            ]
        )
        args = trl.DPOConfig(
            beta=settings.beta, precompute_ref_log_probs=True, **_arguments(settings, work)
        )
        trainer = DPO(args=args, train_dataset=data, **common)
    trainer.remove_callback(PrinterCallback)
    # trl makes QLoRA's adapters bfloat16, where small updates are lost; they are small enough.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


class _Careful:
    """Says in a sentence that a checkpoint cannot be written."""

    def _save_checkpoint(self, *args: Any, **more: Any) -> None:
        try:
            super()._save_checkpoint(*args, **more)  # type: ignore[misc]
        except Exception as e:  # of safetensors' and torch's own kinds where the disk is full
            work = Path(self.args.output_dir)  # type: ignore[attr-defined]
            kept = whole_checkpoints(work)
            full = getattr(e, "errno", None) == errno.ENOSPC or shutil.disk_usage(work).free == 0
            why = "the disk is full" if full else str(e)
            goes_on = f"goes on from {kept[-1].name}" if kept else "begins anew"
            raise OutputError(
                f"{work}: the checkpoint of step {self.state.global_step} "  # type: ignore[attr-defined]
                f"cannot be written ({why}); make room, and the same command {goes_on}."
            ) from None


def _arguments(settings: TuneSettings, work: Path) -> dict[str, Any]:
    gpu = settings.device == "cuda"
    return {
        "output_dir": str(work),
        "max_steps": settings.n_steps,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // settings.micro_batch,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.n_warm_up,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "max_length": settings.n_ctx,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": not gpu,
        "bf16": gpu,
        "gradient_checkpointing": gpu,
        "dataloader_pin_memory": gpu,
        "logging_steps": 1,
        # By default the trainer logs a NaN as if it were the mean of the losses before.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        # The last one may be cut short by a kill: the one before is kept.
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
