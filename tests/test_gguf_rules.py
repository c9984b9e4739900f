"""Every rule of llama.cpp's for a tensor's type: our files are llama-quantize's byte for byte."""

from __future__ import annotations

import pytest

from dus_edge.quant.imatrix import DEPENDENT
from dus_edge.quant.recipe import PRESETS

from .gguf_cases import SHAPES, assert_same_as_llama_quantize, export

#: Presets that need no importance; test_imatrix has the others.
ALONE = tuple(name for name, preset in PRESETS.items() if preset.default not in DEPENDENT)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_pico_upscaled_is_what_llama_quantize_writes(pico, tmp_path, dtype, make_checkpoint):
    # ggml is slow at IQ3_S; the shapes below have it.
    base, presets = pico, tuple(p for p in ALONE if "iq3" not in p)
    if dtype != "BF16":  # pico ships in bf16; other dtypes on random weights of its shape
        base = make_checkpoint(dtype=dtype, **SHAPES["gqa-256"])
        presets = ("f32", "f16", "q8_0", "q4_0", "q4_k_m")
    files = export(base, tmp_path / "out", *presets, quantizer="ggml")
    assert_same_as_llama_quantize(files, tmp_path)


#: Deep models show the one rule that depends on depth: attn_v of Q3_K and Q4_K with shared keys.
#: test_recipe asks for that of IQ3_S, at which ggml is slow.
FEW = {
    "80-layers": ("f32", "q2_k", "q3_k_m", "q4_k_m"),
    "80-layers-mha": ("f32", "q3_k_m", "q4_k_m"),
}
#: Rows that are not zeros, of each matrix: rules know nothing of values, and pico has all
#: of its own in every preset but those of IQ3_S.
ROWS = 48


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rule_is_llama_cpps(make_checkpoint, tmp_path, shape):
    overrides = dict(SHAPES[shape])
    plan = overrides.pop("plan", None)
    base = make_checkpoint(rows=ROWS, **overrides)
    presets = FEW.get(shape, ALONE)
    files = export(base, tmp_path / "out", *presets, plan=plan, quantizer="ggml")
    assert_same_as_llama_quantize(files, tmp_path)
