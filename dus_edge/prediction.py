"""The jobs that predict: memory and speed of a model on a device that is not here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dus_edge.checkpoint.config import load_config
from dus_edge.checkpoint.names import CONFIG
from dus_edge.checkpoint.resolve import resolve_base
from dus_edge.errors import UsageError
from dus_edge.jobs import ChoosePlan, Model, Say
from dus_edge.predict.devices import Device, find_device, recognise
from dus_edge.predict.fit import (
    Verdict,
    best_preset,
    devices_that_run,
    judge,
    models_of_presets,
    settings_on,
)
from dus_edge.predict.memory.folder import (
    TorchPreset,
    find_torch_preset,
    is_quantized_folder,
    is_torch_preset,
    model_of_preset,
    models_of_torch_presets,
    read_folder,
)
from dus_edge.predict.memory.llama import model_of_config, read_gguf
from dus_edge.predict.memory.torch import VALUE_BYTES
from dus_edge.predict.speed.roofline import Speed, Work, device_speed, predict
from dus_edge.predict.stored_model import KV_TYPES, Settings, StoredModel, kv_types
from dus_edge.quant.recipe import Preset, find_preset

#: Context that fit is judged at unless asked otherwise; or the model's own, if that is shorter.
CONTEXT = 4096


@dataclass(frozen=True)
class Prediction:
    """What a model takes and does on a device.

    Attributes:
        name: of the model.
        verdict: memory: does it fit, and how far.
        context: tokens of the context that memory was judged at.
        speed: tokens per second, as many layers on the device as fit; None where no layer does, or
            the device's speed is unknown.
        best_preset: the largest preset that fits whole; None where none does, or for a file.
        why_no_speed: one sentence, where `speed` is None.
    """

    name: str
    verdict: Verdict
    context: int
    speed: Speed | None
    best_preset: str | None
    why_no_speed: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A model as it would be stored, and by every preset where that is a choice."""

    model: StoredModel
    presets: dict[str, StoredModel]


def choose_preset(name: str) -> Preset | TorchPreset:
    """The preset of that name: one of GGUF's, or of those for transformers.

    Raises:
        UsageError: no such preset; the nearest one is suggested.
    """
    return find_torch_preset(name) if is_torch_preset(name) else find_preset(name)


def find_candidate(
    model: str, choose: ChoosePlan, preset: Preset | TorchPreset | None, say: Say
) -> Candidate:
    """A GGUF file or quantized folder by its headers, or a checkpoint by config and preset.

    Args:
        model: a `.gguf` file, folder (`config.json` is enough), hub id or the built-in base.
        choose: gives the plan for a checkpoint's depth.
        preset: of a checkpoint.
        say: takes lines for the user.

    Raises:
        UsageError: a preset or another depth for what is quantized already.
    """
    if model.endswith(".gguf"):
        _refuse_preset(model, preset)
        return Candidate(read_gguf(Path(model)), {})

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
        return Candidate(stored, {})
    config = load_config(source.folder / CONFIG)
    found = Model(source, config, choose(config.n_layers))
    chosen = preset or find_preset("q4_k_m")
    name = f"{found.name.stem}-{chosen.label}"
    if isinstance(chosen, TorchPreset):
        return Candidate(
            model_of_preset(found.config, chosen, name),
            models_of_torch_presets(found.config, found.name.stem),
        )
    return Candidate(
        model_of_config(found.config, chosen, name),
        models_of_presets(found.config, found.name.stem),
    )


def _refuse_preset(model: str, preset: Preset | TorchPreset | None) -> None:
    if preset is not None:
        raise UsageError(f"{model} is quantized already; --quant is for checkpoints.")


def choose_device(name: str) -> Device:
    """The device of an id; ``auto`` is the present machine."""
    return recognise() if name == "auto" else find_device(name)


def memory_settings(
    model: StoredModel,
    *,
    context: int | None = None,
    batch: int = 2048,
    ubatch: int = 512,
    kv_type: str = "f16",
    flash_attn: bool = True,
    era: str = "2025+",
) -> Settings:
    """How a model is run; the context is by default 4,096 or the model's own if that is shorter."""
    type_k, type_v = kv_types(kv_type, flash_attn)
    return Settings(
        context=context or min(CONTEXT, model.context_length),
        batch=batch,
        ubatch=ubatch,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn,
        era=era,
    )


def predict_on(
    candidate: Candidate,
    device: Device,
    settings: Settings,
    *,
    depth: int = 0,
    n_prompt: int = 512,
    platform: str | None = None,
    memory_gb: float | None = None,
) -> Prediction:
    """Memory and speed of a model on one device.

    Args:
        candidate: the model.
        device: the device.
        settings: context, cache and the rest.
        depth: tokens in the cache before the prompt or the token whose speed is predicted.
        n_prompt: tokens of the prompt.
        platform: rule of usable memory; None means the usual one of the device.
        memory_gb: which of its memory sizes; None means the smallest.

    Raises:
        UsageError: a context or depth beyond the model's, a size that the device is not made with.
    """
    model = candidate.model
    if depth > model.context_length:
        raise UsageError(
            f"{model.name} was made for {model.context_length:,} tokens, "
            f"and a depth of {depth:,} is asked for."
        )
    verdict = judge(model, device, settings, platform=platform, memory_gb=memory_gb)
    settings = settings_on(device, settings)
    best = best_preset(candidate.presets, settings, verdict.usable_bytes)
    speed, why = None, None
    if model.torch is not None and not verdict.fits:
        why = "it does not fit whole, and parts left on the CPU are predicted for GGUF files only."
    elif not verdict.offloaded_layers:
        why = "no layer fits on the device."
    else:
        try:
            speed = predict(
                device_speed(device),
                work_of(model, settings),
                depth=depth,
                n_prompt=n_prompt,
                era=settings.era,
                flash_attn=settings.flash_attn,
                offloaded_layers=None if verdict.fits else verdict.offloaded_layers,
            )
        except UsageError as e:
            why = str(e)
    return Prediction(model.name, verdict, settings.context, speed, best, why)


def where_it_runs(
    candidate: Candidate, settings: Settings, platform: str | None = None
) -> list[Verdict]:
    """Every device, in every memory size, that holds the whole model."""
    return devices_that_run(candidate.model, settings, platform=platform)


def work_of(model: StoredModel, settings: Settings) -> Work:
    """What one token costs a model as it is stored."""
    weights: dict[str, float] = {}
    for tensor in model.tensors:
        if tensor.layer is None and tensor is not model.head:
            continue  # the embedding is looked up, norms are nothing
        if tensor.n_rows > 1:
            weights[tensor.kind] = weights.get(tensor.kind, 0) + tensor.n_rows * tensor.n_cols
    if model.torch is not None:
        per_value = float(VALUE_BYTES[model.torch.values])
        return Work(
            model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim, weights, per_value
        )
    per_value = sum(KV_TYPES[t].bits_per_weight for t in (settings.type_k, settings.type_v)) / 16
    return Work(model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim, weights, per_value)
