"""Families as data: each TOML against transformers and gguf-py, and what a new one can say."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import replace
from importlib.resources import files

import gguf
import numpy as np
import pytest
import torch
import transformers

from dus_edge.checkpoint.config import parse_config, tensor_shapes, with_layers
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Source
from dus_edge.errors import UnsupportedError, UsageError
from dus_edge.export.gguf import sink
from dus_edge.export.gguf.metadata import check_layers
from dus_edge.families.family import (
    FamilyError,
    find_family,
    find_gguf_family,
    load_families,
    parse_family,
)
from dus_edge.families.refused import refusal
from dus_edge.quant.choose import find_quantizer
from dus_edge.quant.recipe import find_preset
from dus_edge.upscale.plan import check_pattern, from_drop, from_ranges, identity

FAMILIES = load_families()
TABLES = {
    name: tomllib.loads((files("dus_edge.families") / f"{name}.toml").read_text("utf-8"))
    for name in FAMILIES
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
VARIANTS = (
    {},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"tie_word_embeddings": True},
    {"head_dim": 32},
)


def transformers_model(family, **changes):
    config = transformers.AutoConfig.for_model(family.model_type, **SMALL | changes)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_those_of_transformers(name):
    family = FAMILIES[name]
    for changes in VARIANTS:
        if not set(changes) <= {rule.key for rule in family.fields.values()}:
            continue
        model = transformers_model(family, **changes)
        if not hasattr(model.config, next(iter(changes), "hidden_size")):
            continue
        raw = {**model.config.to_dict(), "architectures": [family.architecture]}
        theirs = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        if raw["tie_word_embeddings"]:
            del theirs["lm_head.weight"]
        if changes in ({"attention_bias": True}, {"mlp_bias": True}) and not any(
            k.endswith(".bias") for k in theirs
        ):
            continue  # a flag that this architecture of transformers does not look at
        ours = tensor_shapes(parse_config(raw))
        assert ours == theirs, (name, changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_names_are_those_of_gguf_py(name):
    family = FAMILIES[name]
    arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == family.gguf_architecture)
    names = gguf.get_tensor_name_map(arch, 3)
    for tensor in transformers_model(family).state_dict():
        stem, _, part = tensor.rpartition(".")
        if names.get_name(stem) is None:  # there the embedding is always the head
            assert stem == "lm_head" and family.fields["tied_head"].default is True
            continue
        assert family.gguf_name(tensor) == f"{names.get_name(stem)}.{part}"


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_are_transformers_own(name):
    """What quantizers make codes of: every linear module inside the layers, nothing else."""
    family = FAMILIES[name]
    model = transformers_model(family)
    theirs = {
        f"{module}.weight"
        for module, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and ".layers." in f".{module}"
    }
    assert {n for n in model.state_dict() if family.is_linear(n)} == theirs
    assert not family.is_linear("model.layers.0.self_attn.q_proj.bias")
    assert not family.is_linear("model.layers.x.self_attn.q_proj.weight")
    assert {r.hf for rules in family.sites.values() for r in rules} == {
        re.sub(r"\.\d+\.", ".{i}.", n.removesuffix(".weight")) for n in theirs
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_transformers_own(name):
    """A config.json that says as little as it may means what transformers takes it for."""
    family = FAMILIES[name]
    theirs = transformers.AutoConfig.for_model(family.model_type)
    said = {"architectures": [family.architecture], **SMALL, "num_attention_heads": 8}
    del said["num_key_value_heads"]
    config = parse_config(said)
    for field in ("rms_norm_eps", "context_length", "tied_head", "sliding_window"):
        if field in family.fields:
            assert getattr(config, field) == getattr(theirs, family.fields[field].key), field


def test_found_by_each_of_its_names():
    assert find_family({"architectures": ["LLaMAForCausalLM"]}) is FAMILIES["llama"]
    assert find_family({"model_type": "mistral"}) is FAMILIES["mistral"]
    assert find_family({"architectures": ["GPT2LMHeadModel"], "model_type": "llama"}) is None
    assert find_gguf_family("llama") is FAMILIES["llama"]
    assert find_gguf_family("mamba") is None
    assert find_gguf_family(None) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen3MoeForCausalLM", "a mixture of experts, .*; take a dense model of its line"),
        ("MixtralForCausalLM", "a mixture of experts, .*; take a dense"),
        ("Mistral3ForConditionalGeneration", "a multimodal model, .*such as Mistral Small 3"),
        ("Qwen2_5_VLForConditionalGeneration", "a multimodal model, .*; take a text-only"),
        ("GraniteMoeHybridForCausalLM", "a hybrid, .*; take a GraniteForCausalLM"),
        ("Exaone4ForCausalLM", "number of layers, .*; take EXAONE 3.5, or a Korean model"),
        ("FalconMambaForCausalLM", "a hybrid or recurrent model, .*; take"),
        ("GPT2LMHeadModel", "not supported; known are"),
    ],
)
def test_what_is_refused_is_named_with_what_works(name, said):
    with pytest.raises(UnsupportedError, match=f"c.json: .*{name}.*{said}"):
        parse_config({"architectures": [name], **SMALL}, "c.json")


def test_what_is_refused_is_no_family():
    assert not any(refusal(family.architecture) for family in FAMILIES.values())


def config_of(name, **changes):
    return parse_config({"architectures": [FAMILIES[name].architecture], **SMALL, **changes})


def test_layers_that_a_rule_gives_follow_the_plan():
    """Qwen's windows from a layer on: a list is written where the rule would move them."""
    sources = (0, 1, 2, 3, 1, 2, 3, 4)
    windows = {"use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 5}
    base = config_of("qwen2", **windows)
    assert [base.window(i) for i in range(5)] == [None, None, 4096, 4096, 4096]
    grown = with_layers(base, sources)
    assert [grown.window(i) for i in range(8)] == [base.window(i) for i in sources]
    theirs = transformers.AutoConfig.for_model("qwen2", **grown.raw)
    assert [kind == "full_attention" for kind in theirs.layer_types] == list(grown.full_layers)
    without = with_layers(config_of("qwen2", num_hidden_layers=5, max_window_layers=2), sources)
    assert "layer_types" not in without.raw and without.sliding_window is None
    kept = with_layers(config_of("gemma2", num_hidden_layers=8), (0, 1, 2, 3, 2, 3, 4, 5, 6, 7))
    assert "layer_types" not in kept.raw  # the rule still holds
    odd = with_layers(config_of("smollm3", num_hidden_layers=8), (0, 1, 2, 3, 0, 1))
    assert "no_rope_layers" not in odd.raw
    moved = with_layers(config_of("smollm3", num_hidden_layers=8), (0, 3, 3, 4))
    assert moved.raw["no_rope_layers"] == [1, 0, 0, 1]


def test_layers_that_llama_cpp_takes_for_granted():
    check_layers(config_of("smollm3", num_hidden_layers=8), "c.json")
    listed = config_of("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 0, 1])
    with pytest.raises(
        UnsupportedError, match=r"no_rope_layers does not make each layer number 4, 8.*up"
    ):
        check_layers(listed, "c.json")
    full = {"layer_types": ["full_attention"] * 4, "num_hidden_layers": 4}
    with pytest.raises(UnsupportedError, match="layer_types does not make each layer number 2, 4"):
        check_layers(config_of("gemma2", **full), "c.json")
    check_layers(config_of("gemma2", **full, sliding_window=None), "c.json")
    check_layers(config_of("gemma3", **full), "c.json")  # the file says it


@pytest.mark.parametrize(
    ("name", "n_layers", "factor"),
    [
        ("gemma2", 45, math.sqrt(16 / 24)),
        ("gemma2", 46, math.sqrt(32 / 24)),
        ("gemma3", 61, math.sqrt(16 / 24)),
        ("gemma3", 62, math.sqrt(32 / 24)),
    ],
)
def test_what_llama_cpps_scale_is_short_of_is_folded_in(name, n_layers, factor):
    """Of heads of 16 in a width of 32 a head; the model divides by the root of 24."""
    changes = {"num_attention_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24}
    config = config_of(name, num_hidden_layers=n_layers, **changes)
    role = config.family.scale_role
    assert role is not None
    found = config.family.folded_scale(config.family.name(role, 3), config, config.attention_scale)
    assert found == pytest.approx(factor)
    other = config.family.name("k", 3)
    assert config.family.folded_scale(other, config, config.attention_scale) == 1


def test_a_layers_tensor_in_another_layer():
    family = FAMILIES["llama"]
    name = "model.layers.3.mlp.up_proj.weight"
    assert family.layer_of(name) == (3, "mlp.up_proj.weight")
    assert family.in_layer(name, 12) == "model.layers.12.mlp.up_proj.weight"
    for other in ("model.norm.weight", "model.layers.x.y", "model.layers.7", "layers.3.w"):
        assert family.layer_of(other) is None
        assert family.in_layer(other, 12) == other
    for other in ("model.layers.3.mlp.up_proj.scale", "model.norm", "q", "model.layers.3.q.weight"):
        with pytest.raises(KeyError):
            family.find(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"like": "gone"}, "no family 'gone'"),
        ({"windows": 1}, "unknown entries"),
        ({"arithmetic": "gpt2"}, "arithmetic 'gpt2'"),
        ({"fields": {"n_heads": {"key": "n", "defualt": 1}}}, "unknown entries of a field"),
        ({"fields": {"widht": {"key": "n"}}}, "unknown .'widht'"),
        ({"rope": {"reorder": "mirror"}}, "reorder 'mirror'"),
        ({"layers": {"period": 0}}, "period 0"),
        ({"layers": {"patterns": {"odd": {"list": "x", "entries": [1, 0]}}}}, "odd"),
        ({"layers": {"patterns": {"full": {"list": "x", "entries": [1, 0]}}}}, "x in no lists"),
        ({"without": {"tensors": ["experts"]}}, "without 'experts'"),
        ({"gguf": {"scale_into": "q_norm"}}, "scale into q_norm"),
        ({"rope": {"style": "spiral"}}, "style 'spiral'"),
        ({"fields": {"n_heads": {"null": "none"}}}, "neither key nor default"),
        ({"layers": {"prefix": "layers."}}, "layers."),
        ({"tensors": [{"role": "x", "hf": "a", "gguf": "b"}]}, "shape"),
        ({"tensors": [{"role": "x", "hf": "a", "gguf": "b", "shape": ["depth"]}]}, "depth"),
        ({"tensors": [{"role": "x", "hf": "a", "gguf": "b", "shape": [], "bias": "b"}]}, "looks"),
        ({"gguf": {"keys": [{"key": "x", "value": "n_experts"}]}}, "n_experts"),
    ],
)
def test_a_toml_that_is_wrong_is_found(change, message):
    with pytest.raises(FamilyError, match=message):
        parse_family({"like": "llama", **change}, TABLES)


