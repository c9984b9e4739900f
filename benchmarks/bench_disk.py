"""Measure exports whose conversion is cheap beside what the disk can take, and show the rest.

    python benchmarks/bench_disk.py [--rounds 3] [--pause 90] [--layers 8] [--work DIR]
    python benchmarks/bench_disk.py --markdown

A random checkpoint of Mistral 7B's shape (`make_checkpoint.py`, bf16) is up-scaled by a half and
written as F16 and as Q8_0; `dd if=/dev/zero bs=1M conv=fsync` writes as many bytes to the same
folder. The two alternate, and which is first changes from round to round. Before each run what
the one before wrote is removed, everything is synced, the source is read once so that it lies in
the page cache, and nothing happens for `--pause` seconds: a virtual disk may let through
a burst and then less until it has rested. `read_bytes` of a line says whether the source was
cached after all. Wall time is the whole process's, Python's start included.

Where ours goes: seconds that its threads spend in `preadv`, in `pwrite` (copying into the page
cache, and waiting where too much of it is dirty) and in the syncs at the end, beside the wall time
times the threads; the rest is conversion, start and waiting. Lines go to `results/disk.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import HERE, RESULTS, append, machine, read

from dus_edge.words import markdown_table

OUT = RESULTS / "disk.jsonl"
PRESETS = ("f16", "q8_0")
#: Our command line with clocks around the system calls, whose sums are its last line on stderr.
TIMED = """
import json, os, sys, threading, time
spent = dict.fromkeys(("preadv", "pwrite", "fsync"), 0.0)
lock = threading.Lock()
def clocked(name):
    call = getattr(os, name)
    def wrapped(*args):
        start = time.perf_counter()
        try:
            return call(*args)
        finally:
            with lock:
                spent[name] += time.perf_counter() - start
    setattr(os, name, wrapped)
for name in spent:
    clocked(name)
from dus_edge.cli.main import main
try:
    main()
finally:
    print(json.dumps(spent), file=sys.stderr)
"""


def measured(command: list[str]) -> tuple[dict[str, float], str]:
    """A process' wall and CPU seconds and the disk's part in it; and what it said on stderr."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = child.stderr.read().decode()  # type: ignore[union-attr]
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command[:3])} failed: {said[-500:]}")
    facts = {
        "wall_s": wall,
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "read_bytes": usage.ru_inblock * 512,
        "written_bytes": usage.ru_oublock * 512,
    }
    return facts, said


def prepare(base: Path, out: Path, dd: Path, pause: float) -> None:
    """The same state before every run: outputs gone, disk rested, source in the page cache."""
    for path in (dd, *out.glob("*.gguf")):
        path.unlink(missing_ok=True)
    os.sync()
    time.sleep(pause)
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def run_ours(base: Path, out: Path, preset: str, threads: int) -> dict[str, object]:
    """Export once."""
    options = ["-o", str(out), "-q", preset, "--overwrite", "--threads", str(threads)]
    facts, said = measured([sys.executable, "-c", TIMED, "gguf", str(base), *options])
    spent = {f"{name}_s": value for name, value in json.loads(said.splitlines()[-1]).items()}
    (file,) = out.glob("*.gguf")
    return facts | spent | {"bytes": file.stat().st_size}


def run_dd(path: Path, n_bytes: int) -> dict[str, object]:
    """Write as many zeros."""
    size = ["bs=1M", f"count={n_bytes}", "iflag=count_bytes", "conv=fsync"]
    facts, _ = measured(["dd", "if=/dev/zero", f"of={path}", *size])
    return facts | {"bytes": n_bytes}


def compare(args: argparse.Namespace) -> None:
    """All rounds; each run is a line as soon as it is over."""
    work = args.work.absolute()
    base, out, dd = work / f"mistral-shape-{args.layers}", work / "disk-out", work / "dd.bin"
    out.mkdir(parents=True, exist_ok=True)
    if not (base / "config.json").exists():
        make = [sys.executable, str(HERE / "make_checkpoint.py"), str(base)]
        subprocess.run([*make, "--layers", str(args.layers)], check=True)
    about = machine() | {"threads": args.threads, "layers": args.layers, "pause_s": args.pause}
    sizes = {}
    for preset in args.presets.split(","):  # compiles kernels, and tells the size
        prepare(base, out, dd, 0)
        sizes[preset] = run_ours(base, out, preset, args.threads)["bytes"]
    for number in range(args.rounds):
        for preset, n_bytes in sizes.items():
            sides = ("dd", "dus-edge") if number % 2 else ("dus-edge", "dd")
            for side in sides:
                prepare(base, out, dd, args.pause)
                if side == "dd":
                    facts = run_dd(dd, n_bytes)
                else:
                    facts = run_ours(base, out, preset, args.threads)
                append(OUT, [{"side": side, "preset": preset, "round": number} | facts | about])
                rate = n_bytes / facts["wall_s"] / 1e6
                print(f"{preset:5} {side:9} {facts['wall_s']:6.1f} s  {rate:6.0f} MB/s", flush=True)
    dd.unlink(missing_ok=True)
    shutil.rmtree(out)


def markdown() -> str:
    """Rounds of the newest commit: the rate beside dd's, and where ours goes (medians)."""
    lines = read(OUT)
    lines = [line for line in lines if line["commit"] == lines[-1]["commit"]]
    rows = []
    for preset in dict.fromkeys(line["preset"] for line in lines):
        by_side = {
            side: {r["round"]: r for r in lines if (r["side"], r["preset"]) == (side, preset)}
            for side in ("dd", "dus-edge")
        }
        both = sorted(by_side["dd"].keys() & by_side["dus-edge"].keys())
        theirs, ours = ([by_side[side][i] for i in both] for side in ("dd", "dus-edge"))
        ratios = [d["wall_s"] / o["wall_s"] for d, o in zip(theirs, ours, strict=True)]

        def middle(key: str, runs: list[dict] = ours) -> float:
            return statistics.median(run[key] for run in runs)

        rows.append(
            [
                preset.upper(),
                f"{middle('bytes') / 1e9:.2f} GB",
                f"{middle('wall_s', theirs):.1f} s",
                f"{middle('wall_s'):.1f} s",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                f"{middle('user_s'):.1f} + {middle('system_s'):.1f} s",
                *(f"{middle(f'{name}_s'):.1f} s" for name in ("preadv", "pwrite", "fsync")),
                f"{middle('read_bytes') / 1e9:.2f} GB",
            ]
        )
    head = ["", "size", "dd", "ours", "of dd's rate", "CPU, user + system"]
    head += ["preadv", "pwrite", "fsync", "read from disk"]
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=90, help="seconds of rest before a run")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--markdown", action="store_true", help="only render what is there")
    args = parser.parse_args()
    if not args.markdown:
        compare(args)
    print(markdown())


if __name__ == "__main__":
    main()
