"""What we write of a vocabulary, against llama.cpp's converters: tokens, keys, templates."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from dus_edge.export.vocab import special as vocab_special
from dus_edge.export.vocab.vocab import Vocab, read_vocab, vocab_metadata

from .vocab_cases import (
    CASES,
    LLAMA_IDS,
    LLAMA_SPECIAL,
    NAMES,
    TEXTS,
    TINY,
    VOCAB_SIZE,
    added,
    llama_json,
    tiny,
    train_spm,
    write_folder,
)


@pytest.mark.parametrize("name", CASES)
def test_special_tokens_equal_the_converters(vocab_case: Any, name: str) -> None:
    case, vocab, _ = vocab_case(name)
    theirs = gguf.SpecialVocab(case.folder, load_merges=vocab.merges is not None, n_vocab=case.size)
    # Ours may know more: the converter finds names only among added tokens of tokenizer.json.
    assert theirs.special_token_ids.items() <= vocab.special_ids.items()
    ours = {key.split("_")[1]: value for key, value in vocab.flags.items() if key[:3] == "add"}
    assert theirs.add_special_token.items() <= ours.items()
    assert vocab.merges is None or theirs.merges == vocab.merges
    assert vocab.chat_template == theirs.chat_template


def test_sentencepiece_tokens_equal_the_converters(vocab_case: Any) -> None:
    case, vocab, _ = vocab_case("spm-llama2")
    rows = list(zip(vocab.tokens, vocab.scores, vocab.token_types, strict=True))
    theirs = list(gguf.SentencePieceVocab(case.folder).all_tokens())
    assert rows[:VOCAB_SIZE] == [(text.decode(), score, kind) for text, score, kind in theirs]
    unused = int(gguf.TokenType.UNUSED)
    assert rows[VOCAB_SIZE:] == [
        (f"[PAD{i}]", -10000.0, unused) for i in range(VOCAB_SIZE, VOCAB_SIZE + 7)
    ]


def test_added_tokens_of_sentencepiece_folders(vocab_case: Any) -> None:
    _, vocab, _ = vocab_case("spm-added")
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    assert vocab.token_types[:3] == [control] * 3  # added_tokens_decoder says so
    rows = list(zip(vocab.tokens, vocab.token_types, vocab.scores, strict=True))[VOCAB_SIZE:]
    assert rows[:4] == [
        ("<|im_start|>", control, -1000.0),
        ("<|im_end|>", control, -1000.0),
        ("<tool>", user, -1000.0),
        ("<｜pad｜>", control, -1000.0),
    ]
    assert len(rows) == 13 and rows[-1][0] == f"[PAD{VOCAB_SIZE + 12}]"
    assert vocab.flags == {"add_bos_token": True}
    assert vocab.special_ids == {"bos": 1, "eos": 2, "unk": 0}


def test_folders_without_added_tokens_decoder_keep_their_own_specials(vocab_case: Any) -> None:
    _, vocab, _ = vocab_case("spm-transformers-5")
    kind = gguf.TokenType
    assert vocab.token_types[:3] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    assert vocab.scores[:3] == [0.0] * 3
    added = [kind.CONTROL, kind.CONTROL, kind.USER_DEFINED, kind.CONTROL]
    assert vocab.token_types[VOCAB_SIZE : VOCAB_SIZE + 4] == added


def test_fast_tokens_equal_the_converters(vocab_case: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    case, vocab, _ = vocab_case("fast-prepend")
    names = NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_folder(tmp_path, tokenizer_config=names | {"pad_token": "<｜pad｜>"})
    shutil.copy(case.folder / "tokenizer.json", tmp_path)
    theirs = list(gguf.LlamaHfVocab(tmp_path).all_tokens())
    assert [text.decode() for text, _, _ in theirs] == vocab.tokens
    kinds = [kind for _, _, kind in theirs]
    # The converter misses special tokens that have no name in tokenizer_config.json.
    kinds[VOCAB_SIZE : VOCAB_SIZE + 2] = [gguf.TokenType.CONTROL] * 2
    assert kinds == vocab.token_types


def test_folders_saved_by_transformers_5(
    tmp_path: Path, vocab_lines: list[str], load_vocab: Any
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    tokenizer = transformers.TokenizersBackend(
        tokenizer_object=llama_json(train_spm(vocab_lines), "prepend"),
        **NAMES,
        pad_token="<｜pad｜>",
        extra_special_tokens=["<|im_end|>"],
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    vocab = read_vocab(tmp_path, VOCAB_SIZE + 4)
    assert vocab.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": VOCAB_SIZE + 3}
    assert vocab.flags == {"add_bos_token": True, "add_sep_token": False}
    assert vocab.chat_template == "{{ messages }}"
    llama = load_vocab(vocab)
    for text in [*TEXTS, *LLAMA_SPECIAL]:
        assert llama.encode(text, add_special=True, parse_special=True) == tokenizer.encode(text)


def test_metadata_keys_types_and_order(vocab_case: Any) -> None:
    _, vocab, _ = vocab_case("spm-added")
    vocab = replace(
        vocab,
        flags={"add_space_prefix": False, "add_bos_token": True},
        chat_template="A",
        chat_templates={"tool_use": "B"},
    )
    entries = vocab_metadata(vocab)
    kind = gguf.GGUFValueType
    assert [(e.key, e.kind, e.item) for e in entries] == [
        ("tokenizer.ggml.add_space_prefix", kind.BOOL, None),
        ("tokenizer.ggml.model", kind.STRING, None),
        ("tokenizer.ggml.pre", kind.STRING, None),
        ("tokenizer.ggml.tokens", kind.ARRAY, kind.STRING),
        ("tokenizer.ggml.scores", kind.ARRAY, kind.FLOAT32),
        ("tokenizer.ggml.token_type", kind.ARRAY, kind.INT32),
        ("tokenizer.ggml.bos_token_id", kind.UINT32, None),
        ("tokenizer.ggml.eos_token_id", kind.UINT32, None),
        ("tokenizer.ggml.unknown_token_id", kind.UINT32, None),
        ("tokenizer.ggml.add_bos_token", kind.BOOL, None),
        ("tokenizer.chat_template.tool_use", kind.STRING, None),
        ("tokenizer.chat_templates", kind.ARRAY, kind.STRING),
        ("tokenizer.chat_template", kind.STRING, None),
    ]


def test_every_key_is_one_that_gguf_names() -> None:
    names = set(vars(gguf.Keys.Tokenizer).values())
    further = ("eot", "eom", "prefix", "suffix", "middle")
    flags = ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix")
    ids = dict.fromkeys(vocab_special.KINDS + further, 0)
    vocab = Vocab("gpt2", "gpt-2", ["a"], [0.0], [1], ["a b"], ids, dict.fromkeys(flags, True), "T")
    assert {entry.key for entry in vocab_metadata(vocab)} <= names


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": '{"chat_template": "J"}'}, ("J", {})),
        ({"chat_template.json": '{"chat_template": "J"}', "chat_template.jinja": "F"}, ("F", {})),
        (
            {"chat_template.jinja": "F", "additional_chat_templates/tool use.jinja": "T"},
            ("F", {"tool_use": "T"}),
        ),
        (
            {"chat_template.jinja": "F", "tokenizer_config.json": '{"chat_template": "C"}'},
            ("C", {}),
        ),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "default", "template": "D"},
                            {"name": "rag", "template": "R"},
                        ]
                    }
                )
            },
            ("D", {"rag": "R"}),
        ),
        ({}, (None, {})),
    ],
)
def test_chat_templates(tmp_path: Path, files: dict[str, str], expected: Any) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    vocab = read_vocab(write_folder(tmp_path, tokenizer=TINY), 300)
    assert (vocab.chat_template, vocab.chat_templates) == expected
    if (tmp_path / "tokenizer_config.json").is_file() and expected[0] == "C":
        assert gguf.SpecialVocab(tmp_path).chat_template == "C"


def test_code_llama_has_infill_tokens(tmp_path: Path, vocab_lines: list[str]) -> None:
    write_folder(tmp_path, config=LLAMA_IDS, model=train_spm(vocab_lines))
    ids = read_vocab(tmp_path, 32016).special_ids
    assert ids == LLAMA_SPECIAL_IDS | {
        "prefix": 32007,
        "suffix": 32008,
        "middle": 32009,
        "eot": 32010,
    }


LLAMA_SPECIAL_IDS = {"bos": 1, "eos": 2}


def test_special_ids_from_the_less_usual_files(tmp_path: Path) -> None:
    tokenizer = tiny(added_tokens=[added(256, "<s>"), added(257, "</s>"), added(258, "<p>")])
    write_folder(
        tmp_path,
        tokenizer=tokenizer,
        config={"bos_token_id": -1, "pad_token_id": 999, "eos_token_id": [257, 256]},
        special_tokens_map={"bos_token": {"content": "<s>"}, "pad_token": "<p>"},
        generation_config={"eos_token_id": [257, 256]},
    )
    vocab = read_vocab(tmp_path, 260)
    assert vocab.special_ids == {"bos": 256, "eos": 257, "pad": 258}
    assert any("pad token 999" in note for note in vocab.notes)
    assert vocab.flags == {"add_bos_token": False}


def test_the_post_processor_outweighs_the_config(tmp_path: Path) -> None:
    # As in the converter: the template is what transformers runs. (gguf 0.19 has it reversed.)
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
        "pair": [],
    }
    tokenizer = tiny(added_tokens=[added(256, "<s>")], post_processor=template)
    write_folder(tmp_path, tokenizer=tokenizer, tokenizer_config={"add_bos_token": False})
    vocab = read_vocab(tmp_path, 257)
    assert vocab.flags == {"add_bos_token": True} and vocab.special_ids == {"bos": 256}


def test_a_flag_without_its_token_is_not_written_as_set(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer=TINY, tokenizer_config={"add_bos_token": True})
    vocab = read_vocab(tmp_path, 256)
    assert vocab.flags == {"add_bos_token": False}  # llama.cpp would add its default, token 11
    assert any("no bos token" in note for note in vocab.notes)


def test_a_template_that_ends_with_another_token_makes_eos_the_end_of_turn(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>"}},
            {"Sequence": {"id": "A"}},
            {"SpecialToken": {"id": "<p>"}},
        ],
        "pair": [
            {"SpecialToken": {"id": "<s>"}},
            {"Sequence": {"id": "A"}},
            {"SpecialToken": {"id": "</s>"}},
            {"Sequence": {"id": "B"}},
            {"SpecialToken": {"id": "<p>"}},
        ],
    }
    tokens = [added(256, "<s>"), added(257, "</s>"), added(258, "<p>")]
    write_folder(
        tmp_path,
        tokenizer=tiny(added_tokens=tokens, post_processor=template),
        tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", "add_eos_token": True},
    )
    vocab = read_vocab(tmp_path, 260)
    theirs = gguf.SpecialVocab(tmp_path)
    assert vocab.special_ids == theirs.special_token_ids == {"bos": 256, "eos": 258, "eot": 257}
    assert vocab.flags == {
        f"add_{kind}_token": value for kind, value in theirs.add_special_token.items()
    }
