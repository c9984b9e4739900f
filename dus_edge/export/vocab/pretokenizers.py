"""Which of llama.cpp's pre-tokenizers cuts text as a ``tokenizer.json`` says.

llama.cpp's converter hashes the ids of one sample text, so it knows vocabularies, not rules. The
rules are in the file itself; `data/pretokenizers.toml` holds those that llama.cpp has code for.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from dus_edge.errors import UnsupportedError

#: One step of a pre-tokenizer: its type and the settings that change where words end.
Step = tuple[str, ...]


@dataclass(frozen=True)
class PreTokenizer:
    """A byte-level pre-tokenizer that llama.cpp knows by the name `pre`."""

    pre: str
    models: str
    ignore_merges: bool
    steps: tuple[Step, ...]
    note: str | None


@cache
def known_pretokenizers() -> tuple[PreTokenizer, ...]:
    """The kinds of ``data/pretokenizers.toml``."""
    text = (package_files("dus_edge") / "data" / "pretokenizers.toml").read_text(encoding="utf-8")
    return tuple(
        PreTokenizer(
            pre=kind["pre"],
            models=kind["models"],
            ignore_merges=kind["ignore_merges"],
            steps=tuple(_known_step(step) for step in kind["steps"]),
            note=kind.get("note"),
        )
        for kind in tomllib.loads(text)["kind"]
    )


def byte_level_pre(tokenizer: Mapping[str, Any], path: Path) -> tuple[str, list[str]]:
    """The value of ``tokenizer.ggml.pre`` for a byte-level BPE ``tokenizer.json``, with notes.

    Raises:
        UnsupportedError: llama.cpp has no such pre-tokenizer, or text is normalized otherwise
            than by NFC (which llama.cpp leaves out).
    """
    notes = []
    names = [str(step.get("type")) for step in flatten(tokenizer.get("normalizer"), "normalizers")]
    if unknown := [name for name in names if name != "NFC"]:
        raise UnsupportedError(
            f"{path}: the normalizer {unknown[0]} has no counterpart in llama.cpp's byte-level "
            "tokenizers; only NFC is accepted."
        )
    if names:
        notes.append(
            "tokenizer.json composes characters (NFC) before it reads them; llama.cpp does not, "
            "so text with separate combining marks gets other ids."
        )
    steps = tuple(_step(step) for step in flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    for kind in known_pretokenizers():
        if kind.steps == steps and kind.ignore_merges == ignore_merges:
            return kind.pre, notes + ([kind.note] if kind.note else [])
    found = " + ".join("(" + " ".join(step) + ")" for step in steps) or "none"
    known = "; ".join(f"{kind.pre} ({kind.models})" for kind in known_pretokenizers())
    raise UnsupportedError(
        f"{path}: pre_tokenizer {found} with ignore_merges {str(ignore_merges).lower()} is none "
        f"that llama.cpp is known to follow; the known kinds are {known}."
    )


def space_prefix(tokenizer: Mapping[str, Any], path: Path) -> tuple[bool, list[str]]:
    """Whether a SentencePiece-like ``tokenizer.json`` puts a ``▁`` before the text, with notes.

    The shapes: a normalizer ``[Prepend ▁,] Replace " " → ▁`` (transformers 4, ``legacy=True``),
    or a pre-tokenizer Metaspace (``legacy=False``, transformers 5, and files of before 2023).

    Raises:
        UnsupportedError: another normalizer or pre-tokenizer.
    """
    prepend = replace = False
    for step in flatten(tokenizer.get("normalizer"), "normalizers"):
        pattern = (step.get("pattern") or {}).get("String")
        if step.get("type") == "Prepend" and step.get("prepend") == "▁":
            prepend = True
        elif (step.get("type"), pattern, step.get("content")) == ("Replace", " ", "▁"):
            replace = True
        else:
            raise UnsupportedError(
                f"{path}: the normalizer {_compact(step)} has no counterpart in llama.cpp's "
                'tokenizer for Llama models; Prepend "▁" and Replace " " by "▁" have.'
            )
    steps = flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    # Once spaces are replaced there is none left to split at (Gemma's files have this).
    if replace:
        steps = [step for step in steps if (step.get("pattern") or {}).get("String") != " "]
    if replace and not steps:
        return prepend, []
    if len(steps) == 1 and steps[0].get("type") == "Metaspace" and not prepend:
        return _metaspace(steps[0], tokenizer["model"].get("vocab") or {}, path)
    found = " + ".join(_compact(step) for step in steps) or "none"
    raise UnsupportedError(
        f"{path}: pre_tokenizer {found} has no counterpart in llama.cpp's tokenizer for Llama "
        'models; known are Metaspace with "▁" and none after a normalizer Replace " " by "▁".'
    )


def flatten(step: Any, children: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, with nested ``Sequence`` objects dissolved."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return [leaf for child in step.get(children) or [] for leaf in flatten(child, children)]
    return [step]


def _metaspace(
    step: Mapping[str, Any], vocab: Mapping[str, int], path: Path
) -> tuple[bool, list[str]]:
    if step.get("replacement", "▁") != "▁":
        raise UnsupportedError(
            f"{path}: Metaspace replaces spaces by {step['replacement']!r}; llama.cpp uses '▁'."
        )
    # Files of before tokenizers 0.15 say add_prefix_space, not prepend_scheme.
    old = "always" if step.get("add_prefix_space", True) else "never"
    scheme = step.get("prepend_scheme", old)
    notes = []
    if scheme != "never":
        notes.append(
            "tokenizer.json adds no space before text that begins with one; llama.cpp does."
        )
    if scheme == "first":
        notes.append(
            "tokenizer.json adds a space before the whole text only; llama.cpp also adds one "
            "after each special token in it."
        )
    if step.get("split", True) and any("▁" in text[1:] for text in vocab):
        notes.append(
            "tokenizer.json splits words at spaces before it merges; llama.cpp does not, so it "
            "may form the tokens that have a space inside, such as runs of spaces."
        )
    return scheme != "never", notes


def _known_step(step: Mapping[str, Any]) -> Step:
    if step["type"] == "Split":
        return ("Split", f"regex={step['regex']}", "isolated")
    if step["type"] == "Digits":
        return ("Digits", f"individual_digits={step['individual_digits']}")
    return ("ByteLevel", f"use_regex={step['use_regex']}", "add_prefix_space=False")


def _step(step: Mapping[str, Any]) -> Step:
    kind = step.get("type")
    if kind == "Split":
        pattern = step.get("pattern") or {}
        behavior = str(step.get("behavior")).lower()
        # Removing what does not match is the same cut as isolating what does, for patterns
        # that leave nothing over; all the known ones match every character.
        if (behavior == "removed") == bool(step.get("invert")) and behavior in (
            "removed",
            "isolated",
        ):
            behavior = "isolated"
        elif step.get("invert"):
            behavior += " inverted"
        if "Regex" in pattern:
            return ("Split", f"regex={pattern['Regex']}", behavior)
        return ("Split", f"string={pattern.get('String')!r}", behavior)
    if kind == "Digits":
        return ("Digits", f"individual_digits={bool(step.get('individual_digits'))}")
    if kind == "ByteLevel":
        return (
            "ByteLevel",
            f"use_regex={bool(step.get('use_regex', True))}",
            f"add_prefix_space={bool(step.get('add_prefix_space', True))}",
        )
    return (_compact(step),)


def _compact(step: Mapping[str, Any]) -> str:
    return json.dumps(step, ensure_ascii=False)
