"""The job `seam`: one pass of a base over text, and what it says of a plan's seams."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.files import held_outputs
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks
from dus_edge.jobs.grow.outputs import GrowOutputs
from dus_edge.jobs.job import model_json, quiet
from dus_edge.packages import require
from dus_edge.progress import progress
from dus_edge.tables.grow.seam import SeamResults, seam_json, seam_page
from dus_edge.tables.grow.seam_plot import render_seams
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.geometry import StreamGeometry, measure_streams
from dus_edge.upscale.model import ChoosePlan, Model, Say, describe, find_model
from dus_edge.upscale.plan import identity
from dus_edge.words import format_bytes

if TYPE_CHECKING:  # this imports torch
    from dus_edge.calibrate.engine import ComputeSettings


def find_seams(
    base: str,
    choose: ChoosePlan,
    text: TextChoice,
    machine: Machine,
    outputs: GrowOutputs,
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
        outputs.write(_files(results, found, outputs))
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
    from dus_edge.calibrate.streams import kept_streams, states_bytes

    folder = Path(tempfile.gettempdir()) if folder is None else folder
    n_chunks, n_ctx = chunks.tokens.shape
    n_streams = checkpoint.config.n_layers + 1
    n_bytes = states_bytes(checkpoint.config, chunks.tokens, compute.dtype, n_streams)
    say(f"Running {n_chunks} chunks of {n_ctx} tokens, {compute.device}")
    say(f"  a temporary file in {folder}: {format_bytes(n_bytes)}")
    total = total_token_layers(checkpoint, chunks.tokens)
    with (
        progress("Running", total, unit="token-layers") as tick,
        kept_streams(checkpoint, chunks.tokens, compute, folder, tick) as kept,
        progress("Comparing", n_chunks * (n_ctx - 1), unit="tokens") as tock,
    ):
        return measure_streams(kept.by_chunk(range(n_streams), tock))


def seam_dict(model: Model, results: SeamResults) -> dict[str, Any]:
    """The model, its plan, and what was measured."""
    return {**model_json(model), **seam_json(results)}


def _files(results: SeamResults, found: dict[str, Any], outputs: GrowOutputs) -> list[bytes]:
    """The page, the JSON and the pictures."""
    text = json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    data = [f"{seam_page(results)}\n".encode(), text.encode()]
    return data + [render_seams(results, path.suffix[1:]) for path in outputs.paths[2:]]
