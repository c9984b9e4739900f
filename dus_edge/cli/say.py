"""What commands print: lines for people, one JSON line for programs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.talk.next import after_folder, after_gguf, can_chat
from dus_edge.words import counts_text, duration, format_bytes, printable, wrap


def say_to(as_json: bool) -> Callable[[str], None]:
    """What takes a job's lines: on standard error where a program reads standard output."""
    return lambda line: click.echo(printable(line), err=as_json)


def keep_digests(result: Any, asked: bool) -> None:
    """Keep the digests of a job's outputs beside or in them, where that was asked for."""
    if not asked:
        return
    from dus_edge.verify.digest import files_of, write_digests

    write_digests(files_of([output.path for output in result.outputs]))


def print_json(result: Any, **more: Any) -> None:
    from dus_edge.jobs.job import result_json

    click.echo(json.dumps(result_json(result) | more))


def print_notes(result: Any) -> None:
    for note in result.notes:
        click.echo(wrap(f"note: {note}", rest="  "))


def print_next(result: Any, commands: Sequence[str]) -> None:
    """Say that a job is done, and where its result goes next."""
    click.echo(f"Done in {duration(result.seconds)}. Next:")
    for command in commands:
        click.echo(f"  {command}")


def print_folder(
    result: Any,
    out: Path,
    as_json: bool,
    verbose: bool = False,
    *,
    plain: bool = True,
    commands: Sequence[str] = (),
) -> None:
    """Say what a job that wrote a checkpoint folder did.

    Args:
        result: of the job.
        out: the folder.
        as_json: print JSON instead.
        verbose: say which types the tensors have.
        plain: whether nothing is quantized in it.
        commands: where it goes next; none: the usual ones.
    """
    if as_json:
        print_json(result)
        return
    output = result.outputs[0]
    bits = 8 * output.nbytes / result.model.n_parameters
    click.echo(f"{out}\n  {format_bytes(output.nbytes)}, {bits:.2f} bits per weight")
    if verbose:
        click.echo(f"  tensors: {counts_text(output.types)}")
    print_notes(result)
    print_next(result, commands or after_folder(out, plain=plain))


def print_gguf(result: Any, alias: str | None, as_json: bool, verbose: bool, **more: Any) -> None:
    """Say what a job that wrote GGUF files did; `more` are facts for programs."""
    model = alias or result.model.name.stem.lower()
    if as_json:
        command = _create(model, result.outputs[-1].modelfile)
        print_json(result, **more, command=command)
        return
    for output in result.outputs:
        bits = 8 * output.nbytes / result.model.n_parameters
        click.echo(f"{output.path}")
        click.echo(f"  {format_bytes(output.nbytes)}, {bits:.2f} bits per weight")
        if verbose:
            click.echo(f"  tensors: {counts_text(output.types)}")
    print_notes(result)
    # The name alone is the last, as the link is.
    last = result.outputs[-1]
    creates = [
        _create(model + ("" if output is last else f":{output.preset}"), output.modelfile)
        for output in result.outputs
    ]
    print_next(result, after_gguf(last.path, creates, _chats(result.model)))


def _chats(model: Any) -> bool:
    """Whether a model has a chat template."""
    if model.source.gguf is not None:
        return model.source.gguf.text("tokenizer.chat_template") is not None
    return can_chat(model.source.folder)


def _create(name: str, modelfile: Path) -> str:
    """The command that makes an Ollama model, to be pasted into a shell."""
    return f"ollama create {shlex.quote(name)} -f {shlex.quote(str(modelfile))}"
