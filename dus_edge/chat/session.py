"""A conversation with a model: what was said, what of it fits, and the next answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dus_edge.chat.engine import Engine, Pass, Sampling
from dus_edge.chat.stops import StopTexts
from dus_edge.errors import UsageError

#: Share of the context that old turns make room for where an answer's length is not limited.
_ROOM = 4

Ending = Literal["stop", "length", "context", "interrupted"]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: of it.
        n_prompt: tokens of the prompt, all of the conversation so far.
        n_dropped: messages that were left out of it, the oldest.
        ran: what the model was run for.
        why: what ended it: the model or its template, `n_most`, the end of the context, the user.
    """

    text: str
    n_prompt: int
    n_dropped: int
    ran: Pass
    why: Ending

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of the answer a second, the first one apart; None of fewer than two."""
        n = self.ran.n_tokens - 1
        return n / self.ran.answer_s if n > 0 and self.ran.answer_s > 0 else None


class Conversation:
    """What was said so far, and the model that answers.

    A question that could not be answered leaves no trace; an answer that was cut short stays as
    far as it came.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        system: str | None = None,
        n_most: int | None = None,
    ) -> None:
        self.engine, self.sampling, self.system = engine, sampling, system
        self._n_most = n_most
        self._said: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._said = []

    @property
    def n_messages(self) -> int:
        """Messages so far, without the system message."""
        return len(self._said)

    def ask(
        self,
        question: str,
        on_text: Callable[[str], None],
        wanted: Callable[[], bool] = lambda: True,
    ) -> Answer:
        """The next answer.

        Args:
            question: the user's message.
            on_text: takes the answer as it is written.
            wanted: asked at each token; no ends the answer.

        Raises:
            UsageError: the question alone is longer than the context, or the template refuses it.
            DusEdgeError: the model cannot be run.
        """
        said = [*self._said, {"role": "user", "content": question}]
        ids, n_dropped = self._fitted(said)
        room = self.engine.n_ctx - len(ids)
        n_most = min(self._n_most or room, room)
        stops, pieces = StopTexts(self.engine.stops), []

        def show(piece: str) -> bool:
            if text := stops.feed(piece):
                pieces.append(text)
                on_text(text)
            return not stops.met and wanted()

        ran = self.engine.answer(ids, self.sampling, n_most, show)
        if rest := stops.rest():
            pieces.append(rest)
            on_text(rest)
        answer = "".join(pieces)
        self._said = [*said[n_dropped:], {"role": "assistant", "content": answer}]
        why: Ending = "interrupted"
        if ran.ended or stops.met:
            why = "stop"
        elif ran.n_tokens >= n_most:
            why = "context" if n_most == room else "length"
        return Answer(answer, len(ids), n_dropped, ran, why)

    def _fitted(self, said: list[dict[str, str]]) -> tuple[list[int], int]:
        """The prompt's tokens, and how many messages at the front were left out to make it fit."""
        assert self.engine.template is not None
        n_ctx = self.engine.n_ctx
        room = min(self._n_most or n_ctx, n_ctx // _ROOM)
        front = [{"role": "system", "content": self.system}] if self.system else []
        for n in range(0, len(said), 2):
            ids = self.engine.encode(self.engine.template.prompt([*front, *said[n:]]))
            if len(ids) + room <= n_ctx:
                return ids, n
        if len(ids) < n_ctx:  # little room, yet some
            return ids, n
        raise UsageError(
            f"the message makes a prompt of {len(ids):,} tokens, and the context has {n_ctx:,}; "
            "shorten it, or take a larger --ctx."
        )
