"""The commands about devices: what fits, how fast; `dus-edge bench`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dus_edge.options import asked_plan_options


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How the model is stored and run; the command gets `candidate` and `settings`."""
    options = (
        click.option(
            "-q",
            "--quant",
            "preset",
            metavar="PRESET",
            help="Of a checkpoint: a GGUF preset, gptq-int4 (-int8, -int3, -int2), bnb-nf4 or "
            "bnb-int8 [default: q4_k_m].",
        ),
        click.option(
            "--ctx",
            type=int,
            metavar="N",
            help="Tokens of the context [default: 4096, or the model's own].",
        ),
        click.option("--batch", type=int, default=2048, show_default=True, metavar="N"),
        click.option("--ubatch", type=int, default=512, show_default=True, metavar="N"),
        click.option(
            "--kv-type",
            default="f16",
            show_default=True,
            metavar="TYPE",
            help="Of the cache: f16, q8_0 or q4_0.",
        ),
        click.option(
            "--flash-attn/--no-flash-attn", default=True, show_default=True, help="llama.cpp's -fa."
        ),
        click.option(
            "--era",
            type=click.Choice(("2023", "2024", "2025+")),
            default="2025+",
            show_default=True,
            help="When llama.cpp was built.",
        ),
        click.option(
            "--platform",
            metavar="NAME",
            help="windows, linux, linux-headless, macos15 or macos26 "
            "[default: the device's usual one].",
        ),
    )
    for option in reversed(options):
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
        **rest: Any,
    ) -> Any:
        from dus_edge import prediction

        quiet = functools.partial(click.echo, err=True)
        chosen = prediction.choose_preset(preset) if preset else None
        candidate = prediction.find_candidate(model, choose, chosen, quiet)
        settings = prediction.memory_settings(
            candidate.model,
            context=ctx,
            batch=batch,
            ubatch=ubatch,
            kv_type=kv_type,
            flash_attn=flash_attn,
            era=era,
        )
        return command(candidate=candidate, settings=settings, **rest)

    return wrapped


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead.")
def devices(as_json: bool) -> None:
    """List the devices that are known, as --device takes them."""
    from dus_edge.predict.devices import load_devices
    from dus_edge.predict.report import device_json, device_table

    known = load_devices()
    if as_json:
        click.echo(json.dumps([device_json(d) for d in known]))
        return
    click.echo(device_table(known))


@click.command()
@_model_options
@click.option(
    "--device",
    metavar="ID",
    help="One of `dus-edge devices`, or auto [default: every device that runs it].",
)
@click.option(
    "--memory", "memory_gb", type=float, metavar="GB", help="Of a device made with several."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead.")
def fit(
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
    """
    from dus_edge import prediction
    from dus_edge.predict import report

    if device is None:
        found = prediction.where_it_runs(candidate, settings, platform)
        if as_json:
            click.echo(json.dumps([report.verdict_json(v) for v in found]))
            return
        click.echo(report.runs_table(candidate.model.name, settings, found))
        return
    found = prediction.predict_on(
        candidate,
        prediction.choose_device(device),
        settings,
        platform=platform,
        memory_gb=memory_gb,
    )
    click.echo(json.dumps(report.answer_json(found)) if as_json else report.fit_text(found))


@click.group()
def bench() -> None:
    """Measure on this machine, predict for others."""


@bench.command("predict")
@_model_options
@click.option("--device", metavar="ID", required=True, help="One of `dus-edge devices`, or auto.")
@click.option(
    "--memory", "memory_gb", type=float, metavar="GB", help="Of a device made with several."
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens in the cache before.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead.")
def predict(
    candidate: Any,
    settings: Any,
    device: str,
    memory_gb: float | None,
    platform: str | None,
    depth: int,
    as_json: bool,
) -> None:
    """Predict memory and tokens per second of MODEL on a device."""
    from dus_edge import prediction
    from dus_edge.predict import report

    found = prediction.predict_on(
        candidate,
        prediction.choose_device(device),
        settings,
        depth=depth,
        platform=platform,
        memory_gb=memory_gb,
    )
    click.echo(json.dumps(report.answer_json(found)) if as_json else report.prediction_text(found))


@bench.command("run")
@click.argument("models", nargs=-1, metavar="FILE...")
@click.option("--ollama", multiple=True, metavar="NAME", help="A model of the running Ollama.")
@click.option("-p", "n_prompt", type=int, default=512, show_default=True, help="Prompt tokens.")
@click.option("-n", "n_gen", type=int, default=128, show_default=True, help="Generated tokens.")
@click.option("-r", "repetitions", type=int, default=5, show_default=True, help="Repetitions.")
@click.option(
    "--depth", "depths", default="0", show_default=True, help="Tokens in the cache before: 0,4096."
)
@click.option("-t", "--threads", "n_threads", type=int, metavar="N", help="CPU threads.")
@click.option(
    "-ngl", "n_gpu_layers", type=int, default=-1, help="Layers on the GPU [default: all]."
)
@click.option(
    "-fa", "flash_attn", type=click.Choice(("auto", "on", "off")), default="auto", show_default=True
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="JSONL",
    help="Also add the results to this file, a line each, with this machine's facts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead.")
def run(
    models: tuple[str, ...],
    ollama: tuple[str, ...],
    depths: str,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure FILEs on this machine, as llama-bench does.

    FILEs are GGUF files, or folders: plain, GPTQ or bitsandbytes.
    """
    from dus_edge.errors import UsageError
    from dus_edge.measure import measure, record

    try:
        at = tuple(int(d) for d in depths.split(","))
    except ValueError:
        raise UsageError(f"--depth {depths}: give numbers of tokens, such as 0,4096.") from None
    if not models and not ollama:
        raise UsageError("Give a GGUF file or folder to measure, or --ollama NAME.")
    settings = measure.Settings(depths=at, **options)
    if out is not None:
        record.check_record(out, ollama=bool(ollama))
    found = measure.bench_run([Path(m) for m in models], settings) if models else []
    for name in ollama:
        from dus_edge.measure.ollama import measure_ollama

        found += measure_ollama(name, settings)
    if out is not None:
        record.append_record(out, found)
    click.echo(measure.json_lines(found) if as_json else measure.table(found), nl=not as_json)


@bench.command("tables")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default="benchmarks",
    show_default=True,
    metavar="DIR",
    help="Folder for TABLES.md, tables.csv, tables.json and index.html.",
)
@click.option(
    "--measured",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="JSONL",
    help="Of `bench run -o`; may be given several times "
    "[default: DIR/results/measured.jsonl, if there].",
)
@click.option(
    "--quality",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="Of `dus-edge quality -o`; may be given several times "
    "[default: DIR/results/quality.json, if there].",
)
@click.option("--overwrite", is_flag=True, help="Replace them.")
def tables(
    out: Path, measured: tuple[Path, ...], quality: tuple[Path, ...], overwrite: bool
) -> None:
    """Predict SOLAR 10.7B on every known device; add what was measured.

    Writes tables for people (TABLES.md) and programs, and a page to pick from.
    """
    from dus_edge.predict.devices import load_devices
    from dus_edge.progress import progress
    from dus_edge.tables.predicted import page, write_tables

    n_rows = sum(len(d.memory_gb_options) for d in load_devices())
    with progress("Predicting", 2 * n_rows, unit="devices") as advance:
        also = {page.FILE: functools.partial(page.render_page, advance=advance)}
        written = write_tables(
            out,
            overwrite=overwrite,
            measured=measured,
            quality=quality,
            also=also,
            advance=advance,
        )
    for path in written:
        click.echo(path)
