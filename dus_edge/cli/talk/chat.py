"""The command chat."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dus_edge.cli.options import model_options


@click.command("chat")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Answer this alone and leave; - reads it all.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--temp",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Temperature; 0 takes the likeliest token. [default: 0.8]",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="X",
    help="Choose among the likeliest tokens that share this probability. [default: 0.95]",
)
@click.option(
    "--seed", type=int, metavar="N", help="Seed of the choice. [default: another each time]"
)
@click.option(
    "--max-tokens",
    "n_most",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cut an answer there. [default: the rest of the context]",
)
@model_options
def chat_command(
    file: Path,
    prompt: str | None,
    system: str | None,
    temp: float | None,
    top_p: float | None,
    seed: int | None,
    n_most: int | None,
    n_ctx: int | None,
    n_threads: int | None,
    device: str,
) -> None:
    """Talk with FILE in the terminal.

    FILE is a GGUF, or a folder: plain, GPTQ or bitsandbytes. Its own chat
    template makes the prompts. /help lists what can be typed. Piped in, each
    line is a message. Answers go to standard output, the rest to standard error.
    """
    from dus_edge.chat.engine import TEMPERATURE, TOP_P, Sampling
    from dus_edge.chat.open import open_chat
    from dus_edge.chat.session import Conversation
    from dus_edge.chat.terminal import answer_once, say, talk

    sampling = Sampling(
        TEMPERATURE if temp is None else temp, TOP_P if top_p is None else top_p, seed
    )
    engine, notes = open_chat(file, n_ctx, n_threads, device)
    with engine:
        for note in notes:
            say(f"note: {note}")
        conversation = Conversation(engine, sampling, system, n_most)
        if prompt is not None:
            answer_once(conversation, sys.stdin.read().strip() if prompt == "-" else prompt)
            return
        interactive = sys.stdin.isatty()
        if interactive:
            say(f"{engine.name}, a context of {engine.n_ctx:,} tokens; /help lists what there is.")
        if talk(conversation, sys.stdin, interactive) and not interactive:
            raise SystemExit(1)
