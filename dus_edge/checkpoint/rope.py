"""Rotary position embeddings as `config.json` says them, in every spelling of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.families.family import Family
from dus_edge.families.rules import FieldRule

#: Numbers that a kind of rotary embedding needs.
_ROPE_NEEDS = {
    "longrope": ("original_max_position_embeddings",),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
#: Lists of numbers that a kind needs, one for each frequency.
_ROPE_LISTS = {"longrope": ("short_factor", "long_factor")}
#: Other names of a kind.
_ROPE_ALIASES = {"su": "longrope"}
#: Numbers that a rotary embedding may have beside those that it needs.
_ROPE_NUMBERS = (
    *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    *("attention_factor", "extrapolation_factor", "beta_fast", "beta_slow", "mscale"),
    "mscale_all_dim",
)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and, if any, its scaling.

    Attributes:
        theta: base of the frequencies, ``inv_freq[i] = theta ** (-2 i / rotary_dim)``.
        kind: one of the family's `rope_kinds`.
        params: the scaling's own numbers under transformers' names (``factor``, …).
        share: of a head's channels that are rotated.
        theta_local: base in the layers that have a window, where it is another one.
    """

    theta: float
    kind: str = "default"
    params: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    theta_local: float | None = None

    def channels(self, head_dim: int) -> int:
        """Of a head's channels, how many are rotated."""
        return int(head_dim * self.share)

    def check(self, head_dim: int, where: str) -> None:
        """See that it fits heads of a size.

        Raises:
            CheckpointError: it does not.
        """
        n = self.channels(head_dim)
        if n < 2 or n % 2:
            raise CheckpointError(
                f"{where}: {self.share:g} of heads of {head_dim} are to be rotated; an even number "
                "of channels is needed."
            )
        for key in _ROPE_LISTS.get(self.kind, ()):
            if (given := len(self.params[key])) != n // 2:
                raise CheckpointError(
                    f"{where}: {key} of rope has {given} entries; {n // 2} are needed, one for "
                    "each frequency."
                )


def read_rope(raw: Mapping[str, Any], where: str, family: Family) -> Rope:
    """Rope of either spelling; transformers 5 keeps theta inside `rope_parameters`.

    Args:
        raw: config.json.
        where: names it in messages.
        family: which kinds there are, and what holds where nothing is said.

    Raises:
        CheckpointError: a number is missing or none.
        UnsupportedError: a kind that the family does not have.
    """
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta_local = None
    if family.rope_local is not None and isinstance(params, dict):
        theta_local = _theta_local(raw, where, family.rope_local, params)
        params = params.get("full_attention", params)
    if not isinstance(params, dict):
        raise CheckpointError(f"{where}: the rope parameters are {params!r}, not a JSON object.")
    params = dict(params)
    kind = str(params.pop("rope_type", None) or params.pop("type", None) or "default").lower()
    params.pop("type", None)
    kind = _ROPE_ALIASES.get(kind, kind)
    if kind == "longrope":
        original = raw.get("original_max_position_embeddings")
        params.setdefault("original_max_position_embeddings", original)
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or family.rope_theta
    if kind not in family.rope_kinds:
        raise UnsupportedError(
            f"{where}: rope type {kind!r} is not supported; "
            f"known are {', '.join(family.rope_kinds)}."
        )
    for key in _ROPE_NEEDS.get(kind, ()):
        value = params.get(key)
        if not is_number(value) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{where}: rope type {kind!r} needs a positive number {key!r}, not {value!r}."
            )
    for key in _ROPE_LISTS.get(kind, ()):
        values = params.get(key)
        if not isinstance(values, list) or not all(is_number(v) and 0 < v < 1e30 for v in values):
            raise CheckpointError(f"{where}: rope type {kind!r} needs a list of numbers {key!r}.")
    for key, value in params.items():
        if (
            key in _ROPE_NUMBERS
            and value is not None
            and not (is_number(value) and abs(value) < 1e30)
        ):
            raise CheckpointError(f"{where}: {key} of rope is {value!r}; a number is needed.")
    share = params.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor")
    share = share or family.rope_share or 1
    if not is_number(share) or not 0 < share <= 1:
        raise CheckpointError(
            f"{where}: partial_rotary_factor is {share!r}; a number above 0, up to 1, is needed."
        )
    if share != 1 and family.rope_share is None:
        raise UnsupportedError(
            f"{where}: partial rotary embeddings are not supported in a {family.architecture}."
        )
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1e30:
        raise CheckpointError(f"{where}: rope_theta is {theta!r}; a positive number is needed.")
    return Rope(float(theta), kind, params, float(share), theta_local)


def _theta_local(
    raw: Mapping[str, Any], where: str, rule: FieldRule, params: Mapping[str, Any]
) -> float:
    """Base of the frequencies in the layers that have a window; these are never scaled."""
    local = params.get("sliding_attention") or {}
    if not isinstance(local, dict):
        raise CheckpointError(f"{where}: the rope parameters are {local!r}, not a JSON object.")
    kind = local.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedError(
            f"{where}: rope type {kind!r} of sliding_attention is not supported; known is default."
        )
    theta = local.get("rope_theta") or raw.get(str(rule.key)) or rule.default
    if not is_number(theta) or not 0 < theta < 1e30:
        raise CheckpointError(f"{where}: {rule.key} is {theta!r}; a positive number is needed.")
    return float(theta)


def is_number(value: object) -> bool:
    """Whether JSON has a number there; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
