"""Which layers of an up-scaled model learn, named from the plan."""

from __future__ import annotations

from dataclasses import dataclass

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.errors import UsageError
from dus_edge.upscale.plan import DepthPlan

ALL, COPIES, SEAM, LORA = "all", "copies", "seam", "lora"


@dataclass(frozen=True)
class TrainMode:
    """What learns.

    Attributes:
        kind: ``all`` (embedding, head and final norm too), ``copies``, ``seam`` or ``lora``.
        around: of ``seam``, how many layers around each seam.
    """

    kind: str
    around: int = 0

    @property
    def spelled(self) -> str:
        """As the command line has it: ``seam:8``."""
        return f"{self.kind}:{self.around}" if self.kind == SEAM else self.kind


def check_loss(config: ModelConfig) -> None:
    """See that the loss, which is computed by chunks, would be the model's own.

    Raises:
        UsageError: it would not.
    """
    if config.logit_softcap is not None:
        raise UsageError(
            f"healing computes its loss without the cap on logits that a {config.architecture} "
            "has; train the up-scaled folder with dus-edge sft, or with another tool."
        )


def parse_mode(text: str) -> TrainMode:
    """The mode that an option spells.

    Raises:
        UsageError: it is none.
    """
    kind, colon, count = text.partition(":")
    if kind in (ALL, COPIES, LORA) and not colon:
        return TrainMode(kind)
    if kind == SEAM and count.isascii() and count.isdigit() and int(count) > 0:
        return TrainMode(SEAM, int(count))
    raise UsageError(f"--train {text!r}: choose all, copies, lora or seam:K, such as seam:8.")


def learned_layers(mode: TrainMode, plan: DepthPlan) -> tuple[int, ...]:
    """Layers of the result whose weights change, in order.

    ``copies`` are the plan's. ``seam:K`` are the K layers around each seam, half on either side,
    the odd one behind it.

    Raises:
        UsageError: the plan has no copies, or no seam.
    """
    if mode.kind in (ALL, LORA):
        return tuple(range(plan.depth))
    if mode.kind == COPIES:
        if not plan.copies:
            raise UsageError(
                f"--train copies: no layer of the plan {plan.spelled} is a copy; "
                "use --train all, or up-scale with --drop."
            )
        return plan.copies
    if not plan.seams:
        raise UsageError(
            f"--train {mode.spelled}: the plan {plan.spelled} has no seam; use --train all."
        )
    around: set[int] = set()
    for seam in plan.seams:
        first = seam.position - mode.around // 2
        around |= set(range(max(0, first), min(plan.depth, first + mode.around)))
    return tuple(sorted(around))
