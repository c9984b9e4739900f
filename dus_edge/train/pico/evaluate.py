"""Bits per UTF-8 byte of held-out text, for the model and for simple baselines."""

from __future__ import annotations

import lzma
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, STRIDE = 512, 256

Logits = Callable[[Tensor], Tensor]
"""A function from int64 ids (batch, time) to f32 logits (batch, time, vocabulary)."""


def windows(length: int, window: int = WINDOW, stride: int = STRIDE) -> list[tuple[int, int, int]]:
    """Cut positions 0..length-1 into (start, stop, first scored position) windows.

    Each position but 0 (the start token) is scored in exactly one window; all windows but the
    first give at least ``window - stride`` tokens of context.
    """
    found, scored, start = [], 1, 0
    while scored < length:
        stop = min(start + window, length)
        found.append((start, stop, scored))
        scored, start = stop, start + stride
    return found


@torch.inference_mode()
def document_bits(logits: Logits, ids: Sequence[int] | np.ndarray) -> float:
    """Return the bits which the model needs for ``ids[1:]``; ``ids`` starts with ``<s>``."""
    tokens = torch.as_tensor(np.asarray(ids, dtype=np.int64))
    nats = 0.0
    for start, stop, scored in windows(len(tokens)):
        # The last token is only a target, so it stays out of the input.
        out = logits(tokens[None, start : stop - 1])[0, scored - 1 - start :]
        nats += F.cross_entropy(out.float(), tokens[scored:stop], reduction="sum").item()
    return nats / math.log(2)


def bits_per_byte(logits: Logits, documents: Iterable[np.ndarray], text_bytes: int) -> float:
    """Return the model's bits per UTF-8 byte over whole documents (each ``[<s>, ...]``)."""
    return sum(document_bits(logits, ids) for ids in documents) / text_bytes


def order0_bits(counts: Counter, symbols: Iterable[int], alphabet: int) -> float:
    """Return the bits of ``symbols`` under add-one smoothed order-0 ``counts``."""
    total = sum(counts.values()) + alphabet
    wanted = Counter(symbols)
    return sum(n * -math.log2((counts[symbol] + 1) / total) for symbol, n in wanted.items())


def unigram_byte_bits(train: Iterable[str], heldout: Sequence[str]) -> float:
    """Return bits per byte of an order-0 byte model fitted on ``train``."""
    counts: Counter = Counter()
    for text in train:
        counts.update(text.encode("utf-8"))
    data = "".join(heldout).encode("utf-8")
    return order0_bits(counts, data, 256) / len(data)


def unigram_token_bits(
    train: Iterable[np.ndarray], heldout: Sequence[np.ndarray], vocab: int, text_bytes: int
) -> float:
    """Return bits per byte of an order-0 token model fitted on ``train`` ids."""
    counts: Counter = Counter()
    for ids in train:
        counts.update(ids[1:].tolist())
    symbols = (token for ids in heldout for token in ids[1:].tolist())
    return order0_bits(counts, symbols, vocab) / text_bytes


def xz_bits(heldout: Sequence[str]) -> float:
    """Return bits per byte of ``xz -9`` on the concatenated held-out text."""
    data = "".join(heldout).encode("utf-8")
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
