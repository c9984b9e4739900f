"""Measure what an MLX folder takes, beside mlx_lm.convert, and compare the two.

    python benchmarks/bench_mlx.py BASE [--drop M] [--bits 4] [--group-size 64] [--work DIR]

Method: see README.md in this folder. Every run is a process of its own; CPU time and maximum
resident size are the kernel's for that process (wait4). `mlx_lm.convert` gets the up-scaled
checkpoint, which `dus-edge upscale` writes first. Then every tensor is compared byte for byte, and
mlx-lm's logits with transformers' on weights that we dequantize. mlx-lm is that of `.venv-mlx`,
which `make test` sets up. Results go to `results/mlx.jsonl`, one line a run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench_export import CLI, Run, measure
from common import HERE, RESULTS, append, machine

from dus_edge.checkpoint.safetensors import StoredTensor, read_header, shard_files
from dus_edge.quant.mlx.format import affine_weights

INTEROP = HERE.parent / "interop"
MLX = HERE.parent / ".venv-mlx" / "bin" / "python"
CONVERT = """
import sys
from mlx_lm import convert
plain, out, bits, group_size = sys.argv[1:]
convert(plain, out, quantize=True, q_bits=int(bits), q_group_size=int(group_size))
"""


def stored(folder: Path) -> dict[str, StoredTensor]:
    return {n: t for file in shard_files(folder)[0] for n, t in read_header(file).items()}


def raw_bytes(tensor: StoredTensor) -> bytes:
    with tensor.file.open("rb") as f:
        f.seek(tensor.offset)
        return f.read(tensor.nbytes)


def n_different(ours: Path, theirs: Path) -> int:
    """Tensors of which a byte differs between two folders of the same tensors."""
    a, b = stored(ours), stored(theirs)
    if {n: (t.dtype, t.shape) for n, t in a.items()} != {
        n: (t.dtype, t.shape) for n, t in b.items()
    }:
        sys.exit("the folders hold other tensors")
    return sum(raw_bytes(a[name]) != raw_bytes(b[name]) for name in a)


def floats(tensor: StoredTensor) -> np.ndarray:
    if tensor.dtype == "BF16":
        wide = np.frombuffer(raw_bytes(tensor), "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    kind = {"F16": "<f2", "F32": "<f4"}[tensor.dtype]
    return np.frombuffer(raw_bytes(tensor), kind).reshape(tensor.shape).astype(np.float32)


def reference(folder: Path, bits: int) -> Any:
    """Logits of the dequantized weights in transformers' own model, float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(INTEROP))
    from batch import token_batch

    tensors, weights = stored(folder), {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if part == "weight" and f"{stem}.scales" in tensors:
            packed = np.frombuffer(raw_bytes(tensor), "<u4").reshape(tensor.shape)
            scales, biases = (floats(tensors[f"{stem}.{p}"]) for p in ("scales", "biases"))
            weights[name] = torch.from_numpy(affine_weights(packed, scales, biases, bits))
        elif part not in ("scales", "biases"):
            weights[name] = torch.from_numpy(floats(tensor))
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.from_numpy(token_batch(config.vocab_size))).logits.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--drop", type=int)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--no-logits", action="store_true", help="compare bytes alone")
    args = parser.parse_args()

    work = args.work.absolute()
    plain, ours, theirs = work / "mlx-plain", work / "mlx-ours", work / "mlx-theirs"
    for folder in (plain, ours, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    drop = [] if args.drop is None else ["--drop", str(args.drop)]
    sizes = [str(args.bits), str(args.group_size)]
    # Kernels are compiled once on a machine; that is not what is measured.
    warm = [*CLI, "mlx", args.base, *drop, "-o", str(ours)]
    subprocess.run(warm, check=True, stdout=subprocess.DEVNULL)

    threads = ["--threads", str(args.threads)]
    options = ["--bits", sizes[0], "--group-size", sizes[1], *threads, "--overwrite"]
    runs: list[Run] = [
        measure("mlx", [*CLI, "mlx", args.base, *drop, *options, "-o", str(ours)]),
        measure("upscale", [*CLI, "upscale", args.base, *drop, *threads, "-o", str(plain)]),
        measure("mlx_lm.convert", [str(MLX), "-c", CONVERT, str(plain), str(theirs), *sizes]),
    ]
    about: dict[str, Any] = machine() | {
        "base": Path(args.base).name,
        "n_layers": json.loads((ours / "config.json").read_text())["num_hidden_layers"],
        "n_weights": json.loads((ours / "model.safetensors.index.json").read_text())["metadata"][
            "total_parameters"
        ],
        "threads": args.threads,
        "bits": args.bits,
        "group_size": args.group_size,
        "tensors_that_differ": n_different(ours, theirs),
    }
    if not args.no_logits:
        job = {"ours": str(ours), "logits": str(work / "mlx-logits.npy")}
        (work / "mlx-jobs.json").write_text(json.dumps([job]))
        subprocess.run(
            [str(MLX), str(INTEROP / "mlx_side.py"), str(work / "mlx-jobs.json")], check=True
        )
        expected = reference(ours, args.bits)
        found = np.load(job["logits"])
        about["logits_max_difference"] = float(np.abs(found - expected).max())
        about["logits_deviation"] = float(expected.std())
    print(json.dumps(about, indent=1))
    append(RESULTS / "mlx.jsonl", [asdict(run) | about for run in runs])


if __name__ == "__main__":
    main()
