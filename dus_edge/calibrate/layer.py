"""One decoder layer of the arithmetic "llama", cut where its linear layers take their inputs.

The family names the tensors. The four *sites* are the distinct inputs of a layer's seven matrices;
statistics are collected there, and a quantizer may replace a site's matrices before anything behind
them is computed. The arithmetic is that of transformers' `modeling_llama.py` and
`modeling_mistral.py`; a test holds it to theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.spec import Checkpoint


@dataclass(frozen=True)
class Positions:
    """What attention needs to know of positions 0 … n_ctx − 1.

    Attributes:
        cos: ``(n_ctx, head_dim)`` cosines of the rotary embedding, scaled as its kind wants.
        sin: the sines.
        mask: boolean ``(n_ctx, n_ctx)``, true where attention looks; None for plain causal.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None


class DecoderLayer:
    """The weights of one layer on a device, and its computation site by site.

    Weights are called by role: ``q.weight``, ``attn_norm.weight``, ``down.bias``.
    """

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], positions: Positions
    ) -> None:
        self.config = config
        self.weights = weights
        self.positions = positions

    def replace(self, role: str, weight: torch.Tensor) -> None:
        """Go on with another matrix, e.g. ``up``; same shape and dtype."""
        self.weights[f"{role}.weight"] = weight

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(batch, n_ctx, hidden)`` before the layer → behind it."""
        h = h + self.linear(self.attention(self.attention_input(h)), "o")
        return h + self.linear(self.ffn(self.ffn_input(h)), "down")

    def attention_input(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(batch, n_ctx, hidden)`` → input of q, k and v."""
        return self._norm(h, "attn_norm")

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Input of q, k and v → input of the output projection ``(batch, n_ctx, q_width)``."""
        c, p = self.config, self.positions
        batch, n_ctx, _ = x.shape

        def heads(role: str, n: int) -> torch.Tensor:
            return self.linear(x, role).view(batch, n_ctx, n, c.head_dim).transpose(1, 2)

        q = rotated(heads("q", c.n_heads), p.cos, p.sin)
        k = rotated(heads("k", c.n_kv_heads), p.cos, p.sin)
        v = heads("v", c.n_kv_heads)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=p.mask,
            is_causal=p.mask is None,
            enable_gqa=c.n_heads != c.n_kv_heads,
        )
        return out.transpose(1, 2).reshape(batch, n_ctx, c.q_width)

    def ffn_input(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states after attention → input of gate and up."""
        return self._norm(h, "ffn_norm")

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        """Input of gate and up → input of down ``(batch, n_ctx, intermediate)``."""
        return F.silu(self.linear(x, "gate")) * self.linear(x, "up")

    def linear(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """One of the seven matrices applied."""
        return F.linear(x, self.weights[f"{role}.weight"], self.weights.get(f"{role}.bias"))

    def _norm(self, h: torch.Tensor, role: str) -> torch.Tensor:
        weight = self.weights[f"{role}.weight"]
        if self.config.family.norm_shift:
            weight = weight + self.config.family.norm_shift
        return rms_norm(h, weight, self.config.rms_norm_eps)


def rms_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in float32 within."""
    wide = h.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(h.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of heads ``(…, n_ctx, head_dim)``, first half against second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def positions(config: ModelConfig, n_ctx: int, device: str, dtype: torch.dtype) -> Positions:
    """Rotary tables, by transformers for every kind of scaling, and the window's mask."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = {key: value for key, value in config.raw.items() if key != "model_type"}
    known = AutoConfig.for_model(config.family.model_type, **raw)
    # One formula for every family of this arithmetic; only configurations differ.
    rotary = LlamaRotaryEmbedding(known)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(n_ctx)[None])
    mask = None
    if config.sliding_window and config.sliding_window < n_ctx:
        distance = torch.arange(n_ctx)[:, None] - torch.arange(n_ctx)[None]
        mask = ((distance >= 0) & (distance < config.sliding_window)).to(device)
    return Positions(cos[0].to(device, dtype), sin[0].to(device, dtype), mask)


def as_tensor(stored: np.ndarray) -> torch.Tensor:
    """Weights as `Checkpoint.read` gives them → tensor of the same dtype, a copy."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(stored.copy())


def read_layer(checkpoint: Checkpoint, index: int) -> dict[str, torch.Tensor]:
    """All tensors of layer `index` by role (``q.weight``), in stored dtypes, on the CPU."""
    family = checkpoint.config.family
    found = {}
    for name in checkpoint.specs():
        place = family.layer_of(name)
        if place is not None and place[0] == index:
            rule, _, part = family.find(name)
            found[f"{rule.role}.{part}"] = as_tensor(checkpoint.read(name))
    return found
