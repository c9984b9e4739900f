"""How many parameters a model has, by layer, and which of them are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dus_edge.checkpoint.config import ModelConfig, tensor_shapes
from dus_edge.predict.training.work import TrainingWork


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        layer: of one layer; all are alike.
        linear: of these, those of linear matrices.
        down: of the largest linear matrix of a layer.
        embedding: of the embedding.
        head: of the head; 0 where it is tied to the embedding.
        last_norm: of the norm before the head.
        adapter: of the adapters of one layer.
        n_layers: layers.
    """

    layer: int
    linear: int
    down: int
    embedding: int
    head: int
    last_norm: int
    adapter: int
    n_layers: int

    @property
    def ends(self) -> int:
        """All that stands outside layers."""
        return self.embedding + self.head + self.last_norm

    @property
    def total(self) -> int:
        """The model's own, without adapters."""
        return self.n_layers * self.layer + self.ends

    def trained(self, work: TrainingWork) -> int:
        """Those that learn."""
        if work.lora_rank:
            return self.n_layers * self.adapter
        n = self.n_layers if work.layers is None else len(work.layers)
        return n * self.layer + (self.ends if work.ends else 0)


def count_parameters(config: ModelConfig, lora_rank: int = 0) -> Parameters:
    """The parameters of a model of that configuration, from the shapes of its tensors.

    Args:
        config: the model's.
        lora_rank: of adapters: r × (inputs + outputs) for each linear matrix.
    """
    family = config.family
    layer = linear = down = adapter = ends = 0
    for name, shape in tensor_shapes(config).items():
        n = math.prod(shape)
        place = family.layer_of(name)
        if place is None:
            ends += n
        elif place[0] == 0:
            layer += n
            if family.is_linear(name):
                linear += n
                down = max(down, n)
                adapter += lora_rank * sum(shape)
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tied_head else embedding
    return Parameters(
        layer=layer,
        linear=linear,
        down=down,
        embedding=embedding,
        head=head,
        last_norm=ends - embedding - head,
        adapter=adapter,
        n_layers=config.n_layers,
    )
