"""What a GGUF says of how its weights are stored, and where that choice comes from.

A file's name says what somebody called it. Its keys say more: ``general.file_type`` the preset,
``dus.mix.*`` that the types were chosen tensor by tensor, ``quantize.imatrix.*`` that columns were
weighted, ``dus.feedback.*`` that errors were fed forward.
"""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_edge.checkpoint.gguf.types import stored_type
from dus_edge.checkpoint.gguf_header import read_layout

#: How the keys of a GGUF that say where its mix comes from begin, and those of error feedback.
MIX_PREFIX, FEEDBACK_PREFIX = "dus.mix.", "dus.feedback."
_IMATRIX_PREFIX = "quantize.imatrix."
_MOST_GOAL = 80


@dataclass(frozen=True)
class Origin:
    """How weights are stored, and where the choice comes from.

    Attributes:
        types: the preset, or the type of most weights: ``Q4_K_M``. That of a mix is the nearest.
        goal: of a mix, or of a preset with changes; None where the preset says all types.
        expected_kl: divergence that was expected of the mix, nats per token; None if not said.
        imatrix: whether columns were weighted by importance.
        fed: matrices that error feedback was kept in, and those that it was tried on; None without.
    """

    types: str
    goal: str | None = None
    expected_kl: float | None = None
    imatrix: bool = False
    fed: tuple[int, int] | None = None

    @property
    def has_feedback(self) -> bool:
        """Whether any matrix kept error feedback."""
        return self.fed is not None and self.fed[0] > 0

    @property
    def way(self) -> str:
        """The kind of choice, without the preset: ``preset``, ``mix + feedback``.

        Feedback always weighs by importance, so that is not said beside it.
        """
        kind = "preset" if self.goal is None else "mix"
        return f"{kind}{self._more}"

    @property
    def spelled(self) -> str:
        """The whole in words: ``Q4_K_M + imatrix``, ``mix like q4_k_m + feedback``."""
        if self.goal is None:
            kind = self.types
        elif self.goal.lower().startswith(f"{self.types.lower()},"):
            kind = self.goal  # a preset with changes: `q4_k_m, head=Q8_0`
        else:
            kind = f"mix {self.goal}" if self.goal.startswith("like ") else f"mix, {self.goal}"
        return f"{kind}{self._more}"

    @property
    def _more(self) -> str:
        return " + feedback" if self.has_feedback else " + imatrix" if self.imatrix else ""


def file_origin(path: Path) -> Origin | None:
    """What a GGUF file says; None if its header cannot be read, which others refuse in words."""
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            layout = read_layout(view)
    except (ValueError, OSError):
        return None
    weights: Counter[str] = Counter()
    for tensor in layout.tensors:
        if (kind := stored_type(tensor.kind)) is not None:
            weights[kind.name] += math.prod(tensor.dims)
    return origin_of(layout.values, weights)


def origin_of(values: Mapping[str, Any], weights: Mapping[str, int]) -> Origin:
    """The same from a file's keys, whoever wrote them.

    Args:
        values: metadata by key; what is not of the type that we write counts as absent.
        weights: number of weights by type.
    """
    goal, kl = values.get(f"{MIX_PREFIX}goal"), values.get(f"{MIX_PREFIX}expected_kl")
    kept, tried = (values.get(f"{FEEDBACK_PREFIX}{key}") for key in ("kept", "tried"))
    is_mix = isinstance(goal, str) and goal != ""
    return Origin(
        types=type_label(values, weights),
        goal=_one_line(str(goal)) if is_mix else None,
        expected_kl=kl if is_mix and isinstance(kl, float) and math.isfinite(kl) else None,
        imatrix=any(key.startswith(_IMATRIX_PREFIX) for key in values),
        fed=(kept, tried) if type(kept) is int and type(tried) is int else None,
    )


def type_label(values: Mapping[str, Any], weights: Mapping[str, int]) -> str:
    """What names say of types: that of ``general.file_type``, or of most weights."""
    from gguf import LlamaFileType

    number = values.get("general.file_type")
    for kind in LlamaFileType:
        if number == kind and kind is not LlamaFileType.GUESSED:
            return kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return max(weights, key=lambda name: weights[name]) if weights else "unknown types"


def _one_line(text: str) -> str:
    """For tables and plots."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _MOST_GOAL else f"{line[: _MOST_GOAL - 1]}…"
