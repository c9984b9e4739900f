"""What a checkpoint's card says: licence, base models, languages and tags.

A card is a `README.md` that starts with YAML between two ``---`` lines. Cards are written by
hand, so everything here is tolerant: what cannot be understood counts as not said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

CARD = "README.md"

#: More than any real front matter or licence has; a larger file is not read to its end.
_MAX_BYTES = 256 * 1024

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_KEYS = ("license", "license_name", "base_model", "language", "languages", "tags", "configs")
_TOP_LEVEL = re.compile(r"""(["']?)([\w-]+)\1[ \t]*:(?:\s|$)""")
#: Nested brackets take the YAML parser quadratic time; real entries have a handful.
_MAX_BRACKETS = 200
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying)([.-]\w+)*", re.IGNORECASE)
_LLAMA = re.compile(r"\bllama (\d(?:\.\d)?) community license agreement", re.IGNORECASE)
#: Lengths in characters of the known texts with some room; a longer file adds terms of its own.
_APACHE_LENGTH, _MIT_LENGTH = 13_000, 1_600


def front_matter(text: str) -> Mapping[str, object]:
    """What the YAML at the head of a card says under the keys that this module knows.

    Each top-level entry is parsed by itself: an error in one does not lose the others, and
    long tables of results cost nothing. Scalars stay strings: ``language: no`` means
    Norwegian, not false.
    """
    found = _FRONT_MATTER.match(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    if found is None:
        return {}
    entries = _top_level_entries(found[1])
    return {k: v for k in _KEYS if (v := _parse_entry(entries.get(k, ""))) is not None}


def _top_level_entries(yaml_text: str) -> Mapping[str, str]:
    entries: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in yaml_text.split("\n"):
        if key := _TOP_LEVEL.match(line):
            lines = entries[key[2]] = []
        lines.append(line)
    return {key: "\n".join(lines) for key, lines in entries.items()}


def _parse_entry(entry: str) -> object:
    """The value of a one-key YAML mapping, or None if it is broken."""
    if not entry or entry.count("[") + entry.count("{") > _MAX_BRACKETS:
        return None
    import yaml  # comes with huggingface_hub; late, since most commands never read a card

    try:
        data = yaml.load(entry, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return next(iter(data.values()), None) if isinstance(data, dict) else None


def read_card(folder: Path) -> Mapping[str, object]:
    """The front matter of a folder's `README.md`; empty if there is none."""
    return front_matter(_read_text(folder / CARD))


def read_licence(folder: Path) -> str | None:
    """The licence as the hub spells it (``apache-2.0``, ``llama3.1`` …), or None if unknown.

    The card comes first; with ``license: other`` its ``license_name`` counts. Without either,
    a licence file is recognised if it is Apache-2.0, MIT or a Llama community licence.
    """
    card = read_card(folder)
    said = ", ".join(_strings(card.get("license"))).lower()
    if said and said not in ("other", "unknown"):
        return said
    if named := _strings(card.get("license_name")):
        return named[0].lower()
    return _licence_from_files(folder) or (said if said == "other" else None)


def read_base_models(folder: Path) -> list[str]:
    """Ids of the models that this one was made from, as the card lists them."""
    return _strings(read_card(folder).get("base_model"))


def languages(folder: Path) -> list[str]:
    """Language codes from the card, e.g. ``["en", "ko"]``."""
    card = read_card(folder)
    return _strings(card.get("language") or card.get("languages"))


def tags(folder: Path) -> list[str]:
    """Tags from the card, in its order."""
    return _strings(read_card(folder).get("tags"))


def recognise_licence(text: str) -> str | None:
    """Identifier of a licence's full text, or None if it is none of the known ones verbatim."""
    words = " ".join(text.split()).lower()
    # The Llama texts come with appendices, so only their title is looked at.
    if llama := _LLAMA.search(words[:2000]):
        return f"llama{llama[1]}"
    if words.startswith("apache license version 2.0, january 2004") and len(words) < _APACHE_LENGTH:
        return "apache-2.0"
    is_mit = "permission is hereby granted, free of charge" in words and (
        'the software is provided "as is"' in words
    )
    if is_mit and len(words) < _MIT_LENGTH and "modified mit" not in words:
        return "mit"
    return None


def _licence_from_files(folder: Path) -> str | None:
    try:
        files = sorted(f for f in folder.iterdir() if _LICENCE_FILE.fullmatch(f.name))
    except OSError:
        return None
    return next((known for f in files if (known := recognise_licence(_read_text(f)))), None)


def _strings(value: object) -> list[str]:
    """A YAML scalar or list as a list of non-empty strings."""
    items = value if isinstance(value, list) else [value]
    return [text for i in items if isinstance(i, str) and (text := i.strip())]


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as f:
            return f.read(_MAX_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
