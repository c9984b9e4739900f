"""A small model of every family in its real form: config.json as the hub has it, random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from dus_edge.checkpoint.builtin import model_dir
from dus_edge.families.family import load_families

from .conftest import TOKENIZER_FILES

#: What all of them share, in Llama's keys; a family's own take their place.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
WIDE = {"hidden_size": 256, "intermediate_size": 512}
#: m = 2 of 8 layers, a block of four, and one of three, which breaks patterns of two and of four.
PLANS = ("0:6,2:8", "0:8,4:8", "0:5,2:8")


@dataclass(frozen=True)
class Form:
    """A family's model.

    Attributes:
        family: its TOML.
        config: keys of config.json.
        plans: that are tried, of the model's own depth.
        refused: plans that break the family's pattern.
        llama_cpp: whether llama.cpp computes the same; it has no windows in some families.
        spread: of weights, times the root of the width.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    plans: tuple[str, ...] = PLANS
    refused: tuple[str, ...] = ()
    llama_cpp: bool = True
    spread: float = 0.5

    @property
    def raw(self) -> dict[str, Any]:
        """config.json."""
        family = load_families()[self.family]
        named = {"architectures": [family.architecture], "model_type": family.model_type}
        return {**SMALL, **named, **self.config}

    def wide(self) -> Form:
        """The same of a width that K-quants divide."""
        return replace(self, config={**self.config, **WIDE})


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
GRANITE = {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22}
SMOLLM3 = {"no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": ["full_attention"] * 8}
GEMMA2 = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "hidden_activation": "gelu_pytorch_tanh",
}
#: To 46 layers, where llama.cpp takes a Gemma 2 for the 27B, and to 48. GELU's table is a step that
#: a hair can tip over, in some layer or other: less of it reaches narrow logits.
GEMMA2_PLANS = ("0:23,3:26", "0:24,2:26")
GEMMA3 = {**GEMMA2, "rope_local_base_freq": 10000, "rope_theta": 1e6, "sliding_window_pattern": 6}
#: The same of Gemma 3: 62, and 64.
GEMMA3_PLANS = ("0:31,3:34", "0:32,2:34")


def longrope(n: int, context: int) -> dict[str, Any]:
    """Phi-3's rope of n frequencies."""
    short, long = [1 + i / 8 for i in range(n)], [2.0 + i for i in range(n)]
    factors = {"type": "longrope", "short_factor": short, "long_factor": long}
    return {"rope_scaling": factors, "max_position_embeddings": context}


#: Every family beside Llama and Mistral 7B (`forms`), in each of its real forms.
FAMILY_FORMS = {
    "qwen2": Form("qwen2", {"rope_theta": 1e6, "use_sliding_window": False}),
    "qwen2-windows": Form("qwen2", WINDOWS, llama_cpp=False),
    "qwen2-tied-yarn": Form("qwen2", {"rope_scaling": YARN, "tie_word_embeddings": True}),
    "qwen3": Form("qwen3", {"head_dim": 32, "rope_theta": 1e6, "attention_bias": False}),
    "qwen3-tied-no-head-dim": Form("qwen3", {"tie_word_embeddings": True}),
    "nemo": Form("mistral", {"head_dim": 32, "sliding_window": None, "rope_theta": 1e6}),
    "smollm3": Form("smollm3", {"rope_theta": 5e6}, PLANS[:2], PLANS[2:]),
    "smollm3-listed": Form("smollm3", SMOLLM3, PLANS[:2], PLANS[2:]),
    "granite": Form("granite", {**GRANITE, "logits_scaling": 8.0, "tie_word_embeddings": True}),
    "granite-biases": Form("granite", {**GRANITE, "attention_bias": True, "mlp_bias": True}),
    "olmo2": Form("olmo2", {"rms_norm_eps": 1e-6, "rope_theta": 5e5}),
    "gemma2": Form("gemma2", GEMMA2, PLANS[:2], PLANS[2:]),
    "gemma2-26": Form("gemma2", {**GEMMA2, "num_hidden_layers": 26}, GEMMA2_PLANS, spread=0.2),
    "gemma3": Form("gemma3", GEMMA3),
    "gemma3-34": Form("gemma3", {**GEMMA3, "num_hidden_layers": 34}, GEMMA3_PLANS, spread=0.2),
    "phi3": Form("phi3", {"sliding_window": 64}),
    "phi3-long": Form("phi3", {"original_max_position_embeddings": 32, **longrope(8, 256)}),
    "phi3-short": Form("phi3", {"original_max_position_embeddings": 256, **longrope(8, 512)}),
    "phi4-mini": Form("phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "glm4": Form("glm4", {"head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4-no-bias": Form("glm4", {"head_dim": 32, "attention_bias": False}),
}


def write_model(form: Form, folder: Path, rows: int | None = None) -> Path:
    """A checkpoint in float32: the model that transformers makes of the form, at random.

    Of matrices only so many rows, where given; the others are zeros, which are quantized fast.
    """
    folder.mkdir(parents=True)
    text = json.dumps(form.raw)
    (folder / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() > 1:
                x.copy_(torch.randn_like(x) * form.spread / form.raw["hidden_size"] ** 0.5)
                x[rows or len(x) :] = 0
            else:  # norms lie around their neutral factor, biases around none
                x.add_(torch.randn_like(x) * 0.1)
            assert torch.isfinite(x).all(), name
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)
    for file in TOKENIZER_FILES:
        shutil.copy(model_dir() / file, folder / file)
    return folder
