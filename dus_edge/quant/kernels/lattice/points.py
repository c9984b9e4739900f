"""The points that IQ3_S stores four magnitudes by, and which of them lie near four numbers.

512 points of the 4096 that four of the values 1, 3 … 15 make. Which of them is the best for four
weights hangs on the weights' importance too, so a table names `NEAR` points for every four codes
that rounding gives, and the kernel tries them in turn.

The table is computed, once a process: points are taken one by one so that, over fixed draws of
what rounding leaves and of importance, the best of those taken is the best on average. Whatever
number of points is tried from the front of the list is a good one of that number.

Points: those of gguf-py (`gguf.quants.IQ3_S`), iq3s_grid in ggml/src/ggml-common.h.
"""

from __future__ import annotations

import functools

import numpy as np

#: Points named for every four codes.
NEAR = 12
#: Codes of a value: 0 … 7 for 1, 3 … 15.
CODES = 8
_N_KEYS = CODES**4
#: Points nearest by distance that are looked at for the table, and draws that they are judged by.
_AROUND = 32
_DRAWS = 64
#: Importance in these draws goes from exp(−this) to exp(this).
_SPREAD = 1.7
_SLIGHTLY = 1e-5
#: Keys worked on at once.
_CHUNK = 512


@functools.cache
def points() -> np.ndarray:
    """The codes of every point's four values, ``(512, 4)`` int64, by the point's number."""
    from gguf import quants

    quants.IQ3_S.init_grid()
    grid = quants.IQ3_S.grid
    if grid is None:
        raise RuntimeError("gguf-py has no points of IQ3_S.")
    return (grid.reshape(-1, 4).astype(np.int64) - 1) // 2


@functools.cache
def neighbours() -> np.ndarray:
    """Points to try for four rounded codes, ``(4096, NEAR)`` int64 numbers of points.

    Row l0 + 8·l1 + 64·l2 + 512·l3 is of the codes l0 … l3. Where these are a point, that one is
    named `NEAR` times: nothing else is nearer.
    """
    keys = np.arange(_N_KEYS)[:, None] >> np.array([0, 3, 6, 9]) & (CODES - 1)
    residuals, weights = _draws()
    found = [
        _chosen(keys[start : start + _CHUNK], residuals, weights)
        for start in range(0, _N_KEYS, _CHUNK)
    ]
    return np.concatenate(found)


def pairs(n: int) -> np.ndarray:
    """The values of the first `n` neighbours, two to a number: ``(4096 · n / 2,)`` int32.

    A point is 16 bits, four of each value, the first one lowest.
    """
    packed = ((2 * points() + 1) << np.array([0, 4, 8, 12])).sum(1)
    near = packed[neighbours()[:, :n]]
    words = near[:, ::2] | near[:, 1::2] << 16
    return words.astype(np.uint32).view(np.int32).reshape(-1)


def numbers() -> np.ndarray:
    """The number of the point that four codes are, ``(4096,)`` int32; 0 where they are none."""
    found = np.zeros(_N_KEYS, np.int32)
    found[(points() << np.array([0, 3, 6, 9])).sum(1)] = np.arange(len(points()))
    return found


def _draws() -> tuple[np.ndarray, np.ndarray]:
    """What rounding leaves of four codes (−1/2 … 1/2), and importances: ``(_DRAWS, 4)`` float32.

    Multiples of powers of one root, less their whole parts, fill a cube of 8 dimensions evenly
    (Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
    """
    root = 1.0
    for _ in range(60):
        root = (1 + root) ** (1 / 9)
    even = (0.5 + np.outer(np.arange(_DRAWS), root ** -np.arange(1.0, 9.0))) % 1
    residuals, weights = even[:, :4] - 0.5, np.exp(_SPREAD * (2 * even[:, 4:] - 1))
    return residuals.astype(np.float32), weights.astype(np.float32)


def _chosen(keys: np.ndarray, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`neighbours` of some keys, ``(n, 4)`` codes."""
    away = (points()[None] - keys[:, None]).astype(np.float32)
    distances = np.square(away).sum(-1)
    around = np.argpartition(distances, _AROUND, axis=1)[:, :_AROUND]
    around.sort(axis=1)
    away = np.take_along_axis(away, around[:, :, None], axis=1)
    # Σw(r − a)² less Σwr², for every point around and every draw.
    costs = np.square(away) @ weights.T - away @ (2 * weights * residuals).T
    rows = np.arange(len(keys))
    best = np.full((len(keys), 1, len(weights)), np.inf, np.float32)
    found = np.empty((len(keys), NEAR), np.int64)
    for i in range(NEAR):
        # Where none is any better for a draw, the one of the least cost; none is taken twice.
        sums = np.minimum(best, costs).sum(-1) + _SLIGHTLY * costs.sum(-1)
        taken = sums.argmin(1)
        found[:, i] = around[rows, taken]
        best = np.minimum(best, costs[rows, taken][:, None])
        costs[rows, taken] = np.inf
    exact = distances.min(1) == 0
    found[exact] = distances[exact].argmin(1)[:, None]
    return found
