"""The command eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import asked_plan_options, device_option, json_option, threads_option
from dus_edge.cli.say import say_to
from dus_edge.errors import UsageError


class _Count(click.ParamType):
    """A number of documents, or all."""

    name = "count"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        if value is None or str(value).lower() == "all":
            return None
        try:
            n = int(value)
        except ValueError:
            n = 0
        if n < 1:
            self.fail(f"{value!r} is neither a number from 1 nor all", param, ctx)
        return n


@click.command("eval")
@click.argument("files", nargs=-1, metavar="FILE...")
@click.option(
    "--suite",
    default="h6",
    show_default=True,
    metavar="NAME",
    help="Ask h6, ko, or tasks of lm-evaluation-harness, with commas between.",
)
@click.option(
    "--docs",
    "n_docs",
    type=_Count(),
    default="all",
    show_default=True,
    metavar="N|all",
    help="Ask so many documents of each task, the same for every FILE.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of their draw.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Take the rows from this folder of .jsonl. [default: the hub's, or their cache]",
)
@asked_plan_options
@click.option(
    "--contamination",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="TEXT",
    help="Say how many of the questions stand in this training text instead; repeat it for "
    "several.",
)
@click.option("--field", metavar="NAME", help="Field of its .jsonl rows. [default: text]")
@device_option
@click.option(
    "--cache",
    type=click.Choice(["f32", "f16"]),
    default="f32",
    show_default=True,
    help="Type of keys and values of GGUF files.",
)
@threads_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write eval.md, .json, .png, .svg, the harness's results and all samples here.",
)
@click.option("--plots/--no-plots", default=True, help="Draw scores against size, or do not.")
@click.option("--overwrite", is_flag=True, help="Replace a page that exists.")
@json_option
def eval_command(
    files: tuple[str, ...],
    texts: tuple[Path, ...],
    field: str | None,
    choose: Any,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask models the tasks that people quote.

    FILE is a GGUF file, or a folder: plain, GPTQ or bitsandbytes. The first is
    the reference: the others' differences to it come with 95 % intervals. With
    --drop a plain folder is asked as it is and up-scaled. A run that is cut
    short goes on where it was.
    """
    if texts:
        _overlap(files, texts, field, as_json, options)
        return
    if not files:
        raise UsageError("there is nothing to evaluate; name a GGUF file or a folder.")
    from dus_edge.jobs.evaluate import EvalOptions, evaluate
    from dus_edge.tables.evaluation import evaluation_page, evaluation_table

    results, written = evaluate(files, choose, EvalOptions(**options), say_to(as_json))
    if as_json:
        click.echo(json.dumps(evaluation_table(results)))
        return
    click.echo(evaluation_page(results))
    for path in written:
        click.echo(path)


def _overlap(
    files: tuple[str, ...],
    texts: tuple[Path, ...],
    field: str | None,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    if files:
        raise UsageError("--contamination looks at texts, not at models; leave out FILE.")
    from dus_edge.jobs.evaluate import overlap
    from dus_edge.tables.contamination import overlap_json, overlap_page

    found = overlap(options["suite"], options["data"], texts, field)
    click.echo(json.dumps(overlap_json(found)) if as_json else overlap_page(found))
