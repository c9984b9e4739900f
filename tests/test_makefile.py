"""What a person sets for make reaches the program as it is: spaces, quotes, dollars, semicolons."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Prints its words, each ended by a zero byte.
FAKE = """#!/bin/sh
printf '%s\\0' "$@"
"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def made(tmp_path):
    """What `dus-edge` is called with, by a copy of the Makefile in a set-up folder."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("dus-edge", "python"):
        (binaries / name).write_text(FAKE)
        (binaries / name).chmod(0o755)
    for stamp in ("run", "hf", "plots", "train", "llama", "serve", "test"):
        (tmp_path / ".venv" / f"{stamp}.stamp").touch()

    def make(*words: str, **environment: str) -> list[str]:
        done = subprocess.run(
            ["make", "-s", *words], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\0")[:-1]

    return make


NASTY = [
    "a b", "it's", 'say "so"', "$HOME", "$(touch x)", "`touch x`", "a;touch x", "a&&touch x",
    "-q", "--help", "*", "한국어 폴더", "a\\b", "a#b", "%", "~", "$$",
]  # fmt: skip


@pytest.mark.parametrize("target", ["gguf", "upscale", "gptq", "imatrix", "seam", "bench"])
def test_a_base_of_any_name_is_one_word(made, tmp_path, target):
    for value in NASTY:
        for words in (made(target, f"BASE={value}"), made(target, BASE=value)):
            assert words[-2:] == ["--", value]
    assert not (tmp_path / "x").exists()


def test_every_variable_is_one_word(made, tmp_path):
    for value in NASTY:
        words = made("gguf", f"QUANT={value}", f"OUT={value}", f"DROP={value}", f"IMATRIX={value}",
                     f"QUANTIZER={value}")  # fmt: skip
        for option in ("-q", "-o", "--drop", "--imatrix", "--quantizer"):
            assert words[words.index(option) + 1] == value, option
        words = made("gptq", f"BITS={value}", f"GROUP={value}")
        assert words[words.index("--bits") + 1] == words[words.index("--group-size") + 1] == value
    assert not (tmp_path / "x").exists()


def test_a_mix_takes_the_place_of_the_preset(made, tmp_path):
    for value in NASTY:
        for name in ("FIT", "LIKE"):
            words = made("gguf", f"{name}={value}", "QUANT=not this", "TEXT=a")
            assert words[words.index(f"--{name.lower()}") + 1] == value
            assert "not this" not in words and words[words.index("--text") + 1] == "a"
    assert not (tmp_path / "x").exists()


def test_feedback_reads_the_text(made):
    words = made("gguf", "FEEDBACK=1", "TEXT=a")
    assert "--feedback" in words and words[words.index("--text") + 1] == "a"
    assert "--feedback" not in made("gguf", "TEXT=a")


@pytest.mark.parametrize("target", ["sft", "dpo"])
def test_model_and_data_are_one_word(made, tmp_path, target):
    for value in NASTY:
        words = made(target, f"MODEL={value}", f"DATA={value}", f"OUT={value}")
        assert words[0] == target and words[-2:] == ["--", value]
        assert words[words.index("--data") + 1] == value
        assert words[words.index("-o") + 1] == f"{value}/{target}"
    assert not (tmp_path / "x").exists()


def test_a_model_to_talk_with_is_one_word(made, tmp_path):
    for value in NASTY:
        words = made("serve", f"FILE={value}", f"PORT={value}")
        assert words == ["serve", "--port", value, "--", value]
    assert made("chat", "FILE=a b") == ["chat", "--", "a b"]
    assert made("chat", "OUT=$HOME `x`")[-1] == "$HOME `x`/solar-dus-q4_k_m.gguf"
    assert made("chat", "QUANT=q4_0,q8_0")[-1] == "build/solar-dus-q8_0.gguf"
    assert not (tmp_path / "x").exists()


def test_texts_are_several_words_or_one_path(made, tmp_path):
    assert "--text" not in made("imatrix")
    words = made("imatrix", "TEXT=a b*")
    assert words[: words.index("-o")][1:] == ["--text", "a", "--text", "b*"]
    folder = tmp_path / "my texts"
    folder.mkdir()
    words = made("imatrix", f"TEXT={folder}")
    assert words[1:3] == ["--text", str(folder)]
    # Without an importance matrix nothing is calibrated, so no text is asked for.
    assert "--text" not in made("gguf", "TEXT=a")
    assert "--text" in made("gguf", "TEXT=a", "IMATRIX=auto")


def test_presets_by_commas(run, tmp_path):
    assert run("gguf", "pico", "-q", "q8_0,q4_0", "-o", tmp_path)[0] == 0
    assert len(list(tmp_path.glob("*.gguf"))) == 2
    code, _, err = run("gguf", "pico", "-q", "q4_k_m;touch x", "-o", tmp_path)
    assert code == 2 and "There is no preset 'q4_k_m;touch x'" in err
