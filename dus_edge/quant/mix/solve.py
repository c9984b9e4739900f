"""The least loss within a budget of bytes: each matrix takes one of its types.

This is the multiple-choice knapsack. Its relaxation, where a matrix may be split over two types, is
solved by taking steps along convex hulls in the order of loss per byte (Sinha and Zoltners, 1979);
it bounds what any choice can reach. Types whose reduced loss is above what is left between that
bound and a choice at hand are in no better choice; what stays is searched exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dus_edge.quant.types import QuantType

#: Partial choices that are kept of each matrix in the search. Real models stay far below; beyond,
#: those of the least bound are kept, and the result may be short of the best (`Solution.gap`).
_MOST_STATES = 1 << 15


@dataclass(frozen=True, slots=True)
class Option:
    """A type that a matrix may take.

    Attributes:
        kind: the type.
        nbytes: what it takes of the budget.
        loss: what it costs, in any unit that adds up; finite.
    """

    kind: QuantType
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Item:
    """A matrix and the types that it may take; at least one."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Solution:
    """One type for each matrix.

    Attributes:
        kinds: by name, in the order of the items.
        nbytes: what they take together.
        loss: the sum.
        bound: no choice within the budget has less loss.
    """

    kinds: dict[str, QuantType]
    nbytes: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """The loss that a better choice could save at most."""
        return max(0.0, self.loss - self.bound)


def smallest_bytes(items: Sequence[Item]) -> int:
    """Bytes of the smallest choice."""
    return sum(min(o.nbytes for o in item.options) for item in items)


def largest_bytes(items: Sequence[Item]) -> int:
    """Bytes of the choice of least loss, which no budget makes larger."""
    return sum(_frontier(item)[-1].nbytes for item in items)


def choose_types(items: Sequence[Item], budget: int) -> Solution:
    """The choice of least loss within a budget.

    Args:
        items: the matrices.
        budget: bytes that all of them may take together.

    Raises:
        ValueError: even the smallest choice takes more.
    """
    if (least := smallest_bytes(items)) > budget:
        raise ValueError(f"at least {least} bytes are needed, and the budget is {budget}")
    choices = [_frontier(item) for item in items]
    chosen, rate = _relaxed(choices, budget)
    _fill(choices, chosen, budget)
    bound = _bound(choices, budget, rate)
    better = _search(choices, budget, rate, _loss(choices, chosen) - bound)
    if better is not None and _loss(choices, better) < _loss(choices, chosen):
        chosen = better
    picked = [options[k] for options, k in zip(choices, chosen, strict=True)]
    loss = float(sum(o.loss for o in picked))
    return Solution(
        {item.name: o.kind for item, o in zip(items, picked, strict=True)},
        sum(o.nbytes for o in picked),
        loss,
        min(bound, loss),
    )


