"""Text that ends an answer, found while the answer is still being written."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes text on, except what may yet become a stop."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        #: Whether a stop was met; nothing passes after it.
        self.met = False

    def feed(self, piece: str) -> str:
        """The text that can be shown now."""
        if self.met:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.met, self._held = True, ""
            return text[: min(found)]
        n = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n :]
        return text[: len(text) - n]

    def rest(self) -> str:
        """What was held back for nothing, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end begins a stop."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
