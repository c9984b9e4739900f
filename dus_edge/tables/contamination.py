"""What `dus-edge eval --contamination` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dus_edge.eval.contamination import N_WORDS, TaskOverlap
from dus_edge.words import aligned_table, cut_end, wrap

_MOST_EXAMPLES = 5


def overlap_page(found: Mapping[str, TaskOverlap]) -> str:
    """A table of tasks, and what was found of the dirtiest, no line over 80 columns."""
    rows = [
        [
            cut_end(name, 40),
            f"{o.n_documents:,}",
            f"{o.too_short:,}",
            f"{len(o.dirty):,}",
            "none" if o.share is None else f"{100 * o.share:.2f} %",
        ]
        for name, o in found.items()
    ]
    parts = [
        aligned_table(["task", "questions", "too short", "in the text", "share"], rows),
        wrap(
            f"A question is in the text if {N_WORDS} of its words in a row are; questions of fewer "
            "words cannot be judged, and the share is of the others."
        ),
    ]
    dirty = sorted((o for o in found.values() if o.dirty), key=lambda o: -len(o.dirty))
    for o in dirty[:_MOST_EXAMPLES]:
        number, words = o.examples[0]
        parts.append(wrap(f"{o.task}, question {number + 1}: “{words}”", rest="  "))
    return "\n\n".join(parts)


def overlap_json(found: Mapping[str, TaskOverlap]) -> dict[str, Any]:
    """The same for programs."""
    return {
        name: {
            "questions": o.n_documents,
            "too_short": o.too_short,
            "in_text": list(o.dirty),
            "share": o.share,
            "examples": [{"question": number, "words": words} for number, words in o.examples],
        }
        for name, o in found.items()
    }
