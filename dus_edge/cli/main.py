"""The command line: finds a command, runs it, turns errors into one sentence and an exit code.

A command's module is imported when that command is called, so that `--help` is instant however
many there are; `COMMANDS` has what the list says of each, and a test holds it to the commands' own
words.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys

import click

from dus_edge import __version__
from dus_edge.cli.streams import make_patient
from dus_edge.errors import DusEdgeError
from dus_edge.words import printable

INTERRUPTED = 130  # what shells report for Ctrl-C

#: Every command: the module of `dus_edge.cli` that has it, and the first sentence of its help.
COMMANDS: dict[str, tuple[str, str]] = {
    "bench": ("bench", "Measure on this machine, predict for others."),
    "bnb": ("export", "Up-scale BASE into a bitsandbytes checkpoint."),
    "chat": ("talk.chat", "Talk with FILE in the terminal."),
    "completion": ("completion", "Print the script that completes dus-edge's words in a shell."),
    "dpo": ("train.tune", "Tune MODEL on pairs of answers (DPO)."),
    "devices": ("devices", "List the devices that are known, as --device takes them."),
    "eval": ("scores.evaluate", "Ask models the tasks that people quote."),
    "fit": ("devices", "Does MODEL fit a device, and if not, what would?"),
    "gguf": ("export", "Up-scale BASE into GGUF files and their Modelfiles."),
    "gptq": ("export", "Up-scale BASE into a GPTQ checkpoint."),
    "heal": ("train.heal", "Up-scale BASE and train it on text until it is whole again."),
    "imatrix": ("export", "Collect the importance matrix of BASE, up-scaled, from text."),
    "inspect": ("models", "Show MODEL's shape, plan and the size of every preset."),
    "merge": ("export", "Merge a LoRA ADAPTER into BASE, a checkpoint like any other."),
    "mlx": ("export", "Up-scale BASE into a quantized folder for MLX, on Macs."),
    "modelfile": ("models", "Write the Modelfile of a GGUF file or a checkpoint."),
    "quality": ("scores.quality", "Measure how far each CANDIDATE is from REFERENCE on text."),
    "seam": ("grow.seam", "Show what a plan's seams do to the stream of BASE's layers."),
    "sensitivity": (
        "quants.sensitivity",
        "Estimate what storing each tensor of BASE in each type costs.",
    ),
    "serve": ("talk.serve", "Serve FILE by the OpenAI API."),
    "sft": ("train.tune", "Tune MODEL on dialogues."),
    "sweep": ("grow.sweep", "Compare plans for BASE before any training."),
    "verify": ("verify", "Read finished models whole and say whether they are sound."),
    "upscale": ("export", "Up-scale BASE into a checkpoint that transformers loads."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command, imported; None for a name that is not known."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"dus_edge.cli.{COMMANDS[name][0]}")
        return getattr(module, f"{name}_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from `COMMANDS` alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; a name that is nearly one is suggested."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


def main() -> None:
    """Entry point of `dus-edge`: errors become one sentence and an exit code."""
    make_patient()
    for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # What nohup has a process ignore stays ignored.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminated)
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="dus-edge"))
    except DusEdgeError as e:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            import traceback

            traceback.print_exc()
        click.echo(f"dus-edge: {printable(str(e))}", err=True)
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("dus-edge: interrupted; nothing half-written was left behind.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _terminated(signum: int, frame: object) -> None:
    # The same way out as Ctrl-C: partial files are removed on it.
    raise KeyboardInterrupt


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(__version__, prog_name="dus-edge")
def cli() -> None:
    """Depth up-scale a checkpoint and run it on what you own.

    BASE is a folder, a hub id (org/name or org/name@revision), a GGUF, a model of
    Ollama's (ollama:NAME), or pico, the small model that comes with the program.
    """
