"""A checkpoint's own tokenizer: `tokenizer.json` or a SentencePiece model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dus_edge.errors import CheckpointError, UsageError
from dus_edge.jsonfile import find_object
from dus_edge.packages import require

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_FAST = "tokenizer.json"
_SENTENCEPIECE = "tokenizer.model"


class Tokenizer(Protocol):
    """What `make_chunks` needs of a model's tokenizer.

    Attributes:
        bos_id: the token that the tokenizer puts before a text; None if it adds none.
    """

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added around them."""
        ...


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Load a checkpoint's tokenizer.

    ``tokenizer.json`` is read by the tokenizers package; where it is missing, sentencepiece
    reads ``tokenizer.model``.

    Args:
        folder: the checkpoint.
        vocab_size: rows of the embedding; `encode` raises `UsageError` for a token beyond.

    Raises:
        CheckpointError: neither file is there, or it is damaged.
        DependencyError: the package that reads it is not installed.
        UsageError: the BOS token is beyond the embedding.
    """
    if (folder / _FAST).is_file():
        tokenizer: _Fast | _SentencePiece = _Fast(folder, vocab_size)
    elif (folder / _SENTENCEPIECE).is_file():
        tokenizer = _SentencePiece(folder, vocab_size)
    else:
        raise CheckpointError(
            f"{folder}: neither {_FAST} nor {_SENTENCEPIECE} is there; copy the tokenizer files "
            "of the base model into the folder."
        )
    if tokenizer.bos_id is not None:
        _check_ids([tokenizer.bos_id], vocab_size, tokenizer.path)
    return tokenizer


class _Fast:
    """A ``tokenizer.json``."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.path = folder / _FAST
        self._vocab_size = vocab_size
        self._model = _load_fast(self.path)
        self.bos_id = _fast_bos(self._model, folder)

    def encode(self, text: str) -> list[int]:
        # `encode` keeps the interpreter from all other threads; a batch of one does not.
        (found,) = self._model.encode_batch([text], add_special_tokens=False)
        ids = found.ids
        _check_ids(ids, self._vocab_size, self.path)
        return ids


class _SentencePiece:
    """A ``tokenizer.model`` alone."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.path = folder / _SENTENCEPIECE
        self._vocab_size = vocab_size
        self._model = _load_sentencepiece(self.path)
        config = find_object(folder / "tokenizer_config.json") or {}
        # As for transformers' Llama class: added unless the config says otherwise.
        added = config.get("add_bos_token") is not False
        bos_id = _configured_bos(folder, config, self._piece_id)
        if bos_id is None and self._model.bos_id() >= 0:
            bos_id = self._model.bos_id()
        self.bos_id = bos_id if added else None

    def encode(self, text: str) -> list[int]:
        ids = self._model.encode(text)
        _check_ids(ids, self._vocab_size, self.path)
        return ids

    def _piece_id(self, piece: str) -> int | None:
        token = self._model.piece_to_id(piece)
        return token if self._model.id_to_piece(token) == piece else None


def _load_fast(path: Path) -> tokenizers.Tokenizer:
    require("hf", f"{path} is read by the package", "tokenizers")
    from tokenizers import Tokenizer as Fast

    try:
        model = Fast.from_file(str(path))
    except Exception as e:  # the package has no exceptions of its own
        raise CheckpointError(
            f"{path}: the tokenizers package cannot read it ({e}); download the file again."
        ) from None
    # Files may carry limits of a training run.
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # "</s>" in a text is five characters, no token
    return model


def _load_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    require("hf", f"{path} is read by the package", "sentencepiece")
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (OSError, RuntimeError) as e:
        reason = str(e).strip() or "no SentencePiece model"
        raise CheckpointError(
            f"{path}: sentencepiece cannot read it ({reason}); put the tokenizer.json of the "
            "same model beside it."
        ) from None


def _fast_bos(model: tokenizers.Tokenizer, folder: Path) -> int | None:
    """The token before a text.

    What the post-processor does decides. Only where it says nothing do the config files, and
    the class of the tokenizer: transformers' Llama class adds BOS by itself.
    """
    bare = model.encode("a", add_special_tokens=False).ids
    whole = model.encode("a", add_special_tokens=True).ids
    if whole != bare:
        return whole[0] if whole[: len(bare)] != bare else None
    parsed = find_object(folder / _FAST) or {}
    post = parsed.get("post_processor") or {}
    steps = post.get("processors") or [post]
    if any(step.get("type") in ("TemplateProcessing", "ByteLevel") for step in steps):
        return None
    config = find_object(folder / "tokenizer_config.json") or {}
    added = config.get("add_bos_token")
    if not isinstance(added, bool):
        llama = (folder / _SENTENCEPIECE).is_file() or "Llama" in str(config.get("tokenizer_class"))
        added = llama and bool((parsed.get("model") or {}).get("byte_fallback"))
    return _configured_bos(folder, config, model.token_to_id) if added else None


def _configured_bos(folder: Path, tokenizer_config: dict[str, Any], find: Any) -> int | None:
    """The id of the BOS token that the config files name."""
    name = tokenizer_config.get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    token = find(name) if isinstance(name, str) else None
    if token is None:
        token = (find_object(folder / "config.json") or {}).get("bos_token_id")
    return token if isinstance(token, int) and token >= 0 else None


def _check_ids(ids: Sequence[int], vocab_size: int, path: Path) -> None:
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise UsageError(
            f"{path}: gives token {highest}, and the model's embedding has {vocab_size} rows; "
            "copy the tokenizer files of the same model into the folder."
        )
