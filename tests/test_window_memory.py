"""Predicted caches of layers that have a window, against what llama.cpp's log says it allocates."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import llama_cpp
import pytest

from dus_edge.checkpoint.config import load_config
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.export.ranges import copy_ranges
from dus_edge.predict.memory.llama import memory_use, model_of_config, read_gguf
from dus_edge.predict.stored_model import MIB, RunSettings
from dus_edge.quant.recipe import find_preset

from .cases import check_each
from .family_models import FAMILY_FORMS, Form, write_model
from .gguf_cases import SILENT
from .test_family_models import chooser

#: Windows that are no multiple of 256, heads large enough that a cell is seen in the log's digits.
CHANGES = {"sliding_window": 500, "max_position_embeddings": 32768, "head_dim": 64}


def form_of(name: str) -> Form:
    form = FAMILY_FORMS[name]
    return Form(form.family, {**form.config, **CHANGES})


@pytest.fixture(scope="module", params=["gemma2", "gemma3"])
def files(request, tmp_path_factory) -> list[Path]:
    """A base's folder; GGUFs of it, of an up-scaled one, and of that one up-scaled again."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_model(form_of(request.param), folder / "base")
    f16 = [find_preset("f16")]
    made = [
        export_gguf(str(base), chooser(plan), f16, folder / str(i)).outputs[0].path
        for i, plan in enumerate((None, "0:6,2:8"))
    ]
    made.append(copy_ranges(str(made[1]), chooser("0:8,4:12"), folder / "again").outputs[0].path)
    return [base, *made]


class Log:
    """What llama.cpp logs while contexts of a file are made."""

    def __init__(self, path: Path) -> None:
        self.lines: list[str] = []
        self._callback = llama_cpp.llama_log_callback(
            lambda level, text, user: self.lines.append(text.decode(errors="replace"))
        )
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model

    def cache_mib(self, settings: RunSettings) -> float:
        """The caches of a context, all together."""
        c = llama_cpp.llama_context_default_params()
        c.n_ctx = settings.context * settings.n_parallel
        c.n_batch, c.n_ubatch, c.n_threads = settings.batch, settings.ubatch, 1
        c.n_seq_max, c.swa_full = settings.n_parallel, False
        self.lines.clear()
        context = llama_cpp.llama_init_from_model(self.model, c)
        assert context
        llama_cpp.llama_free(context)
        return sum(map(float, re.findall(r"KV buffer size =\s*([\d.]+) MiB", "".join(self.lines))))

    def close(self) -> None:
        llama_cpp.llama_model_free(self.model)
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))


def test_caches_are_what_llama_cpp_allocates(files: list[Path]) -> None:
    def check_file(path: Path) -> None:
        log, stored = Log(path), read_gguf(path)

        def check(context: int, ubatch: int, parallel: int) -> None:
            settings = RunSettings(
                context=context, ubatch=ubatch, n_parallel=parallel, backend="CPU"
            )
            found = memory_use(stored, settings).kv_cache_bytes / MIB
            assert found == pytest.approx(log.cache_mib(settings), abs=0.011)

        try:
            check_each(check, (300, 1024, 8192, 20000), (128, 512), (1, 3))
        finally:
            log.close()

    check_each(check_file, files[1:])


def test_an_export_is_predicted_as_its_file(files: list[Path]) -> None:
    base, made, *_ = files
    planned = model_of_config(load_config(base / "config.json"), find_preset("f16"))
    assert planned.windows == read_gguf(made).windows
    assert set(planned.windows) == {500, None}
