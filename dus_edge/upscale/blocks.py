"""What the geometry of a base's stream says of plans: their seams, and which block to repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dus_edge.upscale.geometry import StreamGeometry
from dus_edge.upscale.plan import DepthPlan, Seam


@dataclass(frozen=True)
class Crossing:
    """A seam, measured on the base.

    The layer behind the seam had stream `right` in the base, and gets what the layer before the
    seam gives, which in the base is stream `left` + 1.

    Attributes:
        seam: which one.
        angle: between the two, in units of π.
        rms_ratio: RMS of what arrives by that of what the layer had.
        aligned: whether the layer behind stands where it stood in the family's pattern.
        angle_error: standard error of the angle over chunks of text; None for a single chunk.
    """

    seam: Seam
    angle: float
    rms_ratio: float
    aligned: bool
    angle_error: float | None = None


@dataclass(frozen=True)
class BestBlock:
    """The block to repeat among those of one size.

    Attributes:
        size: layers that run twice.
        block: first and end of it; None where each one repeats an outlier.
        angle: across the seam that it makes, in units of π; None without a block.
        n_allowed: blocks of this size that repeat no outlier.
        smaller: the block of the smallest angle where that is another one; it repeats an outlier.
        smaller_angle: its angle.
        repeats: outliers in it, or, without a block, all outliers.
    """

    size: int
    block: tuple[int, int] | None
    angle: float | None
    n_allowed: int
    smaller: tuple[int, int] | None = None
    smaller_angle: float | None = None
    repeats: tuple[int, ...] = ()

    @property
    def reason(self) -> str:
        """Why this one, in words."""
        layers = ", ".join(map(str, self.repeats))
        outlier = "outlier" if len(self.repeats) == 1 else "outliers"
        if self.block is None:
            return f"every block of {self.size} repeats one of the outliers ({layers})"
        if self.n_allowed == 1:
            said = "the only one that repeats no outlier"
        else:
            said = f"the smallest angle of {self.n_allowed} that repeat no outlier"
        if self.smaller is None:
            return said
        start, end = self.smaller
        return f"{said}; {start}:{end} ({self.smaller_angle:.3f}) repeats {outlier} {layers}"


def measure_seams(plan: DepthPlan, geometry: StreamGeometry, period: int) -> tuple[Crossing, ...]:
    """Every seam of a plan.

    Args:
        plan: for the base that was measured.
        geometry: of its stream.
        period: layers after which the family's pattern repeats; 1 for none.
    """
    errors = geometry.angle_errors
    return tuple(
        Crossing(
            seam,
            float(geometry.angles[seam.left + 1, seam.right]),
            float(geometry.rms[seam.left + 1] / geometry.rms[seam.right]),
            (seam.right - seam.position) % period == 0,
            None if errors is None else float(errors[seam.left + 1, seam.right]),
        )
        for seam in plan.seams
    )


def repeated_outliers(plan: DepthPlan, outliers: Collection[int]) -> tuple[int, ...]:
    """Outliers that a plan runs more than once, in order."""
    return tuple(i for i, n in sorted(Counter(plan.sources).items()) if n > 1 and i in outliers)


def best_blocks(
    angles: np.ndarray, outliers: Collection[int], period: int = 1
) -> tuple[BestBlock, ...]:
    """For each size the block whose seam has the smallest angle, of those without outliers.

    The block I:J of `--block` runs layer J - 1 and then layer I, so its seam is between streams J
    and I. Equal angles: the first.

    Args:
        angles: ``(n + 1, n + 1)``, as `StreamGeometry.angles`.
        outliers: layers that shall not run twice.
        period: sizes are its multiples; others would break the family's pattern.

    Returns:
        one for each size from `period` up to n, in order.
    """
    n = len(angles) - 1
    return tuple(_best_of(angles, outliers, size) for size in range(period, n + 1, period))


def _best_of(angles: np.ndarray, outliers: Collection[int], size: int) -> BestBlock:
    def angle(start: int) -> float:
        return float(angles[start, start + size])

    def repeated(start: int) -> tuple[int, ...]:
        return tuple(i for i in range(start, start + size) if i in outliers)

    starts = range(len(angles) - size)
    allowed = [start for start in starts if not repeated(start)]
    if not allowed:
        return BestBlock(size, None, None, 0, repeats=tuple(sorted(outliers)))
    best, least = min(allowed, key=angle), min(starts, key=angle)
    found = BestBlock(size, (best, best + size), angle(best), len(allowed))
    if angle(least) >= angle(best):
        return found
    return BestBlock(
        size,
        found.block,
        found.angle,
        found.n_allowed,
        (least, least + size),
        angle(least),
        repeated(least),
    )
