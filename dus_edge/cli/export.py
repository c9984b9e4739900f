"""The commands that write models: gguf, upscale, merge, imatrix, gptq, bnb, mlx."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dus_edge.cli.options import (
    adapter_option,
    calibration_options,
    digest_option,
    folder_option,
    json_option,
    output_options,
    plan_options,
)
from dus_edge.cli.quants.feedback import feedback_choice, feedback_option
from dus_edge.cli.quants.mix import made_mixes, measuring_of, mix_json, mix_options
from dus_edge.cli.say import (
    keep_digests,
    print_folder,
    print_gguf,
    print_json,
    say_to,
)
from dus_edge.cli.talk.next import after_mlx
from dus_edge.quant.choose import DEFAULT, QUANTIZERS
from dus_edge.words import duration, format_bytes

#: What a checkpoint becomes if no preset is named.
DEFAULT_PRESET = "q4_k_m"


@click.command("gguf")
@click.argument("base")
@plan_options
@adapter_option
@click.option(
    "-q",
    "--quant",
    "presets",
    multiple=True,
    metavar="PRESET",
    help="Preset of the file; several by commas, or repeated. "
    f"[default: {DEFAULT_PRESET}; the tensors of a GGUF are copied as they are]",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default="build",
    show_default=True,
    metavar="DIR",
    help="Folder to write the files to.",
)
@click.option(
    "--quantizer",
    type=click.Choice(QUANTIZERS),
    default=DEFAULT,
    show_default=True,
    help="Quantize with this program, or with llama.cpp's ggml (needs dus-edge[llama]).",
)
@click.option(
    "--imatrix",
    metavar="FILE|auto",
    help="Use an importance matrix: a file in a format of llama.cpp's, or auto to collect it now.",
)
@feedback_option
@calibration_options
@mix_options
@click.option(
    "--alias",
    metavar="NAME",
    help="Also link NAME.gguf, the last preset, and NAME-PRESET.gguf to the files, for "
    "Modelfiles that are the same for every base.",
)
@output_options
@digest_option
def gguf_command(
    base: str,
    choose: Any,
    presets: tuple[str, ...],
    out: Path,
    quantizer: str,
    imatrix: str | None,
    feedback: bool,
    text: Any,
    machine: Any,
    mix: Any,
    alias: str | None,
    as_json: bool,
    verbose: bool,
    digest: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into GGUF files and their Modelfiles.

    A BASE that is a GGUF itself is up-scaled as it is, without loss and in
    seconds, or with -q quantized again.
    """
    from dus_edge.checkpoint.gguf.source import names_gguf

    if mix is None and not presets and names_gguf(base):
        from dus_edge.jobs.export.ranges import copy_ranges, refuse_quantizing

        writing.pop("allow_nonfinite")
        options = {"--imatrix": imatrix, "--feedback": feedback or None}
        refuse_quantizing(base, {**options, "--adapter": writing.pop("adapter")})
        result = copy_ranges(base, choose, out, alias=alias, say=say_to(as_json), **writing)
        keep_digests(result, digest)
        print_gguf(result, alias, as_json, verbose)
        return
    from dus_edge.jobs.export.gguf import export_gguf
    from dus_edge.quant.recipe import find_preset

    # Each once; of one that is given twice the later place counts.
    asked = [find_preset(name) for word in presets or (DEFAULT_PRESET,) for name in word.split(",")]
    chosen = list({p.name: p for p in reversed(asked)}.values())[::-1]
    more: dict[str, Any] = {"quantizer": quantizer}
    begun = time.monotonic()
    if mix is not None:
        how = measuring_of(out, text, machine, quantizer, imatrix)
        say, adapter = say_to(as_json), writing["adapter"]
        made = made_mixes(mix, base, choose, presets, chosen, how, adapter, say)
        chosen, more["mixes"] = [m.preset for m in made], mix_json(made)
    source = None
    if imatrix is not None and not (feedback and imatrix == "auto"):
        from dus_edge.jobs.export.imatrix import imatrix_source

        source = imatrix_source(imatrix, text, machine, out, say_to(as_json))
    result = export_gguf(
        base,
        choose,
        chosen,
        out,
        quantizer=quantizer,
        imatrix=source,
        feedback=feedback_choice(feedback, text, machine),
        alias=alias,
        say=say_to(as_json),
        **writing,
    )
    # What types cost was measured before the job began.
    result = replace(result, seconds=time.monotonic() - begun)
    keep_digests(result, digest)
    print_gguf(result, alias, as_json, verbose, **more)


