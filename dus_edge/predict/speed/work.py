"""What one token costs a model, whatever the device: weights by type, and the KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dus_edge.errors import UsageError
from dus_edge.families.shape import Shape
from dus_edge.predict.memory.torch import VALUE_BYTES
from dus_edge.predict.speed import gptq
from dus_edge.predict.stored_model import KV_TYPES, RunSettings, StoredModel
from dus_edge.quant import types

#: Types whose kernels work alike.
GROUPS = ("f16", "q8", "q4", "k", "k_low")
_GROUP_OF = {
    "F32": "f16", "F16": "f16", "BF16": "f16", "Q8_0": "q8",
    "Q4_0": "q4", "Q4_1": "q4", "Q5_0": "q4", "Q5_1": "q4",
    "Q4_K": "k", "Q5_K": "k", "Q6_K": "k", "Q3_K": "k_low", "Q2_K": "k_low",
    "IQ4_NL": "k", "IQ4_XS": "k", "IQ3_S": "k_low",
    "IQ2_S": "k_low", "IQ2_XS": "k_low",
}  # fmt: skip
#: Types of which no run is published: taken for others of as many bits, with wider intervals.
_UNPUBLISHED = frozenset({"IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_S", "IQ2_XS"})
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
        shape: of the model; attention's part is looked at.
        weights: type name (``Q4_K``, ``GPTQ4_128``, …) → weights that every token passes (active
            ones of a mixture of experts), without an embedding table that is only looked up.
        kv_bytes_per_value: 2 for f16, 34/32 for q8_0, 18/32 for q4_0.
    """

    shape: Shape
    weights: Mapping[str, float]
    kv_bytes_per_value: float = 2.0

    def __post_init__(self) -> None:
        if not self.kv_bytes_per_value > 0:
            raise UsageError("kv_bytes_per_value of the model must be positive.")
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
    def unpublished_share(self) -> float:
        """Share (0..1) of those bytes in types of which no run is published."""
        unseen = (n * bytes_per_weight(t) for t, n in self.weights.items() if t in _UNPUBLISHED)
        return sum(unseen) / self.weight_bytes

    @property
    def n_weights(self) -> float:
        """Weights that one token passes."""
        return sum(self.weights.values())

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache of one position."""
        return 2 * self.shape.n_layers * self.shape.kv_width * self.kv_bytes_per_value


def work_of(model: StoredModel, settings: RunSettings) -> Work:
    """What one token costs a model as it is stored, with the cache's types of `settings`."""
    weights: dict[str, float] = {}
    for tensor in model.tensors:
        if tensor.layer is None and tensor is not model.head:
            continue  # the embedding is looked up, norms are nothing
        if tensor.n_rows > 1:
            weights[tensor.kind] = weights.get(tensor.kind, 0) + tensor.n_rows * tensor.n_cols
    if model.torch is not None:
        per_value = float(VALUE_BYTES[model.torch.values])
    else:
        kinds = (settings.type_k, settings.type_v)
        per_value = sum(KV_TYPES[kind].bits_per_weight for kind in kinds) / 16
    return Work(model, weights, per_value)
