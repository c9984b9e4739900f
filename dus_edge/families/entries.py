"""From a family's TOML to records: what `like` brings in, and each table's entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dus_edge.families.rules import DepthRule, FieldRule, LayerPattern, TensorRule


class FamilyError(ValueError):
    """A family's TOML is wrong; a mistake of ours, which a test finds."""


def check_entry(holds: bool, message: str) -> None:
    """See that a TOML is right.

    Raises:
        FamilyError: it is not.
    """
    if not holds:
        raise FamilyError(message)


def merged_entries(
    tables: Mapping[str, Any], bases: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A family's entries over those of the one that it is like; tables one level deep."""
    own = dict(tables)
    like = own.pop("like", None)
    without = own.pop("without", {})
    if like is None:
        return own
    check_entry(like in bases, f"there is no family {like!r}")
    base = {**merged_entries(bases[like], bases), "spellings": []}
    gguf = {**base["gguf"], **own.get("gguf", {})}
    gguf["keys"] = _listed(base["gguf"]["keys"], own.get("gguf", {}), "keys", "key", without)
    tensors = _listed(base["tensors"], own, "tensors", "role", without)
    for key, value in own.items():
        old = base.get(key)
        base[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    kept = {k: v for k, v in base["fields"].items() if k not in without.get("fields", ())}
    return {**base, "gguf": gguf, "tensors": tensors, "fields": kept}


def _listed(
    old: list[dict[str, Any]],
    own: Mapping[str, Any],
    entry: str,
    name: str,
    without: Mapping[str, list[str]],
) -> list[dict[str, Any]]:
    """Tensors or keys of a family over those of another: changed, left out, or new and last."""
    merged = {item[name]: item for item in old}
    for gone in without.get(entry, ()):
        check_entry(gone in merged, f"without {gone!r}, which is not there")
        del merged[gone]
    for item in own.get(entry, ()):
        merged[item[name]] = {**merged.get(item[name], {}), **item}
    return list(merged.values())


def parse_field(rule: Mapping[str, Any]) -> FieldRule:
    """One of `[fields]`."""
    check_entry(rule.get("null", "none") == "none", f"null is {rule.get('null')!r}")
    unknown = set(rule) - {"key", "default", "null", "only_if", "power"}
    check_entry(not unknown, f"unknown entries of a field: {sorted(unknown)}")
    check_entry(
        "key" in rule or "default" in rule, f"a field of neither key nor default: {dict(rule)}"
    )
    power = float(rule.get("power", 1.0))
    return FieldRule(
        rule.get("key"), rule.get("default"), "null" in rule, rule.get("only_if"), power
    )


def parse_tensor(rule: Mapping[str, Any]) -> TensorRule:
    """A tensor; an empty text takes away what a family that it is like has."""
    given = {key: value or None for key, value in rule.items()}
    return TensorRule(**{**given, "shape": tuple(rule["shape"])})


def rope_entries(tables: Mapping[str, Any]) -> dict[str, Any]:
    """What `[rope]` says, by the names of `Family`."""
    share, local = tables.get("share"), tables.get("local")
    return {
        "rope_kinds": tuple(tables["kinds"]),
        "rope_theta": float(tables.get("theta", 10000.0)),
        "rope_share": None if share is None else float(share),
        "rope_local": None if local is None else parse_field(local),
        "rope_style": tables.get("style", "halves"),
        "reorder": tables.get("reorder", "none"),
    }


def layer_entries(tables: Mapping[str, Any]) -> dict[str, Any]:
    """What `[layers]` says, by the names of `Family`."""
    return {
        "layer_prefix": tables["prefix"],
        "layer_lists": tuple(tables.get("lists", ())),
        "layer_caps": tuple(tables.get("caps", ())),
        "period": tables.get("period", 1),
        "depths": tuple(DepthRule(**rule) for rule in tables.get("depths", ())),
        "patterns": {
            kind: LayerPattern(**{**rule, "entries": tuple(rule["entries"])})
            for kind, rule in tables.get("patterns", {}).items()
        },
    }
