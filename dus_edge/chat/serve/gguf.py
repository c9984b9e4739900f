"""llama-cpp-python's server for one GGUF file.

Its routes, without what they come with: `create_app` lets any page of any origin ask, reads
settings from the environment (`MODEL`, `CONFIG_FILE`, …), keeps the logits of every token of the
context (``n_ctx × n_vocab`` float32) and ends one stream when another request comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dus_edge.chat.gguf import ending, gguf_template, load_llama, token_bytes
from dus_edge.chat.serve.call import CURRENT
from dus_edge.chat.serve.request import Served
from dus_edge.run.llama import llama_library
from dus_edge.run.source import SourceInfo


def gguf_app(
    info: SourceInfo, alias: str, n_ctx: int, n_threads: int | None, device: str
) -> tuple[Any, Served]:
    """The server's application, its model loaded; and what is known of the model.

    Raises:
        DusEdgeError: the file cannot be loaded.
    """
    from fastapi import FastAPI
    from llama_cpp.llama_chat_format import (
        ChatFormatterResponse,
        chat_formatter_to_chat_completion_handler,
    )
    from llama_cpp.server import app as server
    from llama_cpp.server.settings import ServerSettings

    def rendered(**request: Any) -> ChatFormatterResponse:
        # The guard has rendered it; its limit and stops are in the request.
        call = CURRENT.get()
        assert call is not None
        return ChatFormatterResponse(prompt=call.prompt, added_special=True)

    template = gguf_template(info.path)
    handler = chat_formatter_to_chat_completion_handler(rendered)
    model = load_llama(info, n_ctx, n_threads, device, chat_handler=handler)
    ends, stops = ending(model, template)
    _make_attentive(model, ends)
    server.print = lambda *said: None  # a line for each client that goes away
    server._llama_proxy = _OneModel(model, alias)
    # Not from the environment, as the class would read it.
    server.set_server_settings(
        ServerSettings.model_construct(api_key=None, interrupt_requests=False)
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(server.router)
    adds_bos = model._model.add_bos_token()
    return app, Served(
        alias=alias,
        n_ctx=model.n_ctx(),
        template=template,
        stops=stops,
        encode=lambda text: model.tokenize(text.encode(), add_bos=False, special=True),
        encode_text=lambda text: model.tokenize(text.encode(), add_bos=adds_bos, special=True),
        defaults={"repeat_penalty": 1.0},
    )


class _OneModel:
    """What llama-cpp-python's server takes its model from, whatever name a request has for it."""

    def __init__(self, model: Any, alias: str) -> None:
        self._model, self._alias = model, alias

    def __call__(self, name: str | None = None) -> Any:
        return self._model

    def __iter__(self) -> Iterator[str]:
        yield self._alias


def _make_attentive(model: Any, ends: frozenset[int]) -> None:
    """Have a model count its tokens, end at the template's, and stop when the client has gone."""
    from starlette.exceptions import HTTPException

    lib, generate, evaluate = llama_library(), model.generate, model.eval
    # llama-cpp-python ends an answer properly at a token of this kind alone.
    end = model.token_eos()

    def attentive(*args: Any, **kwargs: Any) -> Iterator[int]:
        call = CURRENT.get()
        for token in generate(*args, **kwargs):
            if token in ends or (call is not None and call.gone.is_set()):
                yield end
                return
            if call is not None and not lib.llama_vocab_is_eog(model._model.vocab, token):
                call.n_tokens += 1
            yield token

    def in_parts(tokens: Sequence[int]) -> None:
        call = CURRENT.get()
        for at in range(0, len(tokens), model.n_batch):
            # Of a prompt; between two tokens of an answer `attentive` sees to it.
            if len(tokens) > 1 and call is not None and call.gone.is_set():
                raise HTTPException(400, "the client went away")
            evaluate(tokens[at : at + model.n_batch])

    def detokenize(tokens: Sequence[int], *args: Any, **kwargs: Any) -> bytes:
        return b"".join(token_bytes(model, token) for token in tokens)

    model.generate, model.eval, model.detokenize = attentive, in_parts, detokenize
