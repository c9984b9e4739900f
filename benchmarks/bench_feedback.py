"""Measure what `gguf --feedback` costs, and `gptq` on the same text where asked.

    python benchmarks/bench_feedback.py MODEL [--preset q4_k_m] [--chunks 8] [--ctx 512] [--gptq]

MODEL is up-scaled by the default plan; `make_checkpoint.py` makes one of Mistral 7B's shape. Wall
and CPU time are of whole processes, Python's start and loading included; peak memory is the
kernel's maximum resident size (wait4), files that are mapped counted. Lines go to
`results/feedback.jsonl`. `idle` is false where `--shared` says that other work ran beside: then
only CPU time and memory say something.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench_gptq import CHOOSE, timed
from common import RESULTS, append, machine

from dus_edge.upscale.model import find_model

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--preset", default="q4_k_m")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--gptq", action="store_true", help="measure that too")
    parser.add_argument("--shared", action="store_true", help="other work runs beside")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    base = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
    model = find_model(base, CHOOSE, weights=False, say=print)
    facts = machine() | {"model": model.source.name, "n_layers": model.config.n_layers}
    facts |= {"n_parameters": model.n_parameters, "idle": not args.shared}
    facts |= {"n_chunks": args.chunks, "n_ctx": args.ctx}
    text = ["--chunks", str(args.chunks), "--ctx", str(args.ctx)]
    sides = {args.preset: ["gguf", base, "-q", args.preset, "--feedback", *text]}
    if args.gptq:
        sides["gptq int4"] = ["gptq", base, *text]
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for side, words in sides.items():
            folder = Path(work) / side.replace(" ", "-")
            run = timed([*CLI, *words, "-o", str(folder)], Path(work) / "log")
            measured = {k: v for k, v in asdict(run).items() if k != "quantize_s"}
            append(RESULTS / "feedback.jsonl", [{"side": side} | measured | facts])
            print(side, measured, flush=True)


if __name__ == "__main__":
    main()
