"""The sizes that describe a model, wherever they were read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dus_edge.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder-only transformer.

    Raises:
        UsageError: a size is not positive.

    Attributes:
        hidden_size: width of the residual stream.
        n_heads: heads of the queries.
        n_kv_heads: heads of keys and of values.
        head_dim: width of a head.
        n_layers: decoder layers.
        intermediate_size: width of the feed-forward network.
        vocab_size: rows of the embedding.
        context_length: tokens that the model was made for.
    """

    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_layers: int
    intermediate_size: int
    vocab_size: int
    context_length: int

    @property
    def q_width(self) -> int:
        """Rows of the query projection: heads × head size."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Rows of the key and of the value projection: KV heads × head size."""
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Rows of the three as one matrix."""
        return self.q_width + 2 * self.kv_width

    @property
    def gate_up_width(self) -> int:
        """Rows of the feed-forward network's gate and up as one matrix."""
        return 2 * self.intermediate_size

    @property
    def grouped_queries(self) -> bool:
        """Whether several query heads share a key head."""
        return self.n_heads != self.n_kv_heads

    def __post_init__(self) -> None:
        for key, size in self.sizes().items():
            if size < 1:
                raise UsageError(f"{key} is {size}; at least 1 is needed.")

    def sizes(self) -> dict[str, Any]:
        """The sizes by name, of a subclass too: what another `Shape` is made from."""
        return {f.name: getattr(self, f.name) for f in fields(Shape)}
