"""The commands about devices: devices, fit; and the options of everything that predicts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import click

from dus_edge.cli.options import asked_plan_options, json_option
from dus_edge.cli.training import training_options

_MODEL_OPTIONS = (
    click.option(
        "-q",
        "--quant",
        "preset",
        metavar="PRESET",
        help="Format to store a checkpoint in: a GGUF preset, gptq-int4 (-int8, -int3, "
        "-int2), bnb-nf4 or bnb-int8. [default: q4_k_m]",
    ),
    click.option(
        "--ctx",
        type=int,
        metavar="N",
        help="Tokens of context a sequence. [default: 4096, or the model's own if less]",
    ),
    click.option(
        "--batch",
        type=int,
        default=2048,
        show_default=True,
        metavar="N",
        help="Tokens handed over at once.",
    ),
    click.option(
        "--ubatch",
        type=int,
        default=512,
        show_default=True,
        metavar="N",
        help="Tokens computed at once.",
    ),
    click.option(
        "--parallel",
        type=int,
        metavar="N",
        help="Sequences at once, each with a context of its own: OLLAMA_NUM_PARALLEL, "
        "or -np, where -c is all of them. [default: 1]",
    ),
    click.option(
        "--outputs",
        metavar="N|all",
        help="Tokens computed at once whose logits are kept. llama-bench keeps all, and so "
        "did all builds before June 2026. [default: one a sequence, or 4 as llama-server]",
    ),
    click.option(
        "--kv-type",
        default="f16",
        show_default=True,
        metavar="TYPE",
        help="Type of the KV cache: f16, q8_0 or q4_0.",
    ),
    click.option(
        "--flash-attn/--no-flash-attn",
        default=True,
        show_default=True,
        help="Use flash attention, llama.cpp's -fa.",
    ),
    click.option(
        "--era",
        type=click.Choice(("2023", "2024", "2025+")),
        default="2025+",
        show_default=True,
        help="Year that llama.cpp was built in.",
    ),
    click.option(
        "--platform",
        metavar="NAME",
        help="System: windows, linux, linux-headless, macos15 or macos26. "
        "[default: the device's usual one]",
    ),
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the model is stored and run; the command gets `candidate` and `settings`."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    command = click.argument("model")(command)

    @asked_plan_options
    @functools.wraps(command)
    def wrapped(
        model: str,
        choose: Any,
        preset: str | None,
        ctx: int | None,
        batch: int,
        ubatch: int,
        kv_type: str,
        flash_attn: bool,
        era: str,
        parallel: int | None,
        outputs: str | None,
        **rest: Any,
    ) -> Any:
        from dus_edge.jobs.predict import find_candidate
        from dus_edge.predict.fit import choose_preset
        from dus_edge.predict.prediction import (
            memory_settings,
        )

        quiet = functools.partial(click.echo, err=True)
        chosen = choose_preset(preset) if preset else None
        candidate = find_candidate(model, choose, chosen, quiet)
        settings = memory_settings(
            candidate.model,
            context=ctx,
            batch=batch,
            ubatch=ubatch,
            kv_type=kv_type,
            flash_attn=flash_attn,
            era=era,
            parallel=parallel,
            outputs=outputs,
        )
        return command(candidate=candidate, settings=settings, **rest)

    return wrapped


@click.command("devices")
@json_option
def devices_command(as_json: bool) -> None:
    """List the devices that are known, as --device takes them."""
    from dus_edge.predict.devices import load_devices
    from dus_edge.predict.report import device_json, device_table

    known = load_devices()
    if as_json:
        click.echo(json.dumps([device_json(d) for d in known]))
        return
    click.echo(device_table(known))


@click.command("fit")
@training_options
@model_options
@click.option(
    "--device",
    metavar="ID",
    help="Device that `dus-edge devices` lists, or auto. [default: list all that run it]",
)
@click.option(
    "--memory",
    "memory_gb",
    type=float,
    metavar="GB",
    help="Memory of a device that is made with several sizes.",
)
@json_option
def fit_command(
    candidate: Any,
    settings: Any,
    device: str | None,
    memory_gb: float | None,
    platform: str | None,
    as_json: bool,
) -> None:
    """Does MODEL fit a device, and if not, what would?

    MODEL is a GGUF file, a folder (config.json is enough; also GPTQ's and
    bitsandbytes'), a hub id or pico. Without --device: which devices run it.
    With --train: memory, time and disk of training it there.
    """
    from dus_edge.predict import report
    from dus_edge.predict.prediction import (
        choose_device,
        predict_on,
        where_it_runs,
    )

    if device is None:
        found = where_it_runs(candidate, settings, platform)
        if as_json:
            click.echo(json.dumps(report.where_json(found)))
            return
        click.echo(report.runs_table(candidate.model.name, settings, found))
        return
    found = predict_on(
        candidate,
        choose_device(device),
        settings,
        platform=platform,
        memory_gb=memory_gb,
    )
    click.echo(json.dumps(report.answer_json(found)) if as_json else report.fit_text(found))
