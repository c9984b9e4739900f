"""Compare `dus-edge bench run` with llama-bench: same file, threads, settings and libraries.

    python benchmarks/bench_measure.py --llama-bench PATH FILE… [--rounds 7] [--threads 2]
    python benchmarks/bench_measure.py --markdown

llama-bench must be built from the llama.cpp of the installed llama-cpp-python (`llama.cpp` in its
source archive's `vendor`): cmake -B build -DBUILD_SHARED_LIBS=ON, target llama-bench. It is run
with llama-cpp-python's own libllama and libggml (LD_LIBRARY_PATH), since the two builds need not
agree: a wheel is compiled with OpenMP where the default of today's llama.cpp is without, and for
another set of CPU instructions. So what differs is the harness alone; `--own-libraries` leaves the
tool its own for comparison.

A round is one process of each side, one after the other, in an order that turns round; each
measures one warm-up and `--repetitions` of each test. llama-bench takes part twice: how far it is
from itself is what the machine's own noise makes of a figure. The difference is that of the medians
of all repetitions, with a 95 % interval bootstrapped over the rounds. Beside it that of each side's
fastest repetition, the one that nothing disturbed. One line per file and test goes to
`results/measure.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import RESULTS, append, machine, markdown_table, read

SIDES = ("llama-bench", "ours", "llama-bench again")
THEIRS, OURS, AGAIN = SIDES

RUN_OURS = """
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
    command = [sys.executable, "-c", RUN_OURS, str(model), json.dumps(options)]
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


def ratio_of_medians(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Median over median of all repetitions, and its 95 % interval, bootstrapped over rounds.

    Args:
        ours, theirs: ``(rounds, repetitions)`` of each side.
    """
    ratio = np.median(ours) / np.median(theirs)
    chosen = np.random.default_rng(0).integers(0, len(ours), (4_000, len(ours)))
    draws = [np.median(ours[rows]) / np.median(theirs[rows]) for rows in chosen]
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(ratio), float(low), float(high)


def summarize(rounds: list[dict[str, list[float]]]) -> dict[str, float]:
    """Medians and bests of the rates, tokens per second; ours over theirs, theirs over theirs."""
    first, ours, again = (np.array([r[side] for r in rounds]) for side in SIDES)
    theirs = np.hstack([first, again])
    ratio, low, high = ratio_of_medians(ours, theirs)
    control, control_low, control_high = ratio_of_medians(again, first)
    return {
        "llama-bench_ts": float(np.median(theirs)),
        "ours_ts": float(np.median(ours)),
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "control": control,
        "control_low": control_low,
        "control_high": control_high,
        # The fastest repetition of all is the one that nothing disturbed.
        "best_ratio": float(ours.max() / theirs.max()),
        "best_control": float(again.max() / first.max()),
        "rounds": len(rounds),
    }


def compare(tool: Path, model: Path, options: dict, n: int, own_libraries: bool) -> list[dict]:
    """One line per test of a file."""
    found: dict[tuple, list[dict[str, list[float]]]] = {}
    model_type, n_params = "", 0
    for i in range(n):
        lines: dict[str, dict[tuple, dict]] = {}
        # The order turns round, so that a trend favours no side.
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            if side == OURS:
                run = run_ours(model, options)
            else:
                run = run_theirs(tool, model, options, own_libraries)
            lines[side] = {key(line): line for line in run}
        for test, ours in lines[OURS].items():
            same = ("model_n_params", "model_size", "n_threads", "n_batch", "n_ubatch")
            if different := [k for k in same if ours[k] != lines[THEIRS][test][k]]:
                sys.exit(f"the two sides differ in {', '.join(different)}")
            model_type, n_params = ours["model_type"], ours["model_n_params"]
            rates = {side: lines[side][test]["samples_ts"] for side in SIDES}
            found.setdefault(test, []).append(rates)
            print(
                f"  round {i + 1}/{n}  {name(test):>12}  "
                + "  ".join(f"{side} {np.mean(rates[side]):.2f}" for side in SIDES),
                flush=True,
            )
    return [
        {
            "file": model.name,
            "model_type": model_type,
            "model_n_params": n_params,
            "test": name(test),
            **summarize(rounds),
            "samples": rounds,
        }
        for test, rounds in found.items()
    ]


def render(lines: list[dict]) -> str:
    """The newest figures of each file and test."""
    newest = {
        (line["file"], line["test"], line["own_libraries"], line["settings"]["n_threads"]): line
        for line in lines
    }
    head = ["file", "threads", "test", "llama-bench", "bench run", "difference", "95 %"]
    head += ["of the fastest", "llama-bench from itself", "of the fastest"]
    rows = [
        [
            line["file"] + (" (tool's own libraries)" if line["own_libraries"] else ""),
            str(line["settings"]["n_threads"]),
            line["test"],
            f"{line['llama-bench_ts']:.2f}",
            f"{line['ours_ts']:.2f}",
            percent(line["ratio"]),
            f"{percent(line['ratio_low'])} to {percent(line['ratio_high'])}",
            percent(line["best_ratio"]),
            percent(line["control"]),
            percent(line["best_control"]),
        ]
        for line in newest.values()
    ]
    return markdown_table(head, rows, 3)


def percent(ratio: float) -> str:
    """How far a ratio is from one."""
    return f"{100 * (ratio - 1):+.1f} %"


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
