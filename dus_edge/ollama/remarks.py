"""What a Modelfile's comment says of a chat format."""

from __future__ import annotations

from dus_edge.ollama.autodetect import FAR, NearTemplate
from dus_edge.ollama.recognise import ChatFormat

_UNKNOWN = (
    "Chat format: unknown. The checkpoint's chat template renders like none that dus-edge has a Go"
    " template for, so none is given here"
)


def format_remarks(found: ChatFormat) -> tuple[str, ...]:
    """Paragraphs about the format, which template Ollama runs, and where the two differ."""
    if found.family is None:
        return (_unknown(found),)
    family = found.family
    if found.left:
        why = f"it has {_has(found)}" if found.has else "its text is near to none of Ollama's own"
        return (
            f"Chat format: {family.title}, left to the GGUF's own chat template, which Ollama runs,"
            f" for {why}. It writes the day's date, which would stand still in a TEMPLATE.",
        )
    parts = [f"Chat format: {family.title} ({family.source})."]
    if family.notes:
        parts.append(family.notes)
    if not found.known and not found.has and found.near:
        parts.append(f"Without this TEMPLATE, {_taken(found.near)}.")
    if found.has:
        parts.append(
            f"Ollama runs the GGUF's own chat template instead of this TEMPLATE, for it has"
            f" {_has(found)}, unless OLLAMA_GO_TEMPLATE=1 is set for its server."
        )
    differs = list(found.differs)
    if found.dated:
        differs.append("it writes the day's date; here it is 26 July 2024.")
    if differs:
        told = " ".join(f"({i}) {text}" for i, text in enumerate(differs, 1))
        parts.append(f"Where the checkpoint's own template differs from TEMPLATE: {told}")
    elif found.has:
        parts.append("For text without tools, both give the same.")
    return tuple(parts)


def _unknown(found: ChatFormat) -> str:
    if found.near is None or found.has:
        return f"{_UNKNOWN}: Ollama runs the one in the GGUF."
    stops = ""
    if found.stops:
        stops = f" The stops are the checkpoint's, in place of those of {found.near.name}."
    return (
        f"{_UNKNOWN}, and {_taken(found.near)}. Set OLLAMA_GO_TEMPLATE=0 for its server to have it"
        f" run the one in the GGUF.{stops}"
    )


def _taken(near: NearTemplate) -> str:
    if near.edits == 0:
        return f"Ollama takes its own {near.name}, which it has for this very template"
    return (
        f"Ollama {'takes' if near.sure else 'may take'} its own {near.name}, since the two"
        f" templates' texts are near (about {near.edits} edits; fewer than {FAR} count)"
    )


def _has(found: ChatFormat) -> str:
    return " and ".join(found.has)
