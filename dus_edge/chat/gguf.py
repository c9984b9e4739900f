"""GGUF files for a conversation, run by llama-cpp-python in this process."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dus_edge.chat.engine import MIN_P, TOP_K, Pass, Sampling, common_prefix
from dus_edge.chat.template import ChatTemplate
from dus_edge.checkpoint.gguf_header import read_header
from dus_edge.errors import CheckpointError, DusEdgeError
from dus_edge.machine import default_threads
from dus_edge.run.llama import errors, llama_library, why
from dus_edge.run.source import SourceInfo

#: Roles of special tokens as templates name them, and GGUF's names of their ids.
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ALL_LAYERS = -1


def gguf_template(path: Path) -> ChatTemplate | None:
    """A GGUF file's chat template; None if it has none.

    Raises:
        CheckpointError: the file's header cannot be read.
    """
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as view:
            values, _ = read_header(view)
    except (ValueError, OSError) as e:
        raise CheckpointError(f"{path} is no GGUF file of a model ({e}).") from None
    jinja, tokens = values.get("tokenizer.chat_template"), values.get("tokenizer.ggml.tokens")
    if not isinstance(jinja, str) or not jinja.strip():
        return None
    special = {}
    for role, name in _ROLES.items():
        token_id = values.get(f"tokenizer.ggml.{name}_token_id")
        known = isinstance(tokens, list) and type(token_id) is int
        if known and 0 <= token_id < len(tokens):
            special[f"{role}_token"] = tokens[token_id]
    return ChatTemplate(jinja, special, str(path))


def load_llama(
    info: SourceInfo, n_ctx: int, n_threads: int | None, device: str, **more: Any
) -> Any:
    """llama-cpp-python's model of a GGUF file, silent.

    Args:
        info: of `inspect_source`.
        n_ctx: tokens of context.
        n_threads: of the CPU; None for all cores.
        device: anything but ``cpu`` puts all layers on llama.cpp's GPU, if it was built for one.
        more: further arguments of `llama_cpp.Llama`.

    Raises:
        CheckpointError: llama.cpp cannot load the file.
        DusEdgeError: there is no memory for the context.
    """
    lib = llama_library()
    n = n_threads or default_threads()
    errors.clear()
    try:
        return lib.Llama(
            str(info.path),
            n_ctx=n_ctx,
            n_threads=n,
            n_threads_batch=n,
            n_gpu_layers=0 if device == "cpu" else _ALL_LAYERS,
            verbose=False,
            **more,
        )
    except ValueError as e:
        if "context" in str(e):
            raise DusEdgeError(
                f"{info.path}: llama.cpp makes no context of {n_ctx:,} tokens{why()}; take a "
                "smaller --ctx."
            ) from None
        raise CheckpointError(
            f"{info.path} cannot be loaded by llama.cpp{why()}; fetch or export it again."
        ) from None


def ending(model: Any, template: ChatTemplate | None) -> tuple[frozenset[int], tuple[str, ...]]:
    """What ends an answer beside llama.cpp's own set of end tokens, by the model's template.

    Returns:
        tokens; and texts, where the template ends answers in no token of its own.
    """
    text = template.answer_end() if template else ""
    if not text:
        return frozenset(), ()
    lib, vocab = llama_library(), model._model.vocab
    first = model.tokenize(text.encode(), add_bos=False, special=True)[0]
    if lib.llama_vocab_is_control(vocab, first) or lib.llama_vocab_is_eog(vocab, first):
        return frozenset({first}), ()
    return frozenset(), (text.partition("\n")[0].strip(),)


def token_bytes(model: Any, token: int) -> bytes:
    """A token's text; control tokens have none.

    llama-cpp-python's own has room for 32 bytes and loses what is longer: runs of blanks, rules.
    """
    lib, size = llama_library(), 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = lib.llama_token_to_piece(model._model.vocab, token, buffer, size, 0, False)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


class GGUFEngine:
    """A loaded GGUF file; see `dus_edge.chat.engine.Engine`."""

    def __init__(
        self, info: SourceInfo, n_ctx: int, n_threads: int | None = None, device: str = "cpu"
    ) -> None:
        self.name = info.name
        self.template = gguf_template(info.path)
        self._model = load_llama(info, n_ctx, n_threads, device)
        self.n_ctx: int = self._model.n_ctx()
        self._ends, self.stops = ending(self._model, self.template)
        self._path = info.path

    def encode(self, text: str) -> list[int]:
        """See `Engine.encode`."""
        return self._model.tokenize(text.encode(), add_bos=False, special=True)

    def answer(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        n_most: int,
        on_text: Callable[[str], bool],
    ) -> Pass:
        """See `Engine.answer`."""
        model, lib = self._model, llama_library()
        # The last token is computed in any case: its logits are wanted.
        reused = min(common_prefix(model._input_ids.tolist(), ids), len(ids) - 1)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        seed = lib.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed & 0xFFFFFFFF
        model.set_seed(seed)
        begin = first = time.perf_counter()
        n, ended = 0, False
        tokens = model.generate(
            ids,
            temp=sampling.temperature,
            top_p=sampling.top_p,
            top_k=TOP_K,
            min_p=MIN_P,
            repeat_penalty=1.0,
        )
        errors.clear()
        try:
            with contextlib.closing(tokens):
                for token in tokens:
                    if n == 0:
                        first = time.perf_counter()
                    if lib.llama_vocab_is_eog(model._model.vocab, token) or token in self._ends:
                        ended = True
                        break
                    n += 1
                    if not on_text(text.decode(token_bytes(model, token))) or n >= n_most:
                        break
        except RuntimeError:
            raise DusEdgeError(f"{self._path}: llama.cpp cannot run the model{why()}.") from None
        return Pass(reused, n, first - begin, time.perf_counter() - first, ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._model.close()
