"""The shapes that a tokenizer.json may have, and what each means for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dus_edge.errors import UnsupportedError
from dus_edge.export.vocab.vocab import read_vocab

from .vocab_cases import LLAMA3, LlamaVocab, added, fallback, tiny, write_folder, write_gguf


def split(pattern: dict[str, str], behavior: str, invert: bool) -> dict[str, Any]:
    """A pre-tokenizer of the Llama 3 kind."""
    steps = [
        {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    return {"type": "Sequence", "pretokenizers": steps}


@pytest.mark.parametrize(
    ("behavior", "invert", "pre"),
    [("Isolated", False, "smaug-bpe"), ("Removed", True, "smaug-bpe"), ("Removed", False, None)],
)
def test_spellings_of_one_split(
    tmp_path: Path, behavior: str, invert: bool, pre: str | None
) -> None:
    tokenizer = tiny(pre_tokenizer=split({"Regex": LLAMA3}, behavior, invert))
    write_folder(tmp_path, tokenizer=tokenizer)
    if pre is None:
        with pytest.raises(UnsupportedError, match="removed"):
            read_vocab(tmp_path, 256)
        return
    assert read_vocab(tmp_path, 256).pre == pre


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@pytest.mark.parametrize(
    ("shape", "prefix", "n_notes"),
    [
        ({"normalizer": REPLACE, "pre_tokenizer": None}, False, 0),
        (
            {
                "normalizer": REPLACE,
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "MergedWithPrevious",
                },
            },
            False,
            0,
        ),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE],
                },
                "pre_tokenizer": None,
            },
            True,
            0,
        ),
        (
            {"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": True, "split": False}},
            True,
            1,
        ),
        ({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": False}}, False, 1),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, False, 1),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, True, 3),
    ],
)
def test_shapes_of_the_space_prefix(
    tmp_path: Path, shape: dict[str, Any], prefix: bool, n_notes: int
) -> None:
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for text in ("▁", "a", "▁▁"):  # the last needs merging across words
        vocab[text] = len(vocab)
    model = {"vocab": vocab, "merges": ["▁ ▁"]}
    read = read_vocab(write_folder(tmp_path, tokenizer=fallback(model=model, **shape)), 260)
    assert read.flags.get("add_space_prefix", True) is prefix
    assert len(read.notes) == n_notes


def test_the_config_decides_on_the_space_prefix(tmp_path: Path) -> None:
    config = {"add_prefix_space": False}
    write_folder(tmp_path, tokenizer=fallback(), tokenizer_config=config)
    assert read_vocab(tmp_path, 260).flags["add_space_prefix"] is False


@pytest.mark.parametrize(
    ("files", "adds"),
    [
        ({}, False),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast"}}, None),
        ({"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}, False),
        ({"tokenizer_config": {"add_bos_token": True}}, True),
    ],
)
def test_bos_of_folders_without_a_template(
    tmp_path: Path, files: dict[str, Any], adds: bool | None
) -> None:
    write_folder(tmp_path, tokenizer=fallback(), **files)
    assert read_vocab(tmp_path, 260).flags.get("add_bos_token") is adds


def test_merges_may_be_strings_or_pairs(tmp_path: Path) -> None:
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]]):
        write_folder(tmp_path, tokenizer=tiny(model={"merges": merges}))
        assert read_vocab(tmp_path, 256).merges == ["a b", "ab c"]


def test_tokens_that_swallow_spaces_carry_a_note(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer=tiny(added_tokens=[added(256, "<s>") | {"rstrip": True}]))
    assert any("'<s>' swallow spaces" in note for note in read_vocab(tmp_path, 257).notes)


def test_an_ordinary_token_that_llama_cpp_takes_for_an_end(tmp_path: Path) -> None:
    """As in Qwen 3: the source forms it by merges, if at all; llama.cpp knows it by its text."""
    base = tiny()["model"]
    vocab = base["vocab"] | {"</": 256, "</s": 257, "</s>": 258}
    merges = [*base["merges"], ["<", "/"], ["</", "s"], ["</s", ">"]]
    model = {"vocab": vocab, "merges": merges}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    tokenizer = tiny(model=model, pre_tokenizer=by_bytes | {"trim_offsets": False})
    write_folder(tmp_path, tokenizer=tokenizer)
    source = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = read_vocab(tmp_path, 259)
    (note,) = [note for note in found.notes if "</s>" in note]
    assert "ends" in note
    write_gguf(found, tmp_path / "vocab.gguf")
    llama = LlamaVocab(tmp_path / "vocab.gguf")
    try:
        text = "x</s>y"
        theirs = llama.encode(text, add_special=False, parse_special=True)
        assert theirs == [vocab["x"], 258, vocab["y"]]
        assert source.encode(text, add_special_tokens=False).ids != theirs
    finally:
        llama.free()


def test_end_tokens_that_are_special_are_no_difference(tmp_path: Path) -> None:
    model = {"vocab": tiny()["model"]["vocab"]}
    tokenizer = tiny(model=model, added_tokens=[added(256, "</s>")])
    write_folder(tmp_path, tokenizer=tokenizer)
    assert not any("</s>" in note for note in read_vocab(tmp_path, 257).notes)
