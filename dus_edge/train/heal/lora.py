"""LoRA by peft on all linear layers of a network, and the whole weights that come of it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dus_edge.packages import require
from dus_edge.train.heal.network import Network


def add_adapters(network: Network, rank: int) -> None:
    """Put adapters beside every linear layer but the head; they alone learn.

    ``lora_alpha`` is twice the rank, as is common; A is random, B is zero, so nothing changes yet.

    Raises:
        DependencyError: peft is not installed.
    """
    require("train", "--train lora needs", "peft")
    # peft imports bitsandbytes where it is there, which speaks of kernels that are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from peft import LoraConfig, inject_adapter_in_model

    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in network.model.model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
    )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
    inject_adapter_in_model(config, network.model)
    for name, parameter in network.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


def merged_weights(network: Network) -> dict[str, torch.Tensor]:
    """W + (alpha / r) B A of every layer with an adapter, by the checkpoint's names; f32."""
    found: dict[str, torch.Tensor] = {}
    for name, module in network.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer: Any = module
            delta = layer.get_delta_weight("default")
            found[f"{name}.weight"] = layer.base_layer.weight.detach().float() + delta.detach()
    return found