# What a new family can say


def made_up(**changes):
    return parse_family({"like": "llama", **changes}, TABLES)


def test_a_norm_shift_is_added_where_llama_cpp_multiplies(make_checkpoint, tmp_path):
    """Gemma keeps norms as factors minus one; its converter adds the one."""
    base = make_checkpoint(dtype="BF16")
    shifted = made_up(norm_shift=1.0)
    checkpoint = SafetensorsCheckpoint(Source(base, "b", "b"))
    checkpoint.config = replace(checkpoint.config, family=shifted)
    preset = find_preset("q8_0")
    path = tmp_path / "x.gguf"
    file = sink.plan_file(checkpoint.config, tensor_shapes(checkpoint.config), [], preset, path)
    quantizer = find_quantizer("native")
    quantizer.prepare(sink.conversions(checkpoint, [file]), lambda line: None)
    sink.write_files(checkpoint, [file], quantizer, n_threads=1)
    found = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    norms = [n for n in tensor_shapes(checkpoint.config) if n.endswith("norm.weight")]
    assert len(norms) == 9
    for name in norms:
        stored = (checkpoint.read(name).astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(found[shifted.gguf_name(name)], stored + np.float32(1), name)


def test_rows_stay_as_they_are_where_nothing_is_reordered():
    family = made_up(rope={"reorder": "none"})
    config = parse_config({"architectures": ["LlamaForCausalLM"], **SMALL})
    name = "model.layers.0.self_attn.q_proj.weight"
    assert FAMILIES["llama"].rope_heads(name, config) == 4
    assert family.rope_heads(name, config) is None


def test_a_plan_keeps_the_pattern_of_a_family():
    check_pattern(from_drop(32, 8), 1, "X")
    check_pattern(from_drop(32, 8), 4, "X")  # copies 16 layers, a multiple of 4
    check_pattern(identity(30), 4, "X")
    with pytest.raises(UsageError, match=r"layer 25 .* layer 7.*--drop 8, which makes 48 layers\."):
        check_pattern(from_drop(32, 7), 4, "X")
    with pytest.raises(UsageError, match="choose ranges that keep the pattern"):
        check_pattern(from_ranges(8, [(0, 5), (2, 8)]), 2, "X")
    with pytest.raises(UsageError, match=r"keep the pattern, such as --block 8:22\."):
        check_pattern(from_drop(31, 8), 2, "X")  # no m does


def test_depths_that_llama_cpp_takes_for_a_model_of_its_own():
    raw = {"architectures": ["LlamaForCausalLM"], **SMALL}
    for n_layers, n_kv_heads, kind in ((80, 2, "70B"), (80, 4, None), (79, 2, None)):
        config = parse_config(
            raw | {"num_hidden_layers": n_layers, "num_key_value_heads": n_kv_heads}
        )
        assert config.family.llama_cpp_type(config) == kind
