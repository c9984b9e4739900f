"""Ids from llama.cpp, given our metadata, against ids from the tokenizers that we read."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    models,
    pre_tokenizers,
)

from dus_edge.export.vocab.vocab import Vocab, read_vocab

from .draws import examples
from .vocab_cases import (
    BYTE_SPECIAL,
    CASES,
    LLAMA3,
    LLAMA_SPECIAL,
    QWEN2,
    SPM_CASES,
    TEXTS,
    USER_DEFINED_SPECIAL,
    LlamaVocab,
    not_nfc,
    random_text,
    regex_then_bytes,
    write_folder,
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("add_special", [False, True])
@pytest.mark.parametrize("parse_special", [False, True])
def test_ids_equal_the_source(
    vocab_case: Any, name: str, add_special: bool, parse_special: bool
) -> None:
    case, _, llama = vocab_case(name)
    if parse_special and name in SPM_CASES[:4]:
        parse_special = False  # SentencePiece has no such mode
    texts = [t for t in [*TEXTS, *case.special_texts] if not case.excluded(t, parse_special)]
    assert len(texts) >= 300
    for text in texts:
        ids = llama.encode(text, add_special=add_special, parse_special=parse_special)
        assert ids == case.encode(text, add_special, parse_special), text


#: What special tokens are told by, of every case at once.
MARKS = [*LLAMA_SPECIAL, *BYTE_SPECIAL, *USER_DEFINED_SPECIAL, "a", " ", "\n", "한국", "1"]


@pytest.mark.parametrize("name", CASES)
@examples(120)
@given(text=random_text | st.lists(st.sampled_from(MARKS), max_size=8).map("".join))
def test_ids_equal_the_source_for_random_text(vocab_case: Any, name: str, text: str) -> None:
    case, _, llama = vocab_case(name)
    parses = name not in SPM_CASES[:4]
    if not case.excluded(text, parses):
        ids = llama.encode(text, add_special=True, parse_special=parses)
        assert ids == case.encode(text, True, parses)


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "smollm", "gpt-2"])
def test_every_class_of_characters_splits_alike(
    name: str, tmp_path: Path, load_vocab: Callable[[Vocab], LlamaVocab]
) -> None:
    # Merges of a, 1, ! and space with any byte show whether the next character is of their word.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [(head, char) for head in "a1!Ġ" for char in alphabet]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "llama-bpe": regex_then_bytes(LLAMA3),
        "qwen2": regex_then_bytes(QWEN2),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), by_bytes]),
        "gpt-2": by_bytes,
    }[name]
    read = read_vocab(write_folder(tmp_path, tokenizer=tokenizer), len(vocab))
    assert read.pre == name
    llama = load_vocab(read)
    rng = random.Random(3)
    points = [*range(0x3000), *rng.sample(range(0x3000, 0x20000), 6000)]
    chars = [c for c in map(chr, points) if unicodedata.category(c) not in ("Cs", "Cn")]
    for i in range(0, len(chars), 64):
        text = "\nb".join(f"a{c}\na1{c}\na!{c}\na {c}a" for c in chars[i : i + 64])
        ids = llama.encode(text, add_special=False, parse_special=False)
        assert ids == tokenizer.encode(text).ids, chars[i : i + 64]


@pytest.mark.parametrize("name", ["fast-first", "fast-always"])
def test_metaspace_differs_by_its_prefix_rule_only(vocab_case: Any, name: str) -> None:
    # llama.cpp has one rule: a space before the text and after each special token. That is the
    # rule of "prepend"; on the texts left out for Metaspace it gives exactly those ids.
    case, _, llama = vocab_case(name)
    prepend = vocab_case("fast-prepend")[0]
    left_out = [t for t in [*TEXTS, *case.special_texts] if case.excluded(t, True)]
    assert left_out
    for text in left_out:
        assert llama.encode(text, add_special=True, parse_special=True) == prepend.encode(
            text, True, True
        )


def test_nfc_is_the_only_difference_of_qwen2(vocab_case: Any) -> None:
    case, vocab, llama = vocab_case("qwen2")
    left_out = [text for text in TEXTS if not_nfc(text)]
    assert left_out and any("NFC" in note for note in vocab.notes)
    for text in left_out:
        composed = unicodedata.normalize("NFC", text)
        ids = llama.encode(composed, add_special=False, parse_special=True)
        assert ids == case.encode(text, False, True)


def test_a_space_follows_user_defined_pieces(vocab_case: Any) -> None:
    # SPM + space prefix: llama_vocab::impl::tokenize sets is_prev_special after USER_DEFINED.
    case, vocab, llama = vocab_case("spm-user-defined")
    ids = llama.encode("x<custom>y", add_special=False, parse_special=False)
    assert [vocab.tokens[i] for i in ids] == ["▁", "x", "<custom>", "▁y"]
    assert any("<custom>" in note for note in vocab.notes)
    assert case.encode("x<custom>", False, False) == ids[:-1]


def test_the_converters_scores_would_give_other_ids(
    vocab_case: Any, load_vocab: Callable[[Vocab], LlamaVocab]
) -> None:
    _, vocab, ours = vocab_case("fast-prepend")
    flat = load_vocab(replace(vocab, scores=[-1000.0] * len(vocab.tokens)))
    wrong = sum(
        flat.encode(text, add_special=False, parse_special=False)
        != ours.encode(text, add_special=False, parse_special=False)
        for text in TEXTS
    )
    assert wrong > 50
    assert not vocab.notes
