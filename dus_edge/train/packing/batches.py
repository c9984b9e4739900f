"""Which tokens a step trains on: a pure function of the seed and the step, so resuming is free.

A batch has `batch` windows of equal length. Each comes from a stream drawn by weight; a stream's
documents follow each other in an order drawn anew for each pass over it, and are cut into windows.
Positions begin at 0 with every document and no label crosses from one to the next; attention is
kept apart by the positions (transformers finds the borders where they fall back to 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dus_edge.errors import UsageError
from dus_edge.train.packing.tokens import Stream

#: The label of a token that has no next one to predict.
NO_LABEL = -100


@dataclass(frozen=True)
class Batch:
    """Windows of packed documents, ``(n, length)`` int64 each.

    Attributes:
        ids: tokens.
        positions: within each document's part of the window.
        labels: the next token of the same document, or `NO_LABEL`.
    """

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


class Batches:
    """The windows of a whole run.

    Args:
        streams: with at least a window's worth of tokens each.
        weights: how much of the tokens each gives; need not add up to 1.
        length: tokens of a window.
        batch: windows of a step, over all processes.
        seed: of every draw.

    Raises:
        UsageError: a stream has too few tokens for one window.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Sequence[float],
        length: int,
        batch: int,
        seed: int,
    ) -> None:
        for stream in streams:
            if stream.n_tokens < length + 1:
                raise UsageError(
                    f"{stream.source}: the text in {stream.language!r} has {stream.n_tokens:,} "
                    f"tokens left to train on, and a window has {length:,}; give more text or a "
                    "shorter --ctx."
                )
        self.streams = tuple(streams)
        self.length, self.batch, self.seed = length, batch, seed
        self._edges = np.cumsum(np.array(weights, float)) / sum(weights)
        self._drawn = np.zeros((0, 2), np.int64)

    def step(self, step: int, part: slice = slice(None)) -> Batch:
        """The windows of a step, or some of them.

        Args:
            step: from 0.
            part: which of the step's windows, for a process of many.
        """
        slots = self._slots((step + 1) * self.batch)[step * self.batch :][part]
        windows = [self._window(int(stream), int(number)) for stream, number in slots]
        ids, starts, follow = (np.stack(column) for column in zip(*windows, strict=True))
        return _packed(ids, starts, follow)

    def passes(self, steps: int) -> dict[int, float]:
        """How often each stream is gone through in so many steps, by its place."""
        used = np.bincount(self._slots(steps * self.batch)[:, 0], minlength=len(self.streams))
        return {i: float(n) * self.length / self.streams[i].n_tokens for i, n in enumerate(used)}

    def _slots(self, n: int) -> np.ndarray:
        """Stream and number of its window for the first n windows of the run."""
        if len(self._drawn) < n:
            # A generator's first numbers do not depend on how many are asked for.
            draws = np.random.default_rng([self.seed, 0]).random(max(n, 1024))
            streams = np.searchsorted(self._edges, draws, side="right")
            streams = np.minimum(streams, len(self.streams) - 1)
            numbers = np.empty_like(streams)
            for i in range(len(self.streams)):
                mine = streams == i
                numbers[mine] = np.arange(mine.sum())
            self._drawn = np.stack([streams, numbers], 1)
        return self._drawn[:n]

    def _window(self, stream: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, where documents begin, and each token's successor or `NO_LABEL`."""
        n_windows = (self.streams[stream].n_tokens - 1) // self.length
        epoch, place = divmod(number, n_windows)
        order, ends = self._order(stream, epoch)
        first = place * self.length
        ids = np.empty(self.length + 1, np.int64)
        starts = np.zeros(self.length + 1, bool)
        at, index = 0, int(np.searchsorted(ends, first, side="right"))
        while at < self.length + 1:
            document = self.streams[stream].document(int(order[index]))
            begin = int(ends[index]) - len(document)
            part = document[first + at - begin :][: self.length + 1 - at]
            starts[at] = first + at == begin
            ids[at : at + len(part)] = part
            at, index = at + len(part), index + 1
        follow = np.where(starts[1:], NO_LABEL, ids[1:])
        return ids[:-1], starts[:-1], follow

    @lru_cache(maxsize=8)  # noqa: B019 - lives as long as the run
    def _order(self, stream: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents in the order of a pass, and where each ends in it."""
        found = self.streams[stream]
        order = np.random.default_rng([self.seed, 1, stream, epoch]).permutation(len(found.places))
        return order, np.cumsum(found.lengths[order])


def heldout_batches(streams: Sequence[Stream], length: int, batch: int) -> list[tuple[str, Batch]]:
    """All tokens of some streams in order, with their language; the last windows are filled up.

    Args:
        streams: held out.
        length: tokens of a window.
        batch: windows of a batch, at most.
    """
    found = []
    for stream in streams:
        documents = [stream.document(i).astype(np.int64) for i in range(len(stream.places))]
        ids = np.concatenate(documents)
        starts = np.zeros(len(ids), bool)
        starts[np.cumsum([0, *map(len, documents[:-1])])] = True
        follow = np.append(np.where(starts[1:], NO_LABEL, ids[1:]), NO_LABEL)
        n = -(-len(ids) // length)
        short = n * length - len(ids)
        # What fills up is a document of its own, without labels.
        ids = np.append(ids, np.full(short, ids[0]))
        filler = np.zeros(short, bool)
        filler[:1] = True
        starts = np.append(starts, filler)
        follow = np.append(follow, np.full(short, NO_LABEL))
        windows = [x.reshape(n, length) for x in (ids, starts, follow)]
        for first in range(0, n, batch):
            part = slice(first, first + batch)
            found.append((stream.language, _packed(*(w[part] for w in windows))))
    return found


def _packed(ids: np.ndarray, starts: np.ndarray, follow: np.ndarray) -> Batch:
    """Positions from where documents begin."""
    index = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    begun = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return Batch(ids, index - begun, follow)
