"""The job that shows a model: shape, plan and the size of every preset, without a weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dus_edge.errors import CheckpointError
from dus_edge.export.gguf import sink
from dus_edge.export.gguf.format import data_size
from dus_edge.export.gguf.metadata import build_metadata
from dus_edge.export.gguf.ranges import plan_copies
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.jobs.job import model_json
from dus_edge.quant.recipe import PRESETS, Preset
from dus_edge.upscale.model import Model
from dus_edge.words import counts_text, cut_end, format_bytes, format_count


def preset_sizes(model: Model, presets: Mapping[str, Preset]) -> tuple[dict[str, int], bool]:
    """File size in bytes of every preset, without reading a weight.

    Returns:
        sizes by preset, and whether they are exact: without the tokenizer's files the header's
        size is unknown and left out.
    """
    metadata: list[Any] = []
    exact = True
    try:
        vocab = read_vocab(model.source.folder, model.config.vocab_size)
        metadata = build_metadata(model.config, model.source, model.name, model.plan, vocab)
    except CheckpointError:
        exact = False
    # The header names every type by a number of one width, so its length is the same for all
    # presets; a vocabulary of 128,000 tokens is encoded once, not fifteen times.
    header = len(
        sink.plan_file(model.config, model.shapes, metadata, PRESETS["f32"], Path()).header
    )
    sizes = {
        name: header + data_size(sink.plan_tensors(model.config, model.shapes, preset))
        for name, preset in presets.items()
    }
    return sizes, exact


def copied_bytes(model: Model) -> int | None:
    """Size in bytes of a GGUF base up-scaled as it is; None for a checkpoint, or changed copies."""
    if model.source.gguf is None or not model.plan.method.is_plain:
        return None
    return plan_copies(model, Path(".copied")).nbytes


def inspection(model: Model) -> str:
    """The text of `dus-edge inspect`, at most 80 columns."""
    c, plan = model.config, model.plan
    licence = model.source.licence or "unknown (ask the authors before passing it on)"
    lines = [
        _row("Model", model.source.label),
        _row("Licence", licence),
        _row("Architecture", c.architecture),
        _row("Layers", str(plan.n_base) if plan.is_identity else f"{plan.n_base} → {plan.depth}"),
        _row("Parameters", format_count(model.n_parameters)),
        _row("Hidden, FFN", f"{c.hidden_size:,}, {c.intermediate_size:,}"),
        _row("Heads", f"{c.n_heads} of {c.head_dim}, {c.n_kv_heads} for keys and values"),
        _row("Vocabulary", f"{c.vocab_size:,}" + (", tied head" if c.tied_head else "")),
        _row("Context", _context(model)),
        _row("Rope", f"theta {c.rope.theta:,.0f}, {c.rope.kind}"),
    ]
    if model.source.gguf is not None:
        lines.insert(2, _row("Stored as", counts_text(model.source.gguf.types)))
    if not plan.is_identity:
        drop = f", m = {plan.drop}" if plan.drop is not None else ""
        lines.append(_row("Plan", cut_end(plan.spelled, 52 - len(drop)) + drop))
        if not plan.method.is_plain:
            lines.append(_row("Copies", plan.method.spelled))
        for seam in plan.seams[:4]:
            lines.append(
                _row(
                    "Seam",
                    f"layer {seam.position - 1} (source {seam.left}) meets "
                    f"layer {seam.position} (source {seam.right})",
                )
            )
        if len(plan.seams) > 4:
            lines.append(_row("", f"and {len(plan.seams) - 4} seams more"))
    sizes, exact = preset_sizes(model, PRESETS)
    lines += ["", "Preset    File size     Bits per weight"]
    if (size := copied_bytes(model)) is not None:
        sizes = {"as it is": size, **sizes}
    for name, size in sizes.items():
        bits = 8 * size / model.n_parameters
        lines.append(f"{name:8}  {format_bytes(size):>10}  {bits:>10.2f}")
    if not exact:
        lines.append("Sizes without the vocabulary: the tokenizer's files are not there.")
    return "\n".join(lines)


def inspection_json(model: Model) -> dict[str, Any]:
    """The same for programs."""
    c, plan = model.config, model.plan
    sizes, exact = preset_sizes(model, PRESETS)
    return {
        **model_json(model),
        "architecture": c.architecture,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "context_length": c.context_length,
        "sliding_window": c.sliding_window,
        "tied_head": c.tied_head,
        "rope_theta": c.rope.theta,
        "rope_type": c.rope.kind,
        "seams": [[s.position, s.left, s.right] for s in plan.seams],
        "layer_sources": list(plan.sources),
        "file_bytes": sizes,
        "file_bytes_exact": exact,
        **_stored_json(model),
    }


def _stored_json(model: Model) -> dict[str, Any]:
    if model.source.gguf is None:
        return {}
    return {"stored_types": dict(model.source.gguf.types), "copied_bytes": copied_bytes(model)}


def _context(model: Model) -> str:
    c = model.config
    window = c.unheeded_window
    if window and window < c.context_length:
        # llama.cpp's graph has no window: past it, attention differs from the original's.
        return f"{c.context_length:,} (trained with a sliding window of {window:,})"
    return f"{c.context_length:,}"


def _row(label: str, value: str) -> str:
    return f"{label:13} {cut_end(value, 66)}"
