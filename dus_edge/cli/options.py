"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dus_edge.upscale.model import ChoosePlan

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one line of JSON instead."
)


digest_option = click.option(
    "--digest",
    is_flag=True,
    help="Keep SHA-256 digests of the outputs in SHA256SUMS, for `dus-edge verify`.",
)


threads_option = click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of CPU threads. [default: all cores]",
)


device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", help="Run on cpu, cuda or mps."
)


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which layers; the command gets `choose`, see `jobs.plan_chooser`."""
    off = click.option("--no-upscale", is_flag=True, help="Leave the model's depth as it is.")
    return _plan_options(off(command), "a quarter of the base's, as SOLAR did", always=True)


def asked_plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where a model is taken as it is unless a plan is asked for."""
    return _plan_options(command, "none: MODEL as it is", always=False)


def _plan_options(command: Callable[..., Any], default: str, *, always: bool) -> Callable[..., Any]:
    options = (
        click.option(
            "--drop",
            type=int,
            metavar="M",
            help=f"Layers to drop from each of the two copies. [default: {default}]",
        ),
        click.option(
            "--layers",
            type=int,
            metavar="S",
            help="Layers of the result, in place of --drop: 2 × (n − m).",
        ),
        click.option(
            "--plan",
            "plans",
            multiple=True,
            metavar="RANGES",
            help="Source layers in place of --drop, such as 0:24,8:32, or a .toml or .json "
            "file that says all of this. Given twice, the second applies to the first's result.",
        ),
        click.option(
            "--block",
            "blocks",
            multiple=True,
            metavar="I:J",
            help="In place of --drop: run layers I to J - 1 twice. Repeats as --plan does.",
        ),
        click.option(
            "--place",
            metavar="PLACE",
            help="Where copies stand: stacked, or interleaved, each behind its original. "
            "[default: stacked]",
        ),
        click.option(
            "--method",
            metavar="METHOD",
            help="How copies are made: copy, or averaged, the mean of a layer and the next. "
            "[default: copy]",
        ),
        click.option(
            "--branch-scale",
            metavar="A",
            help="Multiply o_proj and down_proj of the copies by A: 1 copies, 0 makes them "
            "do nothing. [default: 1]",
        ),
    )
    for option in reversed(options):
        command = option(command)

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        return command(choose=taken_plan(given, always=always), **given)

    return wrapped


def taken_plan(given: dict[str, Any], *, always: bool) -> ChoosePlan:
    """Take the options of a plan out of what a command was given, and make them one thing.

    Args:
        given: of the command; what is left is the rest.
        always: whether to up-scale if none of them is there.
    """
    from dus_edge.upscale.model import plan_chooser

    drop, layers, plans = given.pop("drop"), given.pop("layers"), given.pop("plans")
    more = {name: given.pop(name) for name in ("blocks", "place", "method", "branch_scale")}
    asked = any(
        value is not None and value != () for value in (drop, layers, plans, *more.values())
    )
    upscale = not given.pop("no_upscale", False) and (always or asked)
    return plan_chooser(drop, layers, plans, upscale, **more)


adapter_option = click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Merge this LoRA adapter on the way, into BASE or, if it was trained on the "
    "up-scaled model, into that.",
)


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How outputs are written and spoken of."""
    options = (
        click.option(
            "--threads",
            "n_threads",
            type=click.IntRange(min=1),
            metavar="N",
            help="Number of worker threads. [default: all cores]",
        ),
        click.option("--overwrite", is_flag=True, help="Replace outputs that exist."),
        click.option(
            "--allow-nonfinite", is_flag=True, help="Go on even if a weight is NaN or infinite."
        ),
        json_option,
        click.option("-v", "--verbose", is_flag=True, help="Print more, and errors in full."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a model is loaded that is talked with."""
    options = (
        click.option(
            "--ctx",
            "n_ctx",
            type=click.IntRange(min=16),
            metavar="N",
            help="Tokens of context. [default: the model's, up to 4096]",
        ),
        threads_option,
        device_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


folder_option = click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Folder to write the checkpoint to.",
)


def text_options(default: str, n_chunks: int | None) -> tuple[Callable[..., Any], ...]:
    """Which text is read, and how much of it."""
    chunks = f"{n_chunks}" if n_chunks else "all of the text"
    return (
        click.option(
            "--text",
            "paths",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="PATH",
            help="Read text from this file, folder or .jsonl; repeat it for several. "
            f"[default: {default}]",
        ),
        click.option(
            "--field",
            metavar="NAME",
            help="Field of .jsonl rows that holds the text. [default: text]",
        ),
        click.option(
            "--ctx",
            "n_ctx",
            type=click.IntRange(min=3),
            metavar="N",
            help="Tokens in a chunk of text. [default: 512]",
        ),
        click.option(
            "--chunks",
            "n_chunks",
            type=click.IntRange(min=1),
            default=n_chunks,
            metavar="N",
            help=f"Read at most this many chunks. [default: {chunks}]",
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True, help="Seed for sampling chunks."
        ),
    )


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Text and machine; the command gets `text` and `machine`, see `calibration`."""
    return _calibration_options(command, None)


def calibrating(n_chunks: int, device: str = "--device") -> Callable[..., Any]:
    """The same, where part of the text is enough, and with another name for the device's option."""
    return lambda command: _calibration_options(command, n_chunks, device)


def _calibration_options(
    command: Callable[..., Any], default_chunks: int | None, device: str = "--device"
) -> Callable[..., Any]:
    options = (
        *text_options("the built-in mix of English, Korean and code", default_chunks),
        click.option(
            device,
            "run_on",
            default="auto",
            show_default=True,
            metavar="DEVICE",
            help="Run the model on cpu, cuda or mps.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(("float32", "bfloat16")),
            help="Precision that the model runs in. [default: float32 on cpu, else bfloat16]",
        ),
    )
    for option in reversed(options):
        command = option(command)

    @functools.wraps(command)
    def wrapped(
        paths: tuple[Path, ...],
        field: str | None,
        n_ctx: int | None,
        n_chunks: int | None,
        seed: int,
        run_on: str,
        dtype: str | None,
        **rest: Any,
    ) -> Any:
        from dus_edge.jobs.export.calibration import Machine, TextChoice

        text = TextChoice(paths, field, n_ctx, n_chunks, seed)
        return command(text=text, machine=Machine(run_on, dtype), **rest)

    return wrapped
