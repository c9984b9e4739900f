"""Compare loaders' logits with those of our own reading of GPTQ folders, in float32.

Runs in the project's environment:

    python compare.py OUT LOADER... -- FOLDER...

reads OUT/<folder's name>.<loader>.npy, prints one row per loader and folder, and exits with 1 if
a difference is above the bound or a loader failed. The reference shares no code with the export:
it unpacks codes from the description of the format alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from batch import token_batch

#: Largest difference of a logit that passes.
BOUND = 1e-2


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the first axis: ``(n, m)`` int32 words to ``(32 n / bits, m)`` codes.

    A column of words is one long string of bits, lowest first, cut into codes; so codes of 3 bits
    run across words.
    """
    n, m = words.shape
    raw = np.ascontiguousarray(words.T).view(np.uint8).reshape(m, 4 * n)
    string = np.unpackbits(raw, axis=1, bitorder="little").reshape(m, -1, bits)
    return (string.astype(np.int64) << np.arange(bits)).sum(axis=2).T


def dequantize(parts: dict[str, np.ndarray], bits: int, plus_one: int) -> np.ndarray:
    """Weight ``(out, in)`` float32 of one linear layer's qweight, qzeros, scales and g_idx."""
    codes = unpack(parts["qweight"], bits)
    zeros = unpack(parts["qzeros"].T, bits).T + plus_one
    group = parts["g_idx"]
    scales = parts["scales"].astype(np.float32)
    return (scales[group] * (codes - zeros[group])).T.astype(np.float32)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quantization's settings, and float32 tensors under transformers' names."""
    import torch
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = config["quantization_config"]
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    plus_one = int(settings.get("checkpoint_format", "gptq") == "gptq")
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        stem, _, part = name.rpartition(".")
        if part == "qweight":
            names = ("qweight", "qzeros", "scales", "g_idx")
            parts = {p: stored[f"{stem}.{p}"].numpy() for p in names}
            dense = dequantize(parts, settings["bits"], plus_one)
            weights[f"{stem}.weight"] = torch.from_numpy(dense)
        elif part not in ("qzeros", "scales", "g_idx"):
            weights[name] = tensor.float()
    return settings, weights


def reference(folder: Path, weights: dict[str, Any]) -> np.ndarray:
    """Logits of the dequantized weights in transformers' own Llama or Mistral, float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.from_numpy(token_batch(config.vocab_size))).logits.numpy()


def row_of(out: Path, folder: Path, loader: str, expected: np.ndarray) -> tuple[str, bool]:
    """The cells that tell of the difference, and whether it passes."""
    path = out / f"{folder.name}.{loader}.npy"
    if not path.exists():
        error = path.with_suffix(".error")
        why = error.read_text(encoding="utf-8").strip() if error.exists() else "no logits"
        return f"{'-':>12}  FAILED  {why}", False
    found = np.load(path)
    if found.shape != expected.shape:
        return f"{'-':>12}  FAILED  shape {found.shape} instead of {expected.shape}", False
    worst = float(np.abs(found - expected).max())
    passed = worst <= BOUND  # NaN does not pass
    return f"{worst:12.3g}  {'pass' if passed else 'FAILED'}", passed


def main() -> int:
    """Print the table."""
    out, *rest = sys.argv[1:]
    split = rest.index("--")
    loaders, folders = rest[:split], [Path(f) for f in rest[split + 1 :]]
    print(f"{'loader':<12}{'bits':>5}{'group':>7}  {'sym':<7}{'desc_act':<10}{'max |Δlogit|':>12}")
    failed = 0
    for folder in folders:
        settings, weights = read_folder(folder)
        expected = reference(folder, weights)
        for loader in loaders:
            cells, passed = row_of(Path(out), folder, loader, expected)
            failed += not passed
            print(
                f"{loader:<12}{settings['bits']:>5}{settings['group_size']:>7}  "
                f"{settings['sym']!s:<7}{settings['desc_act']!s:<10}{cells}",
                flush=True,
            )
    print(f"bound {BOUND:g}, logits' standard deviation {expected.std():.2f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
