"""A model in PyTorch from a checkpoint's tensors, one at a time; what learns is float32.

The modules are transformers'; the weights never pass through its loader. Layers that do not learn
keep the base's dtype where the computation is in it, and copies of a source layer that both stay as
they are share one tensor: an up-scaled model that is frozen takes its base's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dus_edge.calibrate.layer import as_tensor
from dus_edge.checkpoint.config import ModelConfig, tensor_shapes
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.run.folders import hushed
from dus_edge.train.heal.loss import chunked_cross_entropy
from dus_edge.train.heal.mode import check_loss


class Network(nn.Module):
    """A causal language model and its loss.

    Attributes:
        model: transformers' module of the family.
        compute: dtype of matrix products.
        logit_divisor: what logits are divided by.
    """

    def __init__(self, model: Any, compute: torch.dtype, logit_divisor: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.compute = compute
        self.logit_divisor = logit_divisor

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Final hidden states ``(batch, length, width)`` of packed documents, ready for the head.

        Documents do not see each other: transformers derives that from positions that fall back to
        0, if no mask is given and no cache is used; a mask of ones would mix them.
        """
        body, low = self.model.model, self.compute != torch.float32
        with torch.autocast(ids.device.type, self.compute, enabled=low):
            out = body(input_ids=ids, position_ids=positions, use_cache=False)
        states = out.last_hidden_state.to(self.compute)
        return states if self.logit_divisor == 1 else states / self.logit_divisor

    @property
    def head(self) -> torch.Tensor:
        """``(vocabulary, width)``; of a tied model the embedding."""
        return self.model.get_output_embeddings().weight

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor,
        teacher: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed losses; see `chunked_cross_entropy`."""
        states = self.hidden(ids, positions)
        return chunked_cross_entropy(states.flatten(0, 1), self.head, labels.flatten(), teacher)


def empty_network(config: ModelConfig, compute: torch.dtype = torch.float32) -> Network:
    """The modules on the meta device: shapes without memory.

    Args:
        config: of the model.
        compute: dtype of matrix products.

    Raises:
        UsageError: its loss is none that `chunked_cross_entropy` computes.
    """
    check_loss(config)
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {key: value for key, value in config.raw.items() if key != "model_type"}
    known = AutoConfig.for_model(config.family.model_type, **raw)
    with torch.device("meta"), hushed():
        model = AutoModelForCausalLM.from_config(
            known, attn_implementation="sdpa", dtype=torch.float32
        )
    model.config.use_cache = False
    model.train()
    return Network(model, compute, config.logit_divisor)


def checkpoint_layers(network: Network) -> None:
    """Keep a layer's input alone for the backward pass, and compute the layer again there.

    From the lowest layer that learns: transformers' own switch would have the gradient flow through
    the frozen layers below it too.
    """
    layers = network.model.model.layers
    learning = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    body = network.model.model
    first = 0 if body.embed_tokens.weight.requires_grad else learning.index(True)
    for layer in layers[first:]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def load_weights(
    network: Network,
    checkpoint: Checkpoint,
    learned: Collection[str],
    frozen_dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[int], object] = lambda n: None,
) -> None:
    """Give every parameter its values.

    Args:
        network: empty, or with some parameters replaced.
        checkpoint: the model, a view or not.
        learned: names of tensors that learn; they become float32 with a gradient.
        frozen_dtype: of the others.
        device: for all.
        advance: told of parameters.
    """
    shared: dict[str, nn.Parameter] = {}
    for name, spec in checkpoint.specs().items():
        owner, _, attribute = name.rpartition(".")
        module = network.model.get_submodule(owner)
        if name in learned:
            value = as_tensor(checkpoint.read(name)).to(device, torch.float32)
            parameter = nn.Parameter(value)
        elif spec.source in shared:
            parameter = shared[spec.source]
        else:
            value = as_tensor(checkpoint.read(name)).to(device, frozen_dtype)
            parameter = shared[spec.source] = nn.Parameter(value, requires_grad=False)
        setattr(module, attribute, parameter)
        advance(parameter.numel())
    if checkpoint.config.tied_head:
        network.model.tie_weights()
    make_buffers(network, device)


def make_buffers(network: Network, device: torch.device) -> None:
    """Rotary frequencies, which are computed, not stored: on meta they have no values."""
    body = network.model.model
    body.rotary_emb = type(body.rotary_emb)(network.model.config).to(device)


def learned_names(config: ModelConfig, layers: Collection[int], everything: bool) -> list[str]:
    """Tensors of some layers, or of the whole model.

    Args:
        config: of the model.
        layers: whose tensors.
        everything: embedding, head and final norm too.
    """
    names = []
    for name in tensor_shapes(config):
        place = config.family.layer_of(name)
        if everything if place is None else place[0] in layers:
            names.append(name)
    return names
