"""Text to chunks of tokens, cut as llama.cpp's ``llama-imatrix`` cuts them.

The rules are those of ``compute_imatrix`` in llama.cpp's ``tools/imatrix/imatrix.cpp`` and of
``common_tokenize`` with ``parse_special = false``: the text becomes one stream of tokens behind a
BOS token, if the tokenizer adds one; the stream is cut into chunks of the context's length; the
first token of every chunk gives way to BOS; the rest of the stream is not used. Special tokens
that are spelled out in the text are text. Here every language has a stream of its own, so that
a chunk is in one language.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dus_edge.errors import CheckpointError, UsageError
from dus_edge.jsonfile import find_object
from dus_edge.packages import require
from dus_edge.text.documents import Document

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

#: What stands between two documents of one stream.
SEPARATOR = "\n\n"

_FAST = "tokenizer.json"
_SENTENCEPIECE = "tokenizer.model"

#: Tokens of a chunk unless asked otherwise: the default of llama-imatrix and llama-perplexity.
DEFAULT_N_CTX = 512


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


@dataclass(frozen=True)
class Chunks:
    """Tokens to run a model on.

    Attributes:
        tokens: ``(n_chunks, n_ctx)`` int32; languages one after the other.
        languages: one per chunk.
        n_left_over: tokens of the text, with the BOS of each stream, that are in no chunk.
        digest: SHA-256 of tokens, their shape and languages, in hex.
    """

    tokens: np.ndarray
    languages: tuple[str, ...]
    n_left_over: int
    digest: str


# -- chunks -------------------------------------------------------------------------------------


def make_chunks(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    n_ctx: int,
    *,
    n_chunks: int | None = None,
    seed: int = 0,
) -> Chunks:
    """Cut documents into chunks of equal length.

    Args:
        documents: those of one language follow one another in its stream, blank lines between.
        tokenizer: the model's, see `load_tokenizer`.
        n_ctx: tokens per chunk, at least 2.
        n_chunks: at most so many, drawn from all. Languages keep their shares (largest
            remainder), and each keeps a chunk if there are enough for that.
        seed: of the draw. Chunks stay in the order of the text.

    Raises:
        UsageError: the arguments are out of range, or the text does not fill one chunk.
    """
    if n_ctx < 2:
        raise UsageError(f"--ctx {n_ctx}: a chunk needs at least 2 tokens; give a longer one.")
    if n_chunks is not None and n_chunks < 1:
        raise UsageError(f"--chunks {n_chunks}: at least 1 is needed.")
    if not documents:
        raise UsageError("there is no text to cut into chunks; name files or folders with text.")
    streams = {
        language: tokenizer.encode(text) for language, text in _joined_by_language(documents)
    }
    n_text = sum(map(len, streams.values()))
    if not n_text:
        raise UsageError(
            f"{documents[0].origin}: the tokenizer finds no token in this text; name other files."
        )
    cut = [cut_stream(ids, tokenizer.bos_id, n_ctx) for ids in streams.values()]
    available = [len(chunks) for chunks in cut]
    if not sum(available):
        raise _too_short(streams, tokenizer.bos_id, n_ctx)
    if n_chunks is not None and n_chunks < sum(available):
        rng = np.random.default_rng(seed)
        kept = shares(available, n_chunks)
        # Every language draws, even one that keeps nothing, so that none depends on another.
        drawn = [np.sort(rng.permutation(n)[:k]) for n, k in zip(available, kept, strict=True)]
        cut = [chunks[which] for chunks, which in zip(cut, drawn, strict=True)]
    tokens = np.ascontiguousarray(np.concatenate(cut))
    languages = tuple(
        language for language, chunks in zip(streams, cut, strict=True) for _ in chunks
    )
    n_bos = len(streams) if tokenizer.bos_id is not None else 0
    return Chunks(tokens, languages, n_text + n_bos - tokens.size, _digest(tokens, languages))


def cut_stream(ids: Sequence[int], bos_id: int | None, n_ctx: int) -> np.ndarray:
    """Cut one text's tokens as ``llama-imatrix`` does.

    Args:
        ids: without BOS.
        bos_id: comes before `ids` and takes the first place of every chunk; None for neither.
        n_ctx: tokens per chunk.

    Returns:
        ``(n_chunks, n_ctx)`` int32; what does not fill a chunk is left out.
    """
    n_bos = 0 if bos_id is None else 1
    stream = np.empty(len(ids) + n_bos, np.int32)
    stream[n_bos:] = ids
    chunks = stream[: stream.size // n_ctx * n_ctx].reshape(-1, n_ctx)
    if bos_id is not None:
        chunks[:, 0] = bos_id
    return chunks


def shares(available: Sequence[int], total: int) -> list[int]:
    """Split `total` in proportion to `available` by the method of largest remainders.

    Where `total` is enough for one each, whoever has some gets at least one; who is furthest
    above the proportion pays for it.

    Args:
        available: what each has; `total` is at most their sum.
        total: what is to be given out.
    """
    whole = sum(available)
    given = [total * n // whole for n in available]
    by_remainder = sorted(range(len(available)), key=lambda i: -(total * available[i] % whole))
    for i in by_remainder[: total - sum(given)]:
        given[i] += 1
    if total >= sum(n > 0 for n in available):
        for i, n in enumerate(available):
            if n and not given[i]:
                rich = [j for j, got in enumerate(given) if got > 1]
                given[max(rich, key=lambda j: given[j] * whole - total * available[j])] -= 1
                given[i] = 1
    return given


def _joined_by_language(documents: Sequence[Document]) -> list[tuple[str, str]]:
    """Language and text of each stream, in order of first appearance."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.language, []).append(document.text)
    return [(language, SEPARATOR.join(parts)) for language, parts in texts.items()]


def _too_short(streams: dict[str, list[int]], bos_id: int | None, n_ctx: int) -> UsageError:
    n_bos = 0 if bos_id is None else 1
    counts = ", ".join(f"{len(ids) + n_bos} in {name!r}" for name, ids in streams.items())
    return UsageError(
        f"the text has too few tokens for one chunk: {counts}, and {n_ctx} of one language are "
        "needed; give a shorter --ctx or more text."
    )


def _digest(tokens: np.ndarray, languages: Sequence[str]) -> str:
    head = json.dumps([list(tokens.shape), list(languages)])
    return hashlib.sha256(head.encode() + b"\0" + tokens.astype("<i4").tobytes()).hexdigest()


# -- tokenizers ---------------------------------------------------------------------------------


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
        ids = self._model.encode(text, add_special_tokens=False).ids
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
