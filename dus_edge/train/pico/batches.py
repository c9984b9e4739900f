"""Endless training sequences out of encoded documents, reproducible from a counter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Stream:
    """Documents in a shuffled row, read epoch by epoch in shuffled pieces of any length.

    The n-th piece depends on (seed, length, n) alone, so a counter is all the state that a
    resumed run needs. Each epoch shifts the cuts, so no epoch repeats another's pieces.
    """

    def __init__(self, documents: Sequence[np.ndarray], seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(documents))
        self.tokens = np.concatenate([documents[i] for i in order]).astype(np.int64)
        self.seed = seed
        self._orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def _order(self, epoch: int, length: int) -> tuple[int, np.ndarray]:
        """Return an epoch's shift of the cuts and its order of pieces."""
        key = (epoch, length)
        if key not in self._orders:
            rng = np.random.default_rng((self.seed, epoch, length))
            shift = int(rng.integers(length))
            pieces = (len(self.tokens) - 1 - shift) // length
            self._orders[key] = (shift, rng.permutation(pieces))
        return self._orders[key]

    def piece(self, start: int, length: int) -> np.ndarray:
        """Return int64 ids of shape (length + 1,), ``start`` tokens into the endless row."""
        per_epoch = (len(self.tokens) - 1) // length - 1
        epoch, index = divmod(start // length, per_epoch)
        shift, order = self._order(epoch, length)
        begin = shift + int(order[index]) * length
        return self.tokens[begin : begin + length + 1]
