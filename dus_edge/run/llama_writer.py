"""Greedy text of GGUF files through llama.cpp, several prompts side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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

#: Prompts at once: each step reads all weights once, whatever the number.
N_SLOTS = 4


class _Slot:
    """A prompt that is being answered."""

    def __init__(self, number: int, prompt: Sequence[int]) -> None:
        self.number = number
        self.position = len(prompt)
        self.written: list[int] = []


def write_greedily(
    model: Any,
    path: Path,
    prompts: Sequence[Sequence[int]],
    *,
    n_new: int,
    finished: Callable[[list[int]], bool],
    n_threads: int,
    cache: CacheType,
) -> Iterator[tuple[int, list[int]]]:
    """The likeliest token each time, until a text is finished.

    Args:
        model: of `dus_edge.run.llama.load_model`.
        path: of its file, for messages.
        prompts: token ids, at least one each.
        n_new: most tokens behind each.
        finished: whether what was written so far, its end-of-text token included, is all.
        n_threads: of the CPU.
        cache: type of keys and values.

    Yields:
        The number of a prompt and what was written behind it, as they are finished.

    Raises:
        DusEdgeError: llama.cpp cannot run the model.
    """
    lib = llama_library()
    n_slots = min(N_SLOTS, len(prompts))
    length = max(len(p) for p in prompts) + n_new
    n_batch = max(max(len(p) for p in prompts), n_slots)
    context = new_context(
        model,
        path,
        n_threads=n_threads,
        cache=cache,
        # Cells come in blocks of 256 (llama_kv_cache's padding), for each sequence of its own.
        n_ctx=n_slots * -(-length // 256) * 256,
        n_batch=n_batch,
        n_ubatch=min(n_batch, UBATCH_TOKENS),
        n_seq_max=n_slots,
    )
    vocab = lib.llama_model_get_vocab(model)
    with contextlib.ExitStack() as stack:
        stack.callback(lib.llama_free, context)
        batch = lib.llama_batch_init(n_batch, 0, 1)
        stack.callback(lib.llama_batch_free, batch)
        width = lib.llama_vocab_n_tokens(vocab)

        def decode(tokens: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
            """Run (token, position, sequence, whether it is read); the likeliest next ones."""
            batch.n_tokens = len(tokens)
            for i, (token, position, sequence, read) in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = read
            errors.clear()
            if status := lib.llama_decode(context, batch):
                raise DusEdgeError(f"{path}: llama.cpp cannot run the model{why(status)}.")
            n_read = sum(read for _, _, _, read in tokens)
            rows = np.ctypeslib.as_array(lib.llama_get_logits(context), (n_read, width))
            return rows.argmax(axis=1)

        waiting = list(range(len(prompts)))
        slots: dict[int, _Slot] = {}
        while waiting or slots:
            for sequence in range(n_slots):
                if sequence not in slots and waiting:
                    number = waiting.pop(0)
                    prompt = prompts[number]
                    lib.llama_memory_seq_rm(lib.llama_get_memory(context), sequence, -1, -1)
                    last = len(prompt) - 1
                    slot = _Slot(number, prompt)
                    rows = decode([(t, i, sequence, i == last) for i, t in enumerate(prompt)])
                    slot.written.append(int(rows[0]))
                    slots[sequence] = slot
            for sequence, slot in list(slots.items()):
                ended = lib.llama_vocab_is_eog(vocab, slot.written[-1])
                if ended or len(slot.written) >= n_new or finished(slot.written):
                    yield slot.number, slot.written[:-1] if ended else slot.written
                    del slots[sequence]
            if slots and (not waiting or len(slots) == n_slots):
                order = list(slots.items())
                rows = decode([(s.written[-1], s.position, q, True) for q, s in order])
                for (_, slot), token in zip(order, rows, strict=True):
                    slot.position += 1
                    slot.written.append(int(token))
