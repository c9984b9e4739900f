"""What a person sees and types."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dus_edge.cli.main import COMMANDS
from dus_edge.cli.main import cli as cli_group

ROOT = Path(__file__).parent.parent

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def mistral(tmp_path) -> Path:
    """Mistral-7B-v0.1's configuration, without a weight."""
    folder = tmp_path / "Mistral-7B-v0.1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MISTRAL_7B))
    return folder


def test_help_is_instant():
    """Nothing heavy is imported for it; the time itself is in benchmarks/README.md."""
    code = (
        "import sys\nsys.argv = ['dus-edge', '--help']\n"
        "from dus_edge.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'numba', 'gguf', 'huggingface_hub', 'rich', 'torch', 'jinja2',\n"
        "         'sentencepiece'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in COMMANDS:
        assert command in run.stdout


def commands() -> list[tuple[str, click.Command]]:
    """All commands and those of groups, by what is typed."""
    found = []
    for name in COMMANDS:
        command = cli_group.get_command(click.Context(cli_group), name)
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {inner}", c) for inner, c in command.commands.items()]
    return found


@pytest.mark.parametrize(("name", "command"), commands())
def test_help_is_short_sentences_of_80_columns(name, command):
    context = click.Context(command, info_name=f"dus-edge {name}", max_content_width=80)
    assert max(map(len, command.get_help(context).splitlines())) <= 80
    assert command.help[0].isupper() and command.help.split("\n")[0][-1] in ".?"
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        text, _, default = (option.help or "").partition(" [default: ")
        assert text[:1].isupper() and text.endswith("."), (option.name, text)
        assert not text.startswith("Of "), text
        assert not default or default.endswith("]"), option.name


def test_the_list_says_of_each_command_what_it_says_itself():
    for name, (_, sentence) in COMMANDS.items():
        command = cli_group.get_command(click.Context(cli_group), name)
        assert command.name == name
        assert command.get_short_help_str(200) == sentence


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_shells_script(run, shell):
    code, script, _ = run("completion", shell)
    assert code == 0 and f"_DUS_EDGE_COMPLETE={shell}_complete" in script
    if shell == "bash" and shutil.which("bash"):
        read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize(
    ("typed", "word"), [("gg", "gguf"), ("bench pre", "predict"), ("gguf --over", "--overwrite")]
)
def test_words_are_completed(cli, typed, word):
    asked = {"COMP_WORDS": f"dus-edge {typed}", "COMP_CWORD": str(len(typed.split()))}
    run = cli(env=os.environ | asked | {"_DUS_EDGE_COMPLETE": "bash_complete"})
    assert run.stdout.splitlines() == [f"plain,{word}"]


def test_inspect_needs_only_the_config(cli, mistral):
    run = cli("inspect", mistral, "--drop", "8")
    assert run.returncode == 0, run.stderr
    assert "10.73 B" in run.stdout
    assert "32 → 48" in run.stdout
    assert "0:24,8:32, m = 8" in run.stdout
    assert "layer 23 (source 23) meets layer 24 (source 8)" in run.stdout
    assert "sliding window of 4,096" in run.stdout
    assert "Licence       unknown" in run.stdout
    for preset in ("q4_k_m", "q8_0", "f16"):
        assert preset in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_inspect_json(cli, mistral):
    found = json.loads(cli("inspect", mistral, "--json").stdout)
    assert found["n_parameters"] == 10_731_524_096
    assert found["n_layers"] == 48
    assert found["drop"] == 8
    assert found["seams"] == [[24, 23, 8]]
    # The published SOLAR-10.7B GGUFs: 6.46 GB for Q4_K_M, 11.40 GB for Q8_0, 21.46 GB for F16.
    sizes = {k: round(v / 1e9, 2) for k, v in found["file_bytes"].items()}
    assert (sizes["q4_k_m"], sizes["q8_0"], sizes["f16"]) == (6.46, 11.4, 21.46)


def test_inspect_predicts_what_gguf_writes(cli, tmp_path):
    sizes = json.loads(cli("inspect", "pico", "--json").stdout)
    assert sizes["file_bytes_exact"]
    run = cli("gguf", "pico", "-q", "q5_k_m", "-q", "f16", "-o", tmp_path, "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    for output in result["outputs"]:
        assert Path(output["path"]).stat().st_size == output["bytes"]
        assert sizes["file_bytes"][output["preset"]] == output["bytes"]


def test_gguf_writes_its_modelfile(cli, tmp_path):
    from dus_edge.ollama.grammar import parse_modelfile, resolve_from

    run = cli("gguf", "pico", "-q", "q4_0", "-o", tmp_path)
    assert run.returncode == 0, run.stderr
    path = next(tmp_path.glob("*.Modelfile"))
    told = run.stdout.partition("Next:\n")[2].splitlines()
    assert told[0].startswith("  ollama create ") and told[0].endswith(f"-f {path}")
    assert told[1].startswith("  dus-edge serve ") and told[2].startswith("  lms import ")
    commands = parse_modelfile(path.read_text())
    values = {(c.name.lower(), c.key): c.value for c in commands}
    assert resolve_from(path, values["from", None]) == next(tmp_path.glob("*.gguf"))
    assert values["parameter", "num_ctx"] == 512
    assert ("template", None) in values


def test_modelfile_of_a_gguf(cli, tmp_path):
    assert cli("gguf", "pico", "-q", "q4_0", "-o", tmp_path).returncode == 0
    gguf, beside = next(tmp_path.glob("*.gguf")), next(tmp_path.glob("*.Modelfile"))
    run = cli("modelfile", gguf, "-o", tmp_path / "again" / "pico")
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "again" / "pico").read_text()
    assert f"FROM ../{gguf.name}" in text
    assert text.replace("../", "./") == beside.read_text()
    assert cli("modelfile", gguf, "-o", tmp_path / "again" / "pico").returncode == 4
    assert cli("modelfile", tmp_path / "none.gguf").returncode == 3


def test_verbose_counts_the_types(cli, tmp_path):
    run = cli("gguf", "pico", "-q", "q8_0", "-o", tmp_path, "-v")
    assert "tensors: 85 Q8_0, 25 F32" in run.stdout
    run = cli("upscale", "pico", "-o", tmp_path / "up", "-v")
    assert "tensors: 110 BF16" in run.stdout


@pytest.mark.parametrize("quantizer", ["native", "ggml"])
def test_quantizer_is_named(cli, tmp_path, quantizer):
    run = cli("gguf", "pico", "-q", "q8_0", "-o", tmp_path, "--quantizer", quantizer, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["quantizer"] == quantizer


def test_errors_in_full(cli, tmp_path):
    run = cli("gguf", tmp_path / "none", "-v")
    assert run.returncode == 2
    assert "Traceback" in run.stderr
    assert run.stderr.splitlines()[-1].startswith("dus-edge: ")


def test_plain_progress_has_rate_and_time(cli, tmp_path):
    run = cli("gguf", "pico", "-q", "q8_0", "-o", tmp_path)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("Quantizing: 100%")
    assert "M weights/s" in last
    assert re.search(r"took \d+:\d\d", last)


def test_make_alone_lists_the_targets():
    # Under `make test` this is a make within a make, which would announce its folder.
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, env=plain)
    assert run.returncode == 0
    for target in ("gguf", "modelfiles", "upscale", "test", "lint", "bench", "clean"):
        assert f"make {target}" in run.stdout
    assert "QUANTIZER=native" in run.stdout
    said = [
        re.split(r"^  (?:make )?\S+ +", line)[1]
        for line in run.stdout.splitlines()
        if line[0] == " "
    ]
    assert all(text[0].isupper() and text[-1] == "." for text in said), said
    assert max(map(len, run.stdout.splitlines())) <= 80
