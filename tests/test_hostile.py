"""Checkpoints that mean harm: no code of theirs runs, nothing of the user's is taken, no hang."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dus_edge
from dus_edge.checkpoint.builtin import model_dir
from dus_edge.checkpoint.config import parse_config
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.checkpoint.safetensors import read_header
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.export.vocab.vocab import read_vocab
from dus_edge.jsonfile import find_object, read_object

from .conftest import TINY
from .fuzzing.mutate import piece
from .fuzzing.seeds import sentencepiece

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
TRAP = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class TrapConfig(LlamaConfig): pass
class Trap(LlamaForCausalLM): config_class = TrapConfig
"""


# Code


def trapped(base: Path, mark: Path, **config) -> None:
    """Make a folder whose config names Python files of its own."""
    (base / "trap.py").write_text(TRAP.format(mark=str(mark)))
    raw = json.loads((base / "config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.Trap"}
    (base / "config.json").write_text(json.dumps(raw | config))


@pytest.mark.parametrize("kind", [None, "trap"])
@pytest.mark.parametrize(
    "command", [("quality",), ("bench", "run", "-p", "8", "-n", "2", "-r", "1")]
)
def test_no_code_of_a_checkpoint_runs_even_if_somebody_says_yes(
    make_checkpoint, tmp_path, command, kind
):
    base, mark = make_checkpoint(), tmp_path / "ran"
    trapped(base, mark, **({"model_type": kind} if kind else {}))
    words = [*CLI, *command, str(base), *([str(base), "--no-plots"] * (command[0] == "quality"))]
    if command[0] == "quality":
        words += ["--chunks", "1", "--ctx", "32"]
    run = subprocess.run(words, input="y\n" * 50, capture_output=True, text=True, timeout=120)
    assert not mark.exists()
    assert (run.returncode == 0) == (kind is None), run.stderr
    if kind:
        assert "model_type is 'trap'" in run.stderr and len(run.stderr.splitlines()) == 1


def test_every_call_of_transformers_on_a_folder_forbids_code():
    """What `from_pretrained` gets in the package: NO_CODE, or both of its words."""
    root = Path(dus_edge.__file__).parent
    found = 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "from_pretrained" or isinstance(node.args[0], ast.Constant):
                continue  # a model of a state dict has no folder
            spread = {ast.unparse(k.value) for k in node.keywords if k.arg is None}
            assert spread & {"NO_CODE", "NO_CODE_WEIGHTS"}, f"{path}:{node.lineno}"
            weights = "Model" in ast.unparse(node.func)
            assert not weights or "NO_CODE_WEIGHTS" in spread, f"{path}:{node.lineno}"
            found += 1
    assert found >= 4


# Links and what is no file


def test_a_link_out_of_the_folder_is_not_followed(run, make_checkpoint, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("LICENSE", "tokenizer_config.json", "README.md", "chat_template.jinja"):
        base = make_checkpoint(f"base-{name}")
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(secret)
        for command in (("upscale",), ("gguf",)):
            code, _, err = run(*command, base, "-o", tmp_path / "out")
            assert code == 3
            assert name in err and "leads out of the checkpoint's folder" in err
            assert not (tmp_path / "out").exists()


def test_a_linked_folder_of_templates_is_not_followed(run, make_checkpoint, tmp_path):
    base, private = make_checkpoint(), tmp_path / "private"
    private.mkdir()
    (private / "diary.jinja").write_text("secret")
    (base / "additional_chat_templates").symlink_to(private)
    code, _, err = run("upscale", base, "-o", tmp_path / "out")
    assert code == 3 and "additional_chat_templates" in err
    (base / "additional_chat_templates").unlink()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "x.jinja").symlink_to(private / "diary.jinja")
    code, _, err = run("upscale", base, "-o", tmp_path / "out")
    assert code == 3 and "x.jinja" in err


def test_links_inside_and_into_a_hub_cache_are_followed(run, make_checkpoint, tmp_path):
    base = make_checkpoint()
    (base / "LICENSE.md").write_text("MIT")
    (base / "LICENSE").symlink_to("LICENSE.md")
    assert run("upscale", base, "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    # As huggingface_hub lays its cache out.
    storage = tmp_path / "models--org--name"
    (storage / "blobs").mkdir(parents=True)
    snapshot = storage / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir()
    base.rename(snapshot)
    (snapshot / "LICENSE.md").rename(storage / "blobs" / "abc")
    (snapshot / "LICENSE.md").symlink_to("../../blobs/abc")
    assert run("upscale", snapshot, "-o", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "LICENSE").read_text() == "MIT"
    # Weights may lie anywhere.
    weights = snapshot / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert run("upscale", snapshot, "-o", tmp_path / "third")[0] == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer.model", "LICENSE"])
def test_a_pipe_or_a_device_does_not_make_us_wait(make_checkpoint, name, tmp_path):
    base = make_checkpoint()
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    run = subprocess.run(
        [*CLI, "gguf", str(base), "-o", str(tmp_path / "o")], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert run.returncode == 3 and name in run.stderr
    (base / name).unlink()
    (base / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=name):
        resolve_base(str(base))


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": "\\ud800"}', "Unicode"),
        ('{"\\uDFFF": 1}', "Unicode"),
        ('{"a": [{"b": "x\\udc00y"}]}', "Unicode"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"x": {"a": 1, "a": null}}', "'a' stands twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_json_that_readers_take_in_different_ways_is_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_object(path)


def test_json_that_is_meant(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": "\\ud83d\\ude00", "b": 1, "b": 1}')  # a whole pair; twice the same
    assert find_object(path) == {"a": "😀", "b": 1}


def test_a_safetensors_header_with_two_tensors_of_a_name(make_checkpoint):
    path = make_checkpoint() / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + n].decode()
    entry = '"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
    header = "{" + entry + header[1:]
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + n :])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' stands twice"):
        read_header(path)


# Numbers


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 2_000_000_000, "not believed"),
        ("vocab_size", 2_000_000_000, "not believed"),
        ("hidden_size", 1 << 30, "not believed"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("rms_norm_eps", -1, "rms_norm_eps is -1"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0"),
        ("rms_norm_eps", 1e999, "rms_norm_eps is inf"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no'"),
        ("attention_bias", 1, "attention_bias is 1"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2, "beta_fast": "fast"}, "beta_fast"),
        ("rope_scaling", {"rope_type": "yarn", "factor": "two"}, "factor"),
        (
            "rope_scaling",
            {"rope_type": "yarn", "factor": 2, "attention_factor": 1e999},
            "attention",
        ),
    ],
)
def test_nonsense_in_a_config_is_one_sentence(field, value, message):
    with pytest.raises(CheckpointError, match=message) as e:
        parse_config(TINY | {field: value})
    assert "\n" not in str(e.value)


