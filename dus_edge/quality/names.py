"""What models are called in tables and plots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dus_edge.quality.compare import Results


def labels(results: Results) -> list[str]:
    """Short names of the candidates: without what all their file names begin with."""
    names = [c.info.name for c in results.candidates]
    compared = names if len(names) > 1 else [*names, results.reference.name]
    return short_names(compared)[: len(names)]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the parts, between hyphens, that all begin with; nobody is left without one."""
    parts = [name.split("-") for name in names]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    shared = min(len(list(same)), *(len(p) - 1 for p in parts))
    return ["-".join(p[shared:]) for p in parts]
