"""The memory of a device as the budget of a mix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dus_edge.checkpoint.config import ModelConfig
from dus_edge.predict.devices import Device
from dus_edge.predict.memory.llama import (
    device_tensors,
    memory_use,
    model_of_config,
    padded_sizes,
)
from dus_edge.predict.stored_model import RunSettings, TensorSize
from dus_edge.quant.mix.budget import Budget
from dus_edge.quant.mix.matrices import Matrix
from dus_edge.quant.recipe import PRESETS
from dus_edge.quant.types import TYPES, QuantType
from dus_edge.words import format_bytes


def device_budget(
    config: ModelConfig,
    matrices: Sequence[Matrix],
    device: Device,
    settings: RunSettings,
    usable: int,
) -> Budget:
    """What a mix of this model may take of a device's memory, all layers on it.

    The matrices count as they are padded there, and as often: not at all where they stay on the
    host, as the embedding does beside a GPU, twice where there are two copies.

    Args:
        config: of the model to be written.
        matrices: of the same.
        device: what it is to run on.
        settings: how, with what memory depends on of the device (`fit.settings_on`).
        usable: bytes that a model may take there.
    """
    some = model_of_config(config, PRESETS["q8_0"])
    copies = Counter(x.name for x in device_tensors(some, settings))

    def cost(matrix: Matrix, kind: QuantType) -> int:
        size = TensorSize(matrix.name, kind.name, matrix.n_rows, matrix.n_cols, matrix.nbytes(kind))
        return copies[matrix.name] * padded_sizes([size], settings)

    def refusal(least: int) -> str:
        return (
            f"No mix fits {device.id} at a context of {settings.context:,}: the smallest takes "
            f"{format_bytes(least)} ({least:,} bytes) of the {format_bytes(usable)} that a model "
            "may take there; shorten the context, drop more layers, or name a larger device."
        )

    kinds = {x.name: TYPES[x.kind] for x in some.tensors}
    taken = sum(cost(m, kinds[m.name]) for m in matrices)
    rest = memory_use(some, settings).total_bytes - taken
    return Budget(f"{device.id}, context {settings.context:,}", usable, rest, cost, refusal)
