"""Trees of shared prefixes through llama.cpp: one `llama_decode` a step.

A token that several continuations share is computed once and belongs to all their sequences: each
leaf of a step's tree is a sequence of llama.cpp, and a token names those that end below it (see
`llama_batch` in include/llama.h, and the tests of sets of sequences in src/llama-batch.cpp).
Sequence 0 holds the common prefix. Flash attention is off.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dus_edge.errors import DusEdgeError
from dus_edge.run.llama import (
    UBATCH_TOKENS,
    CacheType,
    errors,
    llama_library,
    new_context,
    why,
)
from dus_edge.run.tree import TreeStep


class LlamaTree:
    """An engine for steps of `dus_edge.run.tree.tree_steps`."""

    def __init__(
        self,
        model: Any,
        path: Path,
        *,
        steps: Sequence[TreeStep],
        n_threads: int,
        cache: CacheType,
    ) -> None:
        """
        Args:
            model: of `dus_edge.run.llama.load_model`; freed by its owner, after this.
            path: of its file, for messages.
            steps: all that it will be asked.
            n_threads: of the CPU.
            cache: type of keys and values.

        Raises:
            DusEdgeError: llama.cpp makes no context of that size.
        """
        lib = llama_library()
        self._path = path
        n_sequences = 1 + max(step.tree.n_leaves for step in steps)
        # llama.cpp reserves an output for each sequence, and a batch must hold them.
        n_batch = max(n_sequences, *(len(step.tree.tokens) for step in steps))
        self._context = new_context(
            model,
            path,
            n_threads=n_threads,
            cache=cache,
            n_ctx=max(step.base + len(step.tree.tokens) for step in steps),
            n_batch=n_batch,
            n_ubatch=max(n_sequences, min(n_batch, UBATCH_TOKENS)),
            n_seq_max=n_sequences,
            kv_unified=True,
        )
        self._stack = contextlib.ExitStack()
        self._stack.callback(lib.llama_free, self._context)
        self._memory = lib.llama_get_memory(self._context)
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._sequences = np.arange(n_sequences, dtype=np.int32)
        self._kept = 0

    def compute(self, step: TreeStep) -> np.ndarray:
        """Logits of the rows that the step reads, float32, ``(n_read, vocab)``.

        They are llama.cpp's own buffer, good until the next step.

        Raises:
            DusEdgeError: llama.cpp cannot run the model.
        """
        lib, tree = llama_library(), step.tree
        if step.base < self._kept:
            lib.llama_memory_seq_rm(self._memory, 0, step.base, -1)
            self._kept = step.base
        first = 0 if step.keep else 1
        leaves = range(1, 0 if step.keep else tree.n_leaves + 1)
        if self._kept:
            for leaf in leaves:
                lib.llama_memory_seq_cp(self._memory, 0, leaf, -1, -1)
        self._decode(step, first)
        for leaf in leaves:
            lib.llama_memory_seq_rm(self._memory, leaf, -1, -1)
        if step.keep:
            self._kept += len(tree.tokens)
        if not len(tree.read):
            return np.empty((0, self._vocab_size), np.float32)
        pointer = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (len(tree.read), self._vocab_size))

    def _decode(self, step: TreeStep, first: int) -> None:
        lib, tree = llama_library(), step.tree
        n = len(tree.tokens)
        token = tree.tokens.astype(np.int32)
        position = tree.positions.astype(np.int32)
        spans = tree.leaves if not step.keep else np.tile(np.array([0, 1]), (n, 1))
        counts = (spans[:, 1] - spans[:, 0]).astype(np.int32)
        # Leaves below a token are numbered in a row, so its set is a piece of one array.
        starts = self._sequences.ctypes.data + 4 * (spans[:, 0] + first)
        addresses = starts.astype(np.uint64)
        wanted = np.zeros(n, np.int8)
        wanted[tree.read] = 1
        batch = lib.llama_batch()
        batch.n_tokens = n
        for field, array in (
            ("token", token),
            ("pos", position),
            ("n_seq_id", counts),
            ("seq_id", addresses),
            ("logits", wanted),
        ):
            kind = type(getattr(batch, field))
            setattr(batch, field, ctypes.cast(ctypes.c_void_p(array.ctypes.data), kind))
        errors.clear()
        if status := lib.llama_decode(self._context, batch):
            raise DusEdgeError(f"{self._path}: llama.cpp cannot run the model{why(status)}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.close()
