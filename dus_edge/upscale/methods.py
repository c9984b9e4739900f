"""How the copies of an up-scaled model are made of the base's layers: pure numbers and arithmetic.

A layer adds two branches to the stream of hidden states, attention's and the FFN's; o_proj and
down_proj are the last matrices of the two. Times a number A in the copies they scale what a copy
does: 1 is SOLAR's copy (arXiv:2312.15166), 0 is an identity, which LLaMA Pro (arXiv:2401.02415)
starts its new blocks from, and leaves the base's own outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dus_edge.adapter.numbers import as_floats, as_stored
from dus_edge.errors import UsageError

#: Roles of the tensors, weights and biases, that write a layer's branches to the stream.
BRANCH_ROLES = ("o", "down")


@dataclass(frozen=True)
class Method:
    """How copies are made.

    Attributes:
        branch_scale: what the copies' o_proj and down_proj are multiplied by, as float32.
    """

    branch_scale: float = 1.0

    def __post_init__(self) -> None:
        scale = self.branch_scale
        if not (scale >= 0 and math.isfinite(scale) and scale <= float(np.finfo(np.float32).max)):
            raise UsageError(
                f"--branch-scale {scale:g}: a number from 0 on is needed, such as 0.5."
            )

    @property
    def is_plain(self) -> bool:
        """Whether copies are copies, byte for byte."""
        return self == PLAIN

    @property
    def spelled(self) -> str:
        """In words, for people and for telling runs apart; empty where copies are just copies."""
        return "" if self.branch_scale == 1 else f"branches × {self.branch_scale:g}"

    @property
    def sentence(self) -> str:
        """What is done to a copy, for cards and descriptions; empty where nothing is."""
        scale = self.branch_scale
        return "" if scale == 1 else f"their o_proj and down_proj are the base's times {scale:g}"

    def as_json(self) -> dict[str, Any]:
        """What differs from a plain copy, by name."""
        return {} if self.branch_scale == 1 else {"branch_scale": self.branch_scale}


#: SOLAR's.
PLAIN = Method()


def method_of_json(said: Mapping[str, Any]) -> Method:
    """The method that `Method.as_json` told; other keys are not looked at.

    Raises:
        UsageError: a value that no method has.
    """
    scale = said.get("branch_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UsageError(f"branch_scale is {scale!r}; a number from 0 on is needed, such as 0.5.")
    return Method(float(scale))


def parse_scale(text: str) -> float:
    """The number that `--branch-scale` spells.

    Raises:
        UsageError: it is none, negative or infinite.
    """
    try:
        scale = float(text)
    except ValueError:
        raise UsageError(
            f"--branch-scale {text!r}: a number from 0 on is needed, such as 0.5."
        ) from None
    return Method(scale).branch_scale


def scaled_rows(rows: np.ndarray, dtype: str, scale: float) -> np.ndarray:
    """Stored rows times a number.

    The product is taken in float32, of the stored values and the number as float32, and rounded
    once to the stored dtype, to the nearest, ties to even.

    Args:
        rows: as `Checkpoint.read` gives them.
        dtype: their dtype as safetensors names it.
        scale: the number.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return as_stored(as_floats(rows) * np.float32(scale), dtype)
