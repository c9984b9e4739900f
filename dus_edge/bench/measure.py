"""Speed as llama-bench measures it: GGUF files, in this process, by llama-cpp-python.

The method is that of ``tools/llama-bench/llama-bench.cpp`` of llama.cpp: for each depth, prompt
processing (``pp512``) and then generation (``tg128``), each with a context of exactly the size it
needs and a pool of threads that stays; a warm-up of the whole prompt and of one token; before
each repetition the cache is emptied, and filled to the depth from a state that was kept; random
tokens, batches of 2048 in ubatches of 512, `llama_synchronize` after the prompt and after every
generated token. Means and sample standard deviations are of the repetitions' rates.

What is summed up and printed is pure and shared with `measure_hf` and `ollama_api`; nothing
heavy is imported before a model runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.bench.logits import SourceInfo, inspect_source
from dus_edge.bench.resources import MemoryUse, Meter, joules_per_token
from dus_edge.errors import DusEdgeError, UsageError
from dus_edge.files import format_bytes
from dus_edge.progress import Advance, progress
from dus_edge.stream import default_threads

WIDTH = 80
ALL_LAYERS = -1
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
#: Formats that llama.cpp keeps keys and values in.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


# What to measure


@dataclass(frozen=True)
class Settings:
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
        type_k: what keys are kept in, one of `KV_TYPES`.
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
            if value not in KV_TYPES:
                raise UsageError(f"{name} is {value!r}; take one of {', '.join(KV_TYPES)}.")
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
class Speed:
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
    memory: MemoryUse | None = None
    joules_per_token: float | None = None
    energy_source: str | None = None


def speed(samples_ns: Sequence[int], samples_tokens: Sequence[int]) -> Speed:
    """Means and sample standard deviations; a single repetition deviates by 0.

    llama-bench rounds inside its sums for ``stddev_ns``, so its last digits differ.
    """
    rates = [1e9 * n / ns for n, ns in zip(samples_tokens, samples_ns, strict=True)]
    several = len(rates) > 1
    return Speed(
        avg_ns=sum(samples_ns) // len(samples_ns),
        stddev_ns=round(statistics.stdev(samples_ns)) if several else 0,
        avg_ts=math.fsum(rates) / len(rates),
        stddev_ts=statistics.stdev(rates) if several else 0.0,
        samples_ts=tuple(rates),
    )


def to_json(m: Measurement) -> dict[str, Any]:
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
    return "".join(json.dumps(to_json(m), allow_nan=False) + "\n" for m in measurements)


def table(measurements: Sequence[Measurement]) -> str:
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


def bench_run(models: Sequence[Path], settings: Settings | None = None) -> list[Measurement]:
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
    settings = settings or Settings()
    infos = [inspect_source(model) for model in models]
    for info in infos:
        check_context(str(info.path), info.context_length, settings)
        if info.kind != "gguf":
            from dus_edge.bench.hf_logits import check_packages, find_device

            check_packages(info)
            find_device(settings.device or "cpu")
    found: list[Measurement] = []
    total = len(infos) * len(settings.tests()) * settings.repetitions
    with progress("Measuring", total, unit="runs") as advance:
        for info in infos:
            found += measure(info, settings, advance)
    return found


def measure(
    info: SourceInfo, settings: Settings, advance: Advance = lambda n: None
) -> list[Measurement]:
    """All tests of one model; `advance` is told of each repetition, outside what is timed.

    Raises:
        CheckpointError: the weights are damaged.
        DusEdgeError: the model cannot be run, most often for want of memory.
    """
    if info.kind == "gguf":
        return measure_gguf(info, settings, advance)
    from dus_edge.bench.measure_hf import measure_folder

    return measure_folder(info, settings, advance)


def check_context(name: str, limit: int, settings: Settings) -> None:
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


# llama.cpp


def measure_gguf(
    info: SourceInfo, settings: Settings, advance: Advance = lambda n: None
) -> list[Measurement]:
    """All tests of a GGUF file; see `measure`."""
    from dus_edge.bench.gguf_logits import _library, _model

    lib, ggml = _library(), _Ggml()
    meter = Meter(on_gpu=settings.n_gpu_layers != 0 and "CUDA" in ggml.backends())
    n_threads = settings.n_threads or physical_cores()
    found = []
    start = time.perf_counter()
    with _model(info.path, n_gpu_layers=settings.n_gpu_layers) as model:
        load_s = time.perf_counter() - start
        buffer = ctypes.create_string_buffer(128)
        lib.llama_model_desc(model, buffer, len(buffer))
        about = About(
            engine=f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}",
            build_commit=ggml.commit(),
            cpu_info=ggml.devices(_Ggml.CPU, _Ggml.ACCELERATOR),
            gpu_info=ggml.devices(_Ggml.GPU, _Ggml.INTEGRATED_GPU),
            backends=ggml.backends(),
            model_filename=str(info.path),
            model_type=buffer.value.decode(errors="replace"),
            model_size=lib.llama_model_size(model),
            model_n_params=lib.llama_model_n_params(model),
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            n_threads=n_threads,
            type_k=settings.type_k,
            type_v=settings.type_v,
            n_gpu_layers=settings.n_gpu_layers,
            flash_attn=FLASH_ATTN[settings.flash_attn],
        )
        states: dict[int, Any] = {}
        for test in settings.tests():
            meter.restart_peak()
            with _context(info.path, model, test, settings) as context:
                runner = _Runner(info.path, model, context, test, settings.n_batch, n_threads)
                with ggml.threadpool(context, n_threads):
                    runner.warm_up()
                    timing = repeat(
                        runner.run,
                        functools.partial(runner.prepare, states),
                        settings.repetitions,
                        meter,
                        advance,
                    )
            found.append(measurement(about, test, timing, load_s, meter))
    return found


@contextlib.contextmanager
def _context(path: Path, model: Any, test: Workload, settings: Settings) -> Iterator[Any]:
    """A `llama_context *` as large as the test, freed at the end."""
    from gguf import GGMLQuantizationType

    from dus_edge.bench.gguf_logits import _errors, _library, _why

    lib = _library()
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = test.n_ctx, settings.n_batch, settings.n_ubatch
    params.type_k = GGMLQuantizationType[settings.type_k.upper()].value
    params.type_v = GGMLQuantizationType[settings.type_v.upper()].value
    params.flash_attn_type = FLASH_ATTN[settings.flash_attn]
    params.offload_kqv = params.op_offload = True
    params.embeddings = params.swa_full = False
    _errors.clear()
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise DusEdgeError(
            f"{path}: llama.cpp makes no context of {test.n_ctx} tokens{_why()}; give a smaller "
            "-p, -n or --depth, or other types of the cache."
        )
    try:
        yield context
    finally:
        lib.llama_free(context)


class _Runner:
    """One test on one context."""

    def __init__(
        self, path: Path, model: Any, context: Any, test: Workload, n_batch: int, n_threads: int
    ) -> None:
        from dus_edge.bench.gguf_logits import _library

        self._lib = lib = _library()
        self._path, self._context, self._test = path, context, test
        self._n_batch, self._n_threads = n_batch, n_threads
        vocab = lib.llama_model_get_vocab(model)
        self._n_vocab = lib.llama_vocab_n_tokens(vocab)
        self._bos = lib.llama_vocab_bos(vocab) if lib.llama_vocab_get_add_bos(vocab) else None
        self._memory = lib.llama_get_memory(context)
        # Which tokens they are makes no difference to the time.
        self._random = np.random.default_rng(0)

    def warm_up(self) -> None:
        self._lib.llama_memory_clear(self._memory, False)
        if self._test.n_prompt:
            self._prompt(self._test.n_prompt)
        if self._test.n_gen:
            self._generate(1)

    def prepare(self, states: dict[int, Any]) -> None:
        """An empty cache, or one with `n_depth` tokens; states are kept by their depth."""
        lib, depth = self._lib, self._test.n_depth
        lib.llama_memory_clear(self._memory, False)
        if not depth:
            return
        if depth in states:
            state = states[depth]
            if lib.llama_state_seq_set_data(self._context, state, len(state), 0):
                return
        self._prompt(depth)
        n = lib.llama_state_seq_get_size(self._context, 0)
        # Of one depth only: a state is as large as the cache.
        states.clear()
        states[depth] = (ctypes.c_uint8 * n)()
        lib.llama_state_seq_get_data(self._context, states[depth], n, 0)

    def run(self) -> None:
        """What is timed."""
        if self._test.n_prompt:
            self._prompt(self._test.n_prompt)
        if self._test.n_gen:
            self._generate(self._test.n_gen)

    def _tokens(self, n: int) -> Any:
        tokens = self._random.integers(0, self._n_vocab, n, np.int32)
        if self._bos is not None:
            tokens[0] = self._bos
        return (self._lib.llama_token * n).from_buffer(tokens)

    def _prompt(self, n: int) -> None:
        lib, context = self._lib, self._context
        lib.llama_set_n_threads(context, self._n_threads, self._n_threads)
        tokens = self._tokens(n)
        first = ctypes.cast(tokens, ctypes.POINTER(lib.llama_token))
        for at in range(0, n, self._n_batch):
            part = ctypes.cast(
                ctypes.byref(first.contents, at * ctypes.sizeof(lib.llama_token)),
                ctypes.POINTER(lib.llama_token),
            )
            batch = lib.llama_batch_get_one(part, min(self._n_batch, n - at))
            self._check(lib.llama_decode(context, batch))
        lib.llama_synchronize(context)

    def _generate(self, n: int) -> None:
        lib, context = self._lib, self._context
        decode, synchronize = lib.llama_decode, lib.llama_synchronize
        lib.llama_set_n_threads(context, self._n_threads, self._n_threads)
        tokens = list(self._tokens(n))
        one = (lib.llama_token * 1)()
        batch = lib.llama_batch_get_one(one, 1)
        for token in tokens:
            one[0] = token
            if status := decode(context, batch):
                self._check(status)
            synchronize(context)

    def _check(self, status: int) -> None:
        if status:
            raise DusEdgeError(f"{self._path}: llama.cpp cannot run the model (code {status}).")


class _ThreadpoolParams(ctypes.Structure):
    """`struct ggml_threadpool_params` of ggml/include/ggml.h."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class _Ggml:
    """What llama-bench asks of llama.cpp and llama-cpp-python has no names for."""

    CPU, GPU, INTEGRATED_GPU, ACCELERATOR = range(4)  # enum ggml_backend_dev_type
    _POLL = 50  # ggml's default, and llama-bench's

    def __init__(self) -> None:
        import llama_cpp

        ending = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
        prefix = "" if sys.platform == "win32" else "lib"
        folder = Path(llama_cpp.__file__).parent / "lib"
        base, registry, llama = (
            ctypes.CDLL(str(folder / f"{prefix}{name}{ending}"))
            for name in ("ggml-base", "ggml", "llama")
        )
        self._base, self._registry, self._llama = base, registry, llama
        pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
        for function, result, arguments in (
            (base.ggml_commit, text, []),
            (base.ggml_backend_dev_description, text, [pointer]),
            (base.ggml_backend_dev_type, ctypes.c_int, [pointer]),
            (base.ggml_backend_dev_backend_reg, pointer, [pointer]),
            (base.ggml_backend_reg_name, text, [pointer]),
            (base.ggml_backend_reg_get_proc_address, pointer, [pointer, text]),
            (base.ggml_threadpool_params_init, None, [pointer, ctypes.c_int]),
            (registry.ggml_backend_dev_count, size, []),
            (registry.ggml_backend_dev_get, pointer, [size]),
            (registry.ggml_backend_dev_by_type, pointer, [ctypes.c_int]),
            (registry.ggml_backend_reg_count, size, []),
            (registry.ggml_backend_reg_get, pointer, [size]),
            (llama.llama_attach_threadpool, None, [pointer, pointer, pointer]),
            (llama.llama_detach_threadpool, None, [pointer]),
        ):
            function.restype, function.argtypes = result, arguments

    def commit(self) -> str:
        """Of ggml, which is llama.cpp's."""
        return self._base.ggml_commit().decode()

    def devices(self, *kinds: int) -> str:
        """Names of the devices of these kinds."""
        n, get = self._registry.ggml_backend_dev_count(), self._registry.ggml_backend_dev_get
        found = [get(i) for i in range(n)]
        return ", ".join(
            self._base.ggml_backend_dev_description(device).decode()
            for device in found
            if self._base.ggml_backend_dev_type(device) in kinds
        )

    def backends(self) -> str:
        """``CPU``, or all others: ``CUDA``, ``Metal,BLAS``."""
        n, get = self._registry.ggml_backend_reg_count(), self._registry.ggml_backend_reg_get
        names = [self._base.ggml_backend_reg_name(get(i)).decode() for i in range(n)]
        return ",".join(name for name in names if name != "CPU") or "CPU"

    @contextlib.contextmanager
    def threadpool(self, context: Any, n_threads: int) -> Iterator[None]:
        """Attach threads that stay; without them a build without OpenMP starts some per token.

        Not done where the library's structure is not the one that is known here.
        """
        params = self._params(n_threads)
        cpu = self._registry.ggml_backend_dev_by_type(self.CPU)
        if params is None or not cpu:
            yield
            return
        backend = self._base.ggml_backend_dev_backend_reg(cpu)
        find = self._base.ggml_backend_reg_get_proc_address
        new = find(backend, b"ggml_threadpool_new")
        free = find(backend, b"ggml_threadpool_free")
        if not new or not free:
            yield
            return
        reference = ctypes.POINTER(_ThreadpoolParams)
        pool = ctypes.CFUNCTYPE(ctypes.c_void_p, reference)(new)(ctypes.byref(params))
        self._llama.llama_attach_threadpool(context, pool, None)
        try:
            yield
        finally:
            self._llama.llama_detach_threadpool(context)
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(free)(pool)

    def _params(self, n_threads: int) -> _ThreadpoolParams | None:
        """ggml's defaults; None if it does not fill the structure as we read it."""
        size = ctypes.sizeof(_ThreadpoolParams)
        room = (ctypes.c_uint8 * (4 * size))(*([0xAA] * (4 * size)))
        self._base.ggml_threadpool_params_init(room, n_threads)
        params = _ThreadpoolParams.from_buffer_copy(bytes(room)[:size])
        # Two bytes at the end only align the structure.
        untouched = all(byte == 0xAA for byte in room[size:])
        known = (params.n_threads, params.poll) == (n_threads, self._POLL)
        return params if untouched and known and not any(params.cpumask) else None
