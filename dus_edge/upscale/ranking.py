"""How plans rank: which are worth their size, and how well one number foretells another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

#: Plans of one size that a correlation within it is taken of.
FEWEST = 4


def pareto(costs: Sequence[float], losses: Sequence[float]) -> tuple[int, ...]:
    """Indices of what nothing beats: no other has a lower loss at the same cost or less.

    In order of cost; of equals the first.
    """
    found: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i], i)):
        if not found or losses[i] < losses[found[-1]]:
            found.append(i)
    return tuple(found)


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank.

    None where it is not defined: fewer than three pairs, or all values of one side equal.
    """
    a, b = ranks(x), ranks(y)
    if len(a) < 3 or not np.ptp(a) or not np.ptp(b):
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1 on, as float64; equal values share their mean."""
    values = np.asarray(values, np.float64)
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[which]


def spearman_within(
    groups: Sequence[int], x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray
) -> tuple[float | None, int]:
    """Spearman's correlation with the group held: the mean over groups, weighted by their pairs.

    Args:
        groups: of each pair, such as the layers that a plan adds. Those with fewer than `FEWEST`
            pairs, or without a correlation, are left out.
        x: one side.
        y: the other.

    Returns:
        the mean, None where no group is left; and how many pairs it rests on.
    """
    of, x, y = np.asarray(groups), np.asarray(x), np.asarray(y)
    total, n_pairs = 0.0, 0
    for group in np.unique(of):
        own = of == group
        n = int(own.sum())
        rho = spearman(x[own], y[own]) if n >= FEWEST else None
        if rho is not None:
            total, n_pairs = total + n * rho, n_pairs + n
    return (total / n_pairs if n_pairs else None), n_pairs


def resampled(
    statistic: Callable[[np.ndarray], float | None],
    strata: np.ndarray,
    n_draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95 % interval of a statistic by the percentile bootstrap over chunks of text.

    Args:
        statistic: of indices of chunks.
        strata: ``(n_chunks,)`` the language of each, as whole numbers; chunks are drawn within it.
        n_draws: how many times.
        seed: of the draws.

    Returns:
        the 2.5th and the 97.5th percentile; None where a language has a single chunk, or the
        statistic is not defined.
    """
    groups = [np.flatnonzero(strata == k) for k in np.unique(strata)]
    if min(map(len, groups)) < 2:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_draws):
        value = statistic(np.concatenate([rng.choice(g, len(g)) for g in groups]))
        if value is None:
            return None
        found.append(value)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)
