"""The command that merges an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import digest_option, folder_option, output_options
from dus_edge.cli.say import keep_digests, print_folder, say_to


@click.command("merge")
@click.argument("base")
@click.argument("adapter", type=click.Path(path_type=Path))
@folder_option
@output_options
@digest_option
def merge_command(
    base: str,
    adapter: Path,
    out: Path,
    as_json: bool,
    verbose: bool,
    digest: bool,
    **writing: Any,
) -> None:
    """Merge a LoRA ADAPTER into BASE, a checkpoint like any other.

    ADAPTER is a folder as peft and trl write it. Weights stream through: the
    model need not fit into memory. The result is what peft's merge_and_unload
    gives, bit for bit.
    """
    from dus_edge.jobs.export.merge import export_merged

    result = export_merged(base, adapter, out, say=say_to(as_json), **writing)
    keep_digests(result, digest)
    print_folder(result, out, as_json, verbose)
