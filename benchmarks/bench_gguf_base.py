"""Measure what up-scaling a finished GGUF takes, and that nothing is lost by it.

    python benchmarks/bench_gguf_base.py MODEL.gguf [--drop M] [--chunks 12] [--work DIR]

Method: see README.md in this folder. The file is up-scaled by ranges of its layers, several times,
each in a process of its own. Then it is dequantized into an up-scaled checkpoint, which
transformers runs in float32, and `dus-edge quality` reads the same text with both. Results go to
`results/gguf_base.jsonl`, one line a run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_export import CLI, Run, measure
from common import RESULTS, append, machine


def scores(folder: Path, file: Path, chunks: int, threads: int) -> dict[str, Any]:
    """What `dus-edge quality` says of the file beside the folder."""
    words = ["quality", str(folder), str(file), "--chunks", str(chunks), "--json"]
    more = ["--ctx", "256", "--threads", str(threads)]
    done = subprocess.run([*CLI, *words, *more], check=True, capture_output=True, text=True)
    total = json.loads(done.stdout.splitlines()[-1])["candidates"][0]["total"]
    keys = ("n_tokens", "perplexity", "perplexity_reference", "kl_nats")
    return {key: total[key] for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--drop", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    args = parser.parse_args()

    work = args.work.absolute()
    copied, folder = work / "gguf-copied", work / "gguf-folder"
    for old in (copied, folder):
        shutil.rmtree(old, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    drop = [] if args.drop is None else ["--drop", str(args.drop)]
    options = [*drop, "--threads", str(args.threads), "--overwrite"]
    runs: list[Run] = [
        measure("copy ranges", [*CLI, "gguf", str(args.model), *options, "-o", str(copied)])
        for _ in range(args.rounds)
    ]
    upscale = [*CLI, "upscale", str(args.model), *options, "-o", str(folder)]
    runs.append(measure("dequantize", upscale))
    (file,) = copied.glob("*.gguf")
    about: dict[str, Any] = machine() | {
        "base": args.model.name,
        "base_bytes": args.model.stat().st_size,
        "result_bytes": file.stat().st_size,
        "threads": args.threads,
        **scores(folder, file, args.chunks, args.threads),
    }
    print(json.dumps(about, indent=1))
    copies = [run for run in runs if run.what == "copy ranges"]
    for key in ("wall_s", "cpu_s", "peak_rss_bytes"):
        print(f"{key}: {statistics.median(getattr(run, key) for run in copies):,.2f}")
    append(RESULTS / "gguf_base.jsonl", [asdict(run) | about for run in runs])


if __name__ == "__main__":
    main()
