"""The job `sweep`: many plans of a base at once, untrained, on the same text."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.files import check_free_space, held_outputs
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks, run_identity
from dus_edge.jobs.grow.healing import ShortHealing, heal_plans
from dus_edge.jobs.grow.outputs import GrowOutputs
from dus_edge.jobs.job import model_json, quiet
from dus_edge.packages import require
from dus_edge.predict.devices import Device
from dus_edge.predict.memory.llama import model_of_config
from dus_edge.predict.prediction import (
    StorableModel,
    choose_device,
    memory_settings,
    predict_on,
)
from dus_edge.progress import progress
from dus_edge.quality.scores import PerToken, summarize
from dus_edge.quant.recipe import Preset, find_preset
from dus_edge.tables.grow.sweep import sweep_page
from dus_edge.tables.grow.sweep_json import sweep_csv, sweep_json
from dus_edge.tables.grow.sweep_plot import render_sweep
from dus_edge.tables.grow.swept import SweepResults, SweptPlan
from dus_edge.text.chunks import Chunks
from dus_edge.upscale.blocks import measure_seams
from dus_edge.upscale.candidates import Candidate, SweepChoice, sweep_candidates
from dus_edge.upscale.geometry import StreamGeometry, measure_streams
from dus_edge.upscale.model import Model, Say, find_model, layer_kinds
from dus_edge.upscale.plan import check_averaged, identity
from dus_edge.upscale.shared_run import SharedSchedule, share_layers
from dus_edge.words import format_bytes

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.engine import ComputeSettings
    from dus_edge.calibrate.streams import KeptStates
    from dus_edge.calibrate.sweep import SweepState


@dataclass(frozen=True)
class PlannedUse:
    """How results would be stored and run.

    Attributes:
        preset: of files.
        device: an id of `devices`, or ``auto``; None for no prediction.
        context: tokens that memory is predicted at; by default 4,096 or the model's own.
    """

    preset: str = "q4_k_m"
    device: str | None = None
    context: int | None = None


def sweep_plans(
    base: str,
    asked: SweepChoice,
    text: TextChoice,
    machine: Machine,
    use: PlannedUse,
    outputs: GrowOutputs,
    say: Say = quiet,
    healing: ShortHealing | None = None,
) -> tuple[SweepResults, dict[str, Any], Sequence[Path]]:
    """Run all plans of a base over text, and compare each with the base.

    Args:
        base: folder, hub id or the built-in base's name.
        asked: which plans.
        text: what is run through them.
        machine: where.
        use: how results would be stored and run.
        outputs: what is written; with a folder the run can be taken up again.
        say: takes lines for the user.
        healing: a short training of each plan, after that; it needs a folder.

    Returns:
        the results, the same as JSON, and the files that were written.

    Raises:
        DusEdgeError: base, plans, text or outputs cannot be used.
    """
    require("hf", "running text through a model needs")
    outputs.check()
    if healing is not None:
        healing.options.check()
        if outputs.folder is None:
            raise UsageError("--heal takes long and needs -o DIR, to go on after an interruption.")
    preset = find_preset(use.preset)
    device = choose_device(use.device) if use.device else None
    from dus_edge.calibrate.engine import choose_settings

    compute = choose_settings(machine.device, machine.dtype)

    def candidates_for(config: ModelConfig) -> tuple[Candidate, ...]:
        family, kinds = config.family, layer_kinds(config)
        found = sweep_candidates(config.n_layers, asked, family.period, family.architecture)
        for candidate in found:
            check_averaged(candidate.plan, kinds, family.architecture)
        return found

    # Before a hub base's gigabytes are fetched.
    model = find_model(
        base, identity, weights=True, say=say, early=lambda folder, config: candidates_for(config)
    )
    candidates = candidates_for(model.base_config)
    checkpoint = model.open()
    chunks = read_chunks(model, text)
    schedule = share_layers(model.plan.n_base, [c.plan for c in candidates])
    with held_outputs(outputs.paths), _state(model, chunks, compute, candidates, outputs) as state:
        geometry, scores = _run(checkpoint, chunks, schedule, compute, state, say)
        results = _results(model, candidates, chunks, text.label, geometry, scores, preset)
        if device is not None:
            results = with_predictions(results, model, preset, device, use.context)
        if healing is not None and outputs.folder is not None:
            work = outputs.folder / "sweep.healing"
            healed = heal_plans(model, candidates, healing, work, say)
            pairs = zip(results.plans, healed, strict=True)
            results = replace(results, plans=tuple(replace(p, healed=h) for p, h in pairs))
        json_found = {**model_json(model), **sweep_json(results)}
        if outputs.folder is not None:
            outputs.write(_files(results, json_found, outputs))
        state.forget()
    return results, json_found, outputs.paths


@contextmanager
def _state(
    model: Model,
    chunks: Chunks,
    compute: ComputeSettings,
    candidates: Sequence[Candidate],
    outputs: GrowOutputs,
) -> Iterator[SweepState]:
    """Beside the outputs, from where the same command goes on; else in a folder that goes."""
    from dus_edge.calibrate.sweep import SweepState

    plans = [[list(c.plan.sources), c.plan.method.as_json()] for c in candidates]
    blob = json.dumps(run_identity(model, chunks, compute, plans), sort_keys=True).encode()
    name = hashlib.sha256(blob).hexdigest()
    if outputs.folder is not None:
        state = SweepState(outputs.folder / "sweep.state", name)
        try:
            yield state
        except CheckpointError:
            state.forget()  # going on would end at the same place
            raise
        return
    with tempfile.TemporaryDirectory(prefix="dus-edge-sweep-") as folder:
        yield SweepState(Path(folder), name)


def _run(
    checkpoint: Checkpoint,
    chunks: Chunks,
    schedule: SharedSchedule,
    compute: ComputeSettings,
    state: SweepState,
    say: Say,
) -> tuple[StreamGeometry, np.ndarray]:
    """The stream's geometry, and scores ``(1 + n_plans, 3, n_chunks, n_ctx - 1)``, base first."""
    from dus_edge.calibrate.streams import KeptStates, states_bytes
    from dus_edge.calibrate.sweep import run_schedule

    tokens, steps = chunks.tokens, schedule.steps
    n_bytes = states_bytes(checkpoint.config, tokens, compute.dtype, schedule.n_slots)
    n_apart = sum(step.n_plans for step in steps)
    say(
        f"Running {len(schedule.ends)} plans over {tokens.shape[0]} chunks of {tokens.shape[1]} "
        f"tokens, {compute.device}"
    )
    say(f"  {len(steps)} layers to run; one by one the plans would run {n_apart}")
    say(f"  a file of hidden states in {state.folder}: {format_bytes(n_bytes)}")
    if not state.n_done:
        check_free_space(state.folder, n_bytes)
    else:
        say(f"Going on behind step {state.n_done}: an earlier run of the same was cut short")
    with state.states() as fd:
        kept = KeptStates(fd, checkpoint.config, tokens, compute.dtype)
        with progress("Running", tokens.size * len(steps), unit="token-layers") as tick:
            run_schedule(
                checkpoint,
                tokens,
                schedule,
                kept,
                compute,
                start=state.n_done,
                done=state.done,
                advance=tick,
            )
        scores = _scores(checkpoint, chunks, schedule, compute, state, kept)
        n_compared = tokens.shape[0] * (tokens.shape[1] - 1)
        with progress("Comparing", n_compared, unit="tokens") as tick:
            return measure_streams(kept.by_chunk(schedule.streams, tick)), scores


