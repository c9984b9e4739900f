"""Configurations as the hub holds them; the published parameter counts are the oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dus_edge.checkpoint.config import load_config, parse_config, tensor_shapes, with_layers
from dus_edge.errors import DusEdgeError

CONFIGS = Path(__file__).parent / "data" / "configs"

#: Parameters as the models' pages state them.
PARAMETERS = {
    "llama-1-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-instruct-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-7b-v0.3-transformers-5": 7_248_023_552,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "solar-10.7b-v1.0": 10_731_524_096,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "smollm3-3b": 3_075_098_624,
    "granite-3.3-8b": 8_170_864_640,
    "phi-4": 14_659_507_200,
    "glm-4-9b-0414": 9_400_279_040,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
}


def test_every_config_has_its_count():
    assert {p.stem for p in CONFIGS.glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    config = load_config(CONFIGS / f"{name}.json")
    assert sum(map(math.prod, tensor_shapes(config).values())) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_same_as_transformers(name):
    """transformers' own reading of the same file."""
    transformers = pytest.importorskip("transformers")
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    ours = parse_config(raw)
    theirs = transformers.AutoConfig.for_model(**raw)
    assert ours.n_layers == theirs.num_hidden_layers
    assert ours.n_heads == theirs.num_attention_heads
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.rope.theta == rope["rope_theta"]
    assert ours.rope.kind == rope["rope_type"]
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


def test_solar_is_mistral_upscaled():
    mistral = load_config(CONFIGS / "mistral-7b-v0.1.json")
    solar = load_config(CONFIGS / "solar-10.7b-v1.0.json")
    shapes = tensor_shapes(with_layers(mistral, (*range(24), *range(8, 32))))
    assert shapes == tensor_shapes(solar)


@given(
    st.sampled_from(sorted(p.stem for p in CONFIGS.glob("*.json"))),
    st.data(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_field_may_be_nonsense(name, data, value):
    """Read or refused with a sentence; never a traceback."""
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    raw[data.draw(st.sampled_from(sorted(raw)))] = value
    try:
        config = parse_config(raw)
    except DusEdgeError:
        return
    assert config.n_layers > 0
    assert config.kv_width <= config.q_width
