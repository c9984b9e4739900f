"""BPE tokenizers in ``tokenizer.json``: byte-level (GPT-2 kind) and byte-fallback (Llama 2 kind).

Sources: ``get_vocab_base`` in llama.cpp's ``conversion/base.py`` and ``LlamaHfVocab`` in its
``gguf-py/gguf/vocab.py``, both at 0c1e57098, and how ``src/llama-vocab.cpp`` there uses what
they write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export.vocab.files import TokenizerFiles, check_id
from dus_edge.export.vocab.table import TokenTable

#: Longer tokens are not cut in every place: each cut takes the token's length.
_LONGEST_CUT = 256
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class BpeModel:
    """The ``model`` object of ``tokenizer.json``, checked."""

    path: Path
    vocab: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    byte_fallback: bool
    ignore_merges: bool
    unk_token: str | None


def read_bpe(files: TokenizerFiles) -> BpeModel:
    """The BPE model of ``tokenizer.json``; merges may be ``"a b"`` or ``["a", "b"]``.

    Raises:
        CheckpointError: ids or merges are damaged.
        UnsupportedError: the model is not BPE, or of a kind without counterpart in llama.cpp.
    """
    path = files.folder / "tokenizer.json"
    model = (files.tokenizer or {}).get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: it has no model object.")
    # Files of before tokenizers 0.14 may lack the type; only BPE has merges.
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UnsupportedError(
            f"{path}: model.type is {kind!r}; only BPE and SentencePiece BPE can be exported."
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedError(
                f"{path}: model.{name} is {model[name]!r}; llama.cpp has no tokenizer for it."
            )
    vocab = _vocab(model.get("vocab"), path)
    return BpeModel(
        path=path,
        vocab=vocab,
        merges=_merges(model.get("merges"), vocab, path),
        byte_fallback=bool(model.get("byte_fallback")),
        ignore_merges=bool(model.get("ignore_merges")),
        unk_token=model.get("unk_token"),
    )


def byte_level_table(files: TokenizerFiles, model: BpeModel, vocab_size: int) -> TokenTable:
    """The tokens of a byte-level BPE tokenizer.

    Raises:
        CheckpointError: more tokens than `vocab_size`, or the same token twice.
    """
    table = TokenTable(vocab_size, model.path)
    for text, token_id in model.vocab.items():
        table.set(token_id, text, TokenType.NORMAL, 0.0, model.path)
    table.add(files.added, model.path)
    table.check()
    return table


def byte_fallback_table(files: TokenizerFiles, model: BpeModel, vocab_size: int) -> TokenTable:
    """The tokens of a SentencePiece BPE tokenizer that exists as ``tokenizer.json`` only.

    llama.cpp's tokenizer for model "llama" knows no merges: of all neighbours whose joined text
    is a token it joins the pair whose token has the highest score, the leftmost first. The
    converter gives every token the score −1000, so it joins from left to right whatever the
    merges say. Here a token scores minus the place of the first merge that creates it, which
    is the order of the merges.

    Raises:
        CheckpointError: more tokens than `vocab_size`, or the same token twice.
        UnsupportedError: byte tokens are missing.
    """
    n_bytes = len({text.upper() for text in model.vocab if _BYTE_TOKEN.fullmatch(text)})
    if n_bytes != 256:
        raise UnsupportedError(
            f"{model.path}: {n_bytes} of the 256 byte tokens <0x00> … <0xFF> exist; llama.cpp "
            "aborts on the first character outside such a vocabulary."
        )
    places: dict[str, int] = {}
    for left, right in model.merges:
        places.setdefault(left + right, len(places))
    lowest = -float(len(places))  # exact in float32 up to 2**24
    table = TokenTable(vocab_size, model.path)
    for text, token_id in model.vocab.items():
        if _BYTE_TOKEN.fullmatch(text):
            kind = TokenType.BYTE
        elif text == model.unk_token:
            kind = TokenType.UNKNOWN
        else:
            kind = TokenType.NORMAL
        score = -float(places[text]) if text in places else lowest
        table.set(token_id, text, kind, score, model.path)
    table.add(files.added, model.path, score=lowest)
    table.check()
    return table


def byte_fallback_notes(files: TokenizerFiles, model: BpeModel) -> list[str]:
    """What llama.cpp will not reproduce of such a tokenizer, one sentence each.

    A tokenizer converted from SentencePiece lists every pair of tokens that joins to a token.
    One trained as BPE lists a single pair per token, and llama.cpp joins the others too.
    """
    merges = set(model.merges)
    added = {token.content for token in files.added}
    formed = {left + right for left, right in merges}
    symbols = formed | {text for text in model.vocab if len(text) == 1}
    unlisted = sum(
        any(
            {left, right} <= symbols and (left, right) not in merges
            for left, right in ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        )
        for text in formed - added
        if len(text) <= _LONGEST_CUT
    )
    notes = []
    if unlisted:
        notes.append(
            f"{unlisted} tokens of tokenizer.json can be joined from pairs that its merges do not "
            "list; llama.cpp joins any pair that makes a token, so some words get other ids."
        )
    if any(token.normalized and not token.special for token in files.added):
        notes.append(
            "tokenizer.json has added tokens that match normalized text (normalized: true); "
            "llama.cpp matches them in the raw text."
        )
    return notes


def gguf_merges(model: BpeModel) -> list[str]:
    """The merges as GGUF stores them, ``"a b"``; a space inside a part becomes ``Ġ``.

    (``SpecialVocab`` in llama.cpp's ``gguf-py/gguf/vocab.py``; it shifts the space by 256.)
    """
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in model.merges]


def _vocab(value: Any, path: Path) -> dict[str, int]:
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path}: model.vocab is not an object of tokens and ids.")
    by_id: dict[int, str] = {}
    for text, token_id in value.items():
        check_id(token_id, f"{path}: model.vocab[{text!r}]")
        if (other := by_id.setdefault(token_id, text)) != text:
            raise CheckpointError(
                f"{path}: model.vocab gives id {token_id} to both {other!r} and {text!r}."
            )
    return value


def _merges(value: Any, vocab: Mapping[str, int], path: Path) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: model.merges is not a list.")
    pairs = []
    for place, merge in enumerate(value):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) and part for part in pair)
        ):
            raise CheckpointError(f"{path}: model.merges[{place}] is not a pair: {merge!r}.")
        left, right = pair
        for text in (left, right, left + right):
            if text not in vocab:
                raise CheckpointError(
                    f"{path}: model.merges[{place}] names {text!r}, which is not in model.vocab."
                )
        pairs.append((left, right))
    return tuple(pairs)
