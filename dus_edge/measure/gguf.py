"""GGUF files as llama-bench measures them, in this process, by llama-cpp-python.

Source of the method: ``tools/llama-bench/llama-bench.cpp`` of llama.cpp; see `bench`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dus_edge.errors import DusEdgeError
from dus_edge.machine import physical_cores
from dus_edge.measure.measurement import About, Measurement
from dus_edge.measure.resources import Meter
from dus_edge.measure.timing import measurement, repeat
from dus_edge.measure.workload import FLASH_ATTN, BenchSettings, Workload
from dus_edge.progress import Advance
from dus_edge.run.ggml import Ggml
from dus_edge.run.llama import errors, llama_library, load_model, why
from dus_edge.run.source import SourceInfo


def measure_gguf(
    info: SourceInfo, settings: BenchSettings, advance: Advance = lambda n: None
) -> list[Measurement]:
    """All tests of a GGUF file; see `bench`."""
    lib, ggml = llama_library(), Ggml()
    meter = Meter(on_gpu=settings.n_gpu_layers != 0 and "CUDA" in ggml.backends())
    n_threads = settings.n_threads or physical_cores()
    found = []
    start = time.perf_counter()
    with load_model(info.path, n_gpu_layers=settings.n_gpu_layers) as model:
        load_s = time.perf_counter() - start
        buffer = ctypes.create_string_buffer(128)
        lib.llama_model_desc(model, buffer, len(buffer))
        about = About(
            engine=f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}",
            build_commit=ggml.commit(),
            cpu_info=ggml.devices(Ggml.CPU, Ggml.ACCELERATOR),
            gpu_info=ggml.devices(Ggml.GPU, Ggml.INTEGRATED_GPU),
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
def _context(path: Path, model: Any, test: Workload, settings: BenchSettings) -> Iterator[Any]:
    """A `llama_context *` as large as the test, freed at the end."""
    from gguf import GGMLQuantizationType

    lib = llama_library()
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = test.n_ctx, settings.n_batch, settings.n_ubatch
    params.type_k = GGMLQuantizationType[settings.type_k.upper()].value
    params.type_v = GGMLQuantizationType[settings.type_v.upper()].value
    params.flash_attn_type = FLASH_ATTN[settings.flash_attn]
    params.offload_kqv = params.op_offload = True
    params.embeddings = params.swa_full = False
    errors.clear()
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise DusEdgeError(
            f"{path}: llama.cpp makes no context of {test.n_ctx} tokens{why()}; give a smaller "
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
        self._lib = lib = llama_library()
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
