"""What looks on while a model is tuned: the log, numbers that are none, and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dus_edge.checkpoint.names import TRAINING_LOG
from dus_edge.errors import DusEdgeError
from dus_edge.progress import count_resumed

#: In a checkpoint of the trainer that is whole.
WHOLE = "whole"
_KEPT = ("loss", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies")


class Watch(TrainerCallback):
    """Writes the log, marks whole checkpoints, stops where the loss is no number.

    Attributes:
        stopped: whether the run was asked to stop before its end.
    """

    def __init__(self, work: Path, advance: Callable[[int], None]) -> None:
        self.work = work
        self.advance = advance
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A run that goes on drops what its log had behind the checkpoint."""
        if state.global_step:
            count_resumed(self.advance, state.global_step)
        lines = [_line(entry) for entry in state.log_history if "loss" in entry]
        (self.work / TRAINING_LOG).write_text("".join(lines), encoding="utf-8")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """One line of the log; called before the step's checkpoint is written."""
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            value = float(logs.get(name, 0.0))
            if not math.isfinite(value):
                what = "loss" if name == "loss" else "gradient"
                step = state.global_step
                raise DusEdgeError(
                    f"the {what} is {value} at step {step}, so the run has stopped; "
                    f"{self._last_good(step)}; start again with --restart and a lower --lr."
                )
        with (self.work / TRAINING_LOG).open("a", encoding="utf-8") as log:
            log.write(_line({**logs, "step": state.global_step}))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Show the step; where a stop was asked for, a checkpoint comes first."""
        self.advance(1)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The checkpoint is whole: the trainer writes it in place, so this is what says so."""
        (self.work / f"checkpoint-{state.global_step}" / WHOLE).touch()

    def _last_good(self, step: int) -> str:
        # What the step before left behind is what this one has failed on.
        kept = [p for p in whole_checkpoints(self.work) if _step(p) < step - 1]
        return f"{kept[-1]} is its last good checkpoint" if kept else "there is no checkpoint yet"


def whole_checkpoints(work: Path) -> list[Path]:
    """Checkpoints of the trainer that were written to their end, the latest last."""
    found = [p.parent for p in work.glob(f"checkpoint-*/{WHOLE}")]
    return sorted(found, key=_step)


@contextlib.contextmanager
def stop_gently(watch: Watch) -> Iterator[None]:
    """The first Ctrl-C ends the run at the end of its step; the second, at once."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {n: signal.getsignal(n) for n in numbers}

    def asked(number: int, frame: object) -> None:
        if watch.stopped:
            raise KeyboardInterrupt
        watch.stopped = True

    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # what nohup has a process ignore stays ignored
            signal.signal(number, asked)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _line(entry: dict[str, Any]) -> str:
    kept = {"step": entry["step"]}
    kept |= {name.replace("/", "_"): entry[name] for name in _KEPT if name in entry}
    return json.dumps(kept) + "\n"
