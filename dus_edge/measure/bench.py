"""Speed as llama-bench measures it: settings, repetitions, statistics, and what is said of them.

The method is that of ``tools/llama-bench/llama-bench.cpp`` of llama.cpp: for each depth, prompt
processing (``pp512``) and then generation (``tg128``), each with a context of exactly the size it
needs and a pool of threads that stays; a warm-up of the whole prompt and of one token; before
each repetition the cache is emptied, and filled to the depth from a state that was kept; random
tokens, batches of 2048 in ubatches of 512, `llama_synchronize` after the prompt and after every
generated token. Means and sample standard deviations are of the repetitions' rates.

`measure_gguf`, `measure_hf` and `ollama_api` run the models; nothing heavy is imported before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.measure.resources import MeasuredMemory, Meter, joules_per_token
from dus_edge.progress import Advance, progress
from dus_edge.run.source import SourceInfo, inspect_source
from dus_edge.stream import default_threads
from dus_edge.words import WIDTH, format_bytes

ALL_LAYERS = -1
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
#: Formats that llama.cpp keeps keys and values in.
LLAMA_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


# What to measure


@dataclass(frozen=True)
class BenchSettings:
    """How to measure; names and defaults are llama-bench's.

    Attributes:
        n_prompt: tokens of the prompt; 0 measures no prompt processing.
        n_gen: tokens that are generated; 0 measures no generation.
        repetitions: of each test, after its warm-up.
        depths: tokens that are in the cache before a test.
        n_batch: tokens that are handed over at once.
        n_ubatch: tokens that are computed at once.
        n_threads: of the CPU; None for its physical cores.
        n_gpu_layers: layers on the GPU; -1 for all.
        type_k: what keys are kept in, one of `LLAMA_KV_TYPES`.
        type_v: the same of values.
        flash_attn: ``auto``, ``on`` or ``off``.
        device: torch's device for folders; None for a GPU where there is one.

    Raises:
        UsageError: a value that cannot be.
    """

    n_prompt: int = 512
    n_gen: int = 128
    repetitions: int = 5
    depths: tuple[int, ...] = (0,)
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = ALL_LAYERS
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: str = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        least = {"n_prompt": 0, "n_gen": 0, "repetitions": 1, "n_batch": 1, "n_ubatch": 1}
        sizes = [(name, getattr(self, name), n) for name, n in least.items()]
        sizes += [("depth", depth, 0) for depth in self.depths]
        sizes += [("n_gpu_layers", self.n_gpu_layers, ALL_LAYERS)]
        if self.n_threads is not None:
            sizes.append(("n_threads", self.n_threads, 1))
        for name, value, n in sizes:
            if value < n:
                raise UsageError(f"{name} is {value}; it must be at least {n}.")
        if not self.depths or not self.n_prompt + self.n_gen:
            raise UsageError("there is nothing to measure; give -p, -n or both above 0.")
        for name, value in (("type_k", self.type_k), ("type_v", self.type_v)):
            if value not in LLAMA_KV_TYPES:
                raise UsageError(f"{name} is {value!r}; take one of {', '.join(LLAMA_KV_TYPES)}.")
        if self.flash_attn not in FLASH_ATTN:
            raise UsageError(f"flash_attn is {self.flash_attn!r}; take auto, on or off.")

    def tests(self) -> tuple[Workload, ...]:
        """All tests, in llama-bench's order."""
        return tuple(
            Workload(n_prompt, n_gen, depth)
            for depth in self.depths
            for n_prompt, n_gen in ((self.n_prompt, 0), (0, self.n_gen))
            if n_prompt + n_gen
        )


@dataclass(frozen=True)
class Workload:
    """A prompt to process or tokens to generate, after `n_depth` tokens that are there."""

    n_prompt: int
    n_gen: int
    n_depth: int = 0

    @property
    def name(self) -> str:
        """``pp512``, ``tg128``, ``tg128 @ d4096``, as llama-bench calls it."""
        parts = [f"{kind}{n}" for kind, n in (("pp", self.n_prompt), ("tg", self.n_gen)) if n]
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed."""
        return self.n_prompt + self.n_gen

    @property
    def n_ctx(self) -> int:
        """Tokens that the cache must hold."""
        return self.n_tokens + self.n_depth


# What was measured


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


def speed_table(measurements: Sequence[Measurement]) -> str:
    """For people: a Markdown table, no line over 80 columns; memory includes the process's own."""
    head = ["model", "test", "tokens/s", "memory", "load s", "J/token"]
    rows = []
    for m in measurements:
        s = speed(m.samples_ns, m.samples_tokens)
        rows.append(
            [
                Path(m.about.model_filename).name,
                m.test.name,
                " ± ".join(f"{x:.{2 if s.avg_ts < 1e4 else 0}f}" for x in (s.avg_ts, s.stddev_ts)),
                format_bytes(m.memory.peak_bytes) if m.memory else "",
                "" if m.load_s is None else f"{m.load_s:.2f}",
                "" if m.joules_per_token is None else f"{m.joules_per_token:.3g}",
            ]
        )
    # Columns that say nothing are left out.
    kept = [i for i in range(len(head)) if i < 3 or any(row[i] for row in rows)]
    lines = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    room = WIDTH - sum(widths[1:]) - 3 * len(widths) - 1
    widths[0] = max(8, min(widths[0], room))
    rule = "|".join("-" * (w + 1) + ("-" if i < 2 else ":") for i, w in enumerate(widths))
    out = []
    for line in lines:
        cells = [_shortened(line[0], widths[0]).ljust(widths[0]), line[1].ljust(widths[1])]
        cells += [cell.rjust(w) for cell, w in zip(line[2:], widths[2:], strict=True)]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join([out[0], f"|{rule}|", *out[1:]])


