"""A lean Llama forward pass, equal to transformers' ``LlamaForCausalLM`` weight for weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PicoConfig:
    """The shape of a Llama model; widths in elements, ``context`` in tokens."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 512
    context: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden // self.heads


def rope_tables(config: PicoConfig) -> tuple[Tensor, Tensor]:
    """Return RoPE's cosines and sines, f32 of shape (context, head_dim), half-rotated."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(torch.arange(config.context).float(), 1.0 / config.rope_theta**steps)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to ``x`` of shape (batch, heads, time, head_dim) by half rotation."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.config = config
        width = config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * width, bias=False)
        self.o_proj = nn.Linear(config.heads * width, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``x`` of shape (batch, time, hidden) to the same shape."""
        batch, time, _ = x.shape
        width, groups = self.config.head_dim, self.config.heads // self.config.kv_heads
        q = self.q_proj(x).view(batch, time, -1, width).transpose(1, 2)
        k = self.k_proj(x).view(batch, time, -1, width).transpose(1, 2)
        v = self.v_proj(x).view(batch, time, -1, width).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, time, -1))


class FeedForward(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` of shape (batch, time, hidden) to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PicoLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``x`` of shape (batch, time, hidden) to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Embedding, layers and last norm, named as transformers names them."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(PicoLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.eps)


class Pico(nn.Module):
    """A Llama with tied embeddings; its state dict is a ``LlamaForCausalLM`` checkpoint."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, plan: Sequence[int] | None = None) -> Tensor:
        """Return f32 logits (batch, time, vocab) for int64 ``ids`` (batch, time).

        ``plan`` lists the layers to run in order, for instance an up-scaled plan in which
        some layers run twice; None runs each layer once.
        """
        time = ids.shape[1]
        cos, sin = self.cos[:time], self.sin[:time]
        x = self.model.embed_tokens(ids)
        for index in range(self.config.layers) if plan is None else plan:
            x = self.model.layers[index](x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def initialise(model: Pico, seed: int) -> None:
    """Draw weights: normal embeddings, scaled normal projections, zero output projections.

    With the outputs of attention and feed-forward at zero every layer starts as the identity,
    which lets the first steps be large.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.ones_(weight)
        elif "embed_tokens" in name:
            nn.init.normal_(weight, std=0.02, generator=generator)
        elif "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
