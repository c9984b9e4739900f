"""SentencePiece models (``tokenizer.model``): their few fields, read from the protobuf bytes.

The format is ``sentencepiece_model.proto`` of https://github.com/google/sentencepiece; five
fields of it matter here, so a reader of the wire format is smaller than a dependency. What
becomes of the pieces follows ``_create_vocab_sentencepiece`` in llama.cpp's
``conversion/base.py`` at 0c1e57098, with the differences that the comments name.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export.vocab.files import AddedToken, TokenizerFiles
from dus_edge.export.vocab.table import ADDED_SCORE, TokenTable
from dus_edge.jsonfile import MAX_BYTES, read_regular

#: ``SentencePiece.Type``; the numbers are those of ``gguf.TokenType``.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = _TYPES = range(1, 7)

#: More pieces than any model has.
MOST_PIECES = 1 << 19
#: Longer pieces are not looked at for pairs that form them: each cut takes its length.
_LONGEST_FORMED = 256
_MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "Word", 4: "Char"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the model's table; its id is its place."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The part of a SentencePiece model that decides how text becomes ids."""

    pieces: tuple[Piece, ...]
    model_type: int = 1
    whitespace_suffix: bool = False
    has_charsmap: bool = False
    normalizer: str = ""
    dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @functools.cached_property
    def formed(self) -> frozenset[str]:
        """User-defined pieces that merging leads to: of one character, or of two such parts."""
        formed: set[str] = set()
        own = (p.text for p in self.pieces if p.type == USER_DEFINED)
        for text in sorted((text for text in own if len(text) <= _LONGEST_FORMED), key=len):
            last = len(text) - 1
            for cut in range(1, last + 1):
                if (cut == 1 or text[:cut] in formed) and (cut == last or text[cut:] in formed):
                    formed.add(text)
                    break
            if last == 0:
                formed.add(text)
        return frozenset(formed)


