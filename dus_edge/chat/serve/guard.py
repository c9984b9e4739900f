"""What stands between the network and a server: who may ask, what, and whether they still wait.

A server on loopback is open to every page in a browser on the same machine. So a request that a
page of another origin sends is refused, and so is one for a name that is not this machine's (a
domain that was pointed at 127.0.0.1).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import weakref
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dus_edge.chat.serve.call import CURRENT, Call
from dus_edge.chat.serve.request import CHAT, COMPLETION, ApiError, Served, prepare_request

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]

MODELS = "/v1/models"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
#: More than the longest context that is asked for has in text.
MAX_BODY_BYTES = 16 << 20
_BETWEEN_EVENTS = re.compile(rb"(\r?\n\r?\n)")
_METHODS = {CHAT: "POST", COMPLETION: "POST", MODELS: "GET"}


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        key: what a client must know; None: nothing.
        hosts: names that this machine may be called by; None: any.
    """

    key: str | None
    hosts: frozenset[str] | None

    def check(self, headers: dict[str, str]) -> None:
        """Let a request pass.

        Args:
            headers: by lower-case name.

        Raises:
            ApiError: it does not.
        """
        host = headers.get("host", "")
        if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
            raise ApiError(403, f"this server is not called {host!r}.", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin} may not ask this server.", "wrong_origin")
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.key is not None and not hmac.compare_digest(given, self.key.encode()):
            raise ApiError(401, "the API key is missing or wrong.", "invalid_api_key")


class Guard:
    """An ASGI application around a server's.

    Args:
        app: the server's.
        served: the model behind it.
        access: who may ask.
    """

    def __init__(self, app: Any, served: Served, access: Access) -> None:
        self._app, self._served, self._access = app, served, access
        self._calls: weakref.WeakSet[_Held] = weakref.WeakSet()

    def end_all(self) -> None:
        """Nobody waits any more: the server is about to end."""
        for held in list(self._calls):
            held.call.gone.set()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """One connection of ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        try:
            self._check(scope)
            if scope["path"] == MODELS:
                await self._app(scope, receive, send)
                return
            text = await _read(receive)
            body, call = await asyncio.to_thread(self._prepare, scope["path"], text)
        except ApiError as e:
            await _answer(send, e)
            return
        except _Gone:
            return
        await self._answered(scope, receive, send, body, call)

    def _check(self, scope: _Scope) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        self._access.check(headers)
        path, method = scope["path"], scope["method"]
        if path not in _METHODS:
            raise ApiError(404, f"there is no {path}; there are {', '.join(_METHODS)}.")
        if method != _METHODS[path]:
            raise ApiError(405, f"{path} takes {_METHODS[path]}.")

    def _prepare(self, path: str, text: bytes) -> tuple[bytes, Call]:
        try:
            body = json.loads(text)
        except ValueError as e:
            raise ApiError(400, f"the body is no JSON ({e}).") from None
        ready, call = prepare_request(path, body, self._served)
        return json.dumps(ready).encode(), call

    async def _answered(
        self, scope: _Scope, receive: _Receive, send: _Send, body: bytes, call: Call
    ) -> None:
        """Have the server behind answer, and tell it when the client goes away."""
        held, gone, given = _Held(call), asyncio.Event(), False
        self._calls.add(held)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            call.gone.set()
            gone.set()

        async def again() -> _Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            if not gone.is_set():
                await gone.wait()
            return {"type": "http.disconnect"}

        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        scope = {**scope, "headers": headers}
        token = CURRENT.set(call)
        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, again, _with_usage(send, call) if call.wants_usage else send)
        finally:
            CURRENT.reset(token)
            watcher.cancel()
            # Whoever still runs for this request need not.
            call.gone.set()


class _Held:
    """A call in a weak set: dataclasses with a comparison of their own have no hash."""

    def __init__(self, call: Call) -> None:
        self.call = call


class _Gone(Exception):
    """The client left before it had asked."""


async def _read(receive: _Receive) -> bytes:
    parts, n, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        n += len(parts[-1])
        if n > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has more than {MAX_BODY_BYTES >> 20} MiB.")
        more = message.get("more_body", False)
    return b"".join(parts)


async def _answer(send: _Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_usage(send: _Send, call: Call) -> _Send:
    """A stream that ends in a count of tokens, as `stream_options` asks for.

    llama-cpp-python's server does not know the option. transformers' sends several events in one
    message where the client is slower than the model.
    """
    last: dict[str, Any] = {}

    async def sent(message: _Message) -> None:
        nonlocal last
        # Events and what stands between them, by turns.
        parts = _BETWEEN_EVENTS.split(message.get("body", b""))
        for i, event in enumerate(parts):
            if event.startswith(b"data: {"):
                last = json.loads(event.removeprefix(b"data: "))
            elif event.startswith(b"data: [DONE]") and "id" in last and not last.get("usage"):
                usage = {
                    "prompt_tokens": call.n_prompt,
                    "completion_tokens": call.n_tokens,
                    "total_tokens": call.n_prompt + call.n_tokens,
                }
                more = json.dumps({**last, "choices": [], "usage": usage})
                parts[i] = f"data: {more}\n\n".encode() + event
                message = {**message, "body": b"".join(parts)}
        await send(message)

    return sent
