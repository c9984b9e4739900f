"""What a person asks of `heal`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.hub.dataset import HubText, parse_hub_text
from dus_edge.errors import UsageError
from dus_edge.train.heal.mode import ALL, LORA, TrainMode

#: Peak learning rates by what learns, where none is asked for: of three to four, those that left
#: the lowest held-out loss on SmolLM2-135M with 512 tokens a step (benchmarks/bench_heal.py). Of
#: ``lora`` 3e-3 was 0.005 nats better after 6,144 tokens and unsteady after 16,384.
DEFAULT_RATES = {ALL: 1e-4, "copies": 3e-4, "seam": 1e-3, LORA: 1e-3}
#: What closed most of the gap to the control, and, but for a run's first minutes, most by compute.
DEFAULT_MODE = TrainMode(ALL)


@dataclass(frozen=True)
class TextPart:
    """One text to train on.

    Attributes:
        path: a file, folder or ``.jsonl``; of a dataset what it is asked for by.
        share: of the tokens; None leaves it what the other parts leave.
        licence: of the text, for the card.
        dataset: of the hub, in place of a path.
    """

    path: Path
    share: float | None = None
    licence: str | None = None
    dataset: HubText | None = None

    @property
    def label(self) -> str:
        """What a card calls it."""
        return self.dataset.spelled if self.dataset else self.path.name


def text_part(text: str, share: float | None = None, licence: str | None = None) -> TextPart:
    """A text by what a person calls it: a path that exists, else a dataset of the hub.

    What is neither stays a path, of which reading says that it does not exist.
    """
    path = Path(text)
    return TextPart(path, share, licence, None if path.exists() else parse_hub_text(text))


@dataclass(frozen=True)
class HealOptions:
    """Everything that a result depends on, and how it is watched.

    Attributes:
        texts: to train on.
        replay: of the base's kind of text, against forgetting, with shares.
        field: of JSON lines, which one is the text.
        mode: what learns.
        tokens: to train on, rounded up to whole steps.
        steps: in place of `tokens`.
        rate: peak learning rate.
        length: tokens of a window.
        batch: windows of a step.
        micro: windows that a process runs at a time.
        teacher: share of the base's distribution in the target; 0 for none.
        optimizer: see `OPTIMIZERS`.
        dtype: ``float32`` or ``bfloat16``, of the computation.
        device: ``cpu`` or ``cuda``.
        checkpointing: keep less of the forward pass.
        weight_decay: of matrices.
        rank: of ``lora``.
        seed: of every draw.
        heldout_tokens: kept from training to measure on.
        heldout_texts: texts to measure on instead.
        evaluate: steps between held-out losses; about ten of a run by default.
        save: steps between checkpoints; the same by default.
        control: train the base on the same tokens too.
        restart: throw away a run that was cut short.
    """

    texts: tuple[TextPart, ...]
    replay: tuple[TextPart, ...] = ()
    field: str | None = None
    mode: TrainMode = DEFAULT_MODE
    tokens: int | None = None
    steps: int | None = None
    rate: float | None = None
    length: int = 512
    batch: int = 4
    micro: int = 1
    teacher: float = 0.0
    optimizer: str = "adamw"
    dtype: str = "float32"
    device: str = "cpu"
    checkpointing: bool = False
    weight_decay: float = 0.0
    rank: int = 16
    seed: int = 0
    heldout_tokens: int = 8192
    heldout_texts: tuple[Path, ...] = ()
    evaluate: int | None = None
    save: int | None = None
    control: bool = False
    restart: bool = False

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return DEFAULT_RATES[self.mode.kind] if self.rate is None else self.rate

    @property
    def n_steps(self) -> int:
        """Steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.length * self.batch))

    @property
    def evaluate_every(self) -> int:
        """Steps between held-out losses."""
        return self.evaluate or max(1, self.n_steps // 10)

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.save or self.evaluate_every

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: it does; the options are named.
        """
        if (self.tokens is None) == (self.steps is None):
            raise UsageError("say how long to train: --tokens N, or --steps N.")
        if self.batch % self.micro:
            raise UsageError(
                f"a batch of {self.batch} is no multiple of --micro-batch {self.micro}; "
                "change one of them."
            )
        given = [part.share or 0.0 for part in self.replay]
        if sum(given) >= 1:
            raise UsageError(
                f"the shares of --replay add up to {sum(given):g}; less than 1 is needed, for "
                "--text gets the rest."
            )

    def identity(self) -> dict[str, Any]:
        """What the weights at each step depend on, by what a person calls it."""
        return {
            "train mode": self.mode.spelled,
            "number of steps": self.n_steps,
            "--lr": self.peak,
            "--ctx": self.length,
            "--batch": self.batch,
            "--micro-batch": self.micro,
            "--teacher": self.teacher,
            "--optimizer": self.optimizer,
            "--dtype": self.dtype,
            "--checkpointing": self.checkpointing,
            "--weight-decay": self.weight_decay,
            "--rank": self.rank if self.mode.kind == LORA else None,
            "--seed": self.seed,
            "--replay": [part.share for part in self.replay],
        }
