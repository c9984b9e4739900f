"""The jobs that predict: find a model, as it would be stored, by what a person calls it."""

from __future__ import annotations

from pathlib import Path

from dus_edge.checkpoint.config import load_config
from dus_edge.checkpoint.gguf.source import gguf_path, refuse_gguf
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.errors import UsageError
from dus_edge.predict.fit import models_of_presets
from dus_edge.predict.memory.folder import (
    TorchPreset,
    is_quantized_folder,
    model_of_preset,
    models_of_torch_presets,
    read_folder,
)
from dus_edge.predict.memory.llama import model_of_config, read_gguf
from dus_edge.predict.prediction import StorableModel
from dus_edge.quant.recipe import Preset, find_preset
from dus_edge.upscale.model import ChoosePlan, Model, Say, find_model


def find_candidate(
    model: str, choose: ChoosePlan, preset: Preset | TorchPreset | None, say: Say
) -> StorableModel:
    """A GGUF file or quantized folder by its headers, or a checkpoint by config and preset.

    Args:
        model: a `.gguf` file, a model of Ollama's, a folder (`config.json` is enough), hub id or
            the built-in base.
        choose: gives the plan for a checkpoint's depth.
        preset: of a checkpoint.
        say: takes lines for the user.

    Raises:
        UsageError: a preset or another depth for what is quantized already.
    """
    if (file := gguf_path(model)) is not None:
        _refuse_preset(model, preset)
        return StorableModel(read_gguf(file), {})

    def check(folder: Path) -> None:
        if not is_quantized_folder(folder):
            choose(load_config(folder / CONFIG).n_layers)

    source = resolve_base(model, weights=False, on_config=check, progress=say)
    if is_quantized_folder(source.folder):
        _refuse_preset(model, preset)
        stored = read_folder(source.folder, source.name)
        if not choose(stored.n_layers).is_identity:
            raise UsageError(
                f"{model} is quantized already; layers are dropped and repeated before that."
            )
        return StorableModel(stored, {})
    config = load_config(source.folder / CONFIG)
    found = Model(source, config, choose(config.n_layers))
    chosen = preset or find_preset("q4_k_m")
    name = f"{found.name.stem}-{chosen.label}"
    if isinstance(chosen, TorchPreset):
        return StorableModel(
            model_of_preset(found.config, chosen, name),
            models_of_torch_presets(found.config, found.name.stem),
        )
    return StorableModel(
        model_of_config(found.config, chosen, name),
        models_of_presets(found.config, found.name.stem),
    )


def find_trained(model: str, choose: ChoosePlan, say: Say) -> Model:
    """A checkpoint that is to be trained, by its configuration alone.

    Args:
        model: a folder (`config.json` is enough), hub id or the built-in base.
        choose: gives the plan for its depth.
        say: takes lines for the user.

    Raises:
        UsageError: a GGUF file, which nothing trains.
    """
    refuse_gguf(model, "Training")
    return find_model(model, choose, weights=False, say=say)


def _refuse_preset(model: str, preset: Preset | TorchPreset | None) -> None:
    if preset is not None:
        raise UsageError(f"{model} is quantized already; --quant is for checkpoints.")
