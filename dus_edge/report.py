"""What a person, or a program, is told of a model and of a finished job."""

from __future__ import annotations

from typing import Any

from dus_edge.files import format_bytes
from dus_edge.jobs import Model, Result, format_count, preset_sizes
from dus_edge.quant.recipe import PRESETS


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
    if not plan.is_identity:
        drop = f", m = {plan.drop}" if plan.drop is not None else ""
        lines.append(_row("Plan", _shorten(plan.spelled, 52 - len(drop)) + drop))
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
        **_model_json(model),
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
    }


def result_json(result: Result) -> dict[str, Any]:
    """What a finished job wrote."""
    return {
        **_model_json(result.model),
        "outputs": [
            {
                "path": str(o.path),
                "bytes": o.nbytes,
                "preset": o.preset,
                "tensor_types": dict(o.types),
                "modelfile": str(o.modelfile) if o.modelfile else None,
            }
            for o in result.outputs
        ],
        "notes": list(result.notes),
        "seconds": round(result.seconds, 3),
    }


def _model_json(model: Model) -> dict[str, Any]:
    return {
        "model": model.source.label,
        "name": model.name.stem,
        "revision": model.source.revision,
        "licence": model.source.licence,
        "n_base_layers": model.plan.n_base,
        "n_layers": model.plan.depth,
        "n_parameters": model.n_parameters,
        "plan": model.plan.spelled,
        "drop": model.plan.drop,
    }


def _context(model: Model) -> str:
    c = model.config
    if c.sliding_window and c.sliding_window < c.context_length:
        # llama.cpp's llama graph has no window: past it, attention differs from the original's.
        return f"{c.context_length:,} (trained with a sliding window of {c.sliding_window:,})"
    return f"{c.context_length:,}"


def _row(label: str, value: str) -> str:
    return f"{label:13} {_shorten(value, 66)}"


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
