"""Measure what merging an adapter takes, on a base of Mistral 7B's shape; beside peft on request.

    python benchmarks/bench_merge.py [--layers 32] [--rank 16] [--work DIR] [--threads N] [--peft]

Method: see README.md in this folder. Every run is a process of its own; wall time is the whole
process's, memory the kernel's maximum resident size of that process (wait4). With `--peft` the
same is merged by peft too, and every tensor is compared bit for bit. Results go to
`results/merge.jsonl`, one line a run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from bench_export import CLI, Run, measure
from common import HERE, RESULTS, append, machine

from dus_edge.checkpoint.config import load_config, tensor_shapes
from dus_edge.checkpoint.safetensors import SafetensorsCheckpoint
from dus_edge.checkpoint.spec import Source

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def make_adapter(base: Path, folder: Path, rank: int) -> None:
    """An adapter of every linear layer, with random weights, in peft's format."""
    from safetensors.numpy import save_file

    config = load_config(base / "config.json")
    rng = np.random.default_rng(0)
    tensors, modules = {}, set()
    for name, (n_out, n_in) in (
        (n, s) for n, s in tensor_shapes(config).items() if config.family.is_linear(n)
    ):
        module = name.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        for half, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
            values = rng.standard_normal(shape, np.float32) / np.float32(64)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    about |= {"target_modules": sorted(modules), "base_model_name_or_path": base.name}
    (folder / "adapter_config.json").write_text(json.dumps(about))


def n_different(ours: Path, theirs: Path) -> int:
    """Weights whose bits differ between two folders of the same tensors."""
    a, b = (SafetensorsCheckpoint(Source(f, f.name, f.name)) for f in (ours, theirs))
    if a.specs() != b.specs():
        sys.exit("the folders hold other tensors")
    return sum(int((a.read(name) != b.read(name)).sum()) for name in a.specs())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--peft", action="store_true", help="merge with peft too, and compare")
    args = parser.parse_args()

    work = args.work.absolute()
    base, adapter = work / f"mistral-shape-{args.layers}", work / f"adapter-{args.layers}"
    out, theirs = work / "merged", work / "by-peft"
    work.mkdir(parents=True, exist_ok=True)
    if not (base / "config.json").exists():
        make = [sys.executable, str(HERE / "make_checkpoint.py"), str(base)]
        subprocess.run([*make, "--layers", str(args.layers)], check=True)
    make_adapter(base, adapter, args.rank)

    threads = str(args.threads)
    ours = [*CLI, "merge", str(base), str(adapter), "-o", str(out), "--threads", threads]
    runs: list[Run] = []
    about = machine() | {"threads": args.threads, "layers": args.layers, "rank": args.rank}
    shutil.rmtree(out, ignore_errors=True)
    runs.append(measure("merge", ours))
    if args.peft:
        peft = [sys.executable, "-c", PEFT, str(base), str(adapter), str(theirs), threads]
        runs.append(measure("peft", peft))
        about["n_different"] = n_different(out, theirs)
        print(f"{about['n_different']} weights differ")
    for folder in (out, theirs):
        shutil.rmtree(folder, ignore_errors=True)
    append(RESULTS / "merge.jsonl", [asdict(run) | about for run in runs])


if __name__ == "__main__":
    main()
