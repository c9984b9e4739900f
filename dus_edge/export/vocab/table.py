"""A table of tokens by id: filled from several files, padded, and checked as llama.cpp needs it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gguf import TokenType

from dus_edge.errors import CheckpointError
from dus_edge.export.vocab.files import AddedToken

#: Scores that llama.cpp's converter gives to added tokens and to rows without a token.
ADDED_SCORE = -1000.0
PADDING_SCORE = -10000.0


@dataclass
class TokenTable:
    """Texts, scores and types of the tokens 0 … `size` − 1.

    A row that nobody has filled reads ``[PAD{id}]`` and is of type UNUSED, as the converter
    has it (``_create_vocab_sentencepiece`` and ``get_vocab_base`` in llama.cpp's
    ``conversion/base.py``).
    """

    size: int
    path: Path
    tokens: list[str] = field(init=False)
    scores: list[float] = field(init=False)
    types: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [f"[PAD{i}]" for i in range(self.size)]
        self.scores = [PADDING_SCORE] * self.size
        self.types = [int(TokenType.UNUSED)] * self.size

    def set(self, token_id: int, text: str, token_type: int, score: float, path: Path) -> None:
        """Fill row `token_id`, over what stood there.

        Raises:
            CheckpointError: the embedding has no such row; `path` is the file that has the token.
        """
        if token_id >= self.size:
            raise CheckpointError(
                f"{path}: token {token_id} ({text!r}) has no row in the model's embedding, which "
                f"has {self.size} (vocab_size); remove the token from the tokenizer's files or "
                "resize the embedding."
            )
        self.tokens[token_id] = text
        self.scores[token_id] = score
        self.types[token_id] = int(token_type)

    def add(self, added: Iterable[AddedToken], path: Path, score: float = ADDED_SCORE) -> None:
        """Fill the rows of added tokens: CONTROL if special (or so it looks), else USER_DEFINED.

        llama.cpp searches the raw text for a USER_DEFINED token before it turns spaces into
        ``▁``, so its ``▁`` is written as a space.
        """
        for token in added:
            if token.special or looks_special(token.content):
                self.set(token.id, token.content, TokenType.CONTROL, score, path)
            else:
                text = token.content.replace("▁", " ")
                self.set(token.id, text, TokenType.USER_DEFINED, score, path)

    def check(self) -> None:
        """Refuse what llama.cpp's loader aborts on.

        Raises:
            CheckpointError: two rows hold the same text, or one cannot be written as UTF-8.
        """
        first: dict[str, int] = {}
        for token_id, text in enumerate(self.tokens):
            if not text:  # llama.cpp renames empty tokens itself
                continue
            if (other := first.setdefault(text, token_id)) != token_id:
                raise CheckpointError(
                    f"{self.path}: tokens {other} and {token_id} are both {text!r}; "
                    "llama.cpp cannot load a vocabulary with the same token twice."
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise CheckpointError(
                    f"{self.path}: token {token_id} ({text!r}) is not valid Unicode text."
                ) from error


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token by its look.

    Some publishers forgot the ``special`` mark (``does_token_look_special`` in llama.cpp's
    ``conversion/base.py``).
    """
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )
