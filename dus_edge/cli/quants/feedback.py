"""The option --feedback of gguf."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dus_edge.jobs.export.calibration import Machine, TextChoice
    from dus_edge.jobs.export.feedback import FeedbackChoice

feedback_option = click.option(
    "--feedback",
    is_flag=True,
    help="Run text through the model, as --imatrix auto does, and make each rounding error good "
    "in the weights behind it: closer to the original at the same size, and slower.",
)


def feedback_choice(asked: bool, text: TextChoice, machine: Machine) -> FeedbackChoice | None:
    """What `export_gguf` is given for it.

    Args:
        asked: whether the option is there.
        text: of the calibration options.
        machine: of the same.
    """
    if not asked:
        return None
    from dus_edge.jobs.export.feedback import FeedbackChoice

    return FeedbackChoice(text, machine)
