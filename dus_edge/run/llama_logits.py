"""GGUF files through llama.cpp, by the low-level interface of llama-cpp-python.

The key/value cache is float32 and flash attention is off, so that differences come from the
weights and from what llama.cpp's kernels make of them.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dus_edge.errors import DusEdgeError
from dus_edge.machine import default_threads
from dus_edge.run.llama import UBATCH_TOKENS, llama_library, load_model, new_context, why
from dus_edge.run.llama_text import LlamaText
from dus_edge.run.source import SourceInfo, log_softmax

_ALL_LAYERS = -1


def inspect_gguf(path: Path, name: str, n_bytes: int) -> SourceInfo:
    """Vocabulary, parameters and context of a GGUF file; a truncated file is found here.

    Raises:
        CheckpointError: llama.cpp cannot load the file.
        DependencyError: llama-cpp-python is not installed.
    """
    with load_model(path, vocab_only=True) as model:
        lib = llama_library()
        architecture = _metadata(model, "general.architecture")
        context = _metadata(model, f"{architecture}.context_length")
        return SourceInfo(
            path=path,
            name=name,
            kind="gguf",
            vocab_size=lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)),
            n_bytes=n_bytes,
            n_parameters=lib.llama_model_n_params(model),
            context_length=int(context) if context.isdecimal() else 0,
        )


class GGUFTokenizer:
    """A GGUF file's own tokenizer, as `dus_edge.text.chunks.Tokenizer`.

    Attributes:
        bos_id: the token that is put before a text; None if none is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = contextlib.ExitStack()
        model = self._stack.enter_context(load_model(path, vocab_only=True))
        self._text = LlamaText(model, path)
        self.bos_id = self._text.bos_id if self._text.adds_bos else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens that are spelled out in it are text."""
        return self._text.encode(text, special=False, spelled=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.close()


class GGUFSource:
    """A loaded GGUF file; see `dus_edge.run.source.LogitSource`."""

    def __init__(self, info: SourceInfo, device: str, n_threads: int | None) -> None:
        self.info = info
        self._n_threads = n_threads or default_threads()
        self._stack = contextlib.ExitStack()
        n_gpu_layers = 0 if device == "cpu" else _ALL_LAYERS
        self._model = self._stack.enter_context(load_model(info.path, n_gpu_layers=n_gpu_layers))
        # Made by the first chunk, which says how long they are.
        self._n_ctx = 0
        self._context: Any = None
        self._batch: Any = None

    def log_probs(self, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """See `LogitSource.log_probs`."""
        lib, n = llama_library(), len(tokens)
        if n > self._n_ctx:
            self._make_context(n)
        batch = self._batch
        batch.n_tokens = n
        for i, token in enumerate(tokens.tolist()):
            batch.token[i] = token
            batch.pos[i] = i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= start
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        if status := lib.llama_decode(self._context, batch):
            raise DusEdgeError(f"{self.info.path}: llama.cpp cannot run the model{why(status)}.")
        pointer = lib.llama_get_logits(self._context)
        return log_softmax(np.ctypeslib.as_array(pointer, (n - start, self.info.vocab_size)))

    def _make_context(self, n: int) -> None:
        lib = llama_library()
        self._free_context()
        self._context = new_context(
            self._model,
            self.info.path,
            n_threads=self._n_threads,
            n_ctx=n,
            n_batch=n,
            n_ubatch=min(n, UBATCH_TOKENS),
        )
        self._batch = lib.llama_batch_init(n, 0, 1)
        self._n_ctx = n

    def _free_context(self) -> None:
        if self._context:
            llama_library().llama_batch_free(self._batch)
            llama_library().llama_free(self._context)
        self._context, self._n_ctx = None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._free_context()
        self._stack.close()


def _metadata(model: Any, key: str) -> str:
    """A metadata value as text; empty if there is none."""
    buffer = ctypes.create_string_buffer(256)
    n = llama_library().llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace") if n >= 0 else ""
