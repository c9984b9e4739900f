"""Does a model fit a device, and if not, what would: fewer layers, less context, another preset.

Pure functions over `dus_edge.predict.memory.llama`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.predict.devices import Device, load_devices
from dus_edge.predict.memory.cuda import multiprocessors
from dus_edge.predict.memory.folder import TorchPreset, find_torch_preset, is_torch_preset
from dus_edge.predict.memory.llama import (
    check_context,
    context_warning,
    memory_use,
    model_of_config,
    usable_bytes,
    usual_platform,
)
from dus_edge.predict.memory.torch import kernel_note
from dus_edge.predict.stored_model import MemoryUse, RunSettings, StoredModel
from dus_edge.quant.recipe import PRESETS, Preset, find_preset

#: Contexts are answered in these steps: llama.cpp rounds up to them.
CONTEXT_STEP = 256
#: Share of the usable memory within which a verdict may be wrong either way.
UNSURE = 0.03
#: Said of a processor that is not the present one.
WHOLE_MEMORY = "What the system and other programs take of the memory is not subtracted."


@dataclass(frozen=True)
class Verdict:
    """Whether a model runs on a device.

    Attributes:
        device: the device.
        memory_gb: which of its memory sizes.
        platform: which rule of usable memory; None for the present machine.
        fits: whether all of it is on the device.
        offloaded_layers: largest `-ngl` that fits, at most the layers and the output; of a model
            that transformers runs all or none.
        longest_context: longest context with all layers on the device, up to the model's own or
            the one asked for; None if there is none.
        use: memory with all layers on the device.
        usable_bytes: memory that a model may take.
        runtime: what runs the model: ``llama.cpp`` or ``transformers``.
        note: one sentence where the device has no kernel of its own for the model, or on what its
            memory leaves out.
        context_warning: one sentence where the context is beyond the model's own.
    """

    device: Device
    memory_gb: float
    platform: str | None
    fits: bool
    offloaded_layers: int
    longest_context: int | None
    use: MemoryUse
    usable_bytes: int
    runtime: str = "llama.cpp"
    note: str | None = None
    context_warning: str | None = None

    @property
    def close(self) -> bool:
        """Whether it may turn out the other way: what a system takes is not known so well."""
        return abs(self.use.total_bytes - self.usable_bytes) < UNSURE * self.usable_bytes


def settings_on(device: Device, settings: RunSettings) -> RunSettings:
    """The same settings with what memory depends on of a device."""
    return replace(
        settings,
        backend=device.backend,
        n_sm=multiprocessors(device.cuda_cores, device.compute_capability),
        compute_capability=device.compute_capability,
    )


def judge(
    model: StoredModel,
    device: Device,
    settings: RunSettings,
    *,
    platform: str | None = None,
    memory_gb: float | None = None,
) -> Verdict:
    """Whether and how far a model fits a device.

    Args:
        model: the model.
        device: the device; `settings.backend` is taken from it.
        settings: context, cache and the rest; `n_gpu_layers` is left to the answer.
        platform: rule of usable memory; None means the usual one.
        memory_gb: which of the device's memory sizes; None means the smallest.

    Raises:
        UsageError: a context that cannot be, a memory size or platform that is not the
            device's, a type of cache that the model's runtime does not have.
    """
    check_context(settings.context)
    usable = usable_bytes(device, platform, memory_gb)
    settings = replace(settings_on(device, settings), n_gpu_layers=None)
    use = memory_use(model, settings)
    fits = use.total_bytes <= usable
    own, on_cpu = device.usable_mib is not None, device.backend == "CPU"
    return Verdict(
        device=device,
        memory_gb=device.memory(memory_gb),
        platform=None if own or on_cpu else platform or usual_platform(device),
        fits=fits,
        offloaded_layers=model.n_layers + 1 if fits else layers_that_fit(model, settings, usable),
        longest_context=longest_context(model, settings, usable),
        use=use,
        usable_bytes=usable,
        runtime=model.runtime,
        note=kernel_note(model, device.backend) or (WHOLE_MEMORY if on_cpu and not own else None),
        context_warning=context_warning(model, settings.context),
    )


def layers_that_fit(model: StoredModel, settings: RunSettings, usable: int) -> int:
    """The largest `-ngl` whose layers fit, from 0 to the layers and the output.

    A CPU has no host to leave layers on, and what accelerate would leave there under transformers
    is not predicted: in both it is all or none.
    """
    everything = model.n_layers + 1
    if settings.backend == "CPU" or model.torch is not None:
        whole = memory_use(model, replace(settings, n_gpu_layers=None))
        return everything if whole.total_bytes <= usable else 0

    def fits(n: int) -> bool:
        use = memory_use(model, replace(settings, n_gpu_layers=n))
        return use.total_bytes <= usable

    # The whole first: without it the device needs a copy of what it multiplies for the host, so
    # the whole may take less than all but one layer. Below it, more layers take more.
    if fits(everything):
        return everything
    low, high = 0, everything
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest_context(model: StoredModel, settings: RunSettings, usable: int) -> int | None:
    """The longest context that fits with all layers on the device.

    Up to the model's own, or that of `settings` if it is longer. In steps of `CONTEXT_STEP`, or
    just that; None if not even one step fits.
    """
    own = max(model.context_length, settings.context)

    def fits(context: int) -> bool:
        whole = replace(settings, context=context, n_gpu_layers=None)
        return memory_use(model, whole).total_bytes <= usable

    if fits(own):
        return own
    low, high = 0, -(-own // CONTEXT_STEP)  # in steps: low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CONTEXT_STEP) else (low, middle)
    return low * CONTEXT_STEP or None


def models_of_presets(config: ModelConfig, name: str = "the model") -> dict[str, StoredModel]:
    """The model as every preset would store it, largest first; f32 is no choice for running."""
    models = {
        key: model_of_config(config, preset, name)
        for key, preset in PRESETS.items()
        if key != "f32"
    }
    return dict(sorted(models.items(), key=lambda item: -item[1].weights_bytes))


def best_preset(
    models: Mapping[str, StoredModel], settings: RunSettings, usable: int
) -> str | None:
    """The preset with the most bytes that fits with all layers; None if none does."""
    whole = replace(settings, n_gpu_layers=None)
    order = sorted(models, key=lambda key: -models[key].weights_bytes)
    return next((k for k in order if memory_use(models[k], whole).total_bytes <= usable), None)


def devices_that_run(
    model: StoredModel, settings: RunSettings, *, platform: str | None = None
) -> list[Verdict]:
    """Every device of the database with every memory size that holds the whole model.

    Args:
        model: the model.
        settings: context, cache and the rest.
        platform: only devices that run on it; None means each on its usual one.
    """
    check_context(settings.context)
    whole = replace(settings, n_gpu_layers=None)
    found = []
    for device in load_devices():
        if platform is not None and (device.backend == "Metal") != platform.startswith("macos"):
            continue
        needed = memory_use(model, settings_on(device, whole)).total_bytes
        found += [
            judge(model, device, settings, platform=platform, memory_gb=gb)
            for gb in device.memory_gb_options
            if needed <= usable_bytes(device, platform, gb)
        ]
    return found


def choose_preset(name: str) -> Preset | TorchPreset:
    """The preset of that name: one of GGUF's, or of those for transformers.

    Raises:
        UsageError: no such preset; the nearest one is suggested.
    """
    return find_torch_preset(name) if is_torch_preset(name) else find_preset(name)
