"""The weights that a GPTQ folder means, as a plain folder.

`bench_divergence.py` reads our folders and GPTQModel's by it, so that no kernel's rounding is part
of what it compares.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dus_edge.quant.gptq_format import dequantized

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def write_dense(folder: Path, base: Path, out: Path) -> None:
    """A GPTQ folder of version 1 as a plain one: float32 for the quantized, the rest as is."""
    config = json.loads((folder / "config.json").read_text())
    bits = config.pop("quantization_config")["bits"]
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    stems = [name.removesuffix(".qweight") for name in found if name.endswith(".qweight")]
    for stem in stems:
        parts = [found.pop(f"{stem}.{part}").numpy() for part in PARTS]
        found[f"{stem}.weight"] = torch.from_numpy(dequantized(*parts, bits))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_file(found, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    for path in base.glob("token*"):
        shutil.copy(path, out)
