"""A mix for a device keeps its predicted memory, and uses it; one for a size keeps that."""

from __future__ import annotations

import math
import random

import pytest

from dus_edge.checkpoint.config import ModelConfig, config_of_shape, tensor_shapes
from dus_edge.errors import UsageError
from dus_edge.export.gguf.format import data_size
from dus_edge.export.gguf.mix import file_budget, mixed_preset, model_matrices, preset_types
from dus_edge.export.gguf.sink import plan_tensors
from dus_edge.families.shape import Shape
from dus_edge.predict.devices import Device, find_device, load_devices
from dus_edge.predict.fit import judge, settings_on
from dus_edge.predict.memory.llama import memory_use, model_of_config, usable_bytes
from dus_edge.predict.memory.mix import device_budget
from dus_edge.predict.prediction import memory_settings
from dus_edge.quant.mix.budget import best_types
from dus_edge.quant.mix.matrices import items_of
from dus_edge.quant.mix.solve import largest_bytes, smallest_bytes
from dus_edge.quant.recipe import PRESETS

from .mix_cases import made_up
from .shapes import LLAMA3_8B, SOLAR

#: Cases in which the memory is neither below the smallest mix nor above the largest.
N_CASES = 40


def random_config(draw: random.Random) -> ModelConfig:
    """A model of 0.5 to 40 B parameters; some widths divide badly."""
    head_dim = draw.choice((64, 96, 128))
    n_kv_heads = draw.choice((2, 4, 8))
    n_heads = n_kv_heads * draw.choice((1, 2, 4, 7))
    hidden = draw.choice((1536, 2048, 2880, 3072, 4096, 5120))
    shape = Shape(
        n_layers=draw.randrange(16, 73),
        hidden_size=hidden,
        intermediate_size=32 * round(hidden * draw.uniform(2, 4) / 32),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=draw.choice((32000, 64256, 128256)),
        context_length=32768,
    )
    return config_of_shape(shape, tied_head=draw.random() < 0.3)


def devices() -> list[tuple[Device, float]]:
    return [(device, gb) for device in load_devices() for gb in device.memory_gb_options]


def test_predicted_memory_is_kept_and_used():
    """Forty models, devices and contexts: never over, within 1.5 % of what there is."""
    draw = random.Random(16)
    seen, refused = [], 0
    while len(seen) < N_CASES:
        config, (device, gb) = random_config(draw), draw.choice(devices())
        n_weights = sum(math.prod(shape) for shape in tensor_shapes(config).values())
        if not 2 < 8 * gb * 2**30 / n_weights < 12:
            continue  # far too small, or large enough for anything
        context = 256 * draw.randrange(1, 65)
        platform = draw.choice(("windows", "linux")) if device.backend == "CUDA" else None
        matrices = model_matrices(config, tensor_shapes(config))
        losses = made_up(matrices, seed=len(seen)).kl
        stored = model_of_config(config, PRESETS["q8_0"])
        settings = settings_on(device, memory_settings(stored, context=context))
        usable = usable_bytes(device, platform, gb)
        budget = device_budget(config, matrices, device, settings, usable)
        items = items_of(matrices, losses, {}, budget.cost, "x")
        if usable < budget.rest + smallest_bytes(items):
            refused += 1
            with pytest.raises(UsageError, match=f"No mix fits {device.id} at a context of"):
                best_types(matrices, losses, {}, budget, "x")
            continue
        if usable > budget.rest + largest_bytes(items):
            continue
        best = best_types(matrices, losses, {}, budget, "x")
        model = model_of_config(config, mixed_preset(matrices, best.kinds, {}, 4.5))
        taken = memory_use(model, settings).total_bytes
        assert taken == budget.total(matrices, best.kinds), (device.id, config)
        assert judge(model, device, settings, platform=platform, memory_gb=gb).fits
        assert 0.985 * usable <= taken <= usable, (device.id, gb, context, config)
        seen.append((device.id, best.gap / best.loss))
    assert refused and len({name for name, _ in seen}) > 20
    # What no mix of the same memory could have less of.
    assert max(gap for _, gap in seen) < 0.01


@pytest.mark.parametrize("sizes", [LLAMA3_8B, SOLAR, {**SOLAR, "hidden_size": 4128}])
def test_a_size_is_kept_and_used(sizes):
    config = config_of_shape(Shape(**sizes))
    shapes = tensor_shapes(config)
    matrices = model_matrices(config, shapes)
    losses = made_up(matrices).kl
    for preset in ("q3_k_m", "q4_k_m", "q6_k"):
        most = 1000 + data_size(plan_tensors(config, shapes, PRESETS[preset]))
        budget = file_budget(config, shapes, 1000, most, preset)
        assert budget.total(matrices, preset_types(PRESETS[preset], config, matrices)) == most
        best = best_types(matrices, losses, {}, budget, "x")
        mix = mixed_preset(matrices, best.kinds, {}, 4.5)
        nbytes = 1000 + data_size(plan_tensors(config, shapes, mix))
        assert nbytes == budget.total(matrices, best.kinds)
        assert 0.995 * most <= nbytes <= most


def test_an_embedding_beside_a_gpu_costs_nothing():
    """It stays on the host, so it is as good as can be; with a tied head its copy counts."""
    device = find_device("rtx-3060-12gb")
    for tied, kind in ((False, "Q8_0"), (True, None)):
        config = config_of_shape(Shape(**SOLAR), tied_head=tied)
        matrices = model_matrices(config, tensor_shapes(config))
        settings = settings_on(device, memory_settings(model_of_config(config, PRESETS["f16"])))
        budget = device_budget(config, matrices, device, settings, usable_bytes(device))
        embedding = next(m for m in matrices if m.role == "embedding")
        assert (budget.cost(embedding, PRESETS["q8_0"].default) > 0) is tied
        best = best_types(matrices, made_up(matrices).kl, {}, budget, "x")
        assert kind is None or best.kinds[embedding.name].name == kind
