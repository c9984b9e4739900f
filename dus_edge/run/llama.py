"""llama.cpp's library, by the low-level interface of llama-cpp-python: ready, silent, explained."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dus_edge.errors import CheckpointError
from dus_edge.packages import cannot_import

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR

#: What llama.cpp said was wrong; emptied before each call whose failure is to be explained.
errors: list[str] = []


@contextlib.contextmanager
def load_model(path: Path, *, vocab_only: bool = False, n_gpu_layers: int = 0) -> Iterator[Any]:
    """A loaded `llama_model *`, freed at the end."""
    lib = llama_library()
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = vocab_only, n_gpu_layers
    errors.clear()
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise CheckpointError(
            f"{path} cannot be loaded by llama.cpp{why()}; fetch or export it again."
        )
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def why(status: int | None = None) -> str:
    """The first error that llama.cpp spoke of since the list was cleared, in brackets."""
    code = [] if status is None else [f"code {status}"]
    # "function: error loading model: what it is"
    said = [re.sub(r"^\w+: (error loading model: )?", "", e.strip()) for e in errors[:1]]
    return f" ({', '.join(code + said)})" if code or said else ""


@functools.cache
def llama_library() -> ModuleType:
    """llama_cpp, ready for use and silent but for `errors`.

    Raises:
        DependencyError: it is not installed or does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as e:
        raise cannot_import("llama", "GGUF files are run by llama-cpp-python", e) from None
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _log_callback(llama_cpp: ModuleType) -> Any:
    """Keeps errors for messages; llama.cpp writes pages about every file. Never collected."""

    def log(level: int, text: bytes, data: object) -> None:
        if level == _LOG_ERROR:
            errors.append(text.decode(errors="replace"))

    return llama_cpp.llama_log_callback(log)
