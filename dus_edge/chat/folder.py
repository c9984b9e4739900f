"""Checkpoint folders for a conversation, run by transformers' `generate` in this process.

Folders are loaded as `dus_edge.run` loads them, in float32: nothing of theirs is executed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dus_edge.chat.engine import MIN_P, TOP_K, Pass, Sampling, common_prefix
from dus_edge.chat.template import ChatTemplate
from dus_edge.errors import CheckpointError, DusEdgeError
from dus_edge.run.folders import NO_CODE, check_packages, explained, hushed
from dus_edge.run.source import SourceInfo
from dus_edge.run.torch_logits import load_network

if TYPE_CHECKING:
    import torch


def folder_tokenizer(info: SourceInfo) -> Any:
    """transformers' tokenizer of a folder.

    Raises:
        CheckpointError: it cannot be loaded.
        DependencyError: a package is not installed.
    """
    check_packages(info)
    import transformers

    with hushed(), explained(info):
        return transformers.AutoTokenizer.from_pretrained(info.path, **NO_CODE)


def folder_template(info: SourceInfo, tokenizer: Any) -> ChatTemplate | None:
    """A folder's chat template, the default one of several; None if it has none.

    Raises:
        CheckpointError: it has several and none is the default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        jinja = tokenizer.get_chat_template()
    except ValueError:
        raise CheckpointError(
            f"{info.path} has several chat templates and none of them is called default; leave "
            "one in tokenizer_config.json."
        ) from None
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return ChatTemplate(jinja, special, str(info.path))


def folder_ends(
    network: Any, tokenizer: Any, template: ChatTemplate | None
) -> tuple[list[int], tuple[str, ...]]:
    """What ends an answer: tokens and texts.

    Tokens: those of ``generation_config.json`` or ``config.json``, of the tokenizer, and what the
    template ends answers in.
    """
    named = network.generation_config.eos_token_id
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    text = template.answer_end() if template else ""
    if not text:
        return sorted(ends), ()
    first = tokenizer(text, add_special_tokens=False)["input_ids"][0]
    if first in tokenizer.all_special_ids or first in tokenizer.added_tokens_decoder:
        return sorted(ends | {first}), ()
    return sorted(ends), (text.partition("\n")[0].strip(),)


class FolderEngine:
    """A loaded folder; see `dus_edge.chat.engine.Engine`."""

    def __init__(
        self, info: SourceInfo, n_ctx: int, n_threads: int | None = None, device: str = "cpu"
    ) -> None:
        self.name, self.n_ctx, self._path = info.name, n_ctx, info.path
        self.tokenizer = folder_tokenizer(info)
        self.template = folder_template(info, self.tokenizer)
        self.network, self._device = load_network(info, device, n_threads)
        self.ends, self.stops = folder_ends(self.network, self.tokenizer, self.template)
        self._cache: Any = None
        self._cached: list[int] = []

    def encode(self, text: str) -> list[int]:
        """See `Engine.encode`."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        n_most: int,
        on_text: Callable[[str], bool],
    ) -> Pass:
        """See `Engine.answer`."""
        import torch
        import transformers

        reused = self._rewind(ids)
        cache, self._cache = self._cache, None  # gone, should anything fail
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        streamer = _Streamer(self.tokenizer, self.ends, on_text)
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": TOP_K,
                "min_p": MIN_P,
            }
        config = transformers.GenerationConfig(
            max_new_tokens=n_most,
            eos_token_id=self.ends or None,
            pad_token_id=self.ends[0] if self.ends else 0,
            **chosen,
        )
        begin = time.perf_counter()
        try:
            with torch.inference_mode(), hushed():
                out = self.network.generate(
                    input_ids=torch.tensor([list(ids)], device=self._device),
                    attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=self._device),
                    past_key_values=cache,
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=transformers.StoppingCriteriaList([streamer.stopped]),
                )
        except torch.OutOfMemoryError:
            raise DusEdgeError(
                f"{self._path}: {self._device} has too little memory for the conversation; take a "
                "smaller --ctx or --device cpu."
            ) from None
        on_text(streamer.rest())
        # The last token was chosen and not run.
        self._cached, self._cache = out[0].tolist()[:-1], cache
        first = streamer.first or time.perf_counter()
        done = time.perf_counter()
        return Pass(reused, streamer.n_tokens, first - begin, done - first, streamer.ended)

    def _rewind(self, ids: Sequence[int]) -> int:
        """Cut the cache to what it has of a prompt, the last token not among it."""
        import transformers

        n = min(common_prefix(self._cached, ids), len(ids) - 1)
        if self._cache is None or n == 0:
            self._cache, n = transformers.DynamicCache(config=self.network.config), 0
        elif n < len(self._cached):
            try:
                self._cache.crop(n - len(self._cached))
            except ValueError:  # a sliding window has forgotten what stands there
                self._cache, n = transformers.DynamicCache(config=self.network.config), 0
        self._cached = self._cached[:n]
        return n

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._cache = self.network = None


class _Streamer:
    """Takes tokens from `generate` as it chooses them: `put` and `end` are transformers' names."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], on_text: Callable[[str], bool]) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer, self._ends, self._on_text = tokenizer._tokenizer, ends, on_text
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._prompt_seen = False
        self._wanted = True
        self._ids: list[int] = []
        self._shown = 0
        self.first: float | None = None
        self.n_tokens, self.ended = 0, False

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then one token at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if not self._wanted:  # `generate` asks `stopped` before it hands over a token
            return
        self.first = self.first or time.perf_counter()
        for token in value.reshape(-1).tolist():
            if token in self._ends:
                self.ended = True
                continue
            self.n_tokens += 1
            self._ids.append(token)
            text = self._decoder.step(self._tokenizer, token) or ""
            self._shown += len(text)
            self._wanted = self._on_text(text)

    def end(self) -> None:
        """Nothing more comes."""

    def rest(self) -> str:
        """What the decoder held back, without the half of a character."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text[self._shown :].rstrip("\ufffd")

    def stopped(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """For `generate`: whether the answer is no longer wanted."""
        import torch

        return torch.full((len(input_ids),), not self._wanted, device=input_ids.device)
