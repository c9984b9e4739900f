"""Checkpoint folders as transformers' models: GPTQ dequantized by us, errors in one sentence.

Format of GPTQ folders: that of auto-gptq's version 1 (``qweight``, ``qzeros``, ``scales``,
``g_idx``), see `dus_edge.quant.gptq_format`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dus_edge.checkpoint.names import CONFIG
from dus_edge.errors import (
    CheckpointError,
    DusEdgeError,
    UnsupportedError,
    UsageError,
)
from dus_edge.families.family import find_family
from dus_edge.packages import require
from dus_edge.quant.gptq_format import GPTQ_BITS, dequantized
from dus_edge.run.source import SourceInfo, read_config, weight_files

if TYPE_CHECKING:
    import torch

_CODES = ".qweight"
_GPTQ_PARTS = (_CODES, ".qzeros", ".scales", ".g_idx")
#: What every call of transformers on a folder says: nothing of the folder's is run, nor fetched.
NO_CODE = {"local_files_only": True, "trust_remote_code": False}
#: The same where weights are loaded: no pickle is opened.
NO_CODE_WEIGHTS = {**NO_CODE, "use_safetensors": True}
_V1_FORMATS = (None, "gptq")


def load_gptq(info: SourceInfo, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A GPTQ folder as a plain model in float32, and what transformers says of its tensors."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(info.path, **NO_CODE)
    raw = read_config(info.path)
    del config.quantization_config
    family = find_family(raw)
    assert family is not None  # `inspect_source` has seen to it
    model, found = getattr(transformers, family.architecture).from_pretrained(
        None,
        config=config,
        state_dict=_dequantized_state(info, raw["quantization_config"]),
        dtype=torch.float32,
        output_loading_info=True,
    )
    return model.to(device), found


def _dequantized_state(info: SourceInfo, details: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of a GPTQ folder as float32, under the plain model's names."""
    import torch
    from safetensors import safe_open

    bits = _gptq_bits(info, details)
    files = weight_files(info.path, info.kind)
    state: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: f for f in opened for name in f.keys()}  # noqa: SIM118

        def read(name: str) -> torch.Tensor:
            if name not in where:
                raise CheckpointError(f"{info.path}: tensor {name} is missing; fetch it again.")
            return where[name].get_tensor(name)

        layers = {name.removesuffix(_CODES) for name in where if name.endswith(_CODES)}
        for layer in sorted(layers):
            qweight = read(layer + _CODES).numpy()
            scales = read(layer + ".scales").float().numpy()
            if layer + ".g_idx" in where:
                g_idx = read(layer + ".g_idx").numpy()
            else:
                n_in = qweight.shape[0] * 32 // bits
                g_idx = np.arange(n_in, dtype=np.int32) // (n_in // len(scales))
            weight = dequantized(qweight, read(layer + ".qzeros").numpy(), scales, g_idx, bits)
            state[layer + ".weight"] = torch.from_numpy(weight)
        for name in where:
            layer, dot, part = name.rpartition(".")
            if layer in layers and dot + part in _GPTQ_PARTS:
                continue
            tensor = read(name).float()
            # auto-gptq writes biases of zeros for layers that have none.
            if not (layer in layers and part == "bias" and not tensor.any()):
                state[name] = tensor
    return state


def _gptq_bits(info: SourceInfo, details: dict[str, Any]) -> int:
    bits, form = details.get("bits"), details.get("checkpoint_format")
    if bits not in GPTQ_BITS:
        raise UnsupportedError(f"{info.path / CONFIG}: GPTQ of {bits} bits; {GPTQ_BITS} are read.")
    if form not in _V1_FORMATS:
        raise UnsupportedError(
            f"{info.path / CONFIG}: checkpoint_format is {form!r}; save it as 'gptq' (version 1)."
        )
    return bits


def check_whole(info: SourceInfo, found: dict[str, Any]) -> None:
    """transformers fills what is missing with random numbers."""
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{info.path}: tensor {missing[0]}{more} is missing; fetch the folder again."
        )
    if left := sorted(found["unexpected_keys"]):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(
            f"{info.path}: tensor {left[0]}{more} has no place in the model that "
            f"{CONFIG} describes; fetch the folder again."
        )


def without_packed_4bit(model: Any, *, always: bool) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for processors with AVX512-BF16.

    Its kernel for them (`Linear4bit.forward` in 0.50) multiplies in bfloat16 whatever
    `compute_dtype` says, and fails where a row is no multiple of a block.

    Args:
        model: with weights loaded, not run yet; other models are left alone.
        always: also where it would run, for results that are the same on every machine.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        state = module.weight.quant_state
        if always or state is None or state.shape[-1] % state.blocksize:
            module.support_avx512bf16_for_cpu = False


def torch_device(name: str) -> torch.device:
    """torch's device of that name.

    Raises:
        UsageError: torch cannot use it.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        reason = str(e).partition("\n")[0]
        raise UsageError(f"--device {name} cannot be used ({reason}); take cpu.") from None
    return device


def check_packages(info: SourceInfo) -> None:
    """See that all packages which run this folder are installed.

    Raises:
        DependencyError: one is not.
    """
    extra = "bnb" if info.kind == "bitsandbytes" else "hf"
    require(extra, f"{info.path} is run by")


@contextlib.contextmanager
def explained(info: SourceInfo) -> Iterator[None]:
    """What transformers raises for a folder it cannot load, as one sentence."""
    import torch

    try:
        yield
    except DusEdgeError:
        raise
    except torch.OutOfMemoryError:
        raise DusEdgeError(
            f"{info.path}: the device has too little memory for the model; take --device cpu."
        ) from None
    except MemoryError:
        raise DusEdgeError(
            f"{info.path}: too little memory for the model in float32; measure a GGUF file of it."
        ) from None
    except Exception as e:  # many kinds, of three packages
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise CheckpointError(
            f"{info.path} cannot be loaded by transformers ({reason}); fetch or export it again."
        ) from e


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No progress bars and reports of transformers while the block runs.

    Nor bitsandbytes' warnings, one for each int8 layer each time it runs.
    """
    from transformers.utils import logging as reports

    quantizer = logging.getLogger("bitsandbytes")
    levels, bars = (reports.get_verbosity(), quantizer.level), reports.is_progress_bar_enabled()
    reports.set_verbosity(logging.CRITICAL)
    quantizer.setLevel(logging.CRITICAL)
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(levels[0])
        quantizer.setLevel(levels[1])
        if bars:
            reports.enable_progress_bar()
