"""The command sensitivity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import adapter_option, calibrating, json_option, plan_options
from dus_edge.cli.say import print_json, say_to
from dus_edge.quant.choose import DEFAULT, QUANTIZERS
from dus_edge.words import duration, format_bytes

#: Chunks of text that are enough; see docs/calibration.md.
DEFAULT_CHUNKS = 16


@click.command("sensitivity")
@click.argument("base")
@plan_options
@adapter_option
@calibrating(DEFAULT_CHUNKS)
@click.option(
    "--imatrix",
    metavar="FILE|auto",
    help="Assume tensors quantized with this importance matrix, or with that of the text.",
)
@click.option(
    "--quantizer",
    type=click.Choice(QUANTIZERS),
    default=DEFAULT,
    show_default=True,
    help="Assume tensors quantized with this program, or with llama.cpp's ggml.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="File to write the sensitivities to, such as sensitivity.json.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@json_option
def sensitivity_command(
    base: str,
    choose: Any,
    text: Any,
    machine: Any,
    imatrix: str | None,
    quantizer: str,
    out: Path,
    adapter: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Estimate what storing each tensor of BASE in each type costs.

    The cost is the divergence from BASE, up-scaled, in nats per token. Text runs
    forward once and gradients run back, layer by layer, so the model need not
    fit into memory; a run that is cut short goes on where it was.
    """
    from dus_edge.jobs.export.sensitivity import AssumedStorage, export_sensitivity

    result = export_sensitivity(
        base,
        choose,
        out,
        text,
        machine,
        AssumedStorage(imatrix, quantizer),
        adapter=adapter,
        overwrite=overwrite,
        say=say_to(as_json),
    )
    if result is None:  # the first process speaks
        return
    if as_json:
        print_json(result)
        return
    output = result.outputs[0]
    click.echo(f"{out}\n  {format_bytes(output.nbytes)}, {output.types['tensors']} tensors")
    click.echo(f"Done in {duration(result.seconds)}.")
