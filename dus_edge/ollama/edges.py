"""Conversations at the edge, where a Go template in Ollama and a checkpoint's own may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dus_edge.ollama.gotemplate import Message, render_conversation

_REASONING = "<think>\nIt is even.\n</think>\n\n"


def _talk(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": text} for role, text in turns)


#: Conversations by what is at the edge in them.
EDGES: Mapping[str, tuple[Message, ...]] = {
    "system": _talk(("system", "Be brief."), ("user", "Hello.")),
    "two questions": _talk(("user", "One."), ("user", "Two?")),
    "empty system": _talk(("system", ""), ("user", "Hello.")),
    "blanks": _talk(("user", " One.\n"), ("assistant", "\n Two. "), ("user", "\tThree?\n\n")),
    "reasoning": _talk(("user", "4?"), ("assistant", f"{_REASONING}Even."), ("user", "5?")),
}

#: What is said of each, where the checkpoint's own template refuses it, and where it renders else.
_SAID = {
    "system": (
        "it refuses system messages; here they precede the first question.",
        "system messages stand elsewhere.",
    ),
    "two questions": (
        "it refuses two user messages in a row; Ollama joins them by a blank line.",
        "two user messages in a row are two turns; Ollama joins them by a blank line.",
    ),
    "empty system": (
        "it refuses an empty system message.",
        "an empty system message is written otherwise.",
    ),
    "blanks": (
        "it refuses messages with blanks around them.",
        "it strips blanks around messages; a Go template in Ollama cannot.",
    ),
    "reasoning": (
        "it refuses answers with reasoning in them.",
        "it leaves out the reasoning (<think>…</think>) of earlier answers.",
    ),
}


def edge_differences(template: str, system: str | None, texts: Sequence[str | None]) -> list[str]:
    """Where a Go template renders otherwise than a checkpoint's own.

    Args:
        template: Go.
        system: the Modelfile's SYSTEM, which Ollama puts before a conversation without one.
        texts: what the checkpoint's own renders for `EDGES`; None where it refuses.

    Returns:
        names of `EDGES`.
    """
    found = []
    for (name, talk), text in zip(EDGES.items(), texts, strict=True):
        if system is not None and talk[0]["role"] != "system":
            talk = ({"role": "system", "content": system}, *talk)
        if text is None or render_conversation(template, talk) != text:
            found.append(name)
    return found


def edge_sentences(names: Sequence[str], texts: Sequence[str | None]) -> list[str]:
    """What is said of differences: half sentences about the checkpoint's own template.

    Args:
        names: of `edge_differences`.
        texts: as there.
    """
    shown = dict(zip(EDGES, texts, strict=True))
    return [_SAID[name][shown[name] is not None] for name in names]
