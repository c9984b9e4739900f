"""SOLAR's shape predicted on every device, in the presets that the tables have a column for."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dus_edge import data
from dus_edge.checkpoint.config import ModelConfig, parse_config, tensor_shapes
from dus_edge.predict.devices import Device, load_devices
from dus_edge.predict.memory.folder import model_of_gptq_config
from dus_edge.predict.memory.llama import model_of_config
from dus_edge.predict.prediction import Prediction, StorableModel, memory_settings, predict_on
from dus_edge.predict.stored_model import RunSettings, StoredModel
from dus_edge.progress import Advance
from dus_edge.quant.recipe import find_preset

SOLAR = "solar-10.7b.json"
MODEL = "SOLAR-DUS 10.7B"


@dataclass(frozen=True)
class Column:
    """One way to store the model: a column of the tables.

    Attributes:
        key: ``preset`` of the rows.
        title: what people read.
        store: the model stored so, from its configuration and a name.
        splits: whether what runs it can leave layers to the CPU (llama.cpp's ``-ngl``).
    """

    key: str
    title: str
    store: Callable[[ModelConfig, str], StoredModel]
    splits: bool = True


def _gguf(preset: str) -> Column:
    def store(config: ModelConfig, name: str) -> StoredModel:
        return model_of_config(config, find_preset(preset), name)

    return Column(preset, preset.upper(), store)


def _gptq(config: ModelConfig, name: str) -> StoredModel:
    return model_of_gptq_config(config, name=name)


PRESET_COLUMNS = (
    *map(_gguf, ("f16", "q8_0", "q4_k_m", "q4_0")),
    Column("gptq-int4", "GPTQ-int4", _gptq, splits=False),
)
#: What people ask for first.
USUAL = "q4_k_m"


@dataclass(frozen=True)
class Row:
    """One device in one memory size: a prediction for every column."""

    device: Device
    memory_gb: float
    cells: Mapping[str, Prediction]


@functools.cache
def solar_config() -> ModelConfig:
    """The configuration of SOLAR 10.7B."""
    raw = json.loads(data.read_text(SOLAR))
    return parse_config({k: v for k, v in raw.items() if not k.startswith("_")}, SOLAR)


def predict_all(
    config: ModelConfig, name: str, advance: Advance = lambda n: None
) -> tuple[RunSettings, list[Row]]:
    """Every device with every memory size, at 4,096 tokens of context with flash attention."""
    models = {c.key: c.store(config, f"{name}-{c.title}") for c in PRESET_COLUMNS}
    settings = memory_settings(models[USUAL])
    rows = []
    for device in load_devices():
        for gb in device.memory_gb_options:
            cells = {
                key: predict_on(StorableModel(m, {}), device, settings, memory_gb=gb)
                for key, m in models.items()
            }
            rows.append(Row(device, gb, cells))
            advance(1)
    return settings, rows


def solar_parameters() -> int:
    """Weights of SOLAR 10.7B."""
    return sum(math.prod(shape) for shape in tensor_shapes(solar_config()).values())
