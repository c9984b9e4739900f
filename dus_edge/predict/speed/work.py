"""What one token costs a model, whatever the device: weights by type, and the KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dus_edge.errors import UsageError
from dus_edge.predict.speed import gptq
from dus_edge.quant import types
from dus_edge.quant.recipe import ModelShape, Preset, tensor_type

#: Types whose kernels work alike.
GROUPS = ("f16", "q8", "q4", "k", "k_low")
_GROUP_OF = {
    "F32": "f16", "F16": "f16", "BF16": "f16", "Q8_0": "q8",
    "Q4_0": "q4", "Q4_1": "q4", "Q5_0": "q4", "Q5_1": "q4",
    "Q4_K": "k", "Q5_K": "k", "Q6_K": "k", "Q3_K": "k_low", "Q2_K": "k_low",
}  # fmt: skip
#: GPTQ weights by the bits of a code.
_GPTQ_GROUP_OF = {2: "k_low", 3: "k_low", 4: "q4", 8: "q8"}


def group(type_name: str) -> str:
    """The group of a tensor type.

    Raises:
        UsageError: no speed is known for it.
    """
    if gptq.is_gptq(type_name):
        return _GPTQ_GROUP_OF[gptq.code_bits(type_name)]
    if type_name not in _GROUP_OF:
        raise UsageError(f"No speed is known for tensors of type {type_name}.")
    return _GROUP_OF[type_name]


def bytes_per_weight(type_name: str) -> float:
    """Bytes that a weight of a tensor type takes, its share of scales included."""
    if gptq.is_gptq(type_name):
        return gptq.bits_per_weight(type_name) / 8
    return types.TYPES[type_name].bits_per_weight / 8


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs a model, whatever the device.

    Attributes:
        n_layers, n_heads, head_dim, n_kv_heads: of attention.
        weights: type name (``Q4_K``, ``GPTQ4_128``, …) → weights that every token passes (active
            ones of a mixture of experts), without an embedding table that is only looked up.
        kv_bytes_per_value: 2 for f16, 34/32 for q8_0, 18/32 for q4_0.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    weights: Mapping[str, float]
    kv_bytes_per_value: float = 2.0

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "kv_bytes_per_value"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} of the model must be positive.")
        for name, n in self.weights.items():
            group(name)
            if not n >= 0:
                raise UsageError(f"The number of {name} weights must not be negative.")
        if not sum(self.weights.values()) > 0:
            raise UsageError("The model has no weights.")

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that one token reads."""
        return sum(n * bytes_per_weight(t) for t, n in self.weights.items())

    @property
    def n_weights(self) -> float:
        """Weights that one token passes."""
        return sum(self.weights.values())

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache of one position."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.kv_bytes_per_value


def dense_work(
    preset: Preset,
    *,
    n_layers: int,
    hidden: int,
    ffn: int,
    n_heads: int,
    n_kv_heads: int,
    vocab: int,
    head_dim: int | None = None,
    tied_head: bool = False,
    kv_bytes_per_value: float = 2.0,
) -> Work:
    """The work of a dense Llama-form model in a preset, tensor by tensor as llama.cpp mixes types.

    Raises:
        UsageError: a size is not positive.
    """
    sizes = {
        "n_layers": n_layers, "hidden": hidden, "ffn": ffn,
        "n_heads": n_heads, "n_kv_heads": n_kv_heads, "vocab": vocab,
    }  # fmt: skip
    for name, value in sizes.items():
        if value <= 0:
            raise UsageError(f"{name} of the model must be positive, not {value}.")
    head_dim = head_dim or hidden // n_heads
    shape = ModelShape(n_layers, n_heads, n_kv_heads, tied_head)
    q, kv = n_heads * head_dim, n_kv_heads * head_dim
    parts = {
        "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, q), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }  # fmt: skip
    tensors = {
        f"blk.{i}.{part}.weight": size for i in range(n_layers) for part, size in parts.items()
    }
    tensors["token_embd.weight" if tied_head else "output.weight"] = (vocab, hidden)
    weights: dict[str, float] = {}
    for name, size in tensors.items():
        kind = tensor_type(preset, name, size, shape).name
        weights[kind] = weights.get(kind, 0) + math.prod(size)
    return Work(n_layers, n_heads, n_kv_heads, head_dim, weights, kv_bytes_per_value)