def test_a_model_type_that_contradicts_the_architecture():
    with pytest.raises(UnsupportedError, match="model_type is 'mistral'"):
        parse_config(TINY | {"model_type": "mistral"})
    parse_config({k: v for k, v in TINY.items() if k != "model_type"})


@pytest.mark.parametrize("where", ["architectures", "hidden_act", "model_type"])
def test_a_config_cannot_paint_the_terminal(run, make_checkpoint, tmp_path, where):
    evil = "\x1b[2J\x1b[31mAll is well\x07"
    value = [evil] if where == "architectures" else evil
    base = make_checkpoint()
    (base / "config.json").write_text(json.dumps(TINY | {where: value}))
    code, out, err = run("gguf", base, "-o", tmp_path / "o")
    assert code == 3
    assert "\x1b" not in out + err and "\x07" not in out + err


def test_a_card_cannot_paint_the_terminal(run, make_checkpoint):
    base = make_checkpoint()
    (base / "README.md").write_text('---\nlicense: "\\amine"\n---\n')
    code, out, err = run("inspect", base)
    assert code == 0 and "mine" in out
    # A bell: click takes colours out by itself where nobody watches.
    assert "\x07" not in out + err


# Vocabularies


def pieces(n: int) -> bytes:
    """A SentencePiece BPE model of n pieces of one byte."""
    return piece(b"a", 0.0, 1) * n + b"\x12\x02\x18\x02"


def test_a_million_pieces_of_one_byte(run, make_checkpoint, tmp_path):
    base = make_checkpoint()
    (base / "tokenizer.model").write_bytes(pieces(1_000_000))
    start = time.process_time()
    code, _, err = run("gguf", base, "-o", tmp_path / "o")
    assert code == 3 and "more than 4096 tokens" in err and len(err.splitlines()) == 1
    assert time.process_time() - start < 2
    # Nor where the vocabulary is as large as any.
    start = time.process_time()
    with pytest.raises(CheckpointError, match="more than 524288 tokens"):
        read_vocab(base, 1 << 19)
    assert time.process_time() - start < 8


