"""Tokenizers that are damaged, or that llama.cpp cannot follow: refused, or carried with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export.vocab import spm as vocab_spm
from dus_edge.export.vocab.vocab import read_vocab

from .draws import examples
from .vocab_cases import (
    TINY,
    USER_DEFINED,
    VOCAB_SIZE,
    added,
    fallback,
    tiny,
    train_spm,
    write_folder,
)

#: Three pieces, a trainer_spec with model_type BPE, a normalizer_spec named "identity".
SMALL_MODEL = (
    b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
    b"\n\x0a\n\x03\xe2\x96\x81\x15\x00\x00\x80\xbf"
    b"\n\x08\n\x01a\x15\x00\x00\x00\xc0"
    b"\x12\x02\x18\x02\x1a\x0e\n\x08identity\x18\x01\x20\x00"
)


REFUSED = {
    "no tokenizer": ({}, "neither tokenizer.model nor tokenizer.json"),
    "tekken only": ({"tekken": {}}, "Mistral's own format"),
    "broken json": ({"tokenizer.json": "{"}, "cannot be read as JSON"),
    "not an object": ({"tokenizer": []}, "not a JSON object"),
    "not utf-8": ({"tokenizer.json": b"\xff\xfe"}, "UTF-8"),
    "no model": ({"tokenizer": {"model": None}}, "no model object"),
    "broken config": ({"tokenizer": TINY, "tokenizer_config.json": "[}"}, "tokenizer_config.json"),
    "unigram": ({"tokenizer": tiny(model={"type": "Unigram"})}, "'Unigram'"),
    "suffix": ({"tokenizer": tiny(model={"end_of_word_suffix": "</w>"})}, "end_of_word_suffix"),
    "no vocab": ({"tokenizer": tiny(model={"vocab": None})}, "model.vocab"),
    "id not int": ({"tokenizer": tiny(model={"vocab": {"a": "0"}, "merges": []})}, "token id '0'"),
    "id negative": ({"tokenizer": tiny(model={"vocab": {"a": -1}, "merges": []})}, "token id -1"),
    "id twice": (
        {"tokenizer": tiny(model={"vocab": {"a": 0, "b": 0}, "merges": []})},
        "id 0 to both 'a' and 'b'",
    ),
    "id too high": (
        {"tokenizer": tiny(model={"vocab": {"a": 300}, "merges": []})},
        "no row in the model's embedding, which has 300",
    ),
    "merges": ({"tokenizer": tiny(model={"merges": None})}, "model.merges is not a list"),
    "merge of one": ({"tokenizer": tiny(model={"merges": ["ab"]})}, "merges[0] is not a pair"),
    "merge unknown": ({"tokenizer": tiny(model={"merges": ["a c"]})}, "names 'ac'"),
    "added id": ({"tokenizer": tiny(added_tokens=[added(None, "<s>")])}, "'<s>'"),
    "added empty": ({"tokenizer": tiny(added_tokens=[added(256, "")])}, "added_tokens[0]"),
    "added list": ({"tokenizer": tiny(added_tokens={})}, None),
    "added twice": (
        {"tokenizer": tiny(added_tokens=[added(256, "<s>"), added(257, "<s>")])},
        "tokens 256 and 257 are both '<s>'",
    ),
    "surrogate": ({"tokenizer": tiny(added_tokens=[added(256, "\ud800")])}, "not valid Unicode"),
    "lower case": ({"tokenizer": tiny(normalizer={"type": "Lowercase"})}, "normalizer Lowercase"),
    "unknown split": (
        {
            "tokenizer": tiny(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": r"\d+"}}
            )
        },
        r"regex=\d+",
    ),
    "prefix space": ({"tokenizer": tiny(pre_tokenizer={"type": "ByteLevel"})}, "prefix_space=True"),
    "ignore_merges": ({"tokenizer": tiny(model={"ignore_merges": True})}, "the known kinds are"),
    "no bytes": ({"tokenizer": fallback(model={"vocab": {"a": 0}, "merges": []})}, "0 of the 256"),
    "fallback normalizer": ({"tokenizer": fallback(normalizer={"type": "NFKC"})}, "NFKC"),
    "fallback words": ({"tokenizer": fallback(pre_tokenizer={"type": "Whitespace"})}, "Whitespace"),
    "fallback mark": (
        {"tokenizer": fallback(pre_tokenizer={"type": "Metaspace", "replacement": "_"})},
        "'_'",
    ),
    "template": (
        {"tokenizer": TINY, "tokenizer_config": {"chat_template": [{"name": "x"}]}},
        "lacks its name or template",
    ),
    "template type": ({"tokenizer": TINY, "tokenizer_config": {"chat_template": 1}}, "neither"),
    "tiktoken": ({"model": b"IQ== 0\nIg== 1\n"}, "tiktoken"),
    "truncated model": ({"model": b"\n\x0e\n\x05"}, "not a SentencePiece model"),
    "empty model": ({"model": b""}, "not a SentencePiece model"),
    "added_tokens": ({"tokenizer": TINY, "added_tokens": {"<x>": "1"}}, "added_tokens.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_damage_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    files, words = REFUSED[name]
    for key, content in files.items():
        if "." in key:
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / key).write_bytes(data)
        elif name == "surrogate":
            (tmp_path / f"{key}.json").write_text(json.dumps(content))
        else:
            write_folder(tmp_path, **{key: content})
    if words is None:  # an empty object is as good as an empty list
        read_vocab(tmp_path, 300)
        return
    with pytest.raises(CheckpointError) as caught:
        read_vocab(tmp_path, 300)
    message = str(caught.value)
    assert words in message and str(tmp_path) in message and "\n" not in message.strip()


@pytest.mark.parametrize(
    ("options", "size", "words"),
    [
        ({"model_type": "unigram"}, 2000, "Unigram"),
        ({"byte_fallback": False}, 2000, "0 of the 256 byte tokens"),
        ({"treat_whitespace_as_suffix": True}, 2000, "treat_whitespace_as_suffix"),
        ({}, VOCAB_SIZE - 1, f"more than {VOCAB_SIZE - 1} tokens"),
    ],
)
def test_sentencepiece_models_that_llama_cpp_cannot_follow(
    tmp_path: Path, vocab_lines: list[str], options: dict[str, Any], size: int, words: str
) -> None:
    write_folder(tmp_path, model=train_spm(vocab_lines, **options))
    error = CheckpointError if size < VOCAB_SIZE else UnsupportedError
    with pytest.raises(error, match=words):
        read_vocab(tmp_path, size)


def test_added_token_beyond_the_embedding_is_refused(
    tmp_path: Path, vocab_lines: list[str]
) -> None:
    write_folder(tmp_path, model=train_spm(vocab_lines), added_tokens={"<pad>": VOCAB_SIZE})
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: token 1400 \('<pad>'\)"):
        read_vocab(tmp_path, VOCAB_SIZE)


def test_normalizing_models_carry_notes(tmp_path: Path, vocab_lines: list[str]) -> None:
    proto = train_spm(
        vocab_lines, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )
    notes = " ".join(read_vocab(write_folder(tmp_path, model=proto), VOCAB_SIZE).notes)
    assert "nmt_nfkc" in notes and "repeated, leading and trailing spaces" in notes


def test_merges_that_are_not_complete_carry_a_note(tmp_path: Path) -> None:
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for text in ("▁", "a", "b", "c", "ab", "bc", "abc"):
        vocab[text] = len(vocab)
    model = {"vocab": vocab, "merges": ["a b", "b c", "ab c"]}  # not "a bc"
    read = read_vocab(write_folder(tmp_path, tokenizer=fallback(model=model)), len(vocab))
    assert any("merges do not list" in note for note in read.notes)
    assert read.scores[-3:] == [0.0, -1.0, -2.0]


def test_the_protobuf_reader_agrees_with_sentencepiece(
    tmp_path: Path, vocab_lines: list[str]
) -> None:
    proto = train_spm(vocab_lines, user_defined_symbols=USER_DEFINED, control_symbols=["<c>"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto)
    write_folder(tmp_path, model=proto)
    model = vocab_spm.read_model(tmp_path / "tokenizer.model")
    assert len(model.pieces) == theirs.vocab_size()
    for i, piece in enumerate(model.pieces):
        assert piece.text == theirs.id_to_piece(i)
        assert piece.score == theirs.get_score(i)
        assert (piece.type == vocab_spm.CONTROL) == theirs.is_control(i)
        assert (piece.type == vocab_spm.UNKNOWN) == theirs.is_unknown(i)
        assert (piece.type == vocab_spm.BYTE) == theirs.is_byte(i)
        assert (piece.type == vocab_spm.UNUSED) == theirs.is_unused(i)
        assert (piece.type == vocab_spm.USER_DEFINED) == (piece.text in USER_DEFINED)


@examples(200)
@given(data=st.data())
def test_damaged_sentencepiece_bytes_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    proto = bytearray(SMALL_MODEL)
    for _ in range(data.draw(st.integers(1, 4))):
        proto[data.draw(st.integers(0, len(proto) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(proto[: data.draw(st.integers(0, len(proto)))]))
    try:
        vocab_spm.read_model(path)
    except CheckpointError as error:
        assert "damaged.model" in str(error)


@examples(300)
@given(
    st.binary(max_size=140),
    st.sampled_from([b"", b"\x18\x01", b"\x18\x06", b"\x18\x81\x01", b"\x20\x01", b"\x18"]),
    st.integers(0, 160),
    st.integers(0, 255),
    st.booleans(),
)
def test_a_piece_read_at_once_is_that_read_field_by_field(text, behind, at, byte, change):
    """Pieces as SentencePiece writes them, longer ones, and damaged ones."""
    size = bytes([len(text)]) if len(text) < 128 else bytes([len(text) & 127 | 128, 1])
    data = b"\x0a" + size + text + b"\x15" + b"\x00\x00\x80\xbf" + behind
    if change:
        at %= len(data)
        data = data[:at] + bytes([byte]) + data[at + 1 :]
    elif len(text) < 128 and behind in (b"", b"\x18\x01", b"\x18\x06"):
        assert vocab_spm._usual_piece(data) is not None
    if (found := vocab_spm._usual_piece(data)) is not None:
        assert found == vocab_spm._any_piece(data)
