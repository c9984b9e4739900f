"""The command heal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import folder_option, json_option, plan_options
from dus_edge.cli.say import print_json, print_next, print_notes, say_to
from dus_edge.cli.talk.next import after_folder
from dus_edge.errors import UsageError
from dus_edge.words import format_bytes

_POSITIVE = click.IntRange(min=1)
_RATE = click.FloatRange(min=0, min_open=True)


def _text_options() -> tuple[Any, ...]:
    return (
        click.option(
            "--text",
            "texts",
            multiple=True,
            required=True,
            metavar="TEXT",
            help="Train on this file, folder, .jsonl, or dataset of the hub, as "
            "org/name[@revision][:configuration[/split]]; repeat it for several.",
        ),
        click.option(
            "--replay",
            multiple=True,
            metavar="TEXT:SHARE",
            help="Mix in text of the base's kind, such as web.jsonl:0.1, against forgetting.",
        ),
        click.option(
            "--field",
            metavar="NAME",
            help="Field of .jsonl rows, or column of datasets, that holds the text. "
            "[default: text]",
        ),
        click.option(
            "--text-licence",
            "licences",
            multiple=True,
            metavar="NAME",
            help="Licence of each --text in order, for the card.",
        ),
        click.option(
            "--heldout-text",
            "heldout_texts",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="Measure on this text. [default: whole documents kept from --text]",
        ),
        click.option(
            "--heldout-tokens",
            type=_POSITIVE,
            default=8192,
            show_default=True,
            metavar="N",
            help="Keep so many tokens of --text to measure on.",
        ),
    )


def _training_options() -> tuple[Any, ...]:
    return (
        click.option(
            "--train",
            "mode",
            default="all",
            show_default=True,
            metavar="MODE",
            help="What learns: all, the second copies, seam:K (layers around the seam), or lora.",
        ),
        click.option("--tokens", type=_POSITIVE, metavar="N", help="Train on so many tokens."),
        click.option("--steps", type=_POSITIVE, metavar="N", help="Steps, in place of --tokens."),
        click.option(
            "--lr", "rate", type=_RATE, metavar="X", help="Peak learning rate. [default: by mode]"
        ),
        click.option(
            "--ctx",
            "length",
            type=click.IntRange(min=8),
            default=512,
            show_default=True,
            metavar="N",
            help="Tokens of a window of packed documents.",
        ),
        click.option(
            "--batch", type=_POSITIVE, default=4, show_default=True, help="Windows of a step."
        ),
        click.option(
            "--micro-batch",
            "micro",
            type=_POSITIVE,
            default=1,
            show_default=True,
            help="Windows computed at once by a process.",
        ),
        click.option(
            "--teacher",
            metavar="base[:SHARE]",
            help="Take a share of the target from the base's own distribution. [default: none; "
            "0.5 without SHARE]",
        ),
        click.option(
            "--optimizer",
            type=click.Choice(("adamw", "adamw8bit")),
            default="adamw",
            show_default=True,
            help="Keep the moments in 8 bits, a quarter of the memory, or whole.",
        ),
        click.option(
            "--weight-decay",
            type=click.FloatRange(min=0),
            default=0.0,
            show_default=True,
            help="Weight decay of matrices.",
        ),
        click.option(
            "--rank", type=_POSITIVE, default=16, show_default=True, help="Rank of --train lora."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of all draws."),
        click.option(
            "--control", is_flag=True, help="Train the base on the same tokens too, to compare."
        ),
    )


def _running_options() -> tuple[Any, ...]:
    return (
        click.option(
            "--device",
            type=click.Choice(("auto", "cpu", "cuda")),
            default="auto",
            show_default=True,
            help="Where to train.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(("float32", "bfloat16")),
            help="Precision of the computation. [default: float32 on cpu, else bfloat16]",
        ),
        click.option(
            "--checkpointing/--no-checkpointing",
            default=None,
            help="Keep less in memory and compute it again. [default: on cuda only]",
        ),
        click.option(
            "--eval-every",
            "evaluate",
            type=_POSITIVE,
            metavar="N",
            help="Steps between held-out losses. [default: a tenth of the run]",
        ),
        click.option(
            "--save-every",
            "save",
            type=_POSITIVE,
            metavar="N",
            help="Steps between checkpoints. [default: as --eval-every]",
        ),
        click.option("--restart", is_flag=True, help="Throw away a run that was cut short."),
        folder_option,
        click.option(
            "--threads", "n_threads", type=_POSITIVE, metavar="N", help="Threads. [default: all]"
        ),
        click.option("--overwrite", is_flag=True, help="Replace DIR if it exists."),
        json_option,
    )


def _heal_options(command: Any) -> Any:
    options = (*_text_options(), *_training_options(), *_running_options())
    for option in reversed(options):
        command = option(command)
    return command


@click.command("heal")
@click.argument("base")
@plan_options
@_heal_options
def heal_command(
    base: str,
    choose: Any,
    out: Path,
    texts: tuple[str, ...],
    replay: tuple[str, ...],
    licences: tuple[str, ...],
    mode: str,
    teacher: str | None,
    device: str,
    dtype: str | None,
    checkpointing: bool | None,
    n_threads: int | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Up-scale BASE and train it on text until it is whole again.

    BASE may be a folder that was up-scaled before. A run that is cut short goes on
    where it was; Ctrl-C keeps a checkpoint first. Under torchrun the model is
    divided among the processes.
    """
    from dus_edge.jobs.train.heal import heal
    from dus_edge.packages import require
    from dus_edge.train.heal.mode import parse_mode
    from dus_edge.train.recovery.options import HealOptions, text_part

    require("hf", "healing needs")
    from dus_edge.calibrate.world import pick_device

    if licences and len(licences) != len(texts):
        raise UsageError("give --text-licence once for each --text, or not at all.")
    parts = tuple(
        text_part(text, licence=licences[i] if licences else None) for i, text in enumerate(texts)
    )
    chosen = pick_device(device)
    result, figures = heal(
        base,
        choose,
        out,
        HealOptions(
            texts=parts,
            replay=tuple(map(_replay, replay)),
            mode=parse_mode(mode),
            teacher=_teacher(teacher),
            device=chosen,
            dtype=dtype or ("bfloat16" if chosen == "cuda" else "float32"),
            checkpointing=chosen == "cuda" if checkpointing is None else checkpointing,
            **options,
        ),
        n_threads=n_threads,
        overwrite=overwrite,
        say=say_to(as_json),
    )
    if result is None:
        return
    if as_json:
        print_json(result, **figures)
        return
    output = result.outputs[0]
    click.echo(f"{output.path}")
    click.echo(f"  {format_bytes(output.nbytes)}, held-out loss {_losses(figures)}")
    print_notes(result)
    print_next(result, after_folder(output.path, plain=True))


def _losses(figures: dict[str, Any]) -> str:
    steps = [figures["upscaled_loss"], figures["healed_loss"]]
    arrow = " → ".join(f"{x:.4f}" for x in steps)
    beside = [
        f"{name} {figures[key]:.4f}"
        for name, key in (("base", "base_loss"), ("control", "control_loss"))
        if figures[key] is not None
    ]
    return arrow + (f" ({', '.join(beside)})" if beside else "")


def _replay(text: str) -> Any:
    from dus_edge.train.recovery.options import text_part

    path, colon, share = text.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not colon or not path or not 0 < value < 1:
        raise UsageError(f"--replay {text!r}: a path and a share are wanted, as web.jsonl:0.1.")
    return text_part(path, value)


def _teacher(text: str | None) -> float:
    if text is None:
        return 0.0
    name, colon, share = text.partition(":")
    try:
        value = float(share) if colon else 0.5
    except ValueError:
        value = 0.0
    if name != "base" or not 0 < value <= 1:
        raise UsageError(f"--teacher {text!r}: base is wanted, or base and a share, as base:0.3.")
    return value
