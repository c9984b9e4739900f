"""The options of `fit` that plan a training in place of running a model."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import click

from dus_edge.cli.options import taken_plan
from dus_edge.errors import UsageError

_OPTIONS = (
    click.option(
        "--train",
        "mode",
        metavar="MODE",
        help="Plan a training instead: all, copies, seam:K (the K layers nearest to a seam), lora "
        "or qlora. --batch is then sequences at a time, by default 1.",
    ),
    click.option("--sequence", type=int, metavar="N", help="Tokens of a sequence. [default: 2048]"),
    click.option(
        "--gpus", type=int, metavar="N", help="Cards to shard the training over. [default: 1]"
    ),
    click.option(
        "--precision",
        type=click.Choice(("f32", "bf16", "mixed")),
        help="Precision; mixed keeps what learns in f32 and computes in bf16. "
        "[default: mixed, on a CPU f32]",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(("adamw", "adamw-bf16", "adamw8bit")),
        help="AdamW with moments in f32, bf16 or 8 bits. [default: adamw]",
    ),
    click.option(
        "--checkpointing/--no-checkpointing",
        default=None,
        help="Compute layers again in the backward pass. [default: on cards]",
    ),
    click.option(
        "--rank", type=int, metavar="R", help="Rank of adapters of lora and qlora. [default: 16]"
    ),
    click.option("--tokens", metavar="N", help="Tokens to train on, such as 1e9, for the hours."),
    click.option(
        "--price-per-hour", type=float, metavar="X", help="Price of a card, for the cost."
    ),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """With --train the command is not called: the training is planned and printed."""
    for option in reversed(_OPTIONS):
        command = option(command)

    @functools.wraps(command)
    def wrapped(
        mode: str | None,
        sequence: int | None,
        gpus: int | None,
        precision: str | None,
        optimizer: str | None,
        checkpointing: bool | None,
        rank: int | None,
        tokens: str | None,
        price_per_hour: float | None,
        **rest: Any,
    ) -> Any:
        fields = {
            "sequence": sequence,
            "gpus": gpus,
            "precision": precision,
            "optimizer": optimizer,
            "checkpointing": checkpointing,
            "lora_rank": rank,
        }
        if mode is None:
            for key, value in {
                **fields,
                "tokens": tokens,
                "price-per-hour": price_per_hour,
            }.items():
                if value is not None:
                    name = {"lora_rank": "rank"}.get(key, key)
                    raise UsageError(f"--{name} is for a training; add --train, such as all.")
            return command(**rest)
        if _given("preset"):
            raise UsageError("--quant is for running a model; --train qlora keeps it as NF4.")
        if rank is not None and mode not in ("lora", "qlora"):
            raise UsageError(f"--rank is for lora and qlora, not for {mode}.")
        fields["batch"] = rest["batch"] if _given("batch") else None
        return _print_training(mode, fields, _token_count(tokens), price_per_hour, **rest)

    return wrapped


def _given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def _token_count(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        n = int(float(text.replace(",", "").replace("_", "")))
    except (ValueError, OverflowError):
        n = 0
    if not 0 < n <= 10**18:
        raise UsageError(f"--tokens is {text!r}; a number such as 1e9 is needed.")
    return n


def _print_training(
    mode: str,
    fields: dict[str, Any],
    tokens: int | None,
    price_per_hour: float | None,
    *,
    model: str,
    device: str | None,
    memory_gb: float | None,
    platform: str | None,
    as_json: bool,
    **others: Any,
) -> None:
    from dus_edge.jobs.predict import find_trained
    from dus_edge.predict.prediction import choose_device
    from dus_edge.predict.training import report
    from dus_edge.predict.training.verdict import judge_training, training_backend
    from dus_edge.predict.training.work import work_of_mode

    if device is None:
        raise UsageError("A training is planned for one device; name it with --device, or auto.")
    if price_per_hour is not None and not 0 <= price_per_hour < 1e9:
        raise UsageError(f"--price-per-hour is {price_per_hour:g}; a price is needed.")
    chosen = choose_device(device)
    backend = training_backend(chosen)
    quiet = functools.partial(click.echo, err=True)
    found = find_trained(model, taken_plan(others, always=False), quiet)
    work = work_of_mode(mode, found.plan, backend=backend, **fields)
    verdict = judge_training(
        found.name.stem,
        found.config,
        found.plan,
        work,
        chosen,
        platform=platform,
        memory_gb=memory_gb,
        tokens=tokens,
        price_per_hour=price_per_hour,
    )
    if as_json:
        click.echo(json.dumps(report.training_json(verdict)))
    else:
        click.echo(report.training_text(verdict))
