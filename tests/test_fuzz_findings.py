"""What damaged files once did to the readers: a test for each, with the smallest such file."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dus_edge.checkpoint.gguf_header import read_header
from dus_edge.errors import MOST_MESSAGE, CheckpointError
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.jsonfile import MAX_ITEMS, find_object, parse_strict
from dus_edge.ollama.facts import gguf_facts
from dus_edge.ollama.gofunctions import GoTemplateError
from dus_edge.ollama.gotemplate import render, render_conversation
from dus_edge.ollama.grammar import ModelfileError, parse_modelfile, resolve_from
from dus_edge.predict.memory.llama import read_gguf
from dus_edge.run.open import inspect_source
from dus_edge.verify.gguf import verify_gguf
from dus_edge.words import whole_number

from .fuzzing import seeds
from .fuzzing.mutate import gguf_string, piece


def lay(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def gguf_with(path: Path, key: str, value: bytes) -> Path:
    """The fuzz's small model with another typed value of a key."""
    data = seeds.gguf_model().files["m.gguf"]
    name = gguf_string(key.encode())
    at = data.index(name) + len(name)
    kind = int.from_bytes(data[at : at + 4], "little")
    assert kind in (4, 6)  # of four bytes
    whole = data[:at] + value + data[at + 8 :]
    path.write_bytes(whole)
    return path


# JSON


