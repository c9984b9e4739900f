"""The job `seam`: one pass of a base over text, and what it says of a plan's seams."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.files import check_absent, check_writable, held_outputs, output_files, pwrite_all
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks
from dus_edge.jobs.job import model_json, quiet
from dus_edge.packages import require
from dus_edge.progress import progress
from dus_edge.tables.grow.seam import SeamResults, seam_json, seam_page
from dus_edge.tables.grow.seam_plot import check_seam_plot, render_seams
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.geometry import StreamGeometry, measure_streams
from dus_edge.upscale.model import ChoosePlan, Model, Say, describe, find_model
from dus_edge.upscale.plan import identity
from dus_edge.words import format_bytes

if TYPE_CHECKING:  # this imports torch
    from dus_edge.calibrate.engine import ComputeSettings


@dataclass(frozen=True)
class SeamOutputs:
    """Where the results are written.

    Attributes:
        folder: for the page, JSON and pictures, and the temporary file; None for nowhere.
        plots: whether to draw.
        overwrite: replace files of the same names.
    """

    folder: Path | None = None
    plots: bool = True
    overwrite: bool = False

    @property
    def paths(self) -> list[Path]:
        """The files."""
        endings = ("md", "json", "png", "svg") if self.plots else ("md", "json")
        return [self.folder / f"seam.{ending}" for ending in endings] if self.folder else []

    def check(self) -> None:
        """See that they can be written, before any work.

        Raises:
            OutputError: one exists, or the folder cannot be written.
            DependencyError: plots are wanted and matplotlib is not installed.
        """
        if self.folder is None:
            return
        check_absent(self.paths, self.overwrite)
        check_writable(self.folder)
        if self.plots:
            check_seam_plot()


def find_seams(
    base: str,
    choose: ChoosePlan,
    text: TextChoice,
    machine: Machine,
    outputs: SeamOutputs,
    say: Say = quiet,
) -> tuple[SeamResults, dict[str, Any], Sequence[Path]]:
    """Measure a base's stream over text, and the seams of a plan on it.

    Args:
        base: folder, hub id or the built-in base's name.
        choose: gives the plan for a base's depth.
        text: what is run through it.
        machine: where.
        outputs: what is written.
        say: takes lines for the user.

    Returns:
        the results, the same as JSON, and the files that were written.

    Raises:
        DusEdgeError: base, plan, text or outputs cannot be used.
    """
    require("hf", "running text through a model needs")
    outputs.check()
    from dus_edge.calibrate.engine import choose_settings

    compute = choose_settings(machine.device, machine.dtype)
    model = find_model(base, choose, weights=True, say=say)
    base_model = replace(model, plan=identity(model.plan.n_base))
    checkpoint = base_model.open()
    chunks = read_chunks(base_model, text)
    say(describe(model))
    with held_outputs(outputs.paths):
        geometry = stream_geometry(checkpoint, chunks, compute, outputs.folder, say)
    period = model.base_config.family.period
    results = SeamResults(model.source.name, model.plan, period, geometry, chunks, text.label)
    found = seam_dict(model, results)
    if outputs.folder is not None:
        _write(results, found, outputs)
    return results, found, outputs.paths


def stream_geometry(
    checkpoint: Checkpoint,
    chunks: Chunks,
    compute: ComputeSettings,
    folder: Path | None,
    say: Say,
) -> StreamGeometry:
    """One pass of a base over text, and the geometry of its stream.

    Args:
        checkpoint: the base.
        chunks: of its tokens.
        compute: device and precision.
        folder: of the temporary file; None for the system's.
        say: takes lines for the user.
    """
    from dus_edge.calibrate.engine import total_token_layers
    from dus_edge.calibrate.streams import kept_streams, streams_bytes

    folder = Path(tempfile.gettempdir()) if folder is None else folder
    n_chunks, n_ctx = chunks.tokens.shape
    size = format_bytes(streams_bytes(checkpoint.config, chunks.tokens, compute.dtype))
    say(f"Running {n_chunks} chunks of {n_ctx} tokens, {compute.device}")
    say(f"  a temporary file in {folder}: {size}")
    total = total_token_layers(checkpoint, chunks.tokens)
    with (
        progress("Running", total, unit="token-layers") as tick,
        kept_streams(checkpoint, chunks.tokens, compute, folder, tick) as kept,
        progress("Comparing", n_chunks * (n_ctx - 1), unit="tokens") as tock,
    ):
        return measure_streams(kept.blocks(tock))


def seam_dict(model: Model, results: SeamResults) -> dict[str, Any]:
    """The model, its plan, and what was measured."""
    return {**model_json(model), **seam_json(results)}


def _write(results: SeamResults, found: dict[str, Any], outputs: SeamOutputs) -> None:
    """Write the page, the JSON and the pictures, all or nothing."""
    text = json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    data = [f"{seam_page(results)}\n".encode(), text.encode()]
    data += [render_seams(results, path.suffix[1:]) for path in outputs.paths[2:]]
    sizes = [(path, len(blob)) for path, blob in zip(outputs.paths, data, strict=True)]
    with output_files(sizes) as fds:
        for fd, blob in zip(fds, data, strict=True):
            pwrite_all(fd, blob, 0)
