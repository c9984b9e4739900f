"""Text and tokens of a GGUF file by llama.cpp, special tokens included."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dus_edge.errors import UsageError
from dus_edge.run.llama import llama_library


class LlamaText:
    """The vocabulary of a loaded model.

    Attributes:
        bos_id: the token that begins a text; None if the file names none.
        eos_id: the token that ends one; None if the file names none.
        adds_bos: whether the tokenizer puts `bos_id` before a text.
    """

    def __init__(self, model: Any, path: Path) -> None:
        """
        Args:
            model: of `dus_edge.run.llama.load_model`.
            path: of its file, for messages.
        """
        lib = llama_library()
        self._path = path
        self._vocab = lib.llama_model_get_vocab(model)
        self.bos_id = _token(lib.llama_vocab_bos(self._vocab))
        self.eos_id = _token(lib.llama_vocab_eos(self._vocab))
        self.adds_bos = bool(lib.llama_vocab_get_add_bos(self._vocab))

    def encode(self, text: str, *, special: bool, spelled: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            text: to encode.
            special: add what the tokenizer puts around a text.
            spelled: whether special tokens that are spelled out in it are tokens, or text.

        Raises:
            UsageError: llama.cpp cannot.
        """
        lib, data = llama_library(), text.encode()
        # A token is at least a byte, but for a space in front and the ends.
        out = (lib.llama_token * (len(data) + 8))()
        n = lib.llama_tokenize(self._vocab, data, len(data), out, len(out), special, spelled)
        if n < 0:
            raise UsageError(f"{self._path}: its tokenizer cannot read the text ({n}).")
        return list(out[:n])

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens, with that of special ones or without."""
        lib = llama_library()
        ids = (lib.llama_token * max(len(tokens), 1))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            out = ctypes.create_string_buffer(size)
            n = lib.llama_detokenize(self._vocab, ids, len(tokens), out, size, False, special)
            if n >= 0:
                return out.raw[:n].decode(errors="replace")
            size = -n


def _token(token: int) -> int | None:
    return token if token >= 0 else None
