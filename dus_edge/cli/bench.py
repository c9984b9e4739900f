"""The group bench: all, predict, run, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.devices import model_options
from dus_edge.cli.options import json_option, plan_options
from dus_edge.cli.say import say_to


@click.group("bench")
def bench_command() -> None:
    """Measure on this machine, predict for others."""


@bench_command.command("predict")
@model_options
@click.option(
    "--device",
    metavar="ID",
    required=True,
    help="Device that `dus-edge devices` lists, or auto for this one.",
)
@click.option(
    "--memory",
    "memory_gb",
    type=float,
    metavar="GB",
    help="Memory of a device that is made with several sizes.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Tokens that are in the cache before.",
)
@click.option(
    "--host",
    metavar="CPU",
    help="Processor that runs layers which do not fit, such as cpu-ddr4-3200. "
    "[default: one of 47 GB/s]",
)
@json_option
def bench_predict(
    candidate: Any,
    settings: Any,
    device: str,
    memory_gb: float | None,
    platform: str | None,
    depth: int,
    host: str | None,
    as_json: bool,
) -> None:
    """Predict memory and tokens per second of MODEL on a device."""
    from dus_edge.predict import report
    from dus_edge.predict.prediction import (
        choose_device,
        predict_on,
    )
    from dus_edge.predict.processors import find_processor

    found = predict_on(
        candidate,
        choose_device(device),
        settings,
        depth=depth,
        platform=platform,
        memory_gb=memory_gb,
        host=find_processor(host) if host else None,
    )
    click.echo(json.dumps(report.answer_json(found)) if as_json else report.prediction_text(found))


@bench_command.command("run")
@click.argument("models", nargs=-1, metavar="FILE...")
@click.option(
    "--ollama", multiple=True, metavar="NAME", help="Measure this model of the running Ollama."
)
@click.option(
    "-p", "n_prompt", type=int, default=512, show_default=True, help="Tokens of the prompt."
)
@click.option("-n", "n_gen", type=int, default=128, show_default=True, help="Tokens to generate.")
@click.option(
    "-r", "repetitions", type=int, default=5, show_default=True, help="Number of repetitions."
)
@click.option(
    "--depth",
    "depths",
    default="0",
    show_default=True,
    help="Tokens that are in the cache before, such as 0,4096.",
)
@click.option(
    "-t",
    "--threads",
    "n_threads",
    type=int,
    metavar="N",
    help="Number of CPU threads. [default: physical cores]",
)
@click.option(
    "-ngl", "n_gpu_layers", type=int, default=-1, help="Layers on the GPU. [default: all]"
)
@click.option(
    "-fa",
    "flash_attn",
    type=click.Choice(("auto", "on", "off")),
    default="auto",
    show_default=True,
    help="Use flash attention.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="JSONL",
    help="Add the results to this file too, a line each, with this machine's facts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print lines of JSON instead.")
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
    help="Folder to write TABLES.md, tables.csv, tables.json and index.html to.",
)
@click.option(
    "--measured",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="JSONL",
    help="File that `bench run -o` wrote; repeat it for several. "
    "[default: DIR/results/measured.jsonl, if there]",
)
@click.option(
    "--quality",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="File that `dus-edge quality -o` wrote; repeat it for several. "
    "[default: DIR/results/quality.json, if there]",
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="File that `dus-edge eval -o` wrote; repeat it for several. "
    "[default: DIR/results/eval.json, if there]",
)
@click.option(
    "--divergence",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="JSONL",
    help="File that benchmarks/bench_divergence.py wrote; repeat it for several. "
    "[default: DIR/results/divergence.jsonl, if there]",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
def bench_tables(
    out: Path,
    measured: tuple[Path, ...],
    quality: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    divergence: tuple[Path, ...],
    overwrite: bool,
) -> None:
    """Predict SOLAR 10.7B on every known device; add what was measured.

    Writes tables for people (TABLES.md) and programs, and a page to pick from.
    """
    from dus_edge.tables.page import write_bench_tables

    sources = {"measured": measured, "quality": quality, "evaluations": evaluations}
    sources["divergence"] = divergence
    for path in write_bench_tables(out, overwrite=overwrite, **sources):
        click.echo(path)


@bench_command.command("all")
@click.argument("base")
@plan_options
@click.option(
    "--bits",
    type=click.Choice(("", "2", "3", "4", "8")),
    default="4",
    show_default=True,
    metavar="N",
    help="Bits of the GPTQ model: 2, 3, 4 or 8; empty for none.",
)
@click.option("--no-gptq", is_flag=True, help="Leave the GPTQ model out.")
@click.option(
    "--group-size",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help="Columns of GPTQ that share a scale: 32, 64, 128, or -1 for a whole row.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Calibrate GPTQ on this text; repeat it for several. [default: built in]",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default="build/bench",
    show_default=True,
    metavar="DIR",
    help="Folder to write the models to.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default="benchmarks/results",
    show_default=True,
    metavar="DIR",
    help="Folder for measured.jsonl and quality.json; the tables go into its parent.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace models, quality.json and tables that exist."
)
@json_option
def bench_all_command(
    base: str,
    choose: Any,
    bits: str,
    no_gptq: bool,
    group_size: int,
    texts: tuple[Path, ...],
    out: Path,
    results: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make BASE's usual files, measure them here, and write the tables.

    The files are F16, Q8_0, Q4_K_M, Q4_0 and GPTQ, each measured in a process of
    its own and compared with F16: pico on Python that it was not trained on,
    others on the built-in evaluation text.
    """
    from dus_edge.jobs.bench_all import bench_all
    from dus_edge.jobs.export.calibration import TextChoice
    from dus_edge.quant.gptq_format import GPTQSettings

    settings = GPTQSettings(bits=int(bits or 4), group_size=group_size)
    done = bench_all(
        base,
        choose,
        out,
        results,
        gptq=None if no_gptq or not bits else settings,
        text=TextChoice(texts),
        overwrite=overwrite,
        say=say_to(as_json),
    )
    written = [done.measured, done.quality, *done.tables]
    if as_json:
        found = {"models": [*map(str, done.models)], "written": [*map(str, written)]}
        click.echo(json.dumps(found))
        return
    for path in written:
        click.echo(path)
