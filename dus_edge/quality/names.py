"""What models are called in tables and plots."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from dus_edge.quality.compare import Results


def labels(results: Results) -> list[str]:
    """What the candidates are called: how each is stored, where that tells them apart.

    Files that are stored alike have their names beside it, or in its place if the name says as
    much. What has no known origin goes by its name alone.
    """
    names = file_labels(results)
    stored = [c.info.origin.spelled if c.info.origin else None for c in results.candidates]
    count = Counter(stored)
    return [
        name
        if spelled is None or (count[spelled] > 1 and _says(name, spelled))
        else f"{spelled}, {name}"
        if count[spelled] > 1
        else spelled
        for name, spelled in zip(names, stored, strict=True)
    ]


def file_labels(results: Results) -> list[str]:
    """Names of the candidates' files: without what all begin with; equal ones have folders."""
    names = [c.info.name for c in results.candidates]
    compared = names if len(names) > 1 else [*names, results.reference.name]
    short = short_names(compared)[: len(names)]
    count = Counter(short)
    return [
        f"{folder}/{name}" if count[name] > 1 and (folder := c.info.path.parent.name) else name
        for name, c in zip(short, results.candidates, strict=True)
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the parts, between hyphens, that all begin with; nobody is left without one."""
    parts = [name.split("-") for name in names]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    shared = min(len(list(same)), *(len(p) - 1 for p in parts))
    return ["-".join(p[shared:]) for p in parts]


def _says(name: str, spelled: str) -> bool:
    return spelled.lower() in name.lower()