def _shortened(text: str, width: int) -> str:
    """The beginning and the end, which names the format."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


# Measuring


def bench_run(models: Sequence[Path], settings: BenchSettings | None = None) -> list[Measurement]:
    """Measure models one after the other, with progress on stderr.

    Everything that can be refused is refused before the first model runs.

    Args:
        models: GGUF files, and checkpoint folders: plain, GPTQ or bitsandbytes.
        settings: None for llama-bench's own.

    Raises:
        UsageError: nothing under a name, or a test is longer than a model's context.
        CheckpointError: a damaged model.
        DependencyError: a package that runs one of the formats is not installed.
    """
    settings = settings or BenchSettings()
    infos = [inspect_source(model) for model in models]
    for info in infos:
        check_test_context(str(info.path), info.context_length, settings)
        if info.kind != "gguf":
            from dus_edge.run.folders import check_packages, torch_device

            check_packages(info)
            torch_device(settings.device or "cpu")
    found: list[Measurement] = []
    total = len(infos) * len(settings.tests()) * settings.repetitions
    with progress("Measuring", total, unit="runs") as advance:
        for info in infos:
            found += measure_model(info, settings, advance)
    return found


def measure_model(
    info: SourceInfo, settings: BenchSettings, advance: Advance = lambda n: None
) -> list[Measurement]:
    """All tests of one model; `advance` is told of each repetition, outside what is timed.

    Raises:
        CheckpointError: the weights are damaged.
        DusEdgeError: the model cannot be run, most often for want of memory.
    """
    if info.kind == "gguf":
        from dus_edge.measure.gguf import measure_gguf

        return measure_gguf(info, settings, advance)
    from dus_edge.measure.folder import measure_folder

    return measure_folder(info, settings, advance)


def check_test_context(name: str, limit: int, settings: BenchSettings) -> None:
    """See that every test fits the context that a model was made for; 0 is not known.

    Raises:
        UsageError: one does not.
    """
    longest = max(settings.tests(), key=lambda test: test.n_ctx)
    if 0 < limit < longest.n_ctx:
        raise UsageError(
            f"{name}: {longest.name} needs a context of {longest.n_ctx} tokens and the model's "
            f"ends at {limit}; give a smaller -p, -n or --depth."
        )


@dataclass(frozen=True)
class Timing:
    """Repetitions of one test: nanoseconds of each, and joules of all if they were counted."""

    samples_ns: tuple[int, ...]
    joules: float | None


def repeat(
    run: Callable[[], None],
    prepare: Callable[[], None],
    n: int,
    meter: Meter,
    advance: Advance,
) -> Timing:
    """Time `run` `n` times, each after an untimed `prepare`."""
    samples: list[int] = []
    joules: list[float | None] = []
    for _ in range(n):
        prepare()
        before = meter.counters()
        start = time.perf_counter_ns()
        run()
        samples.append(time.perf_counter_ns() - start)
        joules.append(meter.joules(before, meter.counters()))
        meter.poll()
        advance(1)
    counted = [j for j in joules if j is not None]
    return Timing(tuple(samples), math.fsum(counted) if len(counted) == n else None)


def measurement(
    about: About, test: Workload, timing: Timing, load_s: float, meter: Meter
) -> Measurement:
    """A finished test of this process, as a `Measurement`."""
    n, seconds = len(timing.samples_ns), sum(timing.samples_ns) / 1e9
    return Measurement(
        about=about,
        test=test,
        samples_ns=timing.samples_ns,
        samples_tokens=(test.n_tokens,) * n,
        time=now(),
        load_s=load_s,
        time_to_first_token_s=seconds / n if test.n_prompt and not test.n_gen else None,
        memory=meter.memory(),
        joules_per_token=joules_per_token(timing.joules, seconds, n * test.n_tokens),
        energy_source=meter.energy_source,
    )


def now() -> str:
    """This second, RFC 3339, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def physical_cores() -> int:
    """Cores without their hyper-threads, no more than this process may use.

    llama-bench's default of threads. Linux: different lines of ``thread_siblings``. macOS: the
    performance cores.
    """
    n = 0
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            said = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True).stdout
            n = n or int(said.strip() or 0)
    else:
        files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings")
        with contextlib.suppress(OSError):
            n = len({file.read_text() for file in files})
    return min(n, default_threads()) or default_threads()
