"""The command sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import calibrating, json_option
from dus_edge.cli.say import say_to
from dus_edge.errors import UsageError


@click.command("sweep")
@click.argument("base")
@click.option(
    "--m",
    "drops",
    metavar="LIST",
    help="SOLAR's plans with these m, such as 2,4,8 or 1:9. [default: all m, unless --sizes or "
    "--plan says what to run]",
)
@click.option(
    "--sizes", metavar="LIST", help="Every block of so many layers, run twice: 12 or 8,12,16."
)
@click.option(
    "--blocks", is_flag=True, help="Every block of the sizes that the m's add: n - 2m layers."
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Take each K-th start of blocks.",
)
@click.option(
    "--plan",
    "plans",
    multiple=True,
    metavar="RANGES",
    help="This plan too, such as 0:24,8:32, or a .toml or .json file; repeat it for several.",
)
@click.option(
    "--branch-scale",
    "scales",
    default="1",
    show_default=True,
    metavar="LIST",
    help="Each plan with o_proj and down_proj of its copies times these: 0,0.5,1.",
)
@click.option(
    "--place",
    "places",
    default="stacked",
    show_default=True,
    metavar="LIST",
    help="Each plan with its copies stacked, interleaved, or both.",
)
@click.option(
    "--method",
    "methods",
    default="copy",
    show_default=True,
    metavar="LIST",
    help="Each plan with copies made by copy, averaged, or both.",
)
@click.option("-q", "--quant", default="q4_k_m", show_default=True, help="Preset of files.")
@click.option(
    "--device",
    metavar="ID",
    help="Predict memory and speed there: an id of `dus-edge devices`, or auto.",
)
@click.option(
    "--at", "context", type=int, metavar="N", help="Context of the prediction. [default: 4096]"
)
@click.option(
    "--heal",
    "n_steps",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Then train each plan so many steps as `dus-edge heal` does, and compare again.",
)
@click.option(
    "--heal-text",
    "heal_texts",
    multiple=True,
    metavar="TEXT",
    help="What is trained and measured on: as heal's --text. [default: that of --text]",
)
@click.option(
    "--train", "mode", default="all", show_default=True, metavar="MODE", help="As heal's --train."
)
@click.option("--lr", "rate", type=float, metavar="X", help="As heal's --lr. [default: by mode]")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Windows of --ctx tokens in a step of --heal.",
)
@click.option(
    "--seeds",
    "n_seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Train each plan with N draws of the text.",
)
@click.option(
    "--heldout-tokens",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Tokens of the text of --heal that are measured on and not trained on.",
)
@calibrating(16, "--compute")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write sweep.md, .json, .csv, .png and .svg to this folder, and go on from there "
    "after an interruption.",
)
@click.option("--plots/--no-plots", default=True, help="Draw losses, or do not.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@json_option
def sweep_command(
    base: str,
    drops: str | None,
    sizes: str | None,
    blocks: bool,
    every: int,
    plans: tuple[str, ...],
    scales: str,
    places: str,
    methods: str,
    quant: str,
    device: str | None,
    context: int | None,
    n_steps: int | None,
    heal_texts: tuple[str, ...],
    mode: str,
    rate: float | None,
    batch: int,
    n_seeds: int,
    heldout_tokens: int,
    text: Any,
    machine: Any,
    out: Path | None,
    plots: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compare plans for BASE before any training.

    Which layers to repeat, and how? All plans run at once, layer by layer; what
    they share is computed once, and no up-scaled model is built. Of each: the loss
    above the base's with an interval, KL, layers, size, and memory and speed on a
    device.
    """
    from dus_edge.jobs.grow.outputs import GrowOutputs
    from dus_edge.jobs.grow.sweep import PlannedUse, sweep_plans
    from dus_edge.tables.grow.sweep import brief_sweep_page
    from dus_edge.upscale.candidates import SweepChoice, parse_numbers
    from dus_edge.upscale.methods import parse_scale

    asked = SweepChoice(
        drops=None if drops is None else parse_numbers(drops, "--m"),
        sizes=() if sizes is None else parse_numbers(sizes, "--sizes"),
        blocks=blocks,
        every=every,
        plans=plans,
        scales=tuple(parse_scale(part.strip()) for part in scales.split(",")),
        places=tuple(part.strip() for part in places.split(",")),
        methods=tuple(part.strip() for part in methods.split(",")),
    )
    outputs = GrowOutputs("sweep", out, plots, overwrite, ("md", "json", "csv"))
    use = PlannedUse(quant, device, context)
    healing = None
    if n_steps is not None:
        healing = _healing(
            heal_texts,
            n_seeds,
            text,
            machine,
            {
                "mode": mode,
                "steps": n_steps,
                "rate": rate,
                "batch": batch,
                "heldout_tokens": heldout_tokens,
                "evaluate": n_steps,
            },
        )
    results, found, written = sweep_plans(
        base, asked, text, machine, use, outputs, say_to(as_json), healing
    )
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"\n{brief_sweep_page(results)}")
    for path in written:
        click.echo(path)


def _healing(
    heal_texts: tuple[str, ...], n_seeds: int, text: Any, machine: Any, given: dict[str, Any]
) -> Any:
    from dus_edge.jobs.grow.healing import ShortHealing
    from dus_edge.text.chunks import DEFAULT_N_CTX
    from dus_edge.train.heal.mode import parse_mode
    from dus_edge.train.recovery.options import HealOptions, text_part

    named = heal_texts or tuple(map(str, text.paths))
    if not named:
        raise UsageError("--heal trains on text of yours: name it by --heal-text, or --text.")
    from dus_edge.calibrate.world import pick_device

    device = pick_device(machine.device)
    options = HealOptions(
        texts=tuple(map(text_part, named)),
        field=text.field,
        length=text.n_ctx or DEFAULT_N_CTX,
        seed=text.seed,
        device=device,
        dtype=machine.dtype or ("bfloat16" if device == "cuda" else "float32"),
        checkpointing=device == "cuda",
        **(given | {"mode": parse_mode(given["mode"])}),
    )
    return ShortHealing(options, n_seeds)
