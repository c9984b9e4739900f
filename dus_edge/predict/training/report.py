"""What a person, or a program, is told of a planned training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dus_edge.predict.training.memory import TrainingMemory
from dus_edge.predict.training.verdict import KEPT_STATES, TrainingVerdict
from dus_edge.predict.training.work import TrainingWork
from dus_edge.words import WIDTH, figure, format_bytes, format_count, wrap


def memory_lines(memory: TrainingMemory) -> list[str]:
    """Bytes by purpose at the peak of a step, and where that is; what the trainer shows too."""
    rows = (
        ("Weights", memory.weights_bytes),
        ("Optimizer", memory.optimizer_bytes),
        ("Gradients", memory.gradients_bytes),
        ("Activations", memory.activations_bytes),
        ("Logits", memory.logits_bytes),
        ("bf16 copies", memory.gathered_bytes),
        ("Overhead", memory.overhead_bytes),
    )
    lines = [f"{name:14} {format_bytes(n):>10}" for name, n in rows if n]
    return [*lines, f"{'Total':14} {format_bytes(memory.total_bytes):>10}   ({_where(memory)})"]


def training_text(v: TrainingVerdict) -> str:
    """What `dus-edge fit --train` prints."""
    lines = [
        *_head(v),
        *memory_lines(v.memory),
        f"{'Usable':14} {format_bytes(v.usable_bytes):>10}",
        "",
        _sentence(v),
    ]
    lines += [f"  {c.words:40} {format_bytes(c.memory.total_bytes):>10}" for c in v.changes]
    return "\n".join([*lines, "", *_speed_lines(v), *_disk_lines(v), "", _note(_notes(v.work))])


def training_json(v: TrainingVerdict) -> dict[str, Any]:
    """The same for programs; rates and hours have the ends of their interval beside them."""
    speed, hours, cost = v.speed, v.hours or (None,) * 3, v.cost or (None,) * 3
    return {
        "model": v.name,
        "device": v.device.id,
        "memory_gb": v.memory_gb,
        "platform": v.platform,
        "fits": v.fits,
        "training": asdict(v.work),
        "parameters": v.memory.parameters,
        "trained_parameters": v.memory.trained_parameters,
        "memory": {
            **{
                key: getattr(v.memory, key)
                for key in v.memory.__slots__
                if key.endswith("_bytes") and key not in ("checkpoint_bytes", "result_bytes")
            },
            "total_bytes": v.memory.total_bytes,
            "usable_bytes": v.usable_bytes,
            "peak": v.memory.peak,
        },
        "changes": [{"options": c.words, "total_bytes": c.memory.total_bytes} for c in v.changes],
        "flops_per_token": speed.flops_per_token if speed else None,
        "tokens_per_s": _digits(speed.tokens_per_s if speed else None),
        "tokens_per_s_low": _digits(speed.tokens_per_s_low if speed else None),
        "tokens_per_s_high": _digits(speed.tokens_per_s_high if speed else None),
        "why_no_speed": v.why_no_speed,
        "tokens": v.tokens,
        "hours": _digits(hours[0]),
        "hours_low": _digits(hours[1]),
        "hours_high": _digits(hours[2]),
        "cost": _digits(cost[0]),
        "cost_low": _digits(cost[1]),
        "cost_high": _digits(cost[2]),
        "state_bytes": v.memory.checkpoint_bytes,
        "result_bytes": v.memory.result_bytes,
        "disk_bytes": v.disk_bytes,
    }


def _digits(x: float | None) -> float | None:
    """Three digits: no prediction knows more."""
    return None if x is None else float(f"{x:.3g}")


def _where(memory: TrainingMemory) -> str:
    if memory.peak.startswith("layer "):
        return f"at its most in {memory.peak}'s backward pass"
    named = {
        "loss": "at the loss",
        "step": "in the optimizer's step",
        "embedding": "in the embedding's backward pass",
        "frozen layers": "in the frozen layers' forward pass",
    }
    return f"at its most {named[memory.peak]}"


def _head(v: TrainingVerdict) -> list[str]:
    work, memory = v.work, v.memory
    share = memory.trained_parameters / memory.parameters
    what = {"lora": "adapters", "qlora": "adapters on NF4"}.get(work.mode, "its own weights")
    cards = f"{work.gpus} x " if work.gpus > 1 else ""
    where = f", {v.platform}" if v.platform else ""
    each = " each" if work.gpus > 1 else ""
    setting = f"{work.precision}, {work.optimizer}"
    setting += ", checkpointing" if work.checkpointing else ""
    return [
        f"Training {v.name}: {work.mode}, {format_count(memory.trained_parameters)} of "
        f"{format_count(memory.parameters)}",
        f"{what} ({share:.1%}); {work.batch} x {work.sequence:,} tokens at a time, {setting}",
        f"on {cards}{v.device.name}, {v.memory_gb:g} GB{each}{where}",
    ]


def _sentence(v: TrainingVerdict) -> str:
    spare = v.usable_bytes - v.memory.total_bytes
    close = "That is close: what the system itself takes is not known so well.\n" if v.close else ""
    if v.fits:
        return f"{close}It fits, with {format_bytes(spare)} to spare."
    missing = f"{close}It does not fit, {format_bytes(-spare)} are missing"
    if v.changes:
        return f"{missing}. Each of these would:"
    return f"{missing},\nand neither does anything smaller that is planned here."


def _speed_lines(v: TrainingVerdict) -> list[str]:
    s = v.speed
    if s is None:
        return [_note(f"No speed is predicted: {v.why_no_speed}")]
    lines = [
        f"{'Speed':14} {figure(s.tokens_per_s):>10} tok/s, {figure(s.tokens_per_s_low)} to "
        f"{figure(s.tokens_per_s_high)} (predicted)"
    ]
    if v.hours and v.tokens:
        expected, least, most = v.hours
        lines.append(
            f"{'Time':14} {figure(expected):>10} hours, {figure(least)} to {figure(most)}, for "
            f"{format_count(v.tokens)} tokens"
        )
    if v.cost:
        expected, least, most = v.cost
        lines.append(
            f"{'Cost':14} {figure(expected):>10}, {figure(least)} to {figure(most)}, at "
            f"{v.price_per_hour:g} an hour and card"
        )
    return lines


def _disk_lines(v: TrainingVerdict) -> list[str]:
    return [
        f"{'Disk':14} {format_bytes(v.disk_bytes):>10}: {KEPT_STATES + 1} states of "
        f"{format_bytes(v.memory.checkpoint_bytes)}, result of "
        f"{format_bytes(v.memory.result_bytes)}"
    ]


def _notes(work: TrainingWork) -> str:
    if work.backend == "CPU":
        return (
            "glibc's heap may hold more than what is alive, 5 to 57 % in measured runs; with "
            "MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_MMAP_MAX_=1000000 in the environment it does "
            "not, at up to 1.7 times the CPU time."
        )
    said = (
        "All predicted. What torch's allocator keeps in reserve is not in it; the speed's interval "
        "is that of published runs on A100, H100 and RTX 4090."
    )
    if work.gpus > 1:
        said += " Nor is what NCCL takes, or what a slow link between cards costs."
    return said


def _note(text: str) -> str:
    return wrap(text, WIDTH - 1, long_words=False)
