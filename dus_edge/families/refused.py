"""Architectures that are refused, and what to take in their place: `data/refused.toml`."""

from __future__ import annotations

import functools
import tomllib

from dus_edge.data import read_text


def refusal(architecture: str) -> str | None:
    """What an architecture is and the nearest thing that works; None if nothing is known of it."""
    for names, parts, sentence in _kinds():
        if architecture in names or any(part in architecture for part in parts):
            return sentence
    return None


@functools.cache
def _kinds() -> tuple[tuple[frozenset[str], tuple[str, ...], str], ...]:
    return tuple(
        (
            frozenset(kind.get("names", ())),
            tuple(kind.get("like", ())),
            f"{kind['what']}, which is not supported; {kind['instead']}",
        )
        for kind in tomllib.loads(read_text("refused.toml"))["kind"]
    )
