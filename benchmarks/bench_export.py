"""Measure the export and the up-scaling on this machine, side by side with llama.cpp and `cp`.

    python benchmarks/bench_export.py [--rounds 3] [--work DIR] [--threads N]

Method: see README.md in this folder. Every run is a process of its own; A and B alternate; wall
time is the whole process's, memory the kernel's maximum resident size of that process (wait4).
Results go to `results/export.jsonl`, one line a run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common import HERE, RESULTS, append, machine

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
LLAMA_QUANTIZE = """
import ctypes, sys, llama_cpp
log = llama_cpp.llama_log_callback(lambda *a: None)
llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
source, target, ftype, threads = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(ftype), int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""
#: general.file_type of the presets measured.
FILE_TYPES = {"q4_k_m": 15, "q8_0": 7}


@dataclass
class Run:
    """One process, as the kernel accounts for it."""

    what: str
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    written_bytes: int


def measure(what: str, command: list[str]) -> Run:
    """Run a command to its end; a failure stops the benchmark."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = child.stderr.read()  # type: ignore[union-attr]
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{what} failed: {error.decode()[-500:]}")
    rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    run = Run(what, wall, usage.ru_utime + usage.ru_stime, rss, usage.ru_oublock * 512)
    busy = (run.cpu_s) / wall
    print(f"{what:32} {wall:7.1f} s  {rss / 1e9:5.2f} GB peak  {busy:4.2f} cores busy", flush=True)
    return run


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--presets", default="q4_k_m,q8_0")
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--gguf-only", action="store_true", help="leave up-scaling and cp out")
    parser.add_argument("--ours-only", action="store_true", help="only base to presets, once")
    args = parser.parse_args()

    work = args.work.absolute()
    base, out, up = work / f"mistral-shape-{args.layers}", work / "out", work / "up"
    work.mkdir(parents=True, exist_ok=True)
    if not (base / "config.json").exists():
        make = [sys.executable, str(HERE / "make_checkpoint.py"), str(base)]
        subprocess.run([*make, "--layers", str(args.layers)], check=True)

    threads = str(args.threads)
    ours = [*CLI, "gguf", str(base), "-o", str(out), "--overwrite", "--threads", threads]
    runs: list[Run] = []
    about = machine() | {"threads": args.threads, "layers": args.layers}
    if args.ours_only:
        for preset in args.presets.split(","):
            runs.append(measure(f"base to {preset}", [*ours, "-q", preset]))
        append(RESULTS / "export.jsonl", [asdict(run) | about for run in runs])
        return
    # The finished F16 file that the usual chain would quantize; made by us, so its content is
    # the same model. Not timed against anything.
    measure("setting up: f16 file", [*ours, "-q", "f16"])
    f16 = next(out.glob("*-F16.gguf"))
    for preset in args.presets.split(","):
        theirs = work / f"theirs-{preset}.gguf"
        quantize = [sys.executable, "-c", LLAMA_QUANTIZE, str(f16), str(theirs)]
        # Compiles the kernels where that was never done; the measured runs load them.
        measure(f"setting up: {preset}", [*ours, "-q", preset])
        for _ in range(args.rounds):
            runs.append(measure(f"base to {preset}", [*ours, "-q", preset]))
            runs.append(
                measure(
                    f"llama_model_quantize {preset}",
                    [*quantize, str(FILE_TYPES[preset]), threads],
                )
            )
        theirs.unlink()
    remove(out)

    upscale = [*CLI, "upscale", str(base), "-o", str(up), "--overwrite", "--threads", threads]
    if not args.gguf_only:
        measure("setting up: checkpoint", upscale)
    for _ in range(0 if args.gguf_only else args.rounds):
        remove(work / "copy")
        runs.append(measure("cp of the checkpoint", ["cp", "-r", str(up), str(work / "copy")]))
        remove(work / "copy")
        # cp writes to new names, so up-scaling must too: the old folder goes before, not within.
        remove(up)
        runs.append(measure("upscale to safetensors", upscale))
    remove(up)

    append(RESULTS / "export.jsonl", [asdict(run) | about for run in runs])
    summarize(runs)


def summarize(runs: list[Run]) -> None:
    """Medians by command."""
    print("\nMedian of each:")
    for what in dict.fromkeys(r.what for r in runs):
        same = [r for r in runs if r.what == what]
        wall = statistics.median(r.wall_s for r in same)
        rss = max(r.peak_rss_bytes for r in same)
        written = max(r.written_bytes for r in same)
        print(f"{what:32} {wall:7.1f} s  {rss / 1e9:5.2f} GB peak  {written / 1e9:6.2f} GB written")


if __name__ == "__main__":
    main()
