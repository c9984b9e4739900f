"""The job `sft`: a checkpoint tuned on dialogues, the loss on answers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.gguf.source import refuse_gguf
from dus_edge.jobs.job import Result, Writing, quiet, run_job
from dus_edge.jobs.train.tuning import TuneJob, TuneOptions
from dus_edge.text.dialogues import TuningData, read_dialogues
from dus_edge.upscale.model import Say, plan_chooser


def tune_on_dialogues(
    model: str,
    folder: Path,
    options: TuneOptions,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    say: Say = quiet,
) -> tuple[Result, dict[str, Any]]:
    """Tune a model on dialogues.

    Args:
        model: folder, hub id or the built-in base's name.
        folder: the result: a checkpoint, or an adapter.
        options: what is asked for.
        n_threads: worker threads that write.
        overwrite: replace an older result of that name.
        say: takes lines for the user.

    Returns:
        what was written, and what was measured.

    Raises:
        DusEdgeError: model, data, chat format, options or output cannot be used; the loss is NaN.
        KeyboardInterrupt: a stop was asked for; a checkpoint was written.
    """
    refuse_gguf(model, "Training")
    job = SftJob(folder, options, Writing(n_threads, overwrite))
    return run_job(job, model, plan_chooser(None, None, (), False), say), job.figures


class SftJob(TuneJob):
    """See `tune_on_dialogues`."""

    goal = "sft"
    unit = "examples"

    def read(self) -> TuningData:
        """Dialogues."""
        return read_dialogues(self.options.data)

    def encode(self, coder: Any, rows: Sequence[Any]) -> tuple[list[Any], int]:
        """Examples."""
        from dus_edge.train.tune.examples import dialogue_examples

        return dialogue_examples(coder, rows)

    def measure(self, model: Any, held: Sequence[Any], advance: Callable[[int], None]) -> float:
        """Mean loss of a token of an answer, in nats."""
        from dus_edge.train.tune.held_out import answer_loss

        return answer_loss(model, held, advance)

    def compare(
        self, before: float, after: float, held: Sequence[Any]
    ) -> tuple[str, list[tuple[str, str, str]], dict[str, Any]]:
        """The loss."""
        n = sum(sum(e.learnt) for e in held)
        return (
            f"{len(held)} examples with {n:,} tokens of answers",
            [("Held-out answer loss", f"{before:.4f}", f"{after:.4f}")],
            {
                "held_out_examples": len(held),
                "held_out_tokens": n,
                "held_out_loss_before": before,
                "held_out_loss_after": after,
            },
        )
