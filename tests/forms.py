"""Every form of model that the program knows, and transformers' own way to up-scale one."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers

MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Every form of model, as overrides of the smallest Llama.
FORMS = {
    "llama-gqa": {},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-3": {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0},
    "llama-3-tied-head-dim": {
        "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": True,
        "head_dim": 32,
    },
    "llama-5-spelling": {
        "rope_theta": ...,
        "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0},
    },
    "llama-linear-rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-yarn-rope": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-old-config": {"rope_theta": ..., "num_key_value_heads": ..., "hidden_act": ...},
    "mistral-v0.1": {**MISTRAL, "sliding_window": 4096},
    "mistral-v0.3": {**MISTRAL, "sliding_window": None, "rope_theta": 1000000.0},
    "mistral-head-dim": {**MISTRAL, "sliding_window": None, "head_dim": 32},
}


def load(folder: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def deep_copied(model, sources):
    """transformers' own model with its layers copied in order: the meaning of a plan."""
    model = copy.deepcopy(model)
    layers = [copy.deepcopy(model.model.layers[i]) for i in sources]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in sources]
    return model
