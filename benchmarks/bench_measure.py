"""Compare `dus-edge bench run` with llama-bench: same file, threads, settings and libraries.

    python benchmarks/bench_measure.py --llama-bench PATH FILE… [--rounds 7] [--threads 2]
    python benchmarks/bench_measure.py --markdown

llama-bench must be built from the llama.cpp of the installed llama-cpp-python (`llama.cpp` in its
source archive's `vendor`): cmake -B build -DBUILD_SHARED_LIBS=ON, target llama-bench. It is run
with llama-cpp-python's own libllama and libggml (LD_LIBRARY_PATH), since the two builds need not
agree: a wheel is compiled with OpenMP where the default of today's llama.cpp is without, and for
another set of CPU instructions. So what differs is the harness alone; `--own-libraries` leaves the
tool its own for comparison.

A round is one process of each side, first one then the other, by turns; both measure one warm-up
and `--repetitions` of each test. The figure is the median over rounds of the ratio of the two
neighbouring averages, so a machine that slows down over a run does not count; with its quartiles.
Beside it the ratio of each side's fastest repetition, the one that other programs disturbed least.
One line per file and test goes to `results/measure.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import RESULTS, append, machine, markdown_table, read

SIDES = ("llama-bench", "ours")

OURS = """
import json, pathlib, sys
from dus_edge.bench.measure import Settings, bench_run, json_lines
options = json.loads(sys.argv[2])
options["depths"] = tuple(options["depths"])
print(json_lines(bench_run([pathlib.Path(sys.argv[1])], Settings(**options))), end="")
"""


def library_folder() -> Path:
    """Where llama-cpp-python keeps its libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit("llama-cpp-python is not installed")
    return Path(spec.origin).parent / "lib"


def run_theirs(tool: Path, model: Path, options: dict, own_libraries: bool) -> list[dict]:
    """llama-bench's own results."""
    command = [tool, "-m", model, "-o", "json", "-r", options["repetitions"]]
    command += ["-p", options["n_prompt"], "-n", options["n_gen"], "-t", options["n_threads"]]
    command += ["-d", ",".join(map(str, options["depths"])), "-ngl", options["n_gpu_layers"]]
    env = dict(os.environ)
    if not own_libraries:
        env["LD_LIBRARY_PATH"] = str(library_folder())
    out = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{tool} failed: {out.stderr.strip()}")
    return json.loads(out.stdout)


def run_ours(model: Path, options: dict) -> list[dict]:
    """Ours, in a process of its own as theirs is."""
    command = [sys.executable, "-c", OURS, str(model), json.dumps(options)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"measuring failed: {out.stderr.strip()}")
    return [json.loads(line) for line in out.stdout.splitlines()]


def key(line: dict) -> tuple[int, int, int]:
    """What says which test a line is of."""
    return line["n_prompt"], line["n_gen"], line["n_depth"]


def name(test: tuple[int, int, int]) -> str:
    n_prompt, n_gen, depth = test
    return (f"pp{n_prompt}" if n_prompt else f"tg{n_gen}") + (f" @ d{depth}" if depth else "")


def summarize(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians of both rates, tokens per second, and of ours over theirs, with quartiles."""
    ratios = sorted(r["ours"] / r["llama-bench"] for r in rounds)
    low, ratio, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    medians = {f"{side}_ts": statistics.median(r[side] for r in rounds) for side in SIDES}
    # The fastest repetition of all is the one that nothing disturbed.
    best = {f"{side}_best_ts": max(r[f"{side} best"] for r in rounds) for side in SIDES}
    return {
        **medians,
        **best,
        "best_ratio": best["ours_best_ts"] / best["llama-bench_best_ts"],
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "rounds": len(rounds),
    }


def compare(tool: Path, model: Path, options: dict, n: int, own_libraries: bool) -> list[dict]:
    """One line per test of a file."""
    found: dict[tuple, list[dict[str, float]]] = {}
    for i in range(n):
        lines: dict[str, list[dict]] = {}
        # The order changes, so that a trend favours neither side.
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            if side == "ours":
                lines[side] = run_ours(model, options)
            else:
                lines[side] = run_theirs(tool, model, options, own_libraries)
        theirs = {key(line): line for line in lines["llama-bench"]}
        for line in lines["ours"]:
            other = theirs[key(line)]
            same = ("model_n_params", "model_size", "n_threads", "n_batch", "n_ubatch")
            if different := [k for k in same if line[k] != other[k]]:
                sys.exit(f"the two sides differ in {', '.join(different)}")
            rates = {"ours": line["avg_ts"], "llama-bench": other["avg_ts"]}
            best = {
                side: max(x["samples_ts"]) for side, x in (("ours", line), ("llama-bench", other))
            }
            rates |= {f"{side} best": rate for side, rate in best.items()}
            found.setdefault(key(line), []).append(rates)
            print(
                f"  round {i + 1}/{n}  {name(key(line)):>16}  "
                + "  ".join(f"{side} {rates[side]:10.2f}" for side in SIDES),
                flush=True,
            )
    return [
        {
            "file": model.name,
            "model_type": lines["ours"][0]["model_type"],
            "model_n_params": lines["ours"][0]["model_n_params"],
            "test": name(test),
            **summarize(rounds),
            "samples": rounds,
        }
        for test, rounds in found.items()
    ]


def render(lines: list[dict]) -> str:
    """The newest figures of each file and test."""
    newest = {(line["file"], line["test"], line["own_libraries"]): line for line in lines}
    head = ["file", "test", "llama-bench", "bench run", "difference", "quartiles", "fastest"]
    rows = [
        [
            line["file"] + (" (tool's own libraries)" if line["own_libraries"] else ""),
            line["test"],
            f"{line['llama-bench_ts']:.2f}",
            f"{line['ours_ts']:.2f}",
            *(
                f"{100 * (line['ratio'] - 1):+.2f} %",
                f"{100 * (line['ratio_low'] - 1):+.2f} … {100 * (line['ratio_high'] - 1):+.2f} %",
                f"{100 * (line['best_ratio'] - 1):+.2f} %",
            ),
        ]
        for line in newest.values()
    ]
    return markdown_table(head, rows, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files")
    parser.add_argument("--llama-bench", type=Path, help="the tool")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=128)
    parser.add_argument("--depth", default="0", help="comma-separated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--gpu-layers", type=int, default=-1)
    parser.add_argument("--own-libraries", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "measure.jsonl")
    parser.add_argument("--markdown", action="store_true", help="only render what is there")
    args = parser.parse_args()

    if args.markdown:
        print(render(read(args.out)))
        return
    if not args.files or args.llama_bench is None:
        parser.error("name GGUF files and --llama-bench")
    options = {
        "n_prompt": args.p,
        "n_gen": args.n,
        "repetitions": args.repetitions,
        "depths": [int(depth) for depth in args.depth.split(",")],
        "n_threads": args.threads,
        "n_gpu_layers": args.gpu_layers,
    }
    about = {"own_libraries": args.own_libraries, "settings": options, **machine()}
    lines = []
    for file in args.files:
        print(file.name, flush=True)
        found = compare(args.llama_bench, file, options, args.rounds, args.own_libraries)
        append(args.out, [line | about for line in found])
        lines += [line | about for line in found]
    print(render(lines))


if __name__ == "__main__":
    main()
