"""Speed of checkpoint folders through transformers, by llama-bench's method.

Plain folders and bitsandbytes' run in the number format that they are kept in. Folders of GPTQ
are dequantized when they are loaded, so their speed and memory are those of a plain model in
float32 (on a GPU, float16), not of a GPTQ kernel; `model_type` says so.
"""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dus_edge.errors import DusEdgeError
from dus_edge.machine import physical_cores, processor_name
from dus_edge.measure.measurement import About, Measurement
from dus_edge.measure.resources import Meter
from dus_edge.measure.timing import measurement, repeat
from dus_edge.measure.workload import BenchSettings, Workload
from dus_edge.progress import Advance
from dus_edge.run.folders import (
    NO_CODE_WEIGHTS,
    check_packages,
    check_whole,
    explained,
    hushed,
    load_gptq,
    torch_device,
    without_packed_4bit,
)
from dus_edge.run.source import SourceInfo, read_config

if TYPE_CHECKING:
    import torch


def measure_folder(
    info: SourceInfo, settings: BenchSettings, advance: Advance = lambda n: None
) -> list[Measurement]:
    """All tests of a folder; see `bench`.

    The prompt goes in at once or in pieces of `n_batch`; ubatches, types of the cache, layers on
    the GPU and flash attention are llama.cpp's alone.

    Raises:
        CheckpointError: the weights are damaged or incomplete.
        DependencyError: a package that reads this kind is not installed.
        UsageError: there is no such device.
        DusEdgeError: the device has too little memory.
    """
    check_packages(info)
    import torch

    _import_model(info)
    device = torch_device(settings.device or best_device())
    n_threads = settings.n_threads or physical_cores()
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    meter = Meter(on_gpu=device.type == "cuda")
    try:
        start = time.perf_counter()
        with _loaded(info, device) as model:
            _synchronize(device)
            load_s = time.perf_counter() - start
            about = _about(info, settings, model, device, n_threads)
            with torch.inference_mode(), hushed(), _enough_memory(info, device):
                return [
                    _measure(about, test, model, device, settings, load_s, meter, advance)
                    for test in settings.tests()
                ]
    finally:
        torch.set_num_threads(before)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def best_device() -> str:
    """``cuda`` or ``mps`` where torch has it, else ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _import_model(info: SourceInfo) -> None:
    """Import the model's code, which is no part of loading the weights and takes seconds."""
    import transformers

    for name in ("AutoModelForCausalLM", *(read_config(info.path).get("architectures") or ())):
        getattr(transformers, str(name), None)


def _measure(
    about: About,
    test: Workload,
    model: Any,
    device: torch.device,
    settings: BenchSettings,
    load_s: float,
    meter: Meter,
    advance: Advance,
) -> Measurement:
    meter.restart_peak()
    runner = _Runner(model, device, test, settings.n_batch)
    runner.warm_up()
    timing = repeat(runner.run, runner.prepare, settings.repetitions, meter, advance)
    return measurement(about, test, timing, load_s, meter)


class _Runner:
    """One test: the cache is filled to the depth once and cut back to it afterwards."""

    def __init__(self, model: Any, device: torch.device, test: Workload, n_batch: int) -> None:
        import torch

        self._model, self._device, self._test, self._n_batch = model, device, test, n_batch
        self._random = torch.Generator().manual_seed(0)
        self._cache: Any = None

    def warm_up(self) -> None:
        self._empty()
        if self._test.n_prompt:
            self._prompt(self._test.n_prompt)
        if self._test.n_gen:
            self._generate(1)
        self._empty()
        if self._test.n_depth:
            self._prompt(self._test.n_depth)

    def prepare(self) -> None:
        """The cache as it is before the test."""
        depth = self._test.n_depth
        added = self._cache.get_seq_length() - depth
        if depth and added:
            try:
                self._cache.crop(-added)
            except (ValueError, RuntimeError):  # a sliding window has forgotten what was there
                self._empty()
                self._prompt(depth)
        elif not depth:
            self._empty()

    def run(self) -> None:
        """What is timed."""
        if self._test.n_prompt:
            self._prompt(self._test.n_prompt)
        if self._test.n_gen:
            self._generate(self._test.n_gen)

    def _empty(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self._model.config)

    def _tokens(self, n: int) -> torch.Tensor:
        import torch

        n_vocab = self._model.config.vocab_size
        return torch.randint(n_vocab, (1, n), generator=self._random).to(self._device)

    def _prompt(self, n: int) -> None:
        for part in self._tokens(n).split(self._n_batch, dim=1):
            self._forward(part)
        _synchronize(self._device)

    def _generate(self, n: int) -> None:
        for token in self._tokens(n).split(1, dim=1):
            self._forward(token)
            _synchronize(self._device)

    def _forward(self, tokens: torch.Tensor) -> None:
        self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


@contextmanager
def _loaded(info: SourceInfo, device: torch.device) -> Iterator[Any]:
    load = load_gptq if info.kind == "gptq" else _load
    with hushed(), explained(info):
        model, found = load(info, device)
    check_whole(info, found)
    if info.kind == "gptq" and device.type != "cpu":
        model = model.half()
    yield model.eval()


def _load(info: SourceInfo, device: torch.device) -> tuple[Any, dict[str, Any]]:
    import transformers

    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        info.path,
        dtype="auto",
        **NO_CODE_WEIGHTS,
        output_loading_info=True,
        **({"device_map": {"": device}} if info.kind == "bitsandbytes" else {}),
    )
    if info.kind == "bitsandbytes":
        without_packed_4bit(model, always=False)
        return model, found
    return model.to(device), found


def _about(
    info: SourceInfo, settings: BenchSettings, model: Any, device: torch.device, n_threads: int
) -> About:
    import torch

    arithmetic = str(model.dtype).removeprefix("torch.")
    return About(
        engine=", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "torch")),
        build_commit=None,
        cpu_info=processor_name(),
        gpu_info=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        backends=device.type,
        model_filename=str(info.path),
        model_type=f"{model.config.model_type} {format_name(info, arithmetic)}",
        model_size=info.n_bytes,
        model_n_params=info.n_parameters,
        n_batch=settings.n_batch,
        n_threads=n_threads,
        type_k=arithmetic,
        type_v=arithmetic,
    )


def format_name(info: SourceInfo, arithmetic: str) -> str:
    """What the weights are in and are computed with, e.g. ``NF4 in bfloat16``."""
    details = read_config(info.path).get("quantization_config") or {}
    if info.kind == "gptq":
        return f"GPTQ int{details.get('bits')} dequantized to {arithmetic}"
    if info.kind == "bitsandbytes":
        if details.get("load_in_8bit"):
            return f"LLM.int8 in {arithmetic}"
        kind = str(details.get("bnb_4bit_quant_type", "fp4")).upper()
        return f"{kind} in {details.get('bnb_4bit_compute_dtype') or 'float32'}"
    return arithmetic


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _enough_memory(info: SourceInfo, device: torch.device) -> Iterator[None]:
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise DusEdgeError(
            f"{info.path}: {device} has too little memory for the model; take --device cpu or "
            "give a smaller -p, -n or --depth."
        ) from None
