"""llama.cpp's library, by the low-level interface of llama-cpp-python: ready, silent, explained."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from dus_edge.errors import CheckpointError, DusEdgeError
from dus_edge.packages import cannot_import

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR

CacheType = Literal["f32", "f16"]
_GGML_TYPES = {"f32": 0, "f16": 1}
#: Tokens that llama.cpp computes at once; its own default, and what bounds its buffers.
UBATCH_TOKENS = 512

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


def new_context(
    model: Any, path: Path, *, n_threads: int, cache: CacheType = "f32", **sizes: Any
) -> Any:
    """A `llama_context *` without flash attention, to be freed by `llama_free`.

    Args:
        model: of `load_model`.
        path: of its file, for messages.
        n_threads: of the CPU.
        cache: type of keys and values.
        sizes: further fields of `llama_context_params`, ``n_ctx`` among them.

    Raises:
        DusEdgeError: llama.cpp makes none of that size.
    """
    lib = llama_library()
    params = lib.llama_context_default_params()
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = params.type_v = _GGML_TYPES[cache]
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for name, value in sizes.items():
        setattr(params, name, value)
    errors.clear()
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise DusEdgeError(f"{path}: llama.cpp makes no context of {params.n_ctx} tokens{why()}.")
    return context


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
