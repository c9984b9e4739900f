"""What was measured: what ran on what, its times, and their statistics as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dus_edge.measure.resources import MeasuredMemory
from dus_edge.measure.workload import Workload


@dataclass(frozen=True)
class About:
    """What ran, on what. Names are the keys of ``llama-bench -o json`` where they mean the same.

    Attributes:
        engine: program and release.
        build_commit: llama.cpp's, where it is known.
        cpu_info, gpu_info: devices' names; empty where there is none, None if not known.
        backends: of ggml, or torch's device.
        model_filename: a path, or the name of a model of Ollama's.
        model_type: architecture, size and format, for people.
        model_size: bytes of all tensors; of folders, of the weights' files.
        model_n_params: weights.
    """

    engine: str
    build_commit: str | None
    cpu_info: str | None
    gpu_info: str | None
    backends: str | None
    model_filename: str
    model_type: str
    model_size: int | None
    model_n_params: int | None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_threads: int | None = None
    type_k: str | None = None
    type_v: str | None = None
    n_gpu_layers: int | None = None
    flash_attn: int | None = None


@dataclass(frozen=True)
class MeasuredSpeed:
    """Statistics of repetitions.

    Attributes:
        avg_ns, stddev_ns: of the times, whole nanoseconds.
        avg_ts, stddev_ts: of the rates, tokens per second.
        samples_ts: each repetition's rate.
    """

    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ts: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """One test of one model.

    Attributes:
        about: what ran.
        test: what was timed.
        samples_ns: time of each repetition, nanoseconds.
        samples_tokens: tokens of each repetition.
        time: when it ended, RFC 3339, UTC.
        load_s: seconds until the model was loaded; None if it was loaded before.
        time_to_first_token_s: mean seconds from a whole prompt until the first new token's
            logits are there (Ollama: until its text is); None where nothing measured it.
        memory: of this process, or what the server says of its own.
        joules_per_token: of what the driver counts; None where it does not.
        energy_source: see `resources.Meter.energy_source`.
    """

    about: About
    test: Workload
    samples_ns: tuple[int, ...]
    samples_tokens: tuple[int, ...]
    time: str
    load_s: float | None = None
    time_to_first_token_s: float | None = None
    memory: MeasuredMemory | None = None
    joules_per_token: float | None = None
    energy_source: str | None = None


def speed(samples_ns: Sequence[int], samples_tokens: Sequence[int]) -> MeasuredSpeed:
    """Means and sample standard deviations; a single repetition deviates by 0.

    llama-bench rounds inside its sums for ``stddev_ns``, so its last digits differ.
    """
    rates = [1e9 * n / ns for n, ns in zip(samples_tokens, samples_ns, strict=True)]
    several = len(rates) > 1
    return MeasuredSpeed(
        avg_ns=sum(samples_ns) // len(samples_ns),
        stddev_ns=round(statistics.stdev(samples_ns)) if several else 0,
        avg_ts=math.fsum(rates) / len(rates),
        stddev_ts=statistics.stdev(rates) if several else 0.0,
        samples_ts=tuple(rates),
    )


def measurement_json(m: Measurement) -> dict[str, Any]:
    """One line: llama-bench's keys, then ours, which have their units in their names."""
    s = speed(m.samples_ns, m.samples_tokens)
    return dataclasses.asdict(m.about) | {
        "n_prompt": m.test.n_prompt,
        "n_gen": m.test.n_gen,
        "n_depth": m.test.n_depth,
        "test_time": m.time,
        "avg_ns": s.avg_ns,
        "stddev_ns": s.stddev_ns,
        "avg_ts": s.avg_ts,
        "stddev_ts": s.stddev_ts,
        "samples_ns": list(m.samples_ns),
        "samples_ts": list(s.samples_ts),
        "test": m.test.name,
        "load_s": m.load_s,
        "time_to_first_token_s": m.time_to_first_token_s,
        "peak_memory_bytes": m.memory.peak_bytes if m.memory else None,
        "baseline_memory_bytes": m.memory.baseline_bytes if m.memory else None,
        "memory_source": m.memory.source if m.memory else None,
        "joules_per_token": m.joules_per_token,
        "energy_source": m.energy_source,
    }


def json_lines(measurements: Sequence[Measurement]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(measurement_json(m), allow_nan=False) + "\n" for m in measurements)
