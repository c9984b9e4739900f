"""The tokenizer.json that is made of a GGUF's vocabulary: ids against llama.cpp's."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from dus_edge.checkpoint.gguf.file import GGUFModel
from dus_edge.checkpoint.gguf.vocab import (
    read_stored_vocab,
    rebuilt_tokenizer,
    rebuilt_tokenizer_config,
)
from dus_edge.data import read_text
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export.vocab.vocab import Vocab, read_vocab

from .cases import check_each
from .vocab_cases import CASES, TEXTS, LlamaVocab, newer_unicode, not_nfc, write_folder, write_gguf

#: llama.cpp's own code for these words differs from the pattern: `data/pretokenizers.toml`.
APART = ("tekken", "gpt-4o")


def rebuilt(vocab: Vocab, folder: Path) -> Path:
    """A folder with the tokenizer that is made of a vocabulary, by way of a GGUF file."""
    write_gguf(vocab, folder / "vocab.gguf")
    stored = read_stored_vocab(GGUFModel(folder / "vocab.gguf"))
    files = {
        "tokenizer": rebuilt_tokenizer(stored),
        "tokenizer_config": rebuilt_tokenizer_config(stored),
    }
    return write_folder(folder, **files)


@pytest.mark.parametrize("name", CASES)
def test_ids_equal_llama_cpps(vocab_case: Any, name: str, tmp_path: Path) -> None:
    case, vocab, llama = vocab_case(name)
    folder = rebuilt(vocab, tmp_path)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [t for t in [*TEXTS, *case.special_texts] if not newer_unicode(t)]
    if name == "spm-user-defined":
        texts = [t for t in texts if "\n\n" not in t]  # `_formed` says why
    if name in APART:
        texts = [t for t in texts if not case.excluded(t, True)]
    assert len(texts) >= 400 or name in APART
    for parse_special in (False, True):
        fast.encode_special_tokens = not parse_special
        for text in texts:
            ids = fast.encode(text, add_special_tokens=True).ids
            assert ids == llama.encode(text, add_special=True, parse_special=parse_special), text


KINDS = tomllib.loads(read_text("pretokenizers.toml"))["kind"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["pre"])
def test_other_names_of_a_cut_are_the_same_to_llama_cpp(
    vocab_case: Any, load_vocab: Any, kind: dict[str, Any]
) -> None:
    """Ids, and whether a text begins with a BOS token where the file does not say."""
    case, vocab, llama = vocab_case(kind["pre"])
    texts = [text for text in TEXTS if not case.excluded(text, True)]
    bos = [vocab.special_ids["bos"]] * kind.get("adds_bos", False)

    def check(name: str) -> None:
        other: LlamaVocab = load_vocab(replace(vocab, pre=name, flags={}))
        for text in texts:
            ids = llama.encode(text, add_special=False, parse_special=True)
            assert other.encode(text, add_special=False, parse_special=True) == ids, text
            assert other.encode(text, add_special=True, parse_special=True) == bos + ids, text

    check_each(check, (kind["pre"], *kind.get("also", ())))


@pytest.mark.parametrize("name", ["spm-added", "fast-never", "llama-bpe", "smollm"])
def test_what_is_made_of_it_again_reads_alike(
    vocab_case: Any, load_vocab: Any, name: str, tmp_path: Path
) -> None:
    """GGUF, folder, GGUF: tokens, kinds and special ids stay, and so do llama.cpp's ids."""
    _, vocab, llama = vocab_case(name)
    again = read_vocab(rebuilt(vocab, tmp_path), len(vocab.tokens))
    assert (again.tokens, again.pre) == (vocab.tokens, vocab.pre)
    assert again.token_types == vocab.token_types
    assert again.merges == vocab.merges
    kept = {k: v for k, v in vocab.special_ids.items() if k in again.special_ids}
    assert {"eos"} <= kept.keys() and kept.items() <= again.special_ids.items()
    theirs: LlamaVocab = load_vocab(again)
    for text in TEXTS:
        for special in (False, True):
            ids = theirs.encode(text, add_special=True, parse_special=special)
            assert ids == llama.encode(text, add_special=True, parse_special=special), text


@pytest.mark.parametrize("name", ["spm-added", "llama-bpe"])
def test_transformers_reads_it(vocab_case: Any, name: str, tmp_path: Path) -> None:
    _, vocab, llama = vocab_case(name)
    vocab = replace(vocab, chat_template="{{ messages[0]['content'] }}")
    folder = rebuilt(vocab, tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:200]:
        if not newer_unicode(text):
            ids = llama.encode(text, add_special=True, parse_special=True)
            assert tokenizer.encode(text) == ids, text
    assert tokenizer.eos_token_id == vocab.special_ids["eos"]
    asked = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == "hello"


def test_what_is_no_such_vocabulary(vocab_case: Any, tmp_path: Path) -> None:
    _, byte_level, _ = vocab_case("smollm")
    _, spm, _ = vocab_case("fast-never")
    cases = [
        (replace(byte_level, pre="novelty"), UnsupportedError, "cuts words as 'novelty' does"),
        (replace(byte_level, model="rwkv"), UnsupportedError, "of the kind 'rwkv'"),
        (replace(byte_level, merges=["q zz"]), CheckpointError, "the merge 'q zz' names what is"),
        (replace(byte_level, merges=None), CheckpointError, "tokenizer.ggml.merges is missing"),
        (replace(spm, token_types=[1] * len(spm.tokens)), UnsupportedError, "0 of the 256 byte"),
        (replace(spm, token_types=[1]), CheckpointError, "token_type has 1 entries for"),
        (replace(spm, scores=[0.0]), CheckpointError, "scores has 1 entries for"),
        (
            replace(spm, tokens=[*spm.tokens[:-1], spm.tokens[5]]),
            CheckpointError,
            "tokens 5 and .* are both",
        ),
    ]
    for i, (vocab, error, words) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(error, match=words):
            rebuilt(vocab, tmp_path / str(i))


def test_texts_that_are_not_composed_are_read_as_llama_cpp_does(
    vocab_case: Any, tmp_path: Path
) -> None:
    """Qwen's own file composes characters first, which llama.cpp does not."""
    _, vocab, llama = vocab_case("qwen2")
    fast = Tokenizer.from_file(str(rebuilt(vocab, tmp_path) / "tokenizer.json"))
    texts = [t for t in TEXTS if not_nfc(t) and not newer_unicode(t)]
    assert texts
    for text in texts:
        ids = llama.encode(text, add_special=False, parse_special=True)
        assert fast.encode(text, add_special_tokens=False).ids == ids
