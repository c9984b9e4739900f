"""Logits of GPTQ folders as GPTQModel reads them; runs in the environment of gptqmodel.txt.

GPTQModel computes in bfloat16 or float16 on a CPU. So that differences in its reading are not
lost among rounding errors, its loaded modules dequantize themselves with float32 scales, and the
model runs in float32 on what they give.

    python load_gptqmodel.py OUT FOLDER...

writes OUT/<folder's name>.gptqmodel.npy, float32 (sequence, token, vocabulary).
"""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from batch import token_batch
from gptqmodel import BACKEND, GPTQModel
from loader import main
from torch import nn


def logits(folder: str) -> np.ndarray:
    """Load, dequantize by the loader's own code, run in float32."""
    # float16 holds the stored scales exactly; bfloat16, the default, would round them.
    loaded = GPTQModel.load(
        folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
    ).model
    quantized = [(n, m) for n, m in loaded.named_modules() if hasattr(m, "dequantize_weight")]
    if not quantized:
        raise RuntimeError("no module was loaded as quantized")
    for name, module in quantized:
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        module.scales = module.scales.float()
        linear.weight = nn.Parameter(module.dequantize_weight().float().T.contiguous())
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.float())
        loaded.set_submodule(name, linear)
    loaded = loaded.float().eval()
    with torch.no_grad():
        ids = torch.from_numpy(token_batch(loaded.config.vocab_size))
        return loaded(ids).logits.numpy()


if __name__ == "__main__":
    main("gptqmodel", logits)
