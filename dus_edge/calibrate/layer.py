"""One decoder layer, cut where its linear layers take their inputs.

The family names the tensors, and which of them there are says what is computed: a norm that is not
there is not taken, and q, k, v or gate and up may be one matrix. The *sites* are the distinct
inputs of a layer's matrices; statistics are collected there, and a quantizer may replace a site's
matrices before anything behind them is computed. The arithmetic is that of transformers' models of
the families; a test holds it to theirs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.checkpoint.spec import Checkpoint

#: By a family's first name of it.
ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


#: Queries whose scores are computed at once; keys behind the last of them are left out.
_QUERIES = 128


@dataclass(frozen=True)
class Positions:
    """What attention of a layer needs to know of positions 0 … n_ctx − 1.

    Attributes:
        rotary: ``(n_ctx, rotary_dim)`` cosines of the rotary embedding, scaled as its kind wants,
            and sines; None in a layer that knows no positions.
        mask: boolean ``(n_ctx, n_ctx)``, true where attention looks; None for plain causal.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None
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
        self._activation = ACTIVATIONS[config.family.activations[0]]

    def replace(self, role: str, weight: torch.Tensor) -> None:
        """Go on with another matrix, e.g. ``up``; same shape and dtype."""
        self.weights[f"{role}.weight"] = weight

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(batch, n_ctx, hidden)`` before the layer → behind it."""
        h = self.after_attention(h, self.attention(self.attention_input(h)))
        return self.after_ffn(h, self.ffn(self.ffn_input(h)))

    def attention_input(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(batch, n_ctx, hidden)`` → input of q, k and v."""
        return self._norm(h, "attn_norm")

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Input of q, k and v → input of the output projection ``(batch, n_ctx, q_width)``."""
        c, p = self.config, self.positions
        batch, n_ctx, _ = x.shape
        q, k, v = self._parts(x, ("q", "k", "v"), "qkv", (c.q_width, c.kv_width, c.kv_width))

        def heads(y: torch.Tensor, norm: str | None = None) -> torch.Tensor:
            y = y.to(x.dtype)
            y = y if norm is None else self._norm(y, norm)
            return y.view(batch, n_ctx, -1, c.head_dim).transpose(1, 2)

        q, k, v = heads(q, "q_norm"), heads(k, "k_norm"), heads(v)
        if p.rotary is not None:
            style = c.family.rope_style
            q, k = rotated(q, *p.rotary, style), rotated(k, *p.rotary, style)
        narrow = self.weights["o.weight"].dtype
        if narrow != x.dtype and p.mask is None and c.attention_softcap is None:
            out = _causal_narrow(q, k, v, c.attention_scale, narrow)
        else:
            out = _attended(q, k, v, p.mask, c)
        return out.transpose(1, 2).reshape(batch, n_ctx, c.q_width)

    def after_attention(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Hidden states before the layer, and input of the output projection → those between."""
        return self._added(h, x, "o", "attn_post_norm")

    def ffn_input(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states after attention → input of gate and up."""
        return self._norm(h, "ffn_norm")

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        """Input of gate and up → input of down ``(batch, n_ctx, intermediate)``."""
        n = self.config.intermediate_size
        gate, up = self._parts(x, ("gate", "up"), "gate_up", (n, n))
        return self._activation(gate) * up

    def after_ffn(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Hidden states after attention, and input of down → those behind the layer."""
        return self._added(h, x, "down", "ffn_post_norm")

    def linear(self, x: torch.Tensor, role: str) -> torch.Tensor:
        """One of the matrices applied, in its own dtype, which is the result's."""
        weight = self.weights[f"{role}.weight"]
        return F.linear(x.to(weight.dtype), weight, self.weights.get(f"{role}.bias"))

    def _parts(
        self, x: torch.Tensor, roles: tuple[str, ...], fused: str, widths: tuple[int, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Matrices of one input applied, where the family may have them as one."""
        if f"{fused}.weight" in self.weights:
            return self.linear(x, fused).split(widths, dim=-1)
        return tuple(self.linear(x, role) for role in roles)

    def _added(self, h: torch.Tensor, x: torch.Tensor, role: str, norm: str) -> torch.Tensor:
        out = self._norm(self.linear(x, role).to(h.dtype), norm)
        scale = self.config.residual_scale
        return h + (out if scale == 1 else out * scale)

    def _norm(self, h: torch.Tensor, role: str) -> torch.Tensor:
        """A norm over as many channels as it has factors: a head, or all; none if it has none."""
        weight = self.weights.get(f"{role}.weight")
        if weight is None:
            return h
        if self.config.family.norm_shift:
            weight = weight + self.config.family.norm_shift
        groups = h.unflatten(-1, (-1, len(weight)))
        return rms_norm(groups, weight, self.config.rms_norm_eps).flatten(-2)


def _attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, c: ModelConfig
) -> torch.Tensor:
    """Attention of heads ``(batch, n_heads, n_ctx, head_dim)``."""
    if c.attention_softcap is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=c.attention_scale,
            enable_gqa=c.grouped_queries,
        )
    shared = c.n_heads // c.n_kv_heads
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(2, 3) * c.attention_scale
    scores = _capped(scores, c.attention_softcap)
    if mask is None:
        n = q.shape[2]
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _causal_narrow(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Causal attention whose products are in a narrower dtype; the softmax stays as wide as `q`.

    Args:
        q: ``(batch, n_heads, n_ctx, head_dim)``.
        k: ``(batch, n_kv_heads, n_ctx, head_dim)``; a head of keys serves as many of queries as
            there are more of them.
        v: the same.
        scale: of the scores.
        dtype: of the products.
    """
    batch, n_heads, n_ctx, width = q.shape
    together = batch * k.shape[1]
    shared = n_heads // k.shape[1]
    q = (q * scale).to(dtype).reshape(together, shared, n_ctx, width)
    k = k.to(dtype).reshape(together, n_ctx, width).transpose(1, 2)
    v = v.to(dtype).reshape(together, n_ctx, width)
    out = torch.empty(together, shared, n_ctx, width, dtype=torch.float32, device=q.device)
    ahead = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool, device=q.device).triu(1)
    for first in range(0, n_ctx, _QUERIES):
        end = min(first + _QUERIES, n_ctx)
        n = end - first
        asking = q[:, :, first:end].reshape(together, shared * n, width)
        scores = torch.bmm(asking, k[:, :, :end]).float()
        corner = scores.view(together, shared, n, end)[..., first:]
        corner.masked_fill_(ahead[:n, :n], -torch.inf)
        found = torch.bmm(torch.softmax(scores, -1).to(dtype), v[:, :end])
        out[:, :, first:end] = found.view(together, shared, n, width)
    return out.view(batch, n_heads, n_ctx, width)


def _capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(x / cap)


def rms_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, in float32 within."""
    wide = h.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(h.dtype)


def next_token_logits(
    h: torch.Tensor, norm: torch.Tensor, head: torch.Tensor, c: ModelConfig
) -> torch.Tensor:
    """Hidden states ``(n, hidden)`` behind the last layer → float32 ``(n, vocab)``.

    Args:
        h: the states, of the head's dtype.
        norm: the final norm's weights as they are stored.
        head: ``(vocab, hidden)``.
        c: of the model.
    """
    return logits_of(head_input(h, norm, c), head, c)


def head_input(h: torch.Tensor, norm: torch.Tensor, c: ModelConfig) -> torch.Tensor:
    """Hidden states ``(n, hidden)`` behind the last layer → what the head takes."""
    weight = norm + c.family.norm_shift if c.family.norm_shift else norm
    return rms_norm(h, weight, c.rms_norm_eps)


def logits_of(x: torch.Tensor, head: torch.Tensor, c: ModelConfig) -> torch.Tensor:
    """The head, or rows of it ``(n_some, hidden)``, on its input → float32 ``(n, n_some)``."""
    logits = (x @ head.T).float()
    if c.logit_divisor != 1:
        logits /= c.logit_divisor
    return logits if c.logit_softcap is None else _capped(logits, c.logit_softcap)


def rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str = "halves"
) -> torch.Tensor:
    """Rotary embedding of heads ``(…, n_ctx, head_dim)``; channels behind rotary_dim stay.

    Args:
        x: the heads.
        cos: ``(n_ctx, rotary_dim)``, the second half like the first.
        sin: the same.
        style: ``halves`` turns channel i with i + rotary_dim / 2, ``pairs`` 2i with 2i + 1.
    """
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if style == "pairs":
        cos, sin = (t.chunk(2, dim=-1)[0].repeat_interleave(2, dim=-1) for t in (cos, sin))
        across = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        across = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos + across * sin, rest), dim=-1)


def positions(
    config: ModelConfig, n_ctx: int, device: str, dtype: torch.dtype
) -> tuple[Positions, ...]:
    """Of each layer, rotary tables, by transformers for every kind of scaling, and its mask."""
    plain = config.rope.kind == "default" and config.rope.theta_local is None
    rotary, known = (_plain_rotary(config), None) if plain else _rotary(config)
    known_layers: dict[tuple[int | None, bool], Positions] = {}

    def of_layer(i: int) -> Positions:
        window, without = config.window(i), config.no_rope_layers[i]
        kind = (window, without)
        if kind not in known_layers:
            table = None
            if not without:
                local = config.rope.theta_local is not None
                named = {"layer_type": known.layer_types[i]} if local else {}
                x, at = torch.zeros(1, dtype=torch.float32), torch.arange(n_ctx)[None]
                cos, sin = rotary(x, at, **named)
                table = cos[0].to(device, dtype), sin[0].to(device, dtype)
            known_layers[kind] = Positions(table, _mask(window, n_ctx, device))
        return known_layers[kind]

    return tuple(of_layer(i) for i in range(config.n_layers))


def _plain_rotary(config: ModelConfig) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The tables without scaling, to the bit transformers', whose import takes seconds."""
    width = config.rope.channels(config.head_dim)
    steps = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    frequencies = 1.0 / (config.rope.theta**steps)

    def tables(x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = at[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    return tables


def _rotary(config: ModelConfig) -> tuple[Any, Any]:
    """transformers' rotary module of the family, and its configuration."""
    from transformers import AutoConfig

    raw = {key: value for key, value in config.raw.items() if key != "model_type"}
    known = AutoConfig.for_model(config.family.model_type, **raw)
    place = type(known).__module__.replace("configuration_", "modeling_")
    module = importlib.import_module(place)
    name = next(name for name in vars(module) if name.endswith("RotaryEmbedding"))
    return getattr(module, name)(known), known


def _mask(window: int | None, n_ctx: int, device: str) -> torch.Tensor | None:
    if window is None or window >= n_ctx:
        return None
    distance = torch.arange(n_ctx)[:, None] - torch.arange(n_ctx)[None]
    return ((distance >= 0) & (distance < window)).to(device)


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
