"""Memory and speed of a model on a device that is not here: both predictions as one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dus_edge.errors import UsageError
from dus_edge.predict.devices import Device, find_device, recognise
from dus_edge.predict.fit import Verdict, best_preset, devices_that_run, judge, settings_on
from dus_edge.predict.memory.llama import check_context, context_warning
from dus_edge.predict.processors import CPU_PREFIX, find_processor
from dus_edge.predict.speed.cpu import host_gbps, predict_cpu
from dus_edge.predict.speed.device import device_speed
from dus_edge.predict.speed.predict import PredictedSpeed, predict
from dus_edge.predict.speed.work import work_of
from dus_edge.predict.stored_model import RunSettings, StoredModel, kv_types
from dus_edge.words import whole_number

#: Context that fit is judged at unless asked otherwise; or the model's own, if that is shorter.
CONTEXT = 4096
#: Slots of llama-server unless `-np` says otherwise; they share one context. Ollama asks for one.
LLAMA_SERVER_SLOTS = 4
#: What `--outputs` takes for all tokens of a ubatch.
ALL_OUTPUTS = "all"


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
        parallel: sequences of that context that memory was judged for; speed is of one alone.
    """

    name: str
    verdict: Verdict
    context: int
    speed: PredictedSpeed | None
    best_preset: str | None
    why_no_speed: str | None = None
    parallel: int = 1


@dataclass(frozen=True)
class StorableModel:
    """A model as it would be stored, and by every preset where that is a choice."""

    model: StoredModel
    presets: dict[str, StoredModel]


def choose_device(name: str) -> Device:
    """The device of an id, a processor alone by its spelling; ``auto`` is the present machine."""
    if name.strip().lower().startswith(CPU_PREFIX):
        return find_processor(name)
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
    parallel: int | None = None,
    outputs: str | int | None = None,
) -> RunSettings:
    """How a model is run; the context is by default 4,096 or the model's own if that is shorter.

    Args:
        model: its own context is looked at.
        context: tokens that each sequence has.
        parallel: sequences at once, each with its own context; none given: one.
        outputs: tokens whose logits are kept, or `ALL_OUTPUTS`; none given: one for each of
            `parallel`, and where that is not given either, for each of llama-server's own slots.

    Raises:
        UsageError: a number or type that cannot be.
    """
    type_k, type_v = kv_types(kv_type, flash_attn)
    return RunSettings(
        context=min(CONTEXT, model.context_length) if context is None else context,
        batch=batch,
        ubatch=ubatch,
        type_k=type_k,
        type_v=type_v,
        flash_attn=flash_attn,
        era=era,
        n_parallel=1 if parallel is None else parallel,
        n_outputs=_n_outputs(outputs, parallel),
    )


def _n_outputs(outputs: str | int | None, parallel: int | None) -> int | None:
    if outputs is None:
        return LLAMA_SERVER_SLOTS if parallel is None else parallel
    if outputs == ALL_OUTPUTS:
        return None
    number = whole_number(str(outputs))
    if number is None:
        raise UsageError(f"--outputs is {outputs!r}; a number or {ALL_OUTPUTS} is needed.")
    return number


def predict_on(
    candidate: StorableModel,
    device: Device,
    settings: RunSettings,
    *,
    depth: int = 0,
    n_prompt: int = 512,
    platform: str | None = None,
    memory_gb: float | None = None,
    host: Device | None = None,
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
        host: processor that runs what does not fit, see `find_processor`; None means a usual one.

    Raises:
        UsageError: a context or depth that cannot be, a size that the device is not made with.
    """
    model = candidate.model
    if depth:
        check_context(depth)
    verdict = judge(model, device, settings, platform=platform, memory_gb=memory_gb)
    warning = context_warning(model, max(depth, settings.context))
    verdict = replace(verdict, context_warning=warning)
    settings = settings_on(device, settings)
    best = best_preset(candidate.presets, settings, verdict.usable_bytes)
    speed, why = None, None
    if model.torch is not None and not verdict.fits:
        why = "it does not fit whole, and parts left on the CPU are predicted for GGUF files only."
    elif not verdict.offloaded_layers:
        why = "no layer fits on the device."
    else:
        layers = None if verdict.fits else verdict.offloaded_layers
        try:
            speed = _speed(model, device, settings, depth, n_prompt, layers, host)
        except UsageError as e:
            why = str(e)
    return Prediction(model.name, verdict, settings.context, speed, best, why, settings.n_parallel)


def _speed(
    model: StoredModel,
    device: Device,
    settings: RunSettings,
    depth: int,
    n_prompt: int,
    offloaded_layers: int | None,
    host: Device | None,
) -> PredictedSpeed:
    work = work_of(model, settings)
    if device.backend == "CPU" and model.torch is None:
        return predict_cpu(device, work, depth=depth, n_prompt=n_prompt)
    return predict(
        device_speed(device),
        work,
        depth=depth,
        n_prompt=n_prompt,
        era=settings.era,
        flash_attn=settings.flash_attn,
        offloaded_layers=offloaded_layers,
        host_gbps=host_gbps(host) if host else None,
    )


def where_it_runs(
    candidate: StorableModel, settings: RunSettings, platform: str | None = None
) -> list[Verdict]:
    """Every device, in every memory size, that holds the whole model."""
    return devices_that_run(candidate.model, settings, platform=platform)
