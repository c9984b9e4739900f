"""The commands that tune a model: sft, dpo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import folder_option, json_option
from dus_edge.cli.say import print_json, print_next, print_notes, say_to
from dus_edge.cli.talk.next import after_folder
from dus_edge.words import format_bytes


def _tune_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What both commands take."""
    positive = click.IntRange(min=1)
    options = (
        click.option(
            "--data",
            required=True,
            metavar="FILE|built-in",
            help="Rows to train on: a .jsonl file, or built-in for those of the program.",
        ),
        click.option("--data-licence", metavar="NAME", help="The data's licence, for the card."),
        click.option("--lora", "method", flag_value="lora", help="Train an adapter."),
        click.option(
            "--qlora", "method", flag_value="qlora", help="Train an adapter on the base in 4 bits."
        ),
        click.option(
            "--full",
            "method",
            flag_value="full",
            help="Train all weights. [default: below 1 B parameters; else --lora]",
        ),
        click.option(
            "--rank", type=positive, default=16, show_default=True, help="Rank of the adapter."
        ),
        click.option(
            "--chat-format",
            metavar="NAME",
            help="Format for a model that has no chat template. [default: solar]",
        ),
        click.option(
            "--max-tokens",
            type=click.IntRange(min=8),
            metavar="N",
            help="Leave out what is longer. [default: 2048, or the model's context]",
        ),
        click.option(
            "--epochs",
            type=click.FloatRange(min=0, min_open=True),
            default=3.0,
            show_default=True,
            metavar="X",
            help="Go over the data so many times.",
        ),
        click.option("--steps", type=positive, metavar="N", help="Steps, in place of --epochs."),
        click.option(
            "--batch", type=positive, default=8, show_default=True, help="Examples of a step."
        ),
        click.option(
            "--micro-batch",
            type=positive,
            metavar="N",
            help="Examples computed at once. [default: --batch; 1 from 1 B parameters on]",
        ),
        click.option(
            "--lr",
            type=click.FloatRange(min=0, min_open=True),
            metavar="X",
            help="Highest learning rate. [default: by method and size]",
        ),
        click.option(
            "--eval-share",
            type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
            default=0.1,
            show_default=True,
            metavar="X",
            help="Share of the rows that is held out, evenly spread.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order."),
        click.option(
            "--save-every", type=positive, metavar="N", help="Steps between two checkpoints."
        ),
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="DEVICE",
            help="Train on cpu or cuda.",
        ),
        folder_option,
        click.option("--restart", is_flag=True, help="Throw away a run that was cut short."),
        click.option("--overwrite", is_flag=True, help="Replace DIR if it exists."),
        json_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command("sft")
@click.argument("model")
@_tune_options
def sft_command(model: str, out: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Tune MODEL on dialogues.

    Rows hold messages, or a prompt and its completion. The loss is on answers
    only, in MODEL's own chat format. A run that is cut short goes on where it was.
    """
    from dus_edge.jobs.train.sft import tune_on_dialogues

    _tune(tune_on_dialogues, model, out, overwrite, as_json, options)


@click.command("dpo")
@click.argument("model")
@_tune_options
@click.option(
    "--beta",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    metavar="X",
    help="How much it costs to move away from MODEL.",
)
def dpo_command(model: str, out: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Tune MODEL on pairs of answers (DPO).

    Rows hold a prompt, the chosen answer and the rejected one. MODEL as it is
    now is the reference; it is run once, before the training.
    """
    from dus_edge.jobs.train.dpo import tune_on_preferences

    _tune(tune_on_preferences, model, out, overwrite, as_json, options)


def _tune(
    job: Callable[..., Any],
    model: str,
    out: Path,
    overwrite: bool,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from dus_edge.jobs.train.tuning import TuneOptions

    asked = TuneOptions(**options)
    result, figures = job(model, out, asked, overwrite=overwrite, say=say_to(as_json))
    if as_json:
        print_json(result, **figures)
        return
    click.echo(f"{out}\n  {format_bytes(result.outputs[0].nbytes)}")
    print_notes(result)
    print_next(result, after_folder(out, plain=True))
