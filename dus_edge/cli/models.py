"""The commands that look at a model: inspect, modelfile."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import json_option, plan_options
from dus_edge.cli.say import say_to
from dus_edge.words import printable


@click.command("inspect")
@click.argument("model")
@plan_options
@json_option
def inspect_command(model: str, choose: Any, as_json: bool) -> None:
    """Show MODEL's shape, plan and the size of every preset.

    No weight is read or fetched; a folder with only config.json will do. Of a
    GGUF, or of a model that Ollama has (ollama:NAME), the header is read.
    """
    from dus_edge.jobs.inspect import inspection, inspection_json
    from dus_edge.upscale.model import find_model

    say = say_to(as_json)
    found = find_model(model, choose, weights=False, say=say, tokenizer="if known")
    click.echo(json.dumps(inspection_json(found)) if as_json else printable(inspection(found)))


@click.command("modelfile")
@click.argument("model", required=False)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write to this file instead of printing.",
)
@click.option(
    "--from",
    "from_path",
    metavar="PATH",
    help="Path that FROM names, relative to the Modelfile. [default: the GGUF]",
)
@click.option(
    "--num-ctx",
    type=click.IntRange(min=4),
    metavar="N",
    help="Highest num_ctx to write. [default: 4096]",
)
@click.option(
    "--tracked",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the project's own modelfiles/ to DIR.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
def modelfile_command(
    model: str | None,
    out: Path | None,
    from_path: str | None,
    num_ctx: int | None,
    tracked: Path | None,
    overwrite: bool,
) -> None:
    """Write the Modelfile of a GGUF file or a checkpoint."""
    from dus_edge.errors import UsageError
    from dus_edge.files import check_absent, check_writable, write_text
    from dus_edge.jobs.modelfile import render_modelfile_of, render_tracked

    if (model is None) == (tracked is None):
        raise UsageError("Give one of MODEL, a GGUF file or a checkpoint, and --tracked DIR.")
    if tracked is not None:
        for path in render_tracked(tracked):
            click.echo(path)
        return
    folder = out.parent if out else Path()
    text = render_modelfile_of(model, folder, from_path, num_ctx, say=say_to(True))
    if out is None:
        click.echo(text, nl=False)
        return
    check_absent([out], overwrite)
    check_writable(out.parent)
    write_text(out, text)
    click.echo(f"ollama create {shlex.quote(out.stem.lower())} -f {shlex.quote(str(out))}")