@click.command("upscale")
@click.argument("base")
@plan_options
@adapter_option
@folder_option
@output_options
@digest_option
def upscale_command(
    base: str,
    choose: Any,
    out: Path,
    as_json: bool,
    verbose: bool,
    digest: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into a checkpoint that transformers loads."""
    from dus_edge.jobs.export.checkpoint import export_checkpoint

    result = export_checkpoint(base, choose, out, say=say_to(as_json), **writing)
    keep_digests(result, digest)
    print_folder(result, out, as_json, verbose)


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


@click.command("imatrix")
@click.argument("base")
@plan_options
@adapter_option
@calibration_options
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="File to write the importance matrix to, such as imatrix.gguf.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@json_option
@digest_option
def imatrix_command(
    base: str,
    choose: Any,
    text: Any,
    machine: Any,
    out: Path,
    adapter: Path | None,
    overwrite: bool,
    as_json: bool,
    digest: bool,
) -> None:
    """Collect the importance matrix of BASE, up-scaled, from text.

    Layers run one after the other, so the model need not fit into memory. For
    `dus-edge gguf --imatrix FILE`, and for llama.cpp's own tools.
    """
    from dus_edge.jobs.export.imatrix import export_imatrix

    result = export_imatrix(
        base,
        choose,
        out,
        text,
        machine,
        adapter=adapter,
        overwrite=overwrite,
        say=say_to(as_json),
    )
    if result is None:  # the first process speaks
        return
    keep_digests(result, digest)
    if as_json:
        print_json(result)
        return
    output = result.outputs[0]
    click.echo(f"{out}\n  {format_bytes(output.nbytes)}, {output.types['matrices']} matrices")
    click.echo(f"Done in {duration(result.seconds)}.")


@click.command("gptq")
@click.argument("base")
@plan_options
@adapter_option
@click.option(
    "--bits",
    type=click.Choice(("2", "3", "4", "8")),
    default="4",
    show_default=True,
    help="Bits of a weight.",
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
    help="Quantize columns in the order of their activations: better, but slower to run.",
)
@click.option(
    "--sym/--asym",
    default=True,
    show_default=True,
    help="Quantize without or with a zero point for each group.",
)
@click.option(
    "--damp",
    type=click.FloatRange(min=0, min_open=True),
    default=0.01,
    show_default=True,
    metavar="X",
    help="Add this share of the mean diagonal to the Hessian.",
)
@calibration_options
@folder_option
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of threads that write. [default: all cores]",
)
@click.option("--overwrite", is_flag=True, help="Replace DIR if it exists.")
@json_option
@digest_option
def gptq_command(
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
    digest: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into a GPTQ checkpoint.

    Layers are quantized one after the other, so the model need not fit into
    memory; a run that is cut short goes on where it was.
    """
    from dus_edge.jobs.export.gptq import export_gptq
    from dus_edge.quant.gptq_format import GPTQSettings

    settings = GPTQSettings(
        bits=int(bits), group_size=group_size, sym=sym, desc_act=desc_act, damp=damp
    )
    result = export_gptq(
        base,
        choose,
        out,
        settings,
        text,
        machine,
        say=say_to(as_json),
        **writing,
    )
    if result is None:  # the first process speaks
        return
    keep_digests(result, digest)
    print_folder(result, out, as_json, plain=False)


@click.command("bnb")
@click.argument("base")
@plan_options
@adapter_option
@click.option(
    "--nf4", "scheme", flag_value="nf4", default="nf4", help="Use 4-bit normal float, the default."
)
@click.option("--int8", "scheme", flag_value="int8", help="Use LLM.int8().")
@click.option(
    "--double-quant/--no-double-quant", default=True, help="Quantize the scales of nf4 too."
)
@folder_option
@output_options
@digest_option
def bnb_command(
    base: str,
    choose: Any,
    scheme: str,
    double_quant: bool,
    out: Path,
    as_json: bool,
    verbose: bool,
    digest: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into a bitsandbytes checkpoint.

    transformers loads it, and QLoRA trains on it. Weights stream through: the
    model need not fit into memory.
    """
    from dus_edge.jobs.export.bnb import export_bnb

    result = export_bnb(
        base,
        choose,
        out,
        scheme,
        double_quant=double_quant,
        say=say_to(as_json),
        **writing,
    )
    keep_digests(result, digest)
    print_folder(result, out, as_json, verbose, plain=False)


@click.command("mlx")
@click.argument("base")
@plan_options
@adapter_option
@click.option(
    "--bits",
    type=int,
    default=4,
    show_default=True,
    metavar="B",
    help="Bits of a weight: 2, 3, 4, 5, 6 or 8.",
)
@click.option(
    "--group-size",
    type=int,
    default=64,
    show_default=True,
    metavar="N",
    help="Columns that share a scale and a bias: 32, 64 or 128.",
)
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    help="Type of scales, biases and norms, and of what is computed. [default: the base's]",
)
@folder_option
@output_options
@digest_option
def mlx_command(
    base: str,
    choose: Any,
    bits: int,
    group_size: int,
    dtype: str | None,
    out: Path,
    as_json: bool,
    verbose: bool,
    digest: bool,
    **writing: Any,
) -> None:
    """Up-scale BASE into a quantized folder for MLX, on Macs.

    mlx-lm and LM Studio load it; the bytes are those of mlx_lm.convert on a CPU.
    Weights stream through: the model need not fit into memory.
    """
    from dus_edge.jobs.export.mlx import export_mlx
    from dus_edge.quant.mlx.format import MLXSettings

    settings = MLXSettings(bits=bits, group_size=group_size)
    result = export_mlx(base, choose, out, settings, dtype=dtype, say=say_to(as_json), **writing)
    keep_digests(result, digest)
    print_folder(result, out, as_json, verbose, commands=after_mlx(out))
