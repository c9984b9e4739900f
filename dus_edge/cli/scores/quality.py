"""The command quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import json_option, text_options, threads_option


def _quality_text(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(text_options("built-in English, Korean and code", 48)):
        command = option(command)
    return command


@click.command("quality")
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE...")
@_quality_text
@click.option("--all-positions", is_flag=True, help="Score the first half of every chunk too.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="Run folders on cpu, cuda or mps.",
)
@threads_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write quality.md, .json, .png and .svg to this folder too.",
)
@click.option("--plots/--no-plots", default=True, help="Draw divergence against size, or do not.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@json_option
def quality_command(
    reference: str,
    candidates: tuple[str, ...],
    paths: tuple[Path, ...],
    out: Path | None,
    plots: bool,
    overwrite: bool,
    as_json: bool,
    device: str,
    **measure: Any,
) -> None:
    """Measure how far each CANDIDATE is from REFERENCE on text.

    Both are GGUF files, or folders: plain, GPTQ or bitsandbytes. Perplexity,
    divergence (KL) of the next token, share of equal first choices, by
    language; bits per weight and file size; what each file says that it is, and
    whether none as large or smaller diverges less (the frontier).
    """
    from dus_edge.quality import report as quality_report
    from dus_edge.quality.compare import quality as run
    from dus_edge.text.chunks import DEFAULT_N_CTX

    if out is not None:
        quality_report.check_report_outputs(out, plots=plots, overwrite=overwrite)
    measure["n_ctx"] = measure["n_ctx"] or DEFAULT_N_CTX
    results = run(reference, candidates, texts=paths, device=device, work=out, **measure)
    written = []
    if out is not None:
        written = quality_report.write(results, out, plots=plots, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(quality_report.quality_json(results)))
        return
    click.echo(quality_report.quality_report(results))
    for path in written:
        click.echo(path)
