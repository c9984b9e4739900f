"""The command completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

#: The variable by which the shell's script asks the program for words; click's name for it.
COMPLETE_VARIABLE = "_DUS_EDGE_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script that completes dus-edge's words in a shell.

    \b
    bash: eval "$(dus-edge completion bash)" in ~/.bashrc
    zsh:  eval "$(dus-edge completion zsh)" in ~/.zshrc
    fish: dus-edge completion fish > ~/.config/fish/completions/dus-edge.fish
    """
    completer = get_completion_class(shell)
    assert completer is not None  # click has these three
    root = context.find_root().command
    click.echo(completer(root, {}, "dus-edge", COMPLETE_VARIABLE).source())
