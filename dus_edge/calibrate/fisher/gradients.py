"""Gradients of a model's own predictions, one layer at a time.

A label is drawn from the model's distribution of the next token, and the gradient of its negative
log-likelihood is carried down through the layers. The squares of such gradients are the Fisher
information: they say how far the distributions move when weights do. One layer's weights and the
states before it are enough to go one layer down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dus_edge.calibrate.layer import DecoderLayer, Positions, next_token_logits
from dus_edge.checkpoint.config import ModelConfig


class TracedLayer(DecoderLayer):
    """A layer that remembers what its matrices take in and give.

    Attributes:
        traced: by role, both ``(batch, n_ctx, width)``; the first without its graph.
    """

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], positions: Positions
    ) -> None:
        super().__init__(config, weights, positions)
        self.traced: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def linear(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """One of the matrices applied."""
        y = super().linear(x, role)
        self.traced[role] = (x.detach(), y)
        return y


@dataclass(frozen=True)
class LayerGradients:
    """What a pass down through a layer gives.

    Attributes:
        below: gradient of the states before the layer ``(batch, n_ctx, hidden)``.
        inputs: by site, what its matrices took in ``(batch, n_ctx, n_cols)``.
        outputs: by role, the gradient of what its matrix gave ``(batch, n_ctx, n_rows)``.
    """

    below: torch.Tensor
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


def layer_gradients(layer: TracedLayer, h: torch.Tensor, behind: torch.Tensor) -> LayerGradients:
    """Carry a gradient down through a layer, which is computed again on the way.

    Args:
        layer: its weights take no gradient.
        h: states before it ``(batch, n_ctx, hidden)``.
        behind: gradient of the states behind it, the same shape.
    """
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        out = layer.forward(h)
    traced, layer.traced = layer.traced, {}
    below, *outputs = torch.autograd.grad(out, [h, *(y for _, y in traced.values())], behind)
    family = layer.config.family
    inputs = {str(family.rule(role).site): x for role, (x, _) in traced.items()}
    return LayerGradients(below, inputs, dict(zip(traced, outputs, strict=True)))


def label_gradients(
    h: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, c: ModelConfig, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of −log p of labels that are drawn from p, with regard to final states.

    Args:
        h: states behind the last layer ``(n, hidden)``.
        norm: the final norm's weights as they are stored, in the dtype of the states.
        head: ``(vocab, hidden)``, the same.
        c: of the model.
        u: ``(n,)`` float32 in [0, 1): which label is drawn, by the distribution's sums.

    Returns:
        the gradients ``(n, hidden)``, in the dtype of the states; and 1 − Σp² ``(n,)`` float32,
        what the squares of the gradient of the logits are expected to add up to.
    """
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        logits = next_token_logits(h, norm, head, c)
    p = logits.detach().softmax(-1)
    spread = 1 - p.square().sum(-1)
    sums = p.cumsum(-1)
    # Of the last sum, which rounding keeps from 1.
    labels = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True)[:, 0]
    with torch.enable_grad():
        loss = F.cross_entropy(logits, labels.clamp(max=sums.shape[1] - 1), reduction="sum")
    return torch.autograd.grad(loss, h)[0], spread
