"""SmolLM2-135M for judging K-quants: its rows made multiples of 256, its weights off their grid.

    python benchmarks/padded.py SMOLLM2 -o PADDED [--seed 0]

SMOLLM2 is what `smollm2.py` makes. Its width, 576, is no multiple of 256, so that llama.cpp would
store nearly all of it in other types. Here each 256 channels hold 192 real ones and 64 zeros: 768
in all, norms × √¾ and their epsilon × ¾, since a mean over channels is now over more of them; the
logits stay the same up to rounding. A fourth head of keys and values and the three that look at it
are zeros, so that no input that is not zero meets weights that are.

Its matrices lie on a grid, of Q4_1 or (the embedding) Q8_0, which would flatter some types. Each
weight moves by a uniform draw of up to half a step of its block, as far as it may have been from
the grid before it was stored: the result is a model of its own, a little worse than the published
one, and the reference of all comparisons.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

#: Of 256 channels, and values of a grid's block.
REAL, BLOCK, STEPS = 192, 32, {"Q4_1": 15, "Q8_0": 127}


def padded(x: np.ndarray, axis: int) -> np.ndarray:
    """Channels along an axis in groups of 192, with 64 zeros behind each."""
    x = np.moveaxis(x, axis, -1)
    groups = x.reshape(*x.shape[:-1], -1, REAL)
    zeros = [(0, 0)] * (groups.ndim - 1) + [(0, 256 - REAL)]
    wide = np.pad(groups, zeros).reshape(*x.shape[:-1], -1)
    return np.ascontiguousarray(np.moveaxis(wide, -1, axis))


def dithered(w: np.ndarray, grid: str, draw: np.random.Generator) -> np.ndarray:
    """Weights ``(rows, columns)`` float32 up to half a step of their block's grid away."""
    blocks = w.reshape(w.shape[0], -1, BLOCK)
    if grid == "Q8_0":
        span = np.abs(blocks).max(axis=-1, keepdims=True)
    else:
        span = blocks.max(axis=-1, keepdims=True) - blocks.min(axis=-1, keepdims=True)
    noise = draw.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
    return (blocks + noise * (span / STEPS[grid])).reshape(w.shape)


def converted(name: str, w: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A tensor of the padded model."""
    if w.ndim == 1:
        return padded(w, 0) * np.float32(np.sqrt(REAL / 256))
    w = dithered(w, "Q8_0" if "embed" in name else "Q4_1", draw)
    if "down_proj" in name:
        return padded(w, 0)
    if "o_proj" in name:  # its inputs are heads: the new ones stand at the end
        return padded(np.pad(w, [(0, 0), (0, w.shape[1] // 3)]), 0)
    if any(f"{x}_proj" in name for x in "qkv"):
        w = np.pad(w, [(0, w.shape[0] // 3), (0, 0)])
    return padded(w, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = np.random.default_rng(args.seed)
    config = json.loads((args.source / "config.json").read_text())
    tensors = load_file(args.source / "model.safetensors")
    args.output.mkdir(parents=True)
    for path in args.source.iterdir():
        if path.suffix in {".json", ".jinja", ".txt"} and path.name != "config.json":
            shutil.copy(path, args.output)
    config |= {
        "hidden_size": config["hidden_size"] * 256 // REAL,
        "num_attention_heads": config["num_attention_heads"] * 4 // 3,
        "num_key_value_heads": config["num_key_value_heads"] * 4 // 3,
        "head_dim": 64,
        "rms_norm_eps": config["rms_norm_eps"] * REAL / 256,
    }
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    found = {name: converted(name, tensors[name], draw) for name in sorted(tensors)}
    save_file(found, args.output / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
