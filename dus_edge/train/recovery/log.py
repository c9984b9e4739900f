"""The log of a run: a line of JSON for its start, for each step, for its end.

Losses are in nats a token with nine digits, so that two runs can be compared digit by digit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dus_edge.train.heal.heldout import HeldoutLoss
from dus_edge.train.heal.loop import StepDone

_DIGITS = 9


@dataclass
class Curve:
    """Held-out losses of a run.

    Attributes:
        name: what is drawn beside it, e.g. ``copies`` or ``control``.
        tokens: trained on so far, at each point; 0 for the start.
        means: over all held-out tokens, nats.
        by_language: the same of each language.
    """

    name: str
    tokens: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    by_language: dict[str, list[float]] = field(default_factory=dict)

    def add(self, tokens: int, loss: HeldoutLoss) -> None:
        """A point more."""
        self.tokens.append(tokens)
        self.means.append(loss.mean)
        for language, value in loss.by_language.items():
            self.by_language.setdefault(language, []).append(value)


def heldout_json(loss: HeldoutLoss) -> dict[str, Any]:
    """A held-out loss as a log has it."""
    return {
        "heldout_loss": round(loss.mean, _DIGITS),
        "heldout_by_language": {k: round(v, _DIGITS) for k, v in loss.by_language.items()},
        "heldout_tokens": loss.n_tokens,
    }


def heldout_of(line: Mapping[str, Any]) -> HeldoutLoss | None:
    """The held-out loss of a line, where it has one."""
    if "heldout_loss" not in line:
        return None
    return HeldoutLoss(line["heldout_by_language"], line["heldout_loss"], line["heldout_tokens"])


def step_json(step: StepDone, run: str) -> dict[str, Any]:
    """A step as a line of the log."""
    line: dict[str, Any] = {
        "run": run,
        "step": step.number,
        "tokens": step.tokens,
        "loss": round(step.loss, _DIGITS),
        "lr": step.rate,
        "grad_norm": round(step.norm, 6),
        "seconds": round(step.seconds, 3),
    }
    return line | (heldout_json(step.heldout) if step.heldout else {})


class Log:
    """A log that is written line by line and goes on where a run was cut short.

    Args:
        path: of the file, there or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.lines.append(json.loads(text))
                except ValueError:  # cut short in the middle of a line
                    break

    def keep(self, run: str, step: int) -> None:
        """Forget what a run wrote of steps that it is going to do again."""
        self.lines = [x for x in self.lines if x.get("run") != run or x.get("step", 0) <= step]
        self.path.write_text("".join(map(_line, self.lines)), encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """A line more, on the disk at once."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(_line(line))

    def start(self, run: str) -> HeldoutLoss | None:
        """The held-out loss before a run's first step, if it was measured."""
        for line in self.lines:
            if line.get("run") == run and line.get("step") == 0:
                return heldout_of(line)
        return None

    def curve(self, run: str) -> Curve:
        """The held-out losses of a run."""
        curve = Curve(run)
        for line in self.lines:
            loss = heldout_of(line)
            if line.get("run") == run and loss is not None and "step" in line:
                curve.add(line["tokens"], loss)
        return curve


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
