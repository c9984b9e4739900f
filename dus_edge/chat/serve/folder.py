"""transformers' own server (`transformers serve`) for one checkpoint folder.

Its handlers, with a model that we have loaded: the command loads by itself what a request names,
from the hub too, unloads it after five minutes, and lists what the hub's cache holds.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from dus_edge.chat.engine import MIN_P, TEMPERATURE, TOP_K, TOP_P
from dus_edge.chat.folder import FolderEngine
from dus_edge.chat.serve.call import CURRENT
from dus_edge.chat.serve.request import Served
from dus_edge.run.source import SourceInfo

_SAMPLING = {"temperature": TEMPERATURE, "top_p": TOP_P, "top_k": TOP_K, "min_p": MIN_P}


def folder_app(
    info: SourceInfo, alias: str, n_ctx: int, n_threads: int | None, device: str
) -> tuple[Any, Served]:
    """The server's application, its model loaded; and what is known of the model.

    Raises:
        DusEdgeError: the folder cannot be loaded.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.server import build_server
    from transformers.utils import logging

    logging.set_verbosity_error()  # a line for each request
    engine = FolderEngine(info, n_ctx, n_threads, device)
    network, tokenizer = engine.network, engine.tokenizer
    _settle(network.generation_config, engine.ends)
    _make_attentive(network)
    manager, state = _OneModel(network, tokenizer, alias), _State()
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    return app, Served(
        alias=alias,
        n_ctx=n_ctx,
        template=engine.template,
        stops=engine.stops,
        encode=engine.encode,
        encode_text=lambda text: tokenizer(text)["input_ids"],
        defaults={},
        # A text as the configuration of what is generated: nothing of a request's is needed there.
        unknown=frozenset({"generation_config"}),
    )


def _settle(config: Any, ends: list[int]) -> None:
    """Give what ``generation_config.json`` leaves open; without one, answers would be greedy."""
    config.eos_token_id = ends or None
    config.pad_token_id = ends[0] if ends else 0
    if config.do_sample is not True:
        config.do_sample = True
        for name, value in _SAMPLING.items():
            setattr(config, name, value)


def _make_attentive(network: Any) -> None:
    """Have a model stop when the client has gone."""
    import torch
    import transformers

    generate = network.generate

    def attentive(*args: Any, **kwargs: Any) -> Any:
        call = CURRENT.get()

        def gone(input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            over = call is not None and call.gone.is_set()
            return torch.full((len(input_ids),), over, device=input_ids.device)

        return generate(
            *args, stopping_criteria=transformers.StoppingCriteriaList([gone]), **kwargs
        )

    network.generate = attentive


class _OneModel:
    """What transformers' handlers take their model from (`ModelManager`)."""

    force_model = None

    def __init__(self, network: Any, tokenizer: Any, alias: str) -> None:
        self._network, self._tokenizer, self._alias = network, tokenizer, alias

    def load_model_and_processor(self, name: str, **more: Any) -> tuple[Any, Any]:
        return self._network, self._tokenizer

    def process_model_name(self, name: str) -> str:
        return self._alias

    def get_model_modality(self, network: Any, processor: Any = None) -> Any:
        from transformers.cli.serving.utils import Modality

        return Modality.LLM

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": self._alias, "object": "model", "created": 0, "owned_by": "me"}]

    def shutdown(self) -> None:
        """The process ends by itself."""


class _State:
    """What they take their threads from (`GenerationState`): one answer after the other."""

    _compile = False

    def __init__(self) -> None:
        from transformers.cli.serving.utils import GenerateManager

        self._manager = GenerateManager()
        thread = self._manager._thread
        # The thread that generates knows for which request.
        thread.submit = _carrying(thread.submit)
        thread.async_submit = _carrying(thread.async_submit)

    def use_continuous_batching(self, network: Any, modality: Any) -> bool:
        return False

    def get_manager(self, name: str, use_cb: bool = False) -> Any:
        return self._manager

    def is_cb_alive(self) -> bool:
        return True


def _carrying(submit: Callable[..., Any]) -> Callable[..., Any]:
    """The same with the context of whoever submits."""

    def submitted(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return submit(contextvars.copy_context().run, work, *args, **kwargs)

    return submitted
