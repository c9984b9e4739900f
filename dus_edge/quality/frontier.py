"""The frontier of size and divergence: files that no file of their size or below beats.

What a file says of itself takes some hundred bytes, so two files of one preset are rarely equal to
the byte. Without some slack a file with fewer words in its header would stand beside a better one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from dus_edge.quality.compare import Results

#: Sizes that are at most this share apart count as equal.
SAME_SIZE = 0.001


def on_frontier(
    sizes: Sequence[float], losses: Sequence[float | None], slack: float = SAME_SIZE
) -> list[bool]:
    """Which of several files lie on the Pareto frontier.

    A file is off it if another one that is at most ``1 + slack`` times as large loses less, or
    loses the same and is smaller. Of equal files either all are on it or none. From the smallest
    to the largest, files on it lose less and less.

    Args:
        sizes: of the files, above 0.
        losses: what each loses; None and what is not finite is never on the frontier.
        slack: share by which a file may be larger and still count as no larger.
    """
    places = [(s, x) for s, x in zip(sizes, losses, strict=True) if _counts(x)]
    return [
        _counts(loss)
        and not any(
            (x < loss and s <= size * (1 + slack)) or (x == loss and s < size) for s, x in places
        )
        for size, loss in zip(sizes, losses, strict=True)
    ]


def frontier(results: Results, language: str | None = None) -> list[bool]:
    """Which candidates lie on it by their mean divergence, on all text or on one language's."""
    scores = [c.total if language is None else c.by_language[language] for c in results.candidates]
    return on_frontier([c.info.n_bytes for c in results.candidates], [s.kl.value for s in scores])


def _counts(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)
