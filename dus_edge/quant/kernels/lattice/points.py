"""The points that a lattice type stores several magnitudes by, and which lie near given ones.

Only some of the points that a type's values make have a number: 512 of 4096 that four values make
in IQ3_S, 1024 or 512 of the 6561 of eight in IQ2_S and IQ2_XS. Which of them is the best for a few
weights hangs on the weights' importance too, so a table names some of them for all the codes that
rounding gives, and the kernel tries them in turn.

The table is computed, once a process: points are taken one by one so that, over fixed draws of
what rounding leaves and of importance, the best of those taken is the best on average. Whatever
number of points is tried from the front of the list is a good one of that number.

Points: those of gguf-py (`gguf.quants`), from iq3s_grid, iq2s_grid and iq2xs_grid in
ggml/src/ggml-common.h.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: Points nearest by distance that are looked at for the table, and draws that they are judged by.
_AROUND = 32
_DRAWS = 64
#: Importance in these draws goes from exp(−this) to exp(this).
_SPREAD = 1.7
_SLIGHTLY = 1e-5
#: Keys worked on at once.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Lattice:
    """A type's points.

    Attributes:
        name: the type.
        values: what gguf-py's grid has for code 0, 1, ….
        dims: weights that a point is of.
        near: points named for every combination of codes.
        packed: what stands for each code in a packed point, of 16 / `dims` bits each.
    """

    name: str
    values: tuple[int, ...]
    dims: int
    near: int
    packed: tuple[int, ...]

    @property
    def n_keys(self) -> int:
        """Combinations of codes."""
        return len(self.values) ** self.dims

    @property
    def places(self) -> np.ndarray:
        """What each code counts in the key of a combination, ``(dims,)`` int64; the first 1."""
        return len(self.values) ** np.arange(self.dims)


_ODD = tuple(range(1, 16, 2))
IQ3_S = Lattice("IQ3_S", _ODD, 4, 12, _ODD)
IQ2_S = Lattice("IQ2_S", (8, 25, 43), 8, 16, (0, 1, 2))
IQ2_XS = Lattice("IQ2_XS", (8, 25, 43), 8, 16, (0, 1, 2))


class Tables(NamedTuple):
    """What points are found by: `pairs` of a few and of many, and `numbers`."""

    few: np.ndarray
    many: np.ndarray
    numbers: np.ndarray


def tables_of(lattice: Lattice, few: int, many: int) -> Tables:
    """The tables of a type that tries twice so many points."""
    return Tables(pairs(lattice, 2 * few), pairs(lattice, 2 * many), numbers(lattice))


@functools.cache
def points(lattice: Lattice) -> np.ndarray:
    """The codes of every point's values, ``(n, dims)`` int64, by the point's number."""
    from gguf import quants

    reference = getattr(quants, lattice.name)
    reference.init_grid()
    if reference.grid is None:
        raise RuntimeError(f"gguf-py has no points of {lattice.name}.")
    grid = reference.grid.reshape(-1, lattice.dims)
    return np.searchsorted(lattice.values, grid)


@functools.cache
def neighbours(lattice: Lattice) -> np.ndarray:
    """Points to try for rounded codes, ``(n_keys, near)`` int64 numbers of points, by the key.

    Where the codes are a point, that one is named every time: nothing else is nearer.
    """
    n = lattice.n_keys
    keys = np.arange(n)[:, None] // lattice.places % len(lattice.values)
    residuals, weights = _draws(lattice.dims)
    found = [
        _chosen(lattice, keys[start : start + _CHUNK], residuals, weights)
        for start in range(0, n, _CHUNK)
    ]
    return np.concatenate(found)


def pairs(lattice: Lattice, n: int) -> np.ndarray:
    """The first `n` neighbours, packed, two to a number: ``(n_keys · n / 2,)`` int32.

    A point is 16 bits, as many of each value, the first one lowest.
    """
    shifts = 16 // lattice.dims * np.arange(lattice.dims)
    packed = (np.array(lattice.packed)[points(lattice)] << shifts).sum(1)
    near = packed[neighbours(lattice)[:, :n]]
    words = near[:, ::2] | near[:, 1::2] << 16
    return words.astype(np.uint32).view(np.int32).reshape(-1)


def numbers(lattice: Lattice) -> np.ndarray:
    """The number of the point that a key's codes are, ``(n_keys,)`` int32; 0 where none is."""
    found = np.zeros(lattice.n_keys, np.int32)
    found[points(lattice) @ lattice.places] = np.arange(len(points(lattice)))
    return found


def _draws(dims: int) -> tuple[np.ndarray, np.ndarray]:
    """What rounding leaves of codes (−1/2 … 1/2), and importances: ``(_DRAWS, dims)`` float32.

    Multiples of powers of one root, less their whole parts, fill a cube evenly
    (Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
    """
    root = 1.0
    for _ in range(60):
        root = (1 + root) ** (1 / (2 * dims + 1))
    even = (0.5 + np.outer(np.arange(_DRAWS), root ** -np.arange(1.0, 2 * dims + 1))) % 1
    residuals, weights = even[:, :dims] - 0.5, np.exp(_SPREAD * (2 * even[:, dims:] - 1))
    return residuals.astype(np.float32), weights.astype(np.float32)


def _chosen(
    lattice: Lattice, keys: np.ndarray, residuals: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """`neighbours` of some keys, ``(n, dims)`` codes."""
    away = (points(lattice)[None] - keys[:, None]).astype(np.float32)
    distances = np.square(away).sum(-1)
    around = np.argpartition(distances, _AROUND, axis=1)[:, :_AROUND]
    around.sort(axis=1)
    away = np.take_along_axis(away, around[:, :, None], axis=1)
    # Σw(r − a)² less Σwr², for every point around and every draw.
    costs = np.square(away) @ weights.T - away @ (2 * weights * residuals).T
    rows = np.arange(len(keys))
    best = np.full((len(keys), 1, len(weights)), np.inf, np.float32)
    found = np.empty((len(keys), lattice.near), np.int64)
    for i in range(lattice.near):
        # Where none is any better for a draw, the one of the least cost; none is taken twice.
        sums = np.minimum(best, costs).sum(-1) + _SLIGHTLY * costs.sum(-1)
        taken = sums.argmin(1)
        found[:, i] = around[rows, taken]
        best = np.minimum(best, costs[rows, taken][:, None])
        costs[rows, taken] = np.inf
    exact = distances.min(1) == 0
    found[exact] = distances[exact].argmin(1)[:, None]
    return found
