"""Where labels go beside their points in a plot, so that none covers anything: geometry only.

Lengths are in points (1/72 inch), x to the right and y upwards; a box is (x0, y0, x1, y1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Distances of a label from its point, and directions in twelfths of a turn from the right,
#: the pleasantest first.
_DISTANCES = (7, 11, 16, 22, 29, 37, 46, 56, 67)
_DIRECTIONS = (0, 1, 11, 6, 5, 7, 2, 10, 4, 8, 3, 9)
#: From this distance on, a line leads to the point.
_LEADER_FROM = 11
#: A line is seen as boxes of this half width, this far apart, from the marker's edge on.
_LINE_HALF, _LINE_STEP, _LINE_START = 0.7, 2.0, 5.0
_MARKER_HALF = 4.0
#: Words keep this far from the centres of others' markers, or one could take them for theirs.
_CLEAR_HALF = 8.0
_GAP = 1.5
#: Cost of a point's distance against a square point covered: enough to prefer near places.
_PER_POINT, _PER_RANK = 0.05, 0.01
#: Cost of a square point beyond the frame: words are cut off there, which is worse than a touch.
_PER_OUTSIDE = 10.0
_MAX_SWEEPS = 12

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Place:
    """A label's place.

    Attributes:
        box: of the words.
        anchor: where the words begin, seen from the point: an offset from it.
        has_line: whether a line leads to the point.
    """

    box: Box
    anchor: tuple[float, float]
    has_line: bool


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    frame: Box,
) -> list[Place]:
    """Choose a place for every label.

    Each label in turn takes the place that covers least, near ones first, and the turns go round
    until nobody moves.

    Args:
        points: the markers' centres.
        sizes: width and height of each label.
        obstacles: what labels must not cover, apart from the markers.
        frame: what labels must stay inside of.
    """
    markers = np.array([_around(x, y, _MARKER_HALF) for x, y in points]).reshape(-1, 4)
    fixed = np.array(list(obstacles), float).reshape(-1, 4)
    clear = np.array([_around(x, y, _CLEAR_HALF) for x, y in points]).reshape(-1, 4)
    options = [_options(p, s) for p, s in zip(points, sizes, strict=True)]
    boxes = [
        [_boxes(point, option) for option in own]
        for point, own in zip(points, options, strict=True)
    ]
    static = [
        [
            _PER_OUTSIDE * _outside(option.box, frame)
            + _covered(cover, fixed)
            + _covered(cover[:1], markers[i : i + 1])
            + _covered(cover[:1], np.delete(clear, i, axis=0))
            + _covered(cover[1:], np.delete(markers, i, axis=0))
            + _PER_POINT * math.hypot(*option.anchor)
            + _PER_RANK * rank
            for rank, (option, cover) in enumerate(zip(own, covers, strict=True))
        ]
        for i, (own, covers) in enumerate(zip(options, boxes, strict=True))
    ]
    chosen = [int(np.argmin(costs)) for costs in static]
    for _ in range(_MAX_SWEEPS):
        moved = False
        for i, costs in enumerate(static):
            others = [boxes[k][chosen[k]] for k in range(len(points)) if k != i]
            taken = np.concatenate(others) if others else np.empty((0, 4))
            total = [c + _covered(b, taken) for c, b in zip(costs, boxes[i], strict=True)]
            best = int(np.argmin(total))
            moved |= best != chosen[i]
            chosen[i] = best
        if not moved:
            break
    return [own[k] for own, k in zip(options, chosen, strict=True)]


def boxes_along(points: Sequence[tuple[float, float]]) -> list[Box]:
    """A line through points as obstacles: small boxes, close together."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        n = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / _LINE_STEP))
        for k in range(n + 1):
            found.append(_around(x0 + (x1 - x0) * k / n, y0 + (y1 - y0) * k / n, _LINE_HALF))
    return found


def _options(point: tuple[float, float], size: tuple[float, float]) -> list[Place]:
    """All places to try for one label, nearest first."""
    (x, y), (width, height) = point, size
    found = []
    for distance, twelfth in itertools.product(_DISTANCES, _DIRECTIONS):
        angle = math.tau * twelfth / 12
        dx, dy = distance * math.cos(angle), distance * math.sin(angle)
        # The words lie on the far side of the anchor.
        left = dx if dx > 1 else dx - width if dx < -1 else dx - width / 2
        steep = abs(dy) >= 0.6 * abs(dx)
        low = dy - height / 2 if not steep else dy if dy > 0 else dy - height
        box = (x + left, y + low, x + left + width, y + low + height)
        found.append(Place(box, (dx, dy), distance >= _LEADER_FROM))
    return found


def _boxes(point: tuple[float, float], place: Place) -> np.ndarray:
    """``(n, 4)``: the words with a gap around, then the line."""
    x0, y0, x1, y1 = place.box
    found: list[Box] = [(x0 - _GAP, y0 - _GAP, x1 + _GAP, y1 + _GAP)]
    length = math.hypot(*place.anchor)
    if place.has_line:
        for at in np.arange(_LINE_START, length, _LINE_STEP):
            dx, dy = (c * at / length for c in place.anchor)
            found.append(_around(point[0] + dx, point[1] + dy, _LINE_HALF))
    return np.array(found)


def _around(x: float, y: float, half: float) -> Box:
    return (x - half, y - half, x + half, y + half)


def _covered(a: np.ndarray, b: np.ndarray) -> float:
    """Area that boxes ``(n, 4)`` and ``(m, 4)`` share, pair by pair."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return float(np.clip(high - low, 0, None).prod(axis=2).sum())


def _outside(box: Box, frame: Box) -> float:
    """Area of a box that is not inside the frame."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _covered(np.array([box]), np.array([frame]))
