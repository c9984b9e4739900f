"""What other commands say of an MLX folder: verify reads it whole, the rest says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dus_edge.checkpoint.names import CONFIG, INDEX, SINGLE
from dus_edge.errors import CheckpointError, UnsupportedError
from dus_edge.jobs.export.mlx import export_mlx
from dus_edge.quant.mlx.format import MLXSettings
from dus_edge.upscale.model import plan_chooser
from dus_edge.verify.folder import verify_folder

UP_SCALED = plan_chooser(None, None, (), True)
DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture
def folder(make_checkpoint, tmp_path) -> Path:
    base = make_checkpoint(dtype="F32", vocab_size=128)
    export_mlx(str(base), UP_SCALED, tmp_path / "mlx", MLXSettings(3, 32))
    return tmp_path / "mlx"


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "mlx"})


def test_a_folder_is_sound(run, folder):
    code, out, _ = run("verify", folder)
    assert code == 0 and out.startswith("sound: ")
    found = verify_folder(folder)
    n_matrices = 6 * 7 + 2
    assert found["kind"] == "MLX"
    assert found["n_tensors"] == 3 * n_matrices + 6 * 2 + 1


def test_a_folder_with_settings_of_its_own_for_a_layer(folder, make_checkpoint, tmp_path):
    """mlx-lm's mixed recipes say them under the layer's name; what has no scales is plain."""
    export_mlx(str(tmp_path / "base"), UP_SCALED, tmp_path / "other", MLXSettings(6, 32))
    other = load_file(tmp_path / "other" / SINGLE)

    def mix(tensors):
        for part in ("weight", "scales", "biases"):
            tensors[f"{DOWN}.{part}"] = other[f"{DOWN}.{part}"]
        for part in ("scales", "biases"):
            del tensors[f"lm_head.{part}"]
        tensors["lm_head.weight"] = np.zeros((128, 64), np.float32)

    change_tensors(folder, mix)
    with pytest.raises(CheckpointError, match=rf"{DOWN}.weight is U32 \[64, 18\], but config.json"):
        verify_folder(folder)
    own = {DOWN: {"bits": 6, "group_size": 32}, "lm_head": False}
    change_config(folder, quantization={"bits": 3, "group_size": 32, "mode": "affine"} | own)
    assert verify_folder(folder)["kind"] == "MLX"


def spoil_scale(tensors) -> None:
    tensors[f"{DOWN}.scales"][5, 1] = np.nan


def take_biases(tensors) -> None:
    del tensors[f"{DOWN}.biases"]


def add_layer(tensors) -> None:
    tensors["model.layers.6.input_layernorm.weight"] = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil_scale, rf"{DOWN}.scales\[5, 1\] is NaN or infinite"),
        (take_biases, f"{DOWN}.biases is missing"),
        (add_layer, "model.layers.6.input_layernorm.weight has no place in a LlamaForCausalLM"),
    ],
)
def test_damage_is_named(run, folder, change, message):
    change_tensors(folder, change)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=message):
        verify_folder(folder)
    assert run("verify", folder)[0] == 3


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"bits": 4, "group_size": 32}, CheckpointError, "weight is U32 .*, but config.json means"),
        ({"bits": 3, "group_size": 128}, CheckpointError, "groups of 128 do not divide the 64"),
        ({"bits": 7, "group_size": 32}, CheckpointError, "MLX has no 7-bit codes"),
        ({"bits": "3"}, CheckpointError, "bits and group_size of quantization are '3' and None"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, UnsupportedError, "MLX's mode 'mxfp4'"),
    ],
)
def test_a_config_that_lies_is_named(folder, settings, kind, message):
    change_config(folder, quantization=settings)
    with pytest.raises(kind, match=message):
        verify_folder(folder)


def test_what_others_say_of_it(run, folder, tmp_path):
    """One sentence each, and what to do."""
    for words, message in (
        (("gguf", folder, "-o", tmp_path / "out"), r"already quantized (MLX); start from the bf16"),
        (("fit", folder), "MLX models are not predicted, for no run of one is among the published"),
        (("fit", "pico", "-q", "mlx-4bit"), "mlx-4bit: memory and speed of MLX models are not"),
        (("quality", folder, folder), "quantized by 'MLX'; plain, gptq and bitsandbytes"),
    ):
        code, _, err = run(*words)
        said = [line for line in err.splitlines() if not line.startswith("Quantizing")]
        assert code in (2, 3) and len(said) == 1 and message in said[0], words
    assert not (tmp_path / "out").exists()
    # Old folders say it by one key only.
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]
    (folder / CONFIG).write_text(json.dumps(config))
    code, _, err = run("gguf", folder, "-o", tmp_path / "out")
    assert code == 3 and "already quantized (MLX)" in err