def is_sentencepiece(path: Path) -> bool:
    """Whether `path` begins as a SentencePiece model does.

    Llama 3 folders may hold a tiktoken table (base64 text) under the name ``tokenizer.model``.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(1) == b"\n"  # field 1 (pieces), length-delimited
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error


def read_model(path: Path, most: int = MOST_PIECES) -> SentencePieceModel:
    """Parse a SentencePiece model file.

    Args:
        path: the file.
        most: pieces that can be used; it is not read beyond them.

    Raises:
        CheckpointError: the bytes are no such model, or there are more pieces.
    """
    try:
        return _parse_model(read_regular(path, MAX_BYTES), most)
    except _TooManyError:
        raise CheckpointError(
            f"{path}: the tokenizer has more than {most} tokens, but the model's embedding has "
            f"only {most} rows (vocab_size); the two files are not of one model."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error
    except (ValueError, IndexError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(
            f"{path}: not a SentencePiece model ({error}); download the file again."
        ) from error


def spm_table(files: TokenizerFiles, model: SentencePieceModel, vocab_size: int) -> TokenTable:
    """The tokens of a SentencePiece model and of the files that add to it.

    Raises:
        CheckpointError: more tokens than `vocab_size`, or the same token twice.
        UnsupportedError: llama.cpp has no tokenizer that cuts text as this model does.
    """
    path = files.folder / "tokenizer.model"
    _check_kind(model, path)
    table = TokenTable(vocab_size, path)
    for token_id, (piece, kind) in enumerate(_kinds(model)):
        text = piece.text.replace("▁", " ") if kind == USER_DEFINED else piece.text
        table.set(token_id, text, kind, piece.score, path)
    for content, token_id in files.added_tokens_json.items():
        table.set(
            token_id,
            content,
            TokenType.USER_DEFINED,
            ADDED_SCORE,
            files.folder / "added_tokens.json",
        )
    added, added_path = added_tokens(files)
    if not files.added_decoder:  # tokenizer.json repeats <unk>, <s> and </s>: leave them as found
        added = tuple(token for token in added if not _is_own_special(model, token))
    table.add(added, added_path)
    table.check()
    return table


def added_tokens(files: TokenizerFiles) -> tuple[tuple[AddedToken, ...], Path]:
    """The added tokens beside a SentencePiece model, and the file that holds them.

    The converter reads ``added_tokens_decoder`` only; transformers 5 no longer writes it, and
    then the same list stands in ``tokenizer.json``.
    """
    if files.added_decoder:
        return files.added_decoder, files.folder / "tokenizer_config.json"
    return files.added, files.folder / "tokenizer.json"


def contradiction_notes(files: TokenizerFiles, model: SentencePieceModel) -> list[str]:
    """One sentence where ``tokenizer.json`` gives an id to another text than ``tokenizer.model``.

    The latter is what is exported, as llama.cpp's converter does; transformers reads the former.
    """
    kept = ((files.tokenizer or {}).get("model") or {}).get("vocab")
    if not isinstance(kept, dict):
        return []
    texts = {i: text for text, i in kept.items() if isinstance(i, int)}
    differ = [i for i, p in enumerate(model.pieces) if i in texts and texts[i] != p.text]
    if not differ:
        return []
    i = differ[0]
    return [
        f"tokenizer.model and tokenizer.json disagree on {len(differ):,} tokens: {i} is "
        f"{model.pieces[i].text!r} in the one and {texts[i]!r} in the other. The file has those of "
        "tokenizer.model; take out the one that is not the model's."
    ]


def spm_notes(model: SentencePieceModel, space_prefix: bool) -> list[str]:
    """What llama.cpp will not reproduce of this model, one sentence each."""
    notes = []
    cut_out = [piece.text for piece, kind in _kinds(model) if kind == USER_DEFINED]
    if cut_out and space_prefix:
        notes.append(
            f"tokenizer.model has user-defined pieces such as {cut_out[0]!r}; llama.cpp puts its "
            "space before the text after such a piece too, and not before one that comes first."
        )
    if model.has_charsmap:
        notes.append(
            f"tokenizer.model normalizes its text ({model.normalizer or 'unnamed'} rules); "
            "llama.cpp does not, so text that those rules change gets other ids."
        )
    if model.remove_extra_whitespaces:
        notes.append(
            "tokenizer.model drops repeated, leading and trailing spaces; llama.cpp keeps them."
        )
    if any(piece.type == UNUSED for piece in model.pieces):
        notes.append("tokenizer.model has unused pieces; llama.cpp may form them nevertheless.")
    return notes


def _is_own_special(model: SentencePieceModel, token: AddedToken) -> bool:
    if token.id >= len(model.pieces):
        return False
    piece = model.pieces[token.id]
    return piece.text == token.content and piece.type in (UNKNOWN, CONTROL)


def _check_kind(model: SentencePieceModel, path: Path) -> None:
    if model.model_type != 2:
        kind = _MODEL_TYPES.get(model.model_type, str(model.model_type))
        raise UnsupportedError(
            f"{path}: a SentencePiece {kind} model; llama.cpp's tokenizer for Llama models merges "
            "pairs as BPE does and would give other ids; only SentencePiece BPE can be exported."
        )
    if model.whitespace_suffix or not model.escape_whitespaces:
        raise UnsupportedError(
            f"{path}: treat_whitespace_as_suffix or escape_whitespaces is set in a way that "
            "llama.cpp's tokenizer for Llama models cannot follow."
        )
    bytes_found = sum(piece.type == BYTE for piece in model.pieces)
    if bytes_found != 256:
        raise UnsupportedError(
            f"{path}: {bytes_found} of the 256 byte tokens <0x00> … <0xFF> exist; llama.cpp "
            "aborts on the first character outside such a vocabulary (train with byte_fallback)."
        )


def _kinds(model: SentencePieceModel) -> Iterator[tuple[Piece, int]]:
    """Each piece with its type in the GGUF file: its own, but for some user-defined ones.

    SentencePiece cuts user-defined pieces out before anything else. The converter writes them
    as NORMAL, so llama.cpp finds only those that merging two neighbours leads to; as
    USER_DEFINED llama.cpp cuts them out as well, but where it adds a space prefix it also puts
    a space after each of them, which would ruin runs of spaces or newlines. Those need no
    cutting out: their score, 0, is the highest, so merging forms them without fail.
    """
    for piece in model.pieces:
        yield piece, NORMAL if piece.text in model.formed else piece.type


# -- protobuf -----------------------------------------------------------------------------------


class _TooManyError(Exception):
    """More pieces than can be used."""


def _parse_model(data: bytes, most: int) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            if len(pieces) == most:
                raise _TooManyError
            pieces.append(_piece(_as_bytes(value)))
        elif number == 2:
            trainer.update(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=int(trainer.get(3, 1)),
        whitespace_suffix=bool(trainer.get(24, 0)),
        has_charsmap=bool(normalizer.get(2, b"")),
        normalizer=_as_bytes(normalizer.get(1, b"")).decode("utf-8"),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _piece(data: bytes) -> Piece:
    text_bytes, score_bytes, kind = _usual_piece(data) or _any_piece(data)
    text = text_bytes.decode("utf-8")
    (score,) = struct.unpack("<f", score_bytes)
    if kind not in _TYPES or not math.isfinite(score):
        raise ValueError(f"piece {text[:20]!r} has type {kind!r} and score {score}")
    return Piece(text, score, int(kind))


def _usual_piece(data: bytes) -> tuple[bytes, bytes, int] | None:
    """Text, score and type as SentencePiece writes them: in this order, a length below 128.

    There are tens of thousands, and byte by byte they take most of the time of an export's start.
    """
    if len(data) < 7 or data[0] != 0x0A:
        return None
    end = 2 + data[1]
    if len(data) < end + 5 or data[end] != 0x15 or data[1] >= 0x80:
        return None
    behind = data[end + 5 :]
    if behind and (len(behind) != 2 or behind[0] != 0x18 or behind[1] >= 0x80):
        return None
    return data[2:end], data[end + 1 : end + 5], behind[1] if behind else NORMAL


def _any_piece(data: bytes) -> tuple[bytes, bytes, int | bytes]:
    """The same of any message."""
    fields = dict(_fields(data))
    return (
        _as_bytes(fields.get(1, b"")),
        _as_bytes(fields.get(2, bytes(4))),
        fields.get(3, NORMAL),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: numbers as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it ends in the middle of a number")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field has the wrong type")
    return value
