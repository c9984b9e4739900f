"""A model's own chat template: the prompt of a conversation, and what ends an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.text.jinja import TemplateRefusal, render_prompt

ChatMessage = Mapping[str, Any]

_ANSWER, _NEXT = "An answer stands here", "The next question stands here"
_PROBE = (
    {"role": "user", "content": "A question stands here"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _NEXT},
)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the tokens that it may name.

    Attributes:
        jinja: the program.
        special_tokens: texts by role: ``bos_token``, ``eos_token``, …
        where: the file that it is of, for messages.
    """

    jinja: str
    special_tokens: Mapping[str, str]
    where: str

    def prompt(self, messages: Sequence[ChatMessage], **more: Any) -> str:
        """The text that the model is given to answer to, all of its tokens spelled out.

        Args:
            messages: roles and contents.
            more: what else the template can read.

        Raises:
            UsageError: the template refuses the conversation.
        """
        try:
            return render_prompt(self.jinja, messages, self.special_tokens, **more)
        except TemplateRefusal as e:
            raise UsageError(
                f"{self.where}: the model's chat template refuses the conversation ({e}); change "
                "its roles or their order."
            ) from None

    def answer_end(self) -> str:
        """The text with which the template ends an answer and goes on to the next question.

        Empty where it cannot be told. What stands there ends an answer, whatever the model's
        files name as their end-of-text token.
        """
        try:
            text = render_prompt(self.jinja, _PROBE, self.special_tokens)
        except TemplateRefusal:
            return ""
        after = text.partition(_ANSWER)[2]
        return after.partition(_NEXT)[0].strip() if _NEXT in after else ""


def no_template(where: object) -> str:
    """What is said of a model that has no template."""
    return (
        f"{where} has no chat template: it is a base model, which continues text and answers "
        "nobody; name a chat model, or make one with dus-edge sft."
    )
