"""Presets and types: numbers against the library, spellings; the rules themselves in test_gguf."""

import ctypes

import pytest

from dus_edge.errors import UsageError
from dus_edge.quant import ggml
from dus_edge.quant.recipe import PRESETS, ModelShape, find_preset, tensor_type
from dus_edge.quant.types import TYPES


def test_block_sizes_are_the_librarys():
    lib = ggml.library()
    lib.ggml_type_name.restype = ctypes.c_char_p
    for kind in TYPES.values():
        assert lib.ggml_type_size(kind.ggml_id) == kind.block_bytes, kind
        assert lib.ggml_blck_size(kind.ggml_id) == kind.block_weights, kind
        assert lib.ggml_type_name(kind.ggml_id).decode().upper() == kind.name


def test_file_types_are_the_librarys():
    import llama_cpp

    for preset in PRESETS.values():
        stem = "ALL_" if preset.name == "f32" else "MOSTLY_"
        assert getattr(llama_cpp, f"LLAMA_FTYPE_{stem}{preset.label}") == preset.file_type


def test_twice_used_layers_get_two_types_in_solar():
    """At 32 → 48 the mix gives 11 of the 16 doubled layers other types in their two places."""
    model = ModelShape(48, 32, 8, tied_head=False)
    preset = PRESETS["q4_k_m"]

    def kind(layer):
        return tensor_type(preset, f"blk.{layer}.ffn_down.weight", (4096, 14336), model)

    differing = [i for i in range(8, 24) if kind(i) != kind(i + 16)]
    assert len(differing) == 11


@pytest.mark.parametrize(("size", "name"), [("70B", "Q5_K"), ("34B", "Q4_K")])
@pytest.mark.parametrize("preset", ["iq3_s", "iq3_m"])
def test_shared_values_of_a_70b_get_more_bits(preset, size, name):
    """llama_tensor_get_type of llama-quant.cpp: attn_v of Q3_K or Q4_K becomes Q5_K there."""
    model = ModelShape(80, 64, 8, tied_head=False, llama_cpp_type=size)
    kind = tensor_type(PRESETS[preset], "blk.9.attn_v.weight", (1024, 8192), model)
    assert kind.name == name


@pytest.mark.parametrize(
    ("typed", "meant"), [("q4km", "q4_k_m"), ("Q8", "q8_0"), ("q4_k_l", "q4_k_"), ("int4", "")]
)
def test_unknown_preset_suggests_the_nearest(typed, meant):
    with pytest.raises(UsageError, match=f"no preset '{typed}'; did you mean {meant}"):
        find_preset(typed)


@pytest.mark.parametrize("typed", ["Q4_K_M", "q4-k-m", " q4_k_m ", "Q4_K"])
def test_spellings(typed):
    assert find_preset(typed) is PRESETS["q4_k_m"]
