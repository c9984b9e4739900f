"""What a person, or a program, is told of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dus_edge.predict.devices import Device
from dus_edge.predict.fit import Verdict
from dus_edge.predict.prediction import Prediction
from dus_edge.predict.speed.predict import PredictedSpeed
from dus_edge.predict.stored_model import MemoryUse, RunSettings
from dus_edge.words import WIDTH, cut_end, figure, format_bytes, wrap


def device_table(devices: Sequence[Device]) -> str:
    """Id, memory and bandwidth, at most 80 columns."""
    lines = [f"{'id':26} {'name':30} {'GB':>8} {'GB/s':>7}"]
    for d in devices:
        sizes = "/".join(f"{gb:g}" for gb in d.memory_gb_options)
        if len(sizes) > 8:
            sizes = f"{d.memory_gb_options[0]:g}–{d.memory_gb_options[-1]:g}"
        name = d.name.removeprefix("NVIDIA ").removeprefix("Apple ")
        rate = f"{d.bandwidth_gbps:g}" if d.bandwidth_gbps else "–"
        lines.append(f"{d.id:26} {cut_end(name, 30):30} {sizes:>8} {rate:>7}")
    return "\n".join(lines)


def device_json(d: Device) -> dict[str, Any]:
    """The same for programs."""
    return {
        "id": d.id,
        "name": d.name,
        "family": d.family,
        "backend": d.backend,
        "memory_gb_options": list(d.memory_gb_options),
        "bandwidth_gbps": d.bandwidth_gbps,
        "fp32_tflops": d.fp32_tflops,
        "source": d.source,
    }


def memory_json(use: MemoryUse, usable_bytes: int) -> dict[str, int]:
    """Bytes by purpose."""
    return {
        "weights_bytes": use.weights_bytes,
        "kv_cache_bytes": use.kv_cache_bytes,
        "compute_buffer_bytes": use.compute_buffer_bytes,
        "overhead_bytes": use.overhead_bytes,
        "total_bytes": use.total_bytes,
        "usable_bytes": usable_bytes,
    }


def verdict_json(v: Verdict) -> dict[str, Any]:
    """Whether and how far a model fits."""
    return {
        "device": v.device.id,
        "memory_gb": v.memory_gb,
        "platform": v.platform,
        "fits": v.fits,
        "offloaded_layers": v.offloaded_layers,
        "longest_context": v.longest_context,
        "memory": memory_json(v.use, v.usable_bytes),
    }


def where_json(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """What `fit` prints with `--json` of every device that holds a model."""
    return [verdict_json(v) | {"context_warning": v.context_warning} for v in found]


def speed_json(speed: PredictedSpeed | None) -> dict[str, float | None]:
    """Rates of generation and prompt, each with the ends of its interval; null if not predicted."""
    keys = [f"{kind}_tokens_per_s{end}" for kind in ("tg", "pp") for end in ("", "_low", "_high")]
    rates = {key: getattr(speed, key, None) for key in keys}
    # Four digits: no prediction knows more, and processors differ in the last ones.
    return {key: None if x is None else float(f"{x:.4g}") for key, x in rates.items()}


def prediction_json(p: Prediction) -> dict[str, Any]:
    """A prediction; every speed has the ends of its 80 % interval beside it."""
    return {
        "model": p.name,
        "context": p.context,
        **verdict_json(p.verdict),
        "best_preset": p.best_preset,
        **speed_json(p.speed),
        "why_no_speed": p.why_no_speed,
    }


def answer_json(p: Prediction) -> dict[str, Any]:
    """What `fit` and `bench predict` print with `--json`: a prediction, and what runs the model.

    `runtime` is whose memory it is, `speed_engine` whose speed.
    """
    return {
        **prediction_json(p),
        "parallel": p.parallel,
        "runtime": p.verdict.runtime,
        "speed_engine": p.speed.engine if p.speed else None,
        "note": p.verdict.note,
        "context_warning": p.verdict.context_warning,
    }


def fit_text(p: Prediction) -> str:
    """What `dus-edge fit` prints of one device."""
    v = p.verdict
    lines = [_head(p), *_memory_lines(v), "", _sentence(p)]
    if not v.fits and v.longest_context:
        lines.append(f"The longest context that fits whole is {v.longest_context:,} tokens.")
    if p.best_preset:
        lines.append(f"The best preset that fits whole at this context is {p.best_preset}.")
    return "\n".join([*lines, *_notes(v)])


def prediction_text(p: Prediction) -> str:
    """What `dus-edge bench predict` prints."""
    lines = [_head(p), *_memory_lines(p.verdict), "", _sentence(p)]
    if p.speed is None:
        why = _note(f"No speed is predicted: {p.why_no_speed}")
        return "\n".join([*lines, why, *_notes(p.verdict)])
    s = p.speed
    rows = (
        ("Generation", s.tg_tokens_per_s, s.tg_tokens_per_s_low, s.tg_tokens_per_s_high),
        ("Prompt", s.pp_tokens_per_s, s.pp_tokens_per_s_low, s.pp_tokens_per_s_high),
    )
    lines += [
        f"{name:14} {figure(x):>8} tok/s, 80 % interval {figure(low)} to {figure(high)} (predicted)"
        for name, x, low, high in rows
        if x is not None
    ]
    if s.engine != p.verdict.runtime:
        lines.append(
            f"That is {s.engine}'s; under {p.verdict.runtime} alone it is several times less."
        )
    if p.parallel > 1:
        lines.append("That is the speed of one sequence alone.")
    if s.pp_tokens_per_s is None:
        lines.append("No speed of the prompt is predicted for such a model.")
    return "\n".join([*lines, *_notes(p.verdict)])


def runs_table(name: str, settings: RunSettings, found: Sequence[Verdict]) -> str:
    """Devices that hold a model whole."""
    if not found:
        return f"No known device holds {name} whole at a context of {settings.context:,} tokens."
    lines = [
        f"{name}, context {settings.context:,}: {len(found)} devices hold it whole",
        f"{'id':22} {'GB':>5} {'platform':15} {'takes':>9} {'of':>9} {'context up to':>13}",
    ]
    for v in found:
        lines.append(
            f"{v.device.id:22} {v.memory_gb:>5g} {v.platform or 'here':15} "
            f"{format_bytes(v.use.total_bytes):>9} {format_bytes(v.usable_bytes):>9} "
            f"{v.longest_context or 0:>13,}"
        )
    notes = dict.fromkeys((v.device.backend, v.note) for v in found if v.note)
    lines += [_note(f"{backend}: {note}") for backend, note in notes]
    if warning := found[0].context_warning:
        lines.append(_note(f"Warning: {warning}"))
    return "\n".join(lines)


def _head(p: Prediction) -> str:
    v = p.verdict
    where = f" ({v.platform})" if v.platform else ""
    runtime = "" if v.runtime == "llama.cpp" else f", under {v.runtime}"
    context = f"{p.context:,}" if p.parallel == 1 else f"{p.context:,} × {p.parallel} sequences"
    head = f"{p.name}, context {context}{runtime}"
    return f"{head}\non {v.device.name}, {v.memory_gb:g} GB{where}"


def _memory_lines(v: Verdict) -> list[str]:
    rows = (
        ("Weights", v.use.weights_bytes),
        ("KV cache", v.use.kv_cache_bytes),
        ("Compute", v.use.compute_buffer_bytes),
        ("Overhead", v.use.overhead_bytes),
        ("Total", v.use.total_bytes),
        ("Usable", v.usable_bytes),
    )
    return [f"{name:14} {format_bytes(n):>10}" for name, n in rows]


def _sentence(p: Prediction) -> str:
    v = p.verdict
    spare = v.usable_bytes - v.use.total_bytes
    if v.fits:
        said = f"It fits whole, with {format_bytes(spare)} to spare."
    elif v.runtime != "llama.cpp":
        said = _note(
            f"It does not fit, {format_bytes(-spare)} are missing. transformers can leave layers "
            "on the CPU (device_map); that is not predicted."
        )
    elif v.offloaded_layers:
        n = v.offloaded_layers
        said = f"It does not fit whole, {format_bytes(-spare)} are missing; -ngl {n} fits."
    else:
        said = "It does not fit, not even one layer."
    if v.close:
        said += "\nThat is close: what the system itself takes is not known so well."
    return said


def _notes(v: Verdict) -> list[str]:
    """What is to be known of a context beyond the model's, and of what transformers runs."""
    beyond = ["", _note(f"Warning: {v.context_warning}")] if v.context_warning else []
    if v.runtime == "llama.cpp":
        return [*beyond, *(["", _note(v.note)] if v.note else [])]
    compute = (
        "Compute is the peak while a prompt of the whole context is read at once; what "
        "torch's allocator keeps in reserve is not in it."
    )
    return [*beyond, "", *(_note(text) for text in (compute, v.note) if text)]


def _note(text: str) -> str:
    return wrap(text, WIDTH - 1, long_words=False)
