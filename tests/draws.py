"""How many cases a property test draws, by the profile that `conftest` has loaded."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def examples(n: int, **options: Any) -> settings:
    """Settings for `n` cases where others draw 100; five times as many under "fuzz"."""
    return settings(max_examples=max(1, n * settings().max_examples // 100), **options)
