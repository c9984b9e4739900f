"""Speed of models on this machine, as llama-bench measures it.

The method is that of ``tools/llama-bench/llama-bench.cpp`` of llama.cpp: for each depth, prompt
processing (``pp512``) and then generation (``tg128``), each with a context of exactly the size it
needs and a pool of threads that stays; a warm-up of the whole prompt and of one token; before
each repetition the cache is emptied, and filled to the depth from a state that was kept; random
tokens, batches of 2048 in ubatches of 512, `llama_synchronize` after the prompt and after every
generated token. Means and sample standard deviations are of the repetitions' rates.

`gguf` and `folder` run the models here, `ollama` has its server run them; nothing heavy is imported
before one runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dus_edge.measure.folder import measure_folder
from dus_edge.measure.gguf import measure_gguf
from dus_edge.measure.measurement import Measurement
from dus_edge.measure.workload import BenchSettings, check_test_context
from dus_edge.progress import Advance, progress
from dus_edge.run.folders import check_packages, torch_device
from dus_edge.run.open import inspect_source
from dus_edge.run.source import SourceInfo


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
        return measure_gguf(info, settings, advance)
    return measure_folder(info, settings, advance)
