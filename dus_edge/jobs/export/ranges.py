"""The job `gguf` of a GGUF base without a preset: ranges of layers, copied as they are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dus_edge.errors import UsageError
from dus_edge.export.gguf.ranges import CopiedFile, plan_copies, write_copies
from dus_edge.files import (
    check_absent,
    check_free_space,
    check_writable,
    held_outputs,
    point_to,
    write_text,
)
from dus_edge.jobs.job import Result, Writing, Written, quiet
from dus_edge.ollama.facts import copied_facts, render_facts
from dus_edge.progress import progress
from dus_edge.upscale.model import ChoosePlan, Model, Say, describe, find_model


def copy_ranges(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    *,
    alias: str | None = None,
    n_threads: int | None = None,
    overwrite: bool = False,
    say: Say = quiet,
) -> Result:
    """A GGUF up-scaled without its tensors being quantized anew, and its Modelfile.

    Args:
        base: a GGUF file or a model of Ollama's.
        choose: gives the plan for the base's depth.
        folder: where the file goes, under a name of the GGUF convention.
        alias: also link ``<alias>.gguf`` to it.
        n_threads: worker threads; all cores by default.
        overwrite: replace files of these names.
        say: takes lines for the user.

    Raises:
        DusEdgeError: base, plan or output cannot be used. Nothing half-written stays.
    """
    start = time.monotonic()
    writing = Writing(n_threads, overwrite)
    model = find_model(base, choose, weights=True, say=say, tokenizer="never")
    gguf = model.source.gguf
    assert gguf is not None
    _check_method(model)
    path = folder / f"{model.name.stem}-{gguf.type_label}.gguf"
    modelfile = path.with_suffix(".Modelfile")
    with held_outputs([path]):
        file = plan_copies(model, path)
        _check_outputs(file, [path, modelfile], overwrite)
        text = render_facts(copied_facts(model), f"./{path.name}")
        types = Counter(source.kind.name for source in file.sources)
        say(describe(model))
        with progress("Copying", sum(t.nbytes for t in file.tensors)) as tick:
            write_copies(gguf, file, n_threads=writing.threads, advance=tick)
        write_text(modelfile, text)
        if alias:
            point_to(path.with_name(f"{alias}.gguf"), path)
    written = Written(path, file.nbytes, gguf.type_label.lower(), modelfile, types)
    return Result(model, (written,), time.monotonic() - start)


def refuse_quantizing(base: str, options: Mapping[str, object]) -> None:
    """See that nothing is asked for which needs tensors to be quantized.

    Args:
        base: what the user called it.
        options: by name; None is not given.

    Raises:
        UsageError: one is.
    """
    for name, given in options.items():
        if given is not None:
            raise UsageError(
                f"{name} is for tensors that are quantized, and those of {base} are copied as they "
                "are; add -q PRESET to quantize them anew, or leave that out."
            )


def _check_method(model: Model) -> None:
    """See that copies are copies: blocks of a quantized tensor cannot be scaled or averaged."""
    method = model.plan.method
    if not method.is_plain:
        raise UsageError(
            f"The copies shall be changed ({method.spelled}), and tensors of a GGUF are copied as "
            "they are; add -q PRESET to quantize them anew, or leave that out."
        )


def _check_outputs(file: CopiedFile, paths: Sequence[Path], overwrite: bool) -> None:
    check_absent(paths, overwrite)
    check_writable(file.path.parent)
    check_free_space(file.path.parent, file.nbytes)
