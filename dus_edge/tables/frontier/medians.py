"""Runs of the divergence benchmark: medians over seeds, and which are on the frontier.

Each line of the benchmark is a file on a text; the same preset made in the same way from other
draws of calibration text has another seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dus_edge.quality.frontier import on_frontier

#: What the benchmark's ways are called, in the order of tables; the words are those of
#: `Origin.way`. Its mixes and its feedback weigh columns by importance.
WAYS: Mapping[str, str] = {
    "ggml": "preset by ggml",
    "native": "preset",
    "ggml+imatrix": "preset by ggml + imatrix",
    "native+imatrix": "preset + imatrix",
    "weights": "mix by weight error",
    "mix": "mix + imatrix",
    "feedback": "preset + feedback",
    "mix+feedback": "mix + feedback",
}


@dataclass(frozen=True)
class MedianRun:
    """A preset made in one way, on one text.

    Attributes:
        model: what was quantized.
        text: what was read.
        preset: of the file, or of the budget that a mix had.
        way: what the file is, in words.
        n_seeds: draws of calibration text.
        n_tokens: of the text.
        n_chunks: of the text.
        file_bytes: median over seeds.
        kl_nats: the same of the mean divergence, nats per token.
        kl_nats_error: one standard error over chunks of the text; None if that is not known.
        kl_nats_low: the least of all seeds.
        kl_nats_high: the most.
        on_frontier: whether no file of this model on this text, as large or smaller, has less.
    """

    model: str
    text: str
    preset: str
    way: str
    n_seeds: int
    n_tokens: int
    n_chunks: int
    file_bytes: int
    kl_nats: float
    kl_nats_error: float | None
    kl_nats_low: float
    kl_nats_high: float
    on_frontier: bool = False


def median_runs(lines: Iterable[Mapping[str, Any]]) -> list[list[MedianRun]]:
    """Runs by model and text, in order of first appearance.

    Within one, presets go from the largest to the smallest, and ways as in `WAYS`. Of lines of the
    same file and text the last one counts.

    Args:
        lines: of `measure.record.read_divergence`.
    """
    groups: dict[tuple[str, str], dict[tuple[str, str], dict[int, Mapping[str, Any]]]] = {}
    for line in lines:
        runs = groups.setdefault((line["model"], line["text"]), {})
        runs.setdefault((line["preset"], line["way"]), {})[line["seed"]] = line
    found = []
    for runs in groups.values():
        medians = [_median(list(seeds.values())) for seeds in runs.values()]
        marks = on_frontier([m.file_bytes for m in medians], [m.kl_nats for m in medians])
        marked = [replace(m, on_frontier=on) for m, on in zip(medians, marks, strict=True)]
        found.append(_ordered(marked))
    return found


def divergence_rows(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of tables.json: a preset, a way and a text each."""
    return [{"source": "measured", **vars(run)} for runs in median_runs(lines) for run in runs]


def _median(seeds: Sequence[Mapping[str, Any]]) -> MedianRun:
    first = seeds[0]
    kl = [line["kl"] for line in seeds]
    chunks = [line["by_chunk"] for line in seeds]
    error = None
    if len({len(c) for c in chunks}) == 1 and len(chunks[0]) > 1:
        means = np.mean(np.array(chunks, float), axis=0)
        error = float(means.std(ddof=1) / np.sqrt(len(means)))
    return MedianRun(
        model=first["model"],
        text=first["text"],
        preset=first["preset"],
        way=WAYS.get(first["way"], first["way"]),
        n_seeds=len(seeds),
        n_tokens=first["n_tokens"],
        n_chunks=len(chunks[0]),
        file_bytes=int(statistics.median(line["bytes"] for line in seeds)),
        kl_nats=statistics.median(kl),
        kl_nats_error=error,
        kl_nats_low=min(kl),
        kl_nats_high=max(kl),
    )


def _ordered(runs: Sequence[MedianRun]) -> list[MedianRun]:
    largest: dict[str, int] = {}
    for run in runs:
        largest[run.preset] = max(run.file_bytes, largest.get(run.preset, 0))
    ways = [*WAYS.values(), *dict.fromkeys(run.way for run in runs)]
    return sorted(runs, key=lambda r: (-largest[r.preset], r.preset, ways.index(r.way)))
