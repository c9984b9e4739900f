"""The command serve."""

from __future__ import annotations

from pathlib import Path

import click

from dus_edge.cli.options import model_options
from dus_edge.words import printable


@click.command("serve")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="HOST", help="Address to listen on."
)
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 takes one that is free.",
)
@click.option(
    "--api-key",
    "key",
    envvar="DUS_EDGE_API_KEY",
    metavar="KEY",
    help="Ask clients for this key. [default: DUS_EDGE_API_KEY, if it is set]",
)
@click.option("--alias", metavar="NAME", help="Name of the model. [default: the file's]")
@model_options
def serve_command(
    file: Path,
    host: str,
    port: int,
    key: str | None,
    alias: str | None,
    n_ctx: int | None,
    n_threads: int | None,
    device: str,
) -> None:
    """Serve FILE by the OpenAI API.

    FILE is a GGUF, served by llama-cpp-python, or a folder (plain, GPTQ or
    bitsandbytes), served by transformers: /v1/chat/completions, /v1/completions
    and /v1/models. Only this machine can reach it unless --host says otherwise.
    """
    from dus_edge.chat.serve.run import Serving, serve

    how = Serving(host, port, key or None, alias, n_ctx, n_threads, device)
    serve(file, how, lambda line: click.echo(printable(line)))
