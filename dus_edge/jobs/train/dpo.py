"""The job `dpo`: a checkpoint tuned on pairs of answers, the better and the worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.gguf.source import refuse_gguf
from dus_edge.jobs.job import Result, Writing, quiet, run_job
from dus_edge.jobs.train.tuning import TuneJob, TuneOptions
from dus_edge.text.dialogues import TuningData, read_preferences
from dus_edge.upscale.model import Say, plan_chooser


def tune_on_preferences(
    model: str,
    folder: Path,
    options: TuneOptions,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    say: Say = quiet,
) -> tuple[Result, dict[str, Any]]:
    """Tune a model on preferences, itself as the reference; see `tune_on_dialogues`."""
    refuse_gguf(model, "Training")
    job = DpoJob(folder, options, Writing(n_threads, overwrite))
    return run_job(job, model, plan_chooser(None, None, (), False), say), job.figures


class DpoJob(TuneJob):
    """See `tune_on_preferences`."""

    goal = "dpo"
    unit = "pairs"

    def read(self) -> TuningData:
        """Preferences."""
        return read_preferences(self.options.data)

    def encode(self, coder: Any, rows: Sequence[Any]) -> tuple[list[Any], int]:
        """Pairs."""
        from dus_edge.train.tune.examples import preference_pairs

        return preference_pairs(coder, rows)

    def measure(self, model: Any, held: Sequence[Any], advance: Callable[[int], None]) -> Any:
        """Log-probabilities of the answers."""
        from dus_edge.train.tune.held_out import pair_log_probs

        return pair_log_probs(model, held, advance)

    def compare(
        self, before: Any, after: Any, held: Sequence[Any]
    ) -> tuple[str, list[tuple[str, str, str]], dict[str, Any]]:
        """Margin, accuracy, and which answer is the likelier one."""
        from dus_edge.train.tune.held_out import pair_scores

        first, last = (pair_scores(x, before, self.options.beta) for x in (before, after))
        return (
            f"{len(held)} pairs",
            [
                ("Held-out margin, nats", f"{first.margin:.4f}", f"{last.margin:.4f}"),
                # Before, all margins are zero: nothing is preferred yet.
                ("Held-out accuracy", f"{first.accuracy:.0%}", f"{last.accuracy:.0%}"),
                ("Chosen is the likelier", f"{first.likelier:.0%}", f"{last.likelier:.0%}"),
            ],
            {
                "held_out_pairs": len(held),
                **{f"held_out_{k}_before": v for k, v in asdict(first).items()},
                **{f"held_out_{k}_after": v for k, v in asdict(last).items()},
            },
        )
