"""`fit`, `devices`, `bench predict` and `bench run` as a person or a program calls them."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.predict.memory.llama import PLATFORMS
from dus_edge.quant.recipe import PRESETS
from dus_edge.tables.predicted import solar_config
from dus_edge.upscale.model import plan_chooser

SOLAR = dict(solar_config().raw)
SPEEDS = [f"{kind}_tokens_per_s{end}" for kind in ("tg", "pp") for end in ("", "_low", "_high")]


@pytest.fixture
def solar(tmp_path: Path) -> Path:
    folder = tmp_path / "SOLAR-10.7B-v1.0"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SOLAR))
    return folder


def predicted(run, *args) -> dict:
    code, out, err = run("bench", "predict", *args, "--json")
    assert code == 0, err
    return json.loads(out)


def test_predict_json(run, solar):
    found = predicted(run, solar, "--quant", "q4_k_m", "--device", "rtx-4090")
    assert found["fits"] is True
    assert found["device"] == "rtx-4090"
    assert found["context"] == 4096
    memory = found["memory"]
    parts = ("weights_bytes", "kv_cache_bytes", "compute_buffer_bytes", "overhead_bytes")
    assert sum(memory[p] for p in parts) == memory["total_bytes"] <= memory["usable_bytes"]
    # 48 layers × 4,096 tokens × (8 heads × 128) × keys and values × 2 bytes
    assert memory["kv_cache_bytes"] == 48 * 4096 * 1024 * 2 * 2
    for kind in ("tg", "pp"):
        low, middle, high = (found[f"{kind}_tokens_per_s{e}"] for e in ("_low", "", "_high"))
        assert 0 < low < middle < high


def test_a_card_that_is_too_small_says_how_many_layers(run, solar):
    found = predicted(run, solar, "--quant", "f16", "--device", "rtx-3060-12gb")
    assert found["fits"] is False
    assert 0 < found["offloaded_layers"] < 49
    whole = predicted(run, solar, "--quant", "q4_k_m", "--device", "rtx-3060-12gb")
    assert found["tg_tokens_per_s"] < whole["tg_tokens_per_s"]
    assert found["best_preset"] in PRESETS


def test_depth_era_and_flash_attention_count(run, solar):
    args = (solar, "--device", "rtx-3090")
    base = predicted(run, *args)
    deep = predicted(run, *args, "--depth", "4000")
    old = predicted(run, *args, "--era", "2023")
    assert deep["tg_tokens_per_s"] < base["tg_tokens_per_s"]
    assert old["pp_tokens_per_s"] < base["pp_tokens_per_s"]
    plain = predicted(run, *args, "--no-flash-attn")
    assert plain["memory"]["compute_buffer_bytes"] > base["memory"]["compute_buffer_bytes"]


def test_a_file_is_what_its_config_and_preset_are(run, tmp_path):
    choose = plan_chooser(None, None, (), False)
    result = export_gguf("pico", choose, [PRESETS["q4_k_m"]], tmp_path)
    file = predicted(run, result.outputs[0].path, "--device", "m1-8c")
    config = predicted(run, "pico", "--device", "m1-8c")
    for key in ("memory", "fits", "context", *SPEEDS):
        assert file[key] == config[key], key


def test_a_plan_up_scales_first(run, solar):
    base = json.loads((solar / "config.json").read_text()) | {"num_hidden_layers": 32}
    small = solar.with_name("base")
    small.mkdir()
    (small / "config.json").write_text(json.dumps(base))
    args = ("--quant", "q4_k_m", "--device", "rtx-4090")
    assert (
        predicted(run, small, *args, "--drop", "8")["memory"]
        == (predicted(run, solar, *args)["memory"])
    )
    assert (
        predicted(run, small, *args)["memory"]["weights_bytes"]
        < (predicted(run, solar, *args)["memory"]["weights_bytes"])
    )


def test_what_people_read(run, solar):
    for args in (
        ("devices",),
        ("fit", solar, "--device", "rtx-4060"),
        ("fit", solar),
        ("bench", "predict", solar, "--device", "m1-8c"),
    ):
        code, out, err = run(*args)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 80, args
    code, out, _ = run("fit", solar, "--quant", "q4_k_m")
    assert "rtx-4090" in out


def test_the_present_machine(run, solar):
    code, out, err = run("fit", solar, "--device", "auto", "--json")
    assert code == 0, err
    assert json.loads(out)["memory"]["usable_bytes"] > 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--device", "rtx-4091"), "rtx-4090"),
        (("--device", "rtx-4090", "--ctx", "0"), "at least 1"),
        (("--device", "rtx-4090", "--ctx", "4294967296"), "2,147,483,648"),
        (("--device", "rtx-4090", "--ctx", "-1"), "-1"),
        (("--device", "rtx-4090", "--batch", "-5"), "-5"),
        (("--device", "rtx-4090", "--quant", "q4_z"), "q4_z"),
        (("--device", "rtx-4090", "--memory", "7"), "24 GB"),
        (("--device", "rtx-4090", "--kv-type", "q3"), "q3"),
        (("--device", "rtx-4090", "--platform", "amiga"), "amiga"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_bad_values_are_one_sentence(run, solar, args, said):
    for command in (("fit",), ("bench", "predict")):
        code, _, err = run(*command, solar, *args)
        assert code == 2
        assert said in err
        assert err.strip().count("\n") == 0


def test_beyond_the_models_context_is_a_warning(run, solar):
    for args in (("--ctx", "8192"), ("--depth", "8000")):
        found = predicted(run, solar, "--device", "rtx-4090", *args)
        assert "made for 4,096 tokens" in found["context_warning"]
        assert found["tg_tokens_per_s"]
        _, out, _ = run("bench", "predict", solar, "--device", "rtx-4090", *args)
        assert "Warning: " in out and max(map(len, out.splitlines())) <= 80
    assert predicted(run, solar, "--device", "rtx-4090")["context_warning"] is None
    for device in ((), ("--device", "rtx-4090")):
        code, out, _ = run("fit", solar, "--ctx", "8192", *device)
        assert code == 0 and "made for 4,096 tokens" in " ".join(out.split())
        found = json.loads(run("fit", solar, "--ctx", "8192", *device, "--json")[1])
        assert "4,096" in (found if device else found[0])["context_warning"]
    code, _, err = run("bench", "predict", solar, "--device", "rtx-4090", "--depth", "3000000000")
    assert code == 2 and "2,147,483,648" in err


def test_damaged_models_are_one_sentence(run, solar, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"not a model at all")
    broken = {k: v for k, v in SOLAR.items() if k != "hidden_size"}
    (solar / "config.json").write_text(json.dumps(broken))
    for path, said in ((tmp_path / "no.gguf", "no.gguf"), (solar, "hidden_size")):
        code, _, err = run("bench", "predict", path, "--device", "rtx-4090")
        assert code == 3
        assert said in err


def test_measuring_here(run, tmp_path):
    choose = plan_chooser(None, None, (), False)
    path = export_gguf("pico", choose, [PRESETS["q4_0"]], tmp_path).outputs[0].path
    code, out, err = run("bench", "run", path, "-p", "16", "-n", "8", "-r", "2", "--json")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(x["n_prompt"], x["n_gen"]) for x in lines] == [(16, 0), (0, 8)]
    assert all(x["avg_ts"] > 0 and len(x["samples_ns"]) == 2 for x in lines)


def test_ollama_that_does_not_run(run, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    code, _, err = run("bench", "run", "--ollama", "solar-dus")
    assert code != 0
    assert "ollama serve" in err


@pytest.mark.parametrize("command", [("fit",), ("bench", "predict")])
def test_help_names_the_platforms_that_there_are(run, command):
    _, out, _ = run(*command, "--help")
    said = re.search(r"--platform NAME\s+System: (.*?)\.\s+\[default", out, re.DOTALL)[1]
    assert re.split(r",\s+|\s+or\s+", said.strip()) == list(PLATFORMS)
