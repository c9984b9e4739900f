"""Requests as the OpenAI API has them: checked, measured, and made what the servers take.

Both servers ignore fields that they do not know, so that `max_completion_tokens` would be no limit,
and find out that a prompt is too long when a stream has begun. What is said here is a clear error
before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dus_edge.chat.serve.call import Call
from dus_edge.chat.template import ChatTemplate, no_template
from dus_edge.errors import UsageError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
#: Tokens of a completion that asks for no number: OpenAI's default.
_COMPLETION_TOKENS = 16


class ApiError(Exception):
    """What is answered in place of an answer.

    Attributes:
        status: of HTTP.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Served:
    """The one model that is served.

    Attributes:
        alias: its name in the API.
        n_ctx: tokens of prompt and answer together.
        template: its own; None for a base model.
        stops: texts that end an answer of a chat, beside the tokens that do.
        encode: tokens of a rendered conversation.
        encode_text: tokens of a plain completion's prompt, the begin-of-text token among them.
        defaults: fields that are set where a request leaves them out.
        unknown: fields that the server behind would refuse.
    """

    alias: str
    n_ctx: int
    template: ChatTemplate | None
    stops: tuple[str, ...]
    encode: Callable[[str], list[int]]
    encode_text: Callable[[str], list[int]]
    defaults: dict[str, Any]
    unknown: frozenset[str] = frozenset()


def prepare_request(path: str, body: Any, served: Served) -> tuple[dict[str, Any], Call]:
    """A request as the server behind takes it, and what is known of it.

    Args:
        path: `CHAT` or `COMPLETION`.
        body: the JSON that came.
        served: the model.

    Raises:
        ApiError: it cannot be answered.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object.")
    if body.get("n") not in (None, 1):
        raise ApiError(400, "n: one answer is given to a request; ask again for another.")
    # Whatever model is named, there is one.
    body = {**served.defaults, **body, "model": served.alias}
    options = body.pop("stream_options", None)
    call = Call(wants_usage=isinstance(options, dict) and bool(options.get("include_usage")))
    if path == CHAT:
        _chat(body, call, served)
    else:
        _completion(body, call, served)
    if call.n_prompt >= served.n_ctx:
        raise ApiError(
            400,
            f"the prompt has {call.n_prompt:,} tokens, and the context {served.n_ctx:,}; shorten "
            "it, or start the server with a larger --ctx.",
            "context_length_exceeded",
        )
    _limit(body, served.n_ctx - call.n_prompt, None if path == CHAT else _COMPLETION_TOKENS)
    return {k: v for k, v in body.items() if k not in served.unknown}, call


def _chat(body: dict[str, Any], call: Call, served: Served) -> None:
    if served.template is None:
        raise ApiError(400, no_template(served.alias), "no_chat_template")
    body["messages"] = _messages(body.get("messages"))
    more = body.pop("chat_template_kwargs", None) or {}
    if not isinstance(more, dict):
        raise ApiError(400, "chat_template_kwargs is no JSON object.")
    taken = more.keys() & {"messages", "add_generation_prompt", "strftime_now"}
    if taken:
        raise ApiError(400, f"chat_template_kwargs: {min(taken)} cannot be set there.")
    if body.get("tools"):
        more = {**more, "tools": body["tools"]}
    try:
        call.prompt = served.template.prompt(body["messages"], **more)
    except UsageError as e:
        raise ApiError(400, str(e), "chat_template") from None
    call.n_prompt = len(served.encode(call.prompt))
    if more.keys() - {"tools"}:
        body["chat_template_kwargs"] = {k: v for k, v in more.items() if k != "tools"}
    if served.stops:
        stop = body.get("stop") or []
        body["stop"] = [*([stop] if isinstance(stop, str) else stop), *served.stops]


def _messages(found: Any) -> list[dict[str, Any]]:
    """Messages with plain texts: templates take no lists of parts."""
    if not isinstance(found, list) or not found:
        raise ApiError(400, "messages: there are none; give a list of roles and contents.")
    messages = []
    for i, message in enumerate(found):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"messages[{i}]: no object with a role and a content.")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, i) for part in content)
        elif content is not None and not isinstance(content, str):
            raise ApiError(400, f"messages[{i}]: its content is no text.")
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({**message, "role": role, "content": content or ""})
    return messages


def _part(part: Any, i: int) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ApiError(400, f"messages[{i}]: its content has a part that is no text.")
    return text


def _completion(body: dict[str, Any], call: Call, served: Served) -> None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise ApiError(400, "prompt: give one text.")
    body["prompt"] = prompt
    call.n_prompt = len(served.encode_text(prompt))


def _limit(body: dict[str, Any], room: int, default: int | None) -> None:
    """Put the answer's limit where both servers look for it, no larger than the room there is."""
    newer = body.pop("max_completion_tokens", None)
    asked = newer if newer is not None else body.get("max_tokens")
    asked = default if asked is None else asked
    if asked is not None and (type(asked) is not int or asked < 1):
        raise ApiError(400, f"max_tokens is {asked!r}; give a number from 1 on.")
    body["max_tokens"] = min(asked or room, room)
