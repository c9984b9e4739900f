"""Checkpoint folders through transformers: plain, bitsandbytes, and GPTQ dequantized by us.

All arithmetic is float32, so that differences come from the weights alone; bitsandbytes' int8
layers round activations too, which is how they work.
"""

from __future__ import annotations

import gc
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dus_edge.errors import DusEdgeError
from dus_edge.machine import default_threads
from dus_edge.run.folders import (
    NO_CODE,
    NO_CODE_WEIGHTS,
    check_packages,
    check_whole,
    explained,
    hushed,
    load_gptq,
    torch_device,
    without_packed_4bit,
)
from dus_edge.run.source import SourceInfo, log_softmax

if TYPE_CHECKING:
    import torch


class FolderSource:
    """A loaded folder; see `dus_edge.run.source.LogitSource`."""

    def __init__(self, info: SourceInfo, device: str, n_threads: int | None) -> None:
        self.info = info
        self._model, self._device = load_network(info, device, n_threads)

    def log_probs(self, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        """See `LogitSource.log_probs`."""
        import torch

        ids = torch.as_tensor(tokens.astype(np.int64))[None].to(self._device)
        try:
            with torch.inference_mode(), hushed():
                out = self._model(ids, use_cache=False, logits_to_keep=len(tokens) - start)
        except torch.OutOfMemoryError:
            raise DusEdgeError(
                f"{self.info.path}: {self._device} has too little memory for the model; "
                "take --device cpu or shorter chunks."
            ) from None
        return log_softmax(out.logits[0].float().cpu().numpy())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        import torch

        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_network(info: SourceInfo, device: str, n_threads: int | None) -> tuple[Any, torch.device]:
    """A folder as transformers' model in float32, ready to be run, and where it is.

    Args:
        info: of `inspect_source`.
        device: ``cpu``, ``cuda``, ``mps``, …
        n_threads: of the CPU; None for all cores.

    Raises:
        CheckpointError: the weights are damaged or incomplete.
        DependencyError: a package that reads this kind is not installed.
        UsageError: there is no such device.
    """
    check_packages(info)
    import torch

    torch.set_num_threads(n_threads or default_threads())
    place = torch_device(device)
    load = load_gptq if info.kind == "gptq" else _load
    with hushed(), explained(info):
        model, found = load(info, place)
    check_whole(info, found)
    return model.eval(), place


def _load(info: SourceInfo, device: torch.device) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(info.path, **NO_CODE)
    if info.kind == "bitsandbytes":
        details = dict(config.quantization_config)
        if details.get("load_in_4bit"):
            details["bnb_4bit_compute_dtype"] = "float32"
        config.quantization_config = details
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        info.path,
        config=config,
        dtype=torch.float32,
        **NO_CODE_WEIGHTS,
        output_loading_info=True,
        **({"device_map": {"": device}} if info.kind == "bitsandbytes" else {}),
    )
    if info.kind == "bitsandbytes":
        without_packed_4bit(model, always=True)
        return model, found
    return model.to(device), found