def _frontier(item: Item) -> list[Option]:
    """Options of which none is as large as another of no more loss, ascending in bytes."""
    kept: list[Option] = []
    for option in sorted(item.options, key=lambda o: (o.nbytes, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _hull(options: Sequence[Option]) -> list[int]:
    """Numbers of the options on the lower convex hull: each step saves less per byte."""
    hull: list[int] = []
    for k in range(len(options)):
        while len(hull) > 1 and _rate(options, hull[-2], hull[-1]) <= _rate(options, hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _rate(options: Sequence[Option], a: int, b: int) -> float:
    """Loss that a step saves per byte."""
    return (options[a].loss - options[b].loss) / (options[b].nbytes - options[a].nbytes)


def _loss(choices: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return float(sum(options[k].loss for options, k in zip(choices, chosen, strict=True)))


def _relaxed(choices: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float]:
    """Hull steps that fit, best first; and the rate of the first that does not, 0 if all do."""
    steps = [
        (_rate(options, a, b), i, b)
        for i, options in enumerate(choices)
        for a, b in pairwise(_hull(options))
    ]
    # The sort is stable, and the steps of one matrix fall: they stay in their order.
    steps.sort(key=lambda step: -step[0])
    chosen = [0] * len(choices)
    left = budget - sum(options[0].nbytes for options in choices)
    stopped: set[int] = set()
    first = 0.0
    for rate, i, k in steps:
        cost = choices[i][k].nbytes - choices[i][chosen[i]].nbytes
        if i in stopped:
            continue
        if cost <= left:
            chosen[i], left = k, left - cost
        else:
            stopped.add(i)
            first = first or rate
    return chosen, first


def _fill(choices: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> None:
    """Take the single steps that save most for as long as one fits; `chosen` is changed."""
    left = budget - sum(options[k].nbytes for options, k in zip(choices, chosen, strict=True))
    while True:
        best, where = 0.0, (-1, -1)
        for i, options in enumerate(choices):
            now = options[chosen[i]]
            for k in range(chosen[i] + 1, len(options)):
                saved = now.loss - options[k].loss
                if options[k].nbytes - now.nbytes <= left and saved > best:
                    best, where = saved, (i, k)
        if best <= 0:
            return
        i, k = where
        left -= choices[i][k].nbytes - choices[i][chosen[i]].nbytes
        chosen[i] = k


def _bound(choices: Sequence[Sequence[Option]], budget: int, rate: float) -> float:
    """Lagrange's bound at a price of `rate` for each byte."""
    return float(sum(min(o.loss + rate * o.nbytes for o in options) for options in choices)) - (
        rate * budget
    )


def _search(
    choices: Sequence[Sequence[Option]], budget: int, rate: float, slack: float
) -> list[int] | None:
    """The best choice that is less than `slack` above the bound; None if none is found.

    Matrix by matrix, all partial choices are kept that no other beats in both bytes and loss, and
    that can still end within `slack`.
    """
    if slack <= 0:
        return None
    reduced = [np.array([o.loss + rate * o.nbytes for o in options]) for options in choices]
    reduced = [r - r.min() for r in reduced]
    allowed = [np.flatnonzero(r <= slack * (1 + 1e-9)) for r in reduced]
    sizes = [np.array([o.nbytes for o in options], np.int64) for options in choices]
    spans = [int(s[a].max() - s[a].min()) for s, a in zip(sizes, allowed, strict=True)]
    order = sorted(range(len(choices)), key=lambda i: -spans[i])
    rest_least = sum(int(s[a].min()) for s, a in zip(sizes, allowed, strict=True))
    rest_most = sum(int(s[a].max()) for s, a in zip(sizes, allowed, strict=True))
    # The final loss is bound + excess + rate × bytes left over.
    floor = budget - slack / rate if rate > 0 else -np.inf
    used, excess = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for i in order:
        rest_least -= int(sizes[i][allowed[i]].min())
        rest_most -= int(sizes[i][allowed[i]].max())
        new_used = (used[:, None] + sizes[i][allowed[i]]).ravel()
        new_excess = (excess[:, None] + reduced[i][allowed[i]]).ravel()
        kept = np.flatnonzero(
            (new_used + rest_least <= budget)
            & (new_used + rest_most >= floor - 1)
            & (new_excess <= slack * (1 + 1e-9))
        )
        if not len(kept):
            return None
        kept = kept[_undominated(new_used[kept], new_excess[kept] - rate * new_used[kept])]
        if len(kept) > _MOST_STATES:
            kept = np.sort(kept[np.argsort(new_excess[kept], kind="stable")[:_MOST_STATES]])
        used, excess = new_used[kept], new_excess[kept]
        parent, option = np.divmod(kept, len(allowed[i]))
        trail.append((parent, allowed[i][option]))
    chosen = [0] * len(choices)
    at = int(np.argmin(excess - rate * used))
    for i, (parent, option) in zip(reversed(order), reversed(trail), strict=True):
        chosen[i], at = int(option[at]), int(parent[at])
    return chosen


def _undominated(used: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Numbers of the states that none of no more bytes matches in loss."""
    order = np.lexsort((loss, used))
    least = np.minimum.accumulate(loss[order])
    before = np.concatenate([[np.inf], least[:-1]])
    return order[loss[order] < before]
