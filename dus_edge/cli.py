"""The command line: parses, calls one function of `jobs`, prints.

Nothing heavy is imported here; each command imports what it needs, so that `--help` is instant.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from dus_edge import __version__
from dus_edge.cli_bench import bench, devices, fit
from dus_edge.errors import DusEdgeError
from dus_edge.options import (
    calibration_options,
    folder_option,
    output_options,
    plan_options,
    text_options,
)
from dus_edge.quant.quantizer import DEFAULT, QUANTIZERS

INTERRUPTED = 130  # what shells report for Ctrl-C


def main() -> None:
    """Entry point of `dus-edge`: errors become one sentence and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(cli.main(standalone_mode=False))
    except DusEdgeError as e:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            import traceback

            traceback.print_exc()
        click.echo(f"dus-edge: {e}", err=True)
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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="dus-edge")
def cli() -> None:
    """Depth up-scale a Llama-family checkpoint and run it on what you own.

    BASE is a folder, a hub id (org/name or org/name@revision), or pico, the small
    model that comes with the program.
    """


@cli.command()
@click.argument("base")
@plan_options
@click.option(
    "-q",
    "--quant",
    "presets",
    multiple=True,
    metavar="PRESET",
    default=("q4_k_m",),
    show_default=True,
    help="Preset; may be given several times.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default="build",
    show_default=True,
    metavar="DIR",
    help="Folder for the files.",
)
@click.option(
    "--quantizer",
    type=click.Choice(QUANTIZERS),
    default=DEFAULT,
    show_default=True,
    help="Who makes the blocks: this program, or llama.cpp's ggml (needs dus-edge[llama]).",
)
@click.option(
    "--imatrix",
    metavar="FILE|auto",
    help="Importance matrix: a file in one of llama.cpp's formats, or auto to collect it now.",
)
@calibration_options
@click.option(
    "--alias",
    metavar="NAME",
    help="Also link NAME.gguf and NAME-PRESET.gguf to the "
    "files, for Modelfiles that are the same for every base.",
)
@output_options
def gguf(
    base: str,
    choose: Any,
    presets: tuple[str, ...],
    out: Path,
    quantizer: str,
    imatrix: str | None,
    text: Any,
    machine: Any,
    alias: str | None,
    as_json: bool,
    verbose: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into GGUF files and their Modelfiles."""
    from dus_edge import jobs
    from dus_edge.quant.recipe import find_preset

    chosen = list({p.name: p for p in map(find_preset, presets)}.values())
    source = None
    if imatrix is not None:
        from dus_edge.calibration import imatrix_source

        source = imatrix_source(imatrix, text, machine, out, _say(as_json))
    result = jobs.export_gguf(
        base,
        choose,
        chosen,
        out,
        quantizer=quantizer,
        imatrix=source,
        alias=alias,
        say=_say(as_json),
        **writing,
    )
    model = alias or result.model.name.stem.lower()
    if as_json:
        command = f"ollama create {model} -f {result.outputs[0].modelfile}"
        _print_json(result, quantizer=quantizer, command=command)
        return
    for output in result.outputs:
        bits = 8 * output.nbytes / result.model.n_parameters
        click.echo(f"{output.path}")
        click.echo(f"  {_size(output.nbytes)}, {bits:.2f} bits per weight")
        if verbose:
            click.echo(f"  tensors: {_counts(output.types)}")
    for note in result.notes:
        click.echo(click.wrap_text(f"note: {note}", 80, subsequent_indent="  "))
    click.echo(f"Done in {_seconds(result.seconds)}. Now run it:")
    for i, output in enumerate(result.outputs):
        tag = f":{output.preset}" if i else ""
        click.echo(f"  ollama create {model}{tag} -f {output.modelfile}")


@cli.command()
@click.argument("base")
@plan_options
@folder_option
@output_options
def upscale(
    base: str,
    choose: Any,
    out: Path,
    as_json: bool,
    verbose: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into a checkpoint that transformers loads."""
    from dus_edge import jobs

    result = jobs.export_checkpoint(
        base,
        choose,
        out,
        say=_say(as_json),
        **writing,
    )
    _print_folder(result, out, as_json, verbose)


@cli.command()
@click.argument("base")
@plan_options
@calibration_options
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The importance matrix, e.g. imatrix.gguf.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead.")
def imatrix(
    base: str, choose: Any, text: Any, machine: Any, out: Path, overwrite: bool, as_json: bool
) -> None:
    """Collect the importance matrix of BASE, up-scaled, from text.

    Layers run one after the other, so the model need not fit into memory. For
    `dus-edge gguf --imatrix FILE`, and for llama.cpp's own tools.
    """
    from dus_edge import calibration

    result = calibration.export_imatrix(
        base, choose, out, text, machine, overwrite=overwrite, say=_say(as_json)
    )
    if as_json:
        _print_json(result)
        return
    output = result.outputs[0]
    click.echo(f"{out}\n  {_size(output.nbytes)}, {output.types['matrices']} matrices")
    click.echo(f"Done in {_seconds(result.seconds)}.")


@cli.command()
@click.argument("base")
@plan_options
@click.option(
    "--bits",
    type=click.Choice(("2", "3", "4", "8")),
    default="4",
    show_default=True,
    help="Bits of a code.",
)
@click.option(
    "--group-size",
    type=int,
    default=128,
    show_default=True,
    metavar="N",
    help="Columns that share a scale: 32, 64, 128, or -1 for a whole row.",
)
@click.option(
    "--desc-act",
    is_flag=True,
    help="Columns in order of their activations, groups too: better, slower to run.",
)
@click.option(
    "--sym/--asym",
    default=True,
    show_default=True,
    help="Without or with a zero point for each group.",
)
@click.option(
    "--damp",
    type=click.FloatRange(min=0, min_open=True),
    default=0.01,
    show_default=True,
    metavar="X",
    help="Share of the mean diagonal added to the Hessian.",
)
@calibration_options
@folder_option
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that write [default: all].",
)
@click.option("--overwrite", is_flag=True, help="Replace DIR if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead.")
def gptq(
    base: str,
    choose: Any,
    bits: str,
    group_size: int,
    desc_act: bool,
    sym: bool,
    damp: float,
    text: Any,
    machine: Any,
    out: Path,
    as_json: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into a GPTQ checkpoint.

    Layers are quantized one after the other, so the model need not fit into
    memory; a run that is cut short goes on where it was.
    """
    from dus_edge import calibration
    from dus_edge.quant.gptq_format import Settings

    settings = Settings(
        bits=int(bits), group_size=group_size, sym=sym, desc_act=desc_act, damp=damp
    )
    result = calibration.export_gptq(
        base,
        choose,
        out,
        settings,
        text,
        machine,
        say=_say(as_json),
        **writing,
    )
    _print_folder(result, out, as_json)


@cli.command()
@click.argument("base")
@plan_options
@click.option(
    "--nf4", "scheme", flag_value="nf4", default="nf4", help="4-bit normal float, the default."
)
@click.option("--int8", "scheme", flag_value="int8", help="LLM.int8().")
@click.option(
    "--double-quant/--no-double-quant", default=True, help="Of nf4: quantize the scales too."
)
@folder_option
@output_options
def bnb(
    base: str,
    choose: Any,
    scheme: str,
    double_quant: bool,
    out: Path,
    as_json: bool,
    verbose: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into a bitsandbytes checkpoint.

    transformers loads it, and QLoRA trains on it. Weights stream through: the
    model need not fit into memory.
    """
    from dus_edge import jobs

    result = jobs.export_bnb(
        base,
        choose,
        out,
        scheme,
        double_quant=double_quant,
        say=_say(as_json),
        **writing,
    )
    _print_folder(result, out, as_json, verbose)


def _print_folder(result: Any, out: Path, as_json: bool, verbose: bool = False) -> None:
    """Say what a job that wrote a checkpoint folder did."""
    if as_json:
        _print_json(result)
        return
    output = result.outputs[0]
    bits = 8 * output.nbytes / result.model.n_parameters
    click.echo(f"{out}\n  {_size(output.nbytes)}, {bits:.2f} bits per weight")
    if verbose:
        click.echo(f"  tensors: {_counts(output.types)}")
    for note in result.notes:
        click.echo(click.wrap_text(f"note: {note}", 80, subsequent_indent="  "))
    click.echo(f"Done in {_seconds(result.seconds)}.")


def _quality_text(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(text_options("built-in English, Korean and code", 48)):
        command = option(command)
    return command


@cli.command()
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE...")
@_quality_text
@click.option("--all-positions", is_flag=True, help="Score the first half of every chunk too.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="DEVICE",
    help="Where folders run: cpu, cuda or mps.",
)
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads [default: all cores].",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write quality.md, .json, .png and .svg there.",
)
@click.option("--plots/--no-plots", default=True, help="Draw divergence against size.")
@click.option("--overwrite", is_flag=True, help="Replace these files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead.")
def quality(
    reference: str,
    candidates: tuple[str, ...],
    paths: tuple[Path, ...],
    out: Path | None,
    plots: bool,
    overwrite: bool,
    as_json: bool,
    device: str,
    **measure: Any,
) -> None:
    """Measure how far each CANDIDATE is from REFERENCE on text.

    Both are GGUF files, or folders: plain, GPTQ or bitsandbytes. Perplexity,
    divergence (KL) of the next token, share of equal first choices, by
    language; bits per weight and file size.
    """
    from dus_edge.quality import report as quality_report
    from dus_edge.quality.compare import quality as run
    from dus_edge.text.chunks import DEFAULT_N_CTX

    if out is not None:
        quality_report.check_outputs(out, plots=plots, overwrite=overwrite)
    measure["n_ctx"] = measure["n_ctx"] or DEFAULT_N_CTX
    results = run(reference, candidates, texts=paths, device=device, work=out, **measure)
    written = []
    if out is not None:
        written = quality_report.write(results, out, plots=plots, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(quality_report.to_json(results)))
        return
    click.echo(quality_report.markdown(results))
    for path in written:
        click.echo(path)


@cli.command()
@click.argument("model")
@plan_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead.")
def inspect(model: str, choose: Any, as_json: bool) -> None:
    """Show MODEL's shape, plan and the size of every preset.

    No weight is read or fetched; a folder with only config.json will do.
    """
    from dus_edge import jobs
    from dus_edge.report import inspection, inspection_json

    found = jobs.find_model(model, choose, weights=False, say=_say(as_json))
    click.echo(json.dumps(inspection_json(found)) if as_json else inspection(found))


@cli.command()
@click.argument("model", required=False)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write there instead of printing.",
)
@click.option(
    "--from",
    "from_path",
    metavar="PATH",
    help="What FROM names, relative to the Modelfile [default: the GGUF].",
)
@click.option(
    "--num-ctx", type=click.IntRange(min=4), metavar="N", help="Highest num_ctx [default: 4096]."
)
@click.option(
    "--tracked",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Render the project's own modelfiles/ into DIR.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
def modelfile(
    model: str | None,
    out: Path | None,
    from_path: str | None,
    num_ctx: int | None,
    tracked: Path | None,
    overwrite: bool,
) -> None:
    """Write the Modelfile of a GGUF file or a checkpoint."""
    from dus_edge import jobs
    from dus_edge.errors import UsageError
    from dus_edge.files import check_absent, check_writable, write_text

    if (model is None) == (tracked is None):
        raise UsageError("Give one of MODEL, a GGUF file or a checkpoint, and --tracked DIR.")
    if tracked is not None:
        for path in jobs.render_tracked(tracked):
            click.echo(path)
        return
    folder = out.parent if out else Path()
    text = jobs.render_modelfile_of(model, folder, from_path, num_ctx, say=_say(True))
    if out is None:
        click.echo(text, nl=False)
        return
    check_absent([out], overwrite)
    check_writable(out.parent)
    write_text(out, text)
    click.echo(f"ollama create {out.stem.lower()} -f {out}")


for _command in (bench, devices, fit):
    cli.add_command(_command)


def _say(as_json: bool) -> Callable[[str], None]:
    return functools.partial(click.echo, err=True) if as_json else click.echo


def _size(n: int) -> str:
    from dus_edge.files import format_bytes

    return format_bytes(n)


def _counts(types: Mapping[str, int]) -> str:
    """``72 Q4_K, 13 Q6_K, 25 F32``, the most frequent first."""
    return ", ".join(f"{n} {t}" for t, n in sorted(types.items(), key=lambda item: -item[1]))


def _seconds(s: float) -> str:
    from dus_edge.progress import format_time

    return f"{s:.1f} s" if s < 60 else f"{format_time(s)} (m:ss)"


def _print_json(result: Any, **more: Any) -> None:
    from dus_edge.report import result_json

    click.echo(json.dumps(result_json(result) | more))
