"""How the copies of an up-scaled model are made of the base's layers: pure numbers and arithmetic.

A layer adds two branches to the stream of hidden states, attention's and the FFN's; o_proj and
down_proj are the last matrices of the two, and some families have norms behind them. Times a number
A in the copies, the last of each branch scale what a copy does: 1 is SOLAR's copy
(arXiv:2312.15166), 0 is an identity, which LLaMA Pro (arXiv:2401.02415) starts its new blocks from,
and leaves the base's own outputs.

An averaged copy is what lies halfway between two layers: the mean of its source and the base's next
layer, norms and biases too. Most methods "copy or average weights from base layers"
(arXiv:2508.08011, which makes its own of two neighbours as well); Emu3-Gen-12B was made so
(huggingface.co/lodrick-the-lafted/Emu3-Gen-12B, "lerp'd between the previous layer and the current
and inserted between the two"). The base's last layer has no next, and a copy of it stays a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dus_edge.adapter.numbers import as_floats, as_stored
from dus_edge.errors import UsageError

COPY, AVERAGED = "copy", "averaged"
COPY_METHODS = (COPY, AVERAGED)


@dataclass(frozen=True)
class Method:
    """How copies are made.

    Attributes:
        kind: ``copy``, or ``averaged`` with the base's next layer.
        branch_scale: what the copies' o_proj and down_proj are multiplied by, as float32.
    """

    kind: str = COPY
    branch_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in COPY_METHODS:
            raise UsageError(f"--method {self.kind!r}: choose {' or '.join(COPY_METHODS)}.")
        scale = self.branch_scale
        if not 0 <= scale <= float(np.finfo(np.float32).max):
            raise UsageError(_wanted(f"{scale:g}"))

    @property
    def is_plain(self) -> bool:
        """Whether copies are copies, byte for byte."""
        return self == PLAIN_COPIES

    @property
    def spelled(self) -> str:
        """In few words; empty where copies are just copies."""
        averaged = ["averaged"] if self.kind == AVERAGED else []
        scaled = [f"branches × {self.branch_scale:g}"] if self.branch_scale != 1 else []
        return ", ".join(averaged + scaled)

    @property
    def sentence(self) -> str:
        """What is done to copies, for cards and descriptions; empty where nothing is."""
        averaged, scale = self.kind == AVERAGED, self.branch_scale
        of = "then" if averaged else "the base's"
        mean = ["each is the mean of its source and the base's next layer"] if averaged else []
        what = "what their attention and FFN add is"
        times = [f"{what} {of} times {scale:g}"] if scale != 1 else []
        return "; ".join(mean + times)

    def as_json(self) -> dict[str, Any]:
        """What differs from a plain copy, by name."""
        kind = {} if self.kind == COPY else {"method": self.kind}
        return kind | ({} if self.branch_scale == 1 else {"branch_scale": self.branch_scale})


#: SOLAR's.
PLAIN_COPIES = Method()


def method_of_json(said: Mapping[str, Any]) -> Method:
    """The method that `Method.as_json` told; other keys are not looked at.

    Raises:
        UsageError: a value that no method has.
    """
    return Method(said.get("method", COPY), parse_scale(said.get("branch_scale", 1.0)))


def parse_scale(value: object) -> float:
    """The number that `--branch-scale` or a plan's file says.

    Raises:
        UsageError: it is none, negative or infinite.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        scale = float(value)
    except (ValueError, OverflowError):
        raise UsageError(_wanted(repr(value))) from None
    return Method(branch_scale=scale).branch_scale


def _wanted(given: str) -> str:
    return f"--branch-scale {given}: a number from 0 on is needed, such as 0.5."


def made_rows(
    rows: Sequence[np.ndarray], dtype: str, scale: float = 1.0, shift: float = 0.0
) -> np.ndarray:
    """Rows of a tensor that a method makes: the mean of stored rows times a number.

    Mean and product are taken in float32, of the stored values and the number as float32, and
    rounded once to the stored dtype, to the nearest, ties to even.

    Args:
        rows: one array or two, as `Checkpoint.read` gives them.
        dtype: of the result, as safetensors names it.
        scale: the number.
        shift: what is added to stored values before they are used: of ``w + shift`` the product
            is wanted, and stored is that less the shift.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        first, *others = map(as_floats, rows)
        for other in others:
            # Halves before the sum: it cannot become too large.
            first = first * np.float32(0.5) + other * np.float32(0.5)
        made = first * np.float32(scale)
        if shift:
            made = made + np.float32(shift * (scale - 1))
        return as_stored(made, dtype)
