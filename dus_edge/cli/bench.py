"""The group bench: predict, run, tables."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.devices import model_options
from dus_edge.cli.options import json_option


@click.group("bench")
def bench_command() -> None:
    """Measure on this machine, predict for others."""


@bench_command.command("predict")
@model_options
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
@json_option
def bench_predict(
    candidate: Any,
    settings: Any,
    device: str,
    memory_gb: float | None,
    platform: str | None,
    depth: int,
    as_json: bool,
) -> None:
    """Predict memory and tokens per second of MODEL on a device."""
    from dus_edge.predict import report
    from dus_edge.predict.prediction import (
        choose_device,
        predict_on,
    )

    found = predict_on(
        candidate,
        choose_device(device),
        settings,
        depth=depth,
        platform=platform,
        memory_gb=memory_gb,
    )
    click.echo(json.dumps(report.answer_json(found)) if as_json else report.prediction_text(found))


@bench_command.command("run")
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
def bench_run_command(
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
    from dus_edge.measure import record
    from dus_edge.measure.bench import bench_run
    from dus_edge.measure.measurement import json_lines
    from dus_edge.measure.speed_table import speed_table
    from dus_edge.measure.workload import BenchSettings
    from dus_edge.words import wrap

    try:
        at = tuple(int(d) for d in depths.split(","))
    except ValueError:
        raise UsageError(f"--depth {depths}: give numbers of tokens, such as 0,4096.") from None
    if not models and not ollama:
        raise UsageError("Give a GGUF file or folder to measure, or --ollama NAME.")
    settings = BenchSettings(depths=at, **options)
    if out is not None:
        record.check_record(out, ollama=bool(ollama))
    found = bench_run([Path(m) for m in models], settings) if models else []

    def warn(line: str) -> None:
        click.echo(wrap(f"warning: {line}", rest="  "), err=True)

    for name in ollama:
        from dus_edge.measure.ollama import measure_ollama

        found += measure_ollama(name, settings, warn=warn)
    if out is not None:
        record.append_record(out, found)
    click.echo(json_lines(found) if as_json else speed_table(found), nl=not as_json)


@bench_command.command("tables")
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
def bench_tables(
    out: Path, measured: tuple[Path, ...], quality: tuple[Path, ...], overwrite: bool
) -> None:
    """Predict SOLAR 10.7B on every known device; add what was measured.

    Writes tables for people (TABLES.md) and programs, and a page to pick from.
    """
    from dus_edge.predict.devices import load_devices
    from dus_edge.progress import progress
    from dus_edge.tables import page
    from dus_edge.tables.write import write_tables

    n_rows = sum(len(d.memory_gb_options) for d in load_devices())
    with progress("Predicting", 2 * n_rows, unit="devices") as advance:
        also = {page.PAGE_FILE: functools.partial(page.render_page, advance=advance)}
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
