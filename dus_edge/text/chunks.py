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
from typing import TYPE_CHECKING

import numpy as np

from dus_edge.errors import UsageError
from dus_edge.text.documents import Document
from dus_edge.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    pass

#: What stands between two documents of one stream.
SEPARATOR = "\n\n"


#: Tokens of a chunk unless asked otherwise: the default of llama-imatrix and llama-perplexity.
DEFAULT_N_CTX = 512


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