def test_a_small_file_asks_for_little_memory(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    tracemalloc.start()
    find_object(tmp_path / "x.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_millions_of_brackets_are_not_made_into_lists():
    text = "[" + "[]," * (MAX_ITEMS // 2) + "[]]"
    start = time.process_time()
    with pytest.raises(ValueError, match="commas and brackets"):
        parse_strict(text)
    assert time.process_time() - start < 1


# Messages


def test_a_message_is_one_short_line():
    text = str(CheckpointError("first\nsecond\r" + "x" * 100_000 + " the end"))
    assert len(text) <= MOST_MESSAGE and len(text.splitlines()) == 1
    assert text.startswith("first\\nsecond\\r") and text.endswith(" the end")
    with pytest.raises(ModelfileError) as e:
        parse_modelfile("FROM x\nPARAMETER num_ctx " + "9" * 50_000)
    assert len(str(e.value)) <= MOST_MESSAGE


# Numbers of more digits than Python converts


def test_a_number_of_5000_digits(tmp_path):
    digits = "1" * 5000
    assert whole_number("007") == 7 and whole_number(digits) is whole_number("²") is None
    with pytest.raises(ModelfileError, match="whole number"):
        parse_modelfile(f"FROM x\nPARAMETER num_ctx {digits}")
    (command,) = parse_modelfile(f"PARAMETER num_ctx -{'0' * 5000}7\nFROM x")[:1]
    assert command.value == -7
    with pytest.raises(GoTemplateError, match="Unknown"):
        render(f"{{{{ {digits} }}}}", {})
    folder = lay(dict(seeds.sentencepiece().files), tmp_path)
    config = {"added_tokens_decoder": {digits: {"content": "x"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not an integer"):
        read_vocab(folder, seeds.TOKENS)
    for name in (f"blk.{digits}.x", "blk", "blk.x"):
        (tmp_path / "m.gguf").write_bytes(seeds.gguf_model(spare=name).files["m.gguf"])
        assert verify_gguf(tmp_path / "m.gguf")["n_tensors"] == 14
        assert {t.layer for t in read_gguf(tmp_path / "m.gguf").tensors} == {None, 0}


# GGUF


def test_a_list_of_strings_without_end(tmp_path):
    """gguf-py's reader, which the Modelfile was made with, took all memory for it."""
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string(b"general.architecture")
    path.write_bytes(head + struct.pack("<IIQ", 9, 8, 1 << 62) + bytes(64))
    with pytest.raises(CheckpointError, match="not believed"):
        gguf_facts(path)
    path.write_bytes(head + struct.pack("<IIQ", 9, 9, 1 << 62) + bytes(64))
    with pytest.raises(CheckpointError, match="unknown type 9"):
        gguf_facts(path)


@pytest.mark.parametrize(("n_tensors", "n_values"), [(1 << 21, 0), (0, 1 << 17)])
def test_counts_of_a_header_are_not_believed(n_tensors, n_values):
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values)
    with pytest.raises(ValueError, match="not believed"):
        read_header(memoryview(head + bytes(1 << 22)))


@pytest.mark.parametrize("kind", [0, 6, 7, 8])
def test_facts_of_another_type_are_no_facts(tmp_path, kind):
    value = struct.pack("<I", kind) + (gguf_string(b"64") if kind == 8 else bytes(4))
    path = gguf_with(tmp_path / "m.gguf", "llama.context_length", value)
    with pytest.raises(CheckpointError):
        gguf_facts(path)


def test_a_number_of_parts_that_is_a_word(tmp_path):
    value = struct.pack("<I", 8) + gguf_string(b"two")
    model = read_gguf(gguf_with(tmp_path / "m.gguf", "split.count", value))
    assert model.n_layers == 1


@pytest.mark.parametrize("read", [verify_gguf, read_gguf])
def test_billions_of_layers(tmp_path, read):
    value = struct.pack("<II", 4, 4_000_000_000)
    path = gguf_with(tmp_path / "m.gguf", "llama.block_count", value)
    with pytest.raises(CheckpointError, match="block_count"):
        read(path)
    value = struct.pack("<II", 4, 2_000_000)
    with pytest.raises(CheckpointError, match=r"2,?000,?000"):
        read(gguf_with(path, "llama.block_count", value))


# Folders


def test_a_shard_of_a_name_that_no_file_can_have(tmp_path):
    folder = lay(dict(seeds.plain_folder().files), tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name in index["weight_map"]:
        index["weight_map"][name] = "é" * 128
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points to"):
        inspect_source(folder)


# Tokenizers


TEMPLATES: list[Any] = [
    {"type": "Sequence", "processors": 5},
    {"type": "Sequence", "processors": {"type": "ByteLevel"}},
    {"type": "TemplateProcessing", "single": 7, "pair": 1.5},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": "<s>"}, {"Sequence": 3}]},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": ["<s>"]}}, {}]},
    {"type": "TemplateProcessing", "single": [{}, {}], "pair": [{"Sequence": "A"}, 1, {}]},
]


@pytest.mark.parametrize("processor", TEMPLATES)
def test_a_template_of_another_form_is_none(tmp_path, processor):
    folder = lay(dict(seeds.byte_fallback().files), tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": processor}))
    assert read_vocab(folder, seeds.TOKENS).special_ids["bos"] == 1


@pytest.mark.parametrize(("score", "kind"), [(0.0, 1 << 31), (0.0, 7), (float("nan"), 1)])
def test_a_piece_that_gguf_cannot_hold(tmp_path, score, kind):
    folder = lay(dict(seeds.sentencepiece().files), tmp_path)
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes() + piece(b"odd", score, kind))
    with pytest.raises(CheckpointError, match="piece 'odd'"):
        read_vocab(folder, seeds.TOKENS)


# Modelfiles and templates


def test_a_modelfile_of_many_lines_is_read_at_once(tmp_path):
    start = time.process_time()
    text = 'FROM x\nSYSTEM """' + "a\n" * 400_000 + '"""\n' + "PARAMETER stop x\r\n" * 20_000
    commands = parse_modelfile(text)
    assert time.process_time() - start < 1
    assert len(commands) == 20_002 and commands[-1].line == 420_002
    assert commands[1].value == "a\n" * 400_000
    with pytest.raises(ModelfileError, match="Line 2: the quote"):
        parse_modelfile('FROM x\nSYSTEM """' + "a\n" * 400_000)


@pytest.mark.parametrize("name", ["A" * 5000, "~" + "b" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_a_models(tmp_path, name):
    assert resolve_from(tmp_path / "Modelfile", name) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ break }}", "break stands outside a range"),
        ("{{ slice .Messages .Messages }}", "whole numbers"),
        ("{{ slice .Messages 0 1 1 }}", "two bounds"),
        ("{{ ne 1 }}", "ne does not take 1"),
        ("{{ not }}", "not does not take 0"),
        ("{{ range 5 }}{{ end }}", "range over a int"),
        ('{{ range "ab" }}{{ end }}', "range over a str"),
        ("{{ " + "( " * 400_000 + "}}", "more than 1000 words"),
        ("{{ " + "( " * 990 + "1" + " )" * 9 + "}}", "nested too deeply|not closed"),
        ("{{ if 1 }}" * 50_000, "nested too deeply"),
    ],
)
def test_templates_that_go_would_refuse(template, message):
    with pytest.raises(GoTemplateError, match=message):
        render(template, {"Messages": []})


def test_a_token_that_begins_an_action_is_not_put_into_a_template():
    from dus_edge.ollama.chat import families, identify

    for known in families():
        text = render_conversation(known.template, [{"role": "user", "content": "x"}])
        assert text
    assert identify("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "{"}) is None