def _scores(
    checkpoint: Checkpoint,
    chunks: Chunks,
    schedule: SharedSchedule,
    compute: ComputeSettings,
    state: SweepState,
    kept: KeptStates,
) -> np.ndarray:
    from dus_edge.calibrate.sweep import NextTokenHead

    n_chunks, n_ctx = chunks.tokens.shape
    head = NextTokenHead(checkpoint, compute)
    share = n_ctx * (1 + len(schedule.ends))
    found = []
    with progress("Scoring", n_chunks * share, unit="tokens") as tick:
        for chunk, tokens in enumerate(chunks.tokens):
            scores = state.scores(chunk)
            if scores is None:
                base = schedule.streams[-1]
                scores = head.scores(kept, chunk, base, schedule.ends, tokens[1:])
                state.keep_scores(chunk, scores)
            found.append(scores)
            tick(share)
    return np.stack(found, axis=2)


def _results(
    model: Model,
    candidates: Sequence[Candidate],
    chunks: Chunks,
    label: str,
    geometry: StreamGeometry,
    scores: np.ndarray,
    preset: Preset,
) -> SweepResults:
    base, others = scores[0, 0], scores[1:]
    plans = []
    for candidate, (nll, kl, same) in zip(candidates, others, strict=True):
        per_token = PerToken(kl=kl, same_top=same > 0, nll_reference=base, nll_candidate=nll)
        total, languages = summarize(per_token, chunks.languages)
        grown = replace(model, plan=candidate.plan)
        seams = measure_seams(candidate.plan, geometry, model.base_config.family.period)
        plans.append(
            SweptPlan(
                candidate,
                grown.n_parameters,
                model_of_config(grown.config, preset).weights_bytes,
                total,
                languages,
                (nll - base).mean(axis=1),
                max((c.angle for c in seams), default=None),
            )
        )
    perplexity = plans[0].total.perplexity_reference
    return SweepResults(
        model.source.name, preset.label, tuple(plans), perplexity, geometry, chunks, label
    )


def with_predictions(
    results: SweepResults, model: Model, preset: Preset, device: Device, context: int | None
) -> SweepResults:
    """The same with memory and speed of every plan on a device.

    Args:
        results: of a sweep.
        model: the base.
        preset: that plans are stored in.
        device: where they run.
        context: tokens; by default 4,096 or the model's own.
    """
    plans = []
    for swept in results.plans:
        grown = replace(model, plan=swept.plan)
        stored = model_of_config(grown.config, preset, grown.name.stem)
        settings = memory_settings(stored, context=context)
        found = predict_on(StorableModel(stored, {}), device, settings)
        plans.append(replace(swept, prediction=found))
    return replace(results, plans=tuple(plans))


def _files(results: SweepResults, found: dict[str, Any], outputs: GrowOutputs) -> list[bytes]:
    """The page, the JSON, the table and the pictures."""
    text = json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    data = [f"{sweep_page(results)}\n".encode(), text.encode(), sweep_csv(results).encode()]
    return data + [render_sweep(results, path.suffix[1:]) for path in outputs.paths[3:]]
