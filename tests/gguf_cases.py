"""Exports as a user makes them, and llama.cpp's own of the same."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from pathlib import Path

import llama_cpp

from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant.choose import DEFAULT
from dus_edge.quant.recipe import PRESETS
from dus_edge.quant.types import TYPES
from dus_edge.upscale.model import plan_chooser

SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))

#: Shapes that trigger every rule and fallback, as overrides of the smallest Llama.
SHAPES = {
    "gqa-256": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8},
    "mha": {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4},
    # n_gqa >= 4 is a rule of q2_k.
    "gqa-4": {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 256},
    "tied": {"hidden_size": 256, "intermediate_size": 256, "tie_word_embeddings": True},
    # 576 = SmolLM's width, no multiple of 256; 172 is none of 32.
    "fallback-32": {"hidden_size": 288, "num_attention_heads": 6, "intermediate_size": 320},
    "fallback-f16": {"hidden_size": 96, "intermediate_size": 172},
    "tied-narrow": {"hidden_size": 96, "intermediate_size": 172, "tie_word_embeddings": True},
    "80-layers": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 53,
        "plan": "0:40,13:53",
        "vocab_size": 4100,
    },
    "80-layers-mha": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 80,
        "num_key_value_heads": 4,
        "plan": "0:80",
        "vocab_size": 4097,
    },
    "odd-vocabulary": {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 4099},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head-dim": {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32},
}


def export(
    base: Path | str, out: Path, *presets: str, plan: str | None = None, quantizer: str = DEFAULT
) -> dict[str, Path]:
    """Export as a user does and give the files by preset."""
    choose = plan_chooser(None, None, (plan,) if plan else (), True)
    chosen = [PRESETS[p] for p in presets]
    result = export_gguf(str(base), choose, chosen, out, quantizer=quantizer)
    for written in result.outputs:
        assert written.path.stat().st_size == written.nbytes
    return {w.preset: w.path for w in result.outputs}


def llama_quantize(source: Path, target: Path, preset: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = PRESETS[preset].file_type
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert code == 0


def llama_quantize_as(source: Path, target: Path, types: Mapping[str, str]) -> None:
    """llama-quantize with --tensor-type for each tensor, by its whole name."""
    entries = [
        llama_cpp.llama_model_tensor_override(f"^{re.escape(n)}$".encode(), TYPES[kind].ggml_id)
        for n, kind in types.items()
    ]
    entries.append(llama_cpp.llama_model_tensor_override(None, 0))
    overrides = (llama_cpp.llama_model_tensor_override * len(entries))(*entries)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = PRESETS["q4_k_m"].file_type, 2
    params.tt_overrides = ctypes.cast(
        overrides, ctypes.POINTER(llama_cpp.llama_model_tensor_override)
    )
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    assert code == 0


def assert_same_as_llama_quantize(files: dict[str, Path], tmp_path: Path) -> None:
    for preset, ours in files.items():
        theirs = tmp_path / "theirs.gguf"
        llama_quantize(files["f32"], theirs, preset)
        assert ours.read_bytes() == theirs.read_bytes(), preset
