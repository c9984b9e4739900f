"""What `dus-edge seam` says: tables for people, and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dus_edge.text.chunks import Chunks
from dus_edge.upscale.blocks import (
    BestBlock,
    Crossing,
    best_blocks,
    measure_seams,
    repeated_outliers,
)
from dus_edge.upscale.geometry import OUTLIER_Z, StreamGeometry
from dus_edge.upscale.plan import DepthPlan
from dus_edge.words import aligned_table, wrap


@dataclass(frozen=True)
class SeamResults:
    """A base, measured for a plan.

    Attributes:
        name: of the base.
        plan: what is asked for.
        period: layers after which the family's pattern repeats; 1 for none.
        geometry: of the base's stream.
        chunks: what was run through it.
        text_label: what the text is called.
    """

    name: str
    plan: DepthPlan
    period: int
    geometry: StreamGeometry
    chunks: Chunks
    text_label: str

    @cached_property
    def seams(self) -> tuple[Crossing, ...]:
        """The plan's."""
        return measure_seams(self.plan, self.geometry, self.period)

    @cached_property
    def best(self) -> tuple[BestBlock, ...]:
        """The best block of each size."""
        return best_blocks(self.geometry.angles, self.geometry.outliers, self.period)

    @property
    def repeated(self) -> tuple[int, ...]:
        """Outliers that the plan repeats."""
        return repeated_outliers(self.plan, self.geometry.outliers)

    @property
    def n_by_language(self) -> dict[str, int]:
        """Chunks of each language."""
        return dict(Counter(self.chunks.languages))


def seam_json(results: SeamResults) -> dict[str, Any]:
    """The results as JSON takes them; angles are in units of π."""
    g, runs = results.geometry, Counter(results.plan.sources)
    return {
        "text": {
            "label": results.text_label,
            "n_ctx": results.chunks.tokens.shape[1],
            "chunks": results.n_by_language,
            "n_tokens": g.n_tokens,
            "sha256": results.chunks.digest,
        },
        "layers": [
            {
                "layer": i,
                "runs": runs[i],
                "rms": _rounded(g.rms[i]),
                "block_influence": _rounded(g.influence[i]),
                "modified_z": _rounded(z),
                "outlier": i in g.outliers,
            }
            for i, z in enumerate(g.z_scores)
        ],
        "rms_behind": _rounded(g.rms[-1]),
        "outliers": list(g.outliers),
        "repeated_outliers": list(results.repeated),
        "period": results.period,
        "seams": [
            {
                "position": c.seam.position,
                "left": c.seam.left,
                "right": c.seam.right,
                "angle": _rounded(c.angle),
                "angle_error": None if c.angle_error is None else _rounded(c.angle_error),
                "rms_ratio": _rounded(c.rms_ratio),
                "aligned": c.aligned,
            }
            for c in results.seams
        ],
        "best_blocks": [
            {
                "size": b.size,
                "n_layers": results.plan.n_base + b.size,
                "block": b.block and list(b.block),
                "angle": None if b.angle is None else _rounded(b.angle),
                "reason": b.reason,
            }
            for b in results.best
        ],
        "angles": [[_rounded(a) for a in row] for row in g.angles],
        "angle_errors": None
        if g.angle_errors is None
        else [[_rounded(a) for a in row] for row in g.angle_errors],
    }


def seam_page(results: SeamResults) -> str:
    """Tables of layers, seams and blocks, no line over 80 columns."""
    g = results.geometry
    languages = ", ".join(f"{n} {name}" for name, n in results.n_by_language.items())
    about = (
        f"The stream of {results.name} over {g.n_tokens:,} tokens of {results.text_label} "
        f"({languages} chunks). Angles are in units of π."
    )
    return "\n\n".join(
        [
            wrap(about),
            "## Layers",
            _layers(results),
            wrap(_about_outliers(g.outliers)),
            "## Seams",
            *_seams(results),
            "## The best block of each size",
            *_blocks(results),
        ]
    )


def _layers(results: SeamResults) -> str:
    g, runs = results.geometry, Counter(results.plan.sources)
    rows = [
        [
            str(i),
            three_digits(g.rms[i]),
            f"{g.influence[i]:.4f}",
            f"{z:+.1f}",
            "outlier" if i in g.outliers else "",
            str(runs[i]),
        ]
        for i, z in enumerate(g.z_scores)
    ]
    head = ["layer", "RMS before", "block influence", "z", "mark", "in the plan"]
    return aligned_table(head, rows, left=(4,))


def _about_outliers(outliers: Sequence[int]) -> str:
    rule = f"block influence over {OUTLIER_Z} robust standard deviations above the median"
    if not outliers:
        return f"No layer is an outlier ({rule})."
    return f"Outliers: {', '.join(map(str, outliers))} ({rule})."


def _seams(results: SeamResults) -> Iterator[str]:
    if not results.seams:
        yield f"The plan {results.plan.spelled} has no seam."
        return
    rows = [
        [
            f"{c.seam.left} → {c.seam.right}",
            f"{c.seam.position - 1}, {c.seam.position}",
            f"{c.angle:.3f}" + (f" ± {c.angle_error:.3f}" if c.angle_error else ""),
            f"× {three_digits(c.rms_ratio)}",
        ]
        for c in results.seams
    ]
    yield aligned_table(["base's layers", "places", "angle", "RMS"], rows)
    yield wrap(
        "Angle, ± its standard error over chunks, and RMS: of what arrives at the layer behind the "
        f"seam, against what it had in the base. {_about_pattern(results)}"
    )
    if results.repeated:
        layers = ", ".join(map(str, results.repeated))
        many = len(results.repeated) > 1
        yield wrap(f"The plan repeats {'outliers' if many else 'outlier'} {layers}.")


def _about_pattern(results: SeamResults) -> str:
    if results.period == 1:
        return "All layers are of one kind: there is no pattern to keep."
    broken = [c for c in results.seams if not c.aligned]
    if not broken:
        return f"The pattern of {results.period} layers goes on across every seam."
    where = ", ".join(f"{c.seam.left} → {c.seam.right}" for c in broken)
    return f"The pattern of {results.period} layers breaks at {where}."


def _blocks(results: SeamResults) -> Iterator[str]:
    n = results.plan.n_base
    found = [b for b in results.best if b.block is not None]
    if found:
        rows = [
            [
                str(b.size),
                str(n + b.size),
                f"{b.block[0]}:{b.block[1]}",
                f"{b.angle:.3f}",
                _why(b),
            ]
            for b in found
            if b.block is not None
        ]
        head = ["size", "layers", "--block", "angle", "smallest of"]
        yield aligned_table(head, rows, left=(4,))
    without = [b.size for b in results.best if b.block is None]
    if without:
        sizes = f"{without[0]}" if len(without) == 1 else f"{without[0]} to {without[-1]}"
        yield wrap(f"Every block of {sizes} layers repeats an outlier.")


def _why(b: BestBlock) -> str:
    """`BestBlock.reason` for a narrow column."""
    said = f"{b.n_allowed} without outliers" if b.n_allowed > 1 else "the only one"
    if b.smaller is None:
        return said
    start, end = b.smaller
    return f"{said}; {start}:{end} is {b.smaller_angle:.3f}"


def three_digits(x: float) -> str:
    """``0.0123``, ``1.23``, ``123``: an RMS, or a ratio of two."""
    return f"{x:#.3g}".rstrip(".")


def _rounded(x: float) -> float:
    return round(float(x), 7)
