"""The command seam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import calibrating, json_option, plan_options
from dus_edge.cli.say import say_to


@click.command("seam")
@click.argument("base")
@plan_options
@calibrating(16)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write seam.md, .json, .png and .svg to this folder too.",
)
@click.option("--plots/--no-plots", default=True, help="Draw the map of angles, or do not.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@json_option
def seam_command(
    base: str,
    choose: Any,
    text: Any,
    machine: Any,
    out: Path | None,
    plots: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Show what a plan's seams do to the stream of BASE's layers.

    BASE runs over text once, layer by layer; no up-scaled model is built. What
    each layer does to the stream and which are outliers, the angle across each
    seam, and the best block to repeat for each size.
    """
    from dus_edge.jobs.grow.outputs import GrowOutputs
    from dus_edge.jobs.grow.seam import find_seams
    from dus_edge.tables.grow.seam import seam_page

    outputs = GrowOutputs("seam", out, plots, overwrite)
    results, found, written = find_seams(base, choose, text, machine, outputs, say_to(as_json))
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"\n{seam_page(results)}")
    for path in written:
        click.echo(path)
