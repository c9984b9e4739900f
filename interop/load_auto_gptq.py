"""Logits of GPTQ folders as auto-gptq computes them; runs in the environment of auto-gptq.txt.

auto-gptq's own kernels run, in float32.

    python load_auto_gptq.py OUT FOLDER...

writes OUT/<folder's name>.auto-gptq.npy, float32 (sequence, token, vocabulary).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from auto_gptq import AutoGPTQForCausalLM
from batch import token_batch
from loader import main
from safetensors import safe_open


def logits(folder: str) -> np.ndarray:
    """Load and run."""
    loaded = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", torch_dtype=torch.float32)
    model = loaded.model.eval()
    if model.config.tie_word_embeddings:
        restore_tied_head(model, Path(folder))
    with torch.no_grad():
        ids = torch.from_numpy(token_batch(model.config.vocab_size))
        return model(ids).logits.numpy()


def restore_tied_head(model: torch.nn.Module, folder: Path) -> None:
    """Give a tied model its embedding back.

    Where the file holds no lm_head.weight of its own, accelerate ties the embedding that it has
    just loaded to the head, which nobody has, and both are uninitialized memory.
    """
    name, stored = "model.embed_tokens.weight", {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= dict.fromkeys(file.keys(), path)
    if "lm_head.weight" in stored:
        return
    with safe_open(stored[name], framework="pt") as file, torch.no_grad():
        model.get_input_embeddings().weight.copy_(file.get_tensor(name))
    model.tie_weights()
    print(f"{folder.name}: the tied embedding was loaded again", flush=True)


if __name__ == "__main__":
    main("auto-gptq", logits)
