"""The command verify."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from dus_edge.cli.options import json_option


@click.command("verify")
@click.argument(
    "paths", nargs=-1, required=True, metavar="FILE|DIR...", type=click.Path(path_type=Path)
)
@click.option(
    "--digests",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compare with the digests in this file of sha256sum. "
    "[default: SHA256SUMS beside or in each, if there]",
)
@json_option
def verify_command(paths: tuple[Path, ...], digests: Path | None, as_json: bool) -> None:
    """Read finished models whole and say whether they are sound.

    FILE is a GGUF file, DIR a checkpoint: plain, GPTQ or bitsandbytes. Structure,
    sizes, finite values and, where one was kept, the digest are checked. The exit
    code is 0 if all are sound and 3 if one is not.
    """
    from dus_edge.errors import CheckpointError
    from dus_edge.verify.verify import verify
    from dus_edge.words import counts_text, format_bytes

    found = verify(list(paths), digests)
    for result in found:
        if as_json:
            line = {"path": str(result.path), "sound": result.problem is None}
            more = {"problem": result.problem, "digests": result.n_digests, **result.facts}
            click.echo(json.dumps(line | more))
        elif result.problem is not None:
            click.echo(f"damaged: {result.problem}")
        else:
            facts = result.facts
            what = f"{facts['n_tensors']:,} tensors, {format_bytes(facts['bytes'])}"
            if "types" in facts:
                what += f": {counts_text(facts['types'])}"
            click.echo(f"sound: {result.path}\n  {what}")
            if result.n_digests:
                click.echo(f"  digests agree: {result.n_digests}")
    if any(result.problem is not None for result in found):
        sys.exit(CheckpointError.exit_code)
