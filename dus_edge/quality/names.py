"""What models are called in tables and plots."""

from __future__ import annotations

import itertools

from dus_edge.quality.compare import Results


def labels(results: Results) -> list[str]:
    """Short names of the candidates: without what all their file names begin with."""
    names = [c.info.name for c in results.candidates]
    compared = names if len(names) > 1 else [*names, results.reference.name]
    parts = [name.split("-") for name in compared]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    # Nobody may be left without a name.
    shared = min(len(list(same)), *(len(p) - 1 for p in parts))
    return ["-".join(p[shared:]) for p in parts[: len(names)]]
