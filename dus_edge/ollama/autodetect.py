"""Which template Ollama takes, by its own rules: without a TEMPLATE, and in spite of one.

Without one, Ollama compares the text of the GGUF's chat template with 37 that it knows and takes
the nearest, with its stops, if fewer than 100 edits lie between (`template/template.go`, `Named`).
With one, Ollama still runs the GGUF's own where that has more capabilities (`server/images.go`,
`shouldPreferChatTemplate`). Both: source of 2026-08-21.

The 37 texts are not kept here, but how often each triple of characters stands in them, hashed. An
edit of a run of characters changes about as many triples, so that the counts give about the
distance. Of 184 published templates 48 are near to one of the 37: all of those are found, with the
right name, and 5 more that are 106 to 145 edits away.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

#: From here on Ollama takes none of its templates.
FAR = 100
#: Below this estimate, Ollama takes the template for certain, as far as was seen.
_SURE = 60
#: Kinds of triples that are told apart.
_KINDS = 256


@dataclass(frozen=True)
class NearTemplate:
    """A template of Ollama's that is near to a checkpoint's.

    Attributes:
        name: Ollama's.
        edits: about how many lie between; 0 for the very text.
    """

    name: str
    edits: int

    @property
    def sure(self) -> bool:
        """Whether Ollama takes it beyond doubt, and not only may."""
        return self.edits < _SURE


def near_template(jinja_template: str) -> NearTemplate | None:
    """The template that Ollama takes for a checkpoint's, or may take; None if it takes none."""
    length = len(jinja_template)
    entries = [entry for entry in _index() if abs(length - entry["length"]) < FAR]
    if not entries:
        return None
    counts, found = count_triples(jinja_template), []
    for entry in entries:
        pairs = list(zip(counts, entry["triples"], strict=True))
        more = sum(max(a - b, 0) for a, b in pairs)
        less = sum(max(b - a, 0) for a, b in pairs)
        found.append(NearTemplate(entry["name"], max(more, less, abs(length - entry["length"]))))
    near = min(found, key=lambda near: near.edits)
    return near if near.edits < FAR else None


def count_triples(text: str) -> list[int]:
    """How often each kind of three characters stands in a text, by the CRC-32 of their UTF-8."""
    counts = [0] * _KINDS
    for i in range(len(text) - 2):
        counts[zlib.crc32(text[i : i + 3].encode("utf-8", "surrogatepass")) % _KINDS] += 1
    return counts


def capabilities(jinja_template: str) -> tuple[str, ...]:
    """What Ollama finds in the text of a chat template: tools, thinking.

    Go templates of ours have neither, so with any of them Ollama runs the GGUF's own, unless the
    server's ``OLLAMA_GO_TEMPLATE`` is set.
    """
    text = jinja_template
    tools = "tools" in text or "tool_call" in text
    splits = any(f"content.split({q}</think>{q})" in text for q in "'\"")
    thinks = ("<think>" in text and "</think>" in text) or (
        splits and "reasoning_content" not in text and "<SPECIAL_12>" not in text
    )
    return (*(["tools"] if tools else []), *(["thinking"] if thinks else []))


@cache
def _index() -> list[dict]:
    path = resources.files(__package__) / "templates" / "ollama_index.json"
    return json.loads(path.read_text(encoding="utf-8"))["templates"]