def test_the_largest_vocabulary_is_read_in_seconds(tmp_path):
    """All pieces are user-defined, each of which is looked at for pairs that form it."""
    n = 500_000
    own = b"".join(piece(f"<0x{i:02X}>".encode(), 0.0, 6) for i in range(256))
    own += b"".join(piece(f"a{i}".encode(), 0.0, 4) for i in range(n))
    (tmp_path / "tokenizer.model").write_bytes(own + b"\x12\x02\x18\x02")
    start = time.process_time()
    assert len(read_vocab(tmp_path, 1 << 19).tokens) == 1 << 19
    assert time.process_time() - start < 15


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_300_000_added_tokens(run, make_checkpoint, tmp_path, where):
    base = make_checkpoint()
    (base / "tokenizer.model").unlink()
    raw = json.loads((base / where).read_text()) if (base / where).exists() else {}
    entries = {4096 + i: f"<{i}>" for i in range(300_000)}
    if where == "tokenizer.json":
        raw["added_tokens"] += [{"id": i, "content": text} for i, text in entries.items()]
    elif where == "tokenizer_config.json":
        raw["added_tokens_decoder"] = {str(i): {"content": t} for i, t in entries.items()}
    else:
        raw = {text: i for i, text in entries.items()}
    if where != "tokenizer.json":  # what is read beside a tokenizer.model
        (base / "tokenizer.model").write_bytes((model_dir() / "tokenizer.model").read_bytes())
    (base / where).write_text(json.dumps(raw))
    start = time.process_time()
    code, _, err = run("gguf", base, "-o", tmp_path / "o")
    assert code == 3 and "no row in the model's embedding" in err
    assert len(err.splitlines()) == 1
    assert time.process_time() - start < 8


@pytest.mark.parametrize("size", [2_000_000_000, 500_000])
def test_a_vocabulary_larger_than_the_embedding_is_refused_at_once(
    run, make_checkpoint, tmp_path, size, monkeypatch
):
    base = make_checkpoint(shards=2)
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"vocab_size": size}))

    def built(*_):
        raise AssertionError("a vocabulary was built")

    monkeypatch.setattr("dus_edge.jobs.export.gguf.read_vocab", built)
    code, _, err = run("gguf", base, "-o", tmp_path / "o")
    assert code == 3 and len(err.splitlines()) == 1
    assert ("not believed" if size > 1 << 19 else "has shape [4096, 64]") in err


def test_a_token_of_a_million_letters(tmp_path):
    """Every place where it could be cut was looked at, each at the cost of its length."""
    long = "a" * 1_000_000
    files = dict(sentencepiece().files)
    files["tokenizer.model"] += piece(long.encode(), 0.0, 4)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    start = time.process_time()
    assert read_vocab(tmp_path, 300).tokens[261] == "<y>"  # by added_tokens.json, over it
    assert time.process_time() - start < 2


# Chat templates


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** 9 ** 9 }}",
        "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
        "{{ 'a' * 2000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
    ids=["loops", "powers", "doubled", "long", "list", "recursion"],
)
def test_a_template_without_end_is_an_unknown_format(run, make_checkpoint, tmp_path, template):
    base = make_checkpoint()
    (base / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    code, _, err = run("gguf", base, "-q", "q8_0", "-o", tmp_path / "out")
    assert code == 0, err
    assert time.monotonic() - start < 30
    text = next((tmp_path / "out").glob("*.Modelfile")).read_text()
    assert "nknown" in text


def test_a_template_may_not_take_our_memory():
    """What the limits are for: the parent's own memory does not grow with a doubled string."""
    from dus_edge.text.jinja import render_apart

    talk = [{"role": "user", "content": "x"}]
    assert render_apart("{{ messages[0].content }}!", [talk, talk], {}) == ["x!", "x!"]
    assert render_apart("{{ 'a' * 3000000000 }}", [talk], {}) in (None, [None])
    assert render_apart("{{ 'a' * 50000000 }}", [talk], {}) is None  # more text than any prompt
