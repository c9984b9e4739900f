"""Compare `dus-edge bench run` with llama-bench: same file, threads, settings and libraries.

    python benchmarks/bench_measure.py --llama-bench PATH FILE… [--rounds 30] [--slice 0.5]
    python benchmarks/bench_measure.py --markdown

llama-bench must be built from the llama.cpp of the installed llama-cpp-python (`llama.cpp` in its
source archive's `vendor`): cmake -B build -DBUILD_SHARED_LIBS=ON, target llama-bench. It is run
with llama-cpp-python's own libllama and libggml (LD_LIBRARY_PATH), since the two builds need not
agree: a wheel is compiled with OpenMP where the default of today's llama.cpp is without, and for
another set of CPU instructions. So what differs is the harness alone; `--own-libraries` leaves the
tool its own for comparison.

A round is one process of each side, all alive at once, of which one runs at a time: they take
turns of `--slice` seconds, stopped and continued by signals, so that what else goes on in the
machine meets all alike. Repetitions that a stop fell into are as long as the stop, and dropped.
llama-bench takes part twice: how far it is from itself is what noise makes of a figure. Of each
round the medians are compared, ours with the geometric mean of theirs; the difference is the mean
over the rounds, with a bootstrapped 95 % interval. Processes differ by where their memory happens
to lie, so rounds are what counts, not repetitions. Beside it stands the difference of each side's
fastest repetition, the one that nothing disturbed. One line per file and test goes to
`results/measure.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import RESULTS, append, machine, read

from dus_edge.words import markdown_table

SIDES = ("llama-bench", "ours", "llama-bench again")
THEIRS, OURS, AGAIN = SIDES

RUN_OURS = """
import json, pathlib, sys
from dus_edge.measure.bench import bench_run
from dus_edge.measure.measurement import json_lines
from dus_edge.measure.workload import BenchSettings
options = json.loads(sys.argv[2])
options["depths"] = tuple(options["depths"])
print(json_lines(bench_run([pathlib.Path(sys.argv[1])], BenchSettings(**options))), end="")
"""


def library_folder() -> Path:
    """Where llama-cpp-python keeps its libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        sys.exit("llama-cpp-python is not installed")
    return Path(spec.origin).parent / "lib"


def commands(
    tool: Path, model: Path, test: tuple[int, int, int], options: dict, own_libraries: bool
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of each side, for one test."""
    n_prompt, n_gen, depth = test
    theirs = [tool, "-m", model, "-o", "json", "-r", options["repetitions"]]
    theirs += ["-p", n_prompt, "-n", n_gen, "-d", depth, "-t", options["n_threads"]]
    theirs += ["-ngl", options["n_gpu_layers"]]
    env = dict(os.environ)
    if not own_libraries:
        env["LD_LIBRARY_PATH"] = str(library_folder())
    mine = options | {"n_prompt": n_prompt, "n_gen": n_gen, "depths": [depth]}
    ours = [sys.executable, "-c", RUN_OURS, model, json.dumps(mine)]
    found = {side: (list(map(str, theirs)), env) for side in (THEIRS, AGAIN)}
    return {
        THEIRS: found[THEIRS],
        OURS: (list(map(str, ours)), dict(os.environ)),
        AGAIN: found[AGAIN],
    }


def take_turns(
    sides: dict[str, tuple[list[str], dict[str, str]]], slice_s: float
) -> dict[str, str]:
    """Run all commands by turns, never two at a time; what each printed."""
    with contextlib.ExitStack() as stack:
        files = {side: stack.enter_context(tempfile.TemporaryFile("w+")) for side in sides}
        running = {}
        for side, (command, env) in sides.items():
            process = subprocess.Popen(
                command, env=env, stdout=files[side], stderr=subprocess.DEVNULL
            )
            stack.callback(process.kill)
            process.send_signal(signal.SIGSTOP)
            running[side] = process
        while running:
            for side, process in list(running.items()):
                process.send_signal(signal.SIGCONT)
                try:
                    code = process.wait(slice_s)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGSTOP)
                    continue
                if code:
                    sys.exit(f"{side} failed (exit code {code})")
                del running[side]
        printed = {}
        for side, file in files.items():
            file.seek(0)
            printed[side] = file.read()
        return printed


def undisturbed(line: dict, slice_s: float) -> list[float]:
    """Rates of the repetitions that no stop fell into, tokens per second."""
    times = line["samples_ns"]
    longest = min(times) + 0.8e9 * slice_s
    return [x for x, ns in zip(line["samples_ts"], times, strict=True) if ns < longest]


def name(test: tuple[int, int, int]) -> str:
    n_prompt, n_gen, depth = test
    return (f"pp{n_prompt}" if n_prompt else f"tg{n_gen}") + (f" @ d{depth}" if depth else "")


def mean_ratio(logs: np.ndarray) -> tuple[float, float, float]:
    """Mean of ratios by their logarithms, and its 95 % interval, bootstrapped over the rounds."""
    draws = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return math.exp(logs.mean()), math.exp(low), math.exp(high)


def summarize(rounds: list[dict[str, list[float]]]) -> dict[str, float]:
    """Rates, tokens per second; ours over theirs, and theirs over theirs."""
    first, ours, again = (np.log([np.median(r[side]) for r in rounds]) for side in SIDES)
    ratio, low, high = mean_ratio(ours - (first + again) / 2)
    control, control_low, control_high = mean_ratio(again - first)
    best = {side: max(max(r[side]) for r in rounds) for side in SIDES}
    return {
        "llama-bench_ts": float(np.exp((first + again) / 2).mean()),
        "ours_ts": float(np.exp(ours).mean()),
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "control": control,
        "control_low": control_low,
        "control_high": control_high,
        "best_ratio": best[OURS] / max(best[THEIRS], best[AGAIN]),
        "best_control": best[AGAIN] / best[THEIRS],
        "rounds": len(rounds),
        "repetitions_kept": sum(len(r[OURS]) for r in rounds),
    }


def compare(
    tool: Path, model: Path, test: tuple[int, int, int], options: dict, args: argparse.Namespace
) -> dict:
    """One test of a file."""
    rounds: list[dict[str, list[float]]] = []
    sides = commands(tool, model, test, options, args.own_libraries)
    ours: dict = {}
    for i in range(args.rounds):
        # The order turns round, so that a trend favours no side.
        order = SIDES if i % 2 == 0 else SIDES[::-1]
        printed = take_turns({side: sides[side] for side in order}, args.slice)
        lines = {side: json.loads(text) for side, text in printed.items()}
        lines = {side: x[0] if isinstance(x, list) else x for side, x in lines.items()}
        ours = lines[OURS]
        same = ("model_n_params", "model_size", "n_threads", "n_batch", "n_ubatch")
        if different := [k for k in same if ours[k] != lines[THEIRS][k]]:
            sys.exit(f"the two sides differ in {', '.join(different)}")
        rounds.append({side: undisturbed(lines[side], args.slice) for side in SIDES})
        print(
            f"  round {i + 1}/{args.rounds}  {name(test):>8}  "
            + "  ".join(f"{side} {np.median(rounds[-1][side]):.2f}" for side in SIDES),
            flush=True,
        )
    return {
        "file": model.name,
        "model_type": ours["model_type"],
        "model_n_params": ours["model_n_params"],
        "test": name(test),
        **summarize(rounds),
        "samples": rounds,
    }


def render(lines: list[dict]) -> str:
    """The newest figures of each file and test."""
    newest = {
        (line["file"], line["test"], line["own_libraries"], line["settings"]["n_threads"]): line
        for line in lines
    }
    head = ["file", "threads", "test", "rounds", "llama-bench", "bench run", "difference", "95 %"]
    head += ["of the fastest", "llama-bench from itself", "95 %"]
    rows = [
        [
            line["file"] + (" (tool's own libraries)" if line["own_libraries"] else ""),
            str(line["settings"]["n_threads"]),
            line["test"],
            str(line["rounds"]),
            f"{line['llama-bench_ts']:.2f}",
            f"{line['ours_ts']:.2f}",
            percent(line["ratio"]),
            f"{percent(line['ratio_low'])} to {percent(line['ratio_high'])}",
            percent(line["best_ratio"]),
            percent(line["control"]),
            f"{percent(line['control_low'])} to {percent(line['control_high'])}",
        ]
        for line in newest.values()
    ]
    return markdown_table(head, rows, left=range(3))


def percent(ratio: float) -> str:
    """How far a ratio is from one."""
    return f"{100 * (ratio - 1):+.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files")
    parser.add_argument("--llama-bench", type=Path, help="the tool")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=20, help="in each round")
    parser.add_argument("--slice", type=float, default=1.0, help="seconds, several repetitions")
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
        "repetitions": args.repetitions,
        "n_threads": args.threads,
        "n_gpu_layers": args.gpu_layers,
    }
    about = {"own_libraries": args.own_libraries, "slice_s": args.slice, "settings": options}
    tests = [
        (n_prompt, n_gen, int(depth))
        for depth in args.depth.split(",")
        for n_prompt, n_gen in ((args.p, 0), (0, args.n))
        if n_prompt + n_gen
    ]
    lines = []
    for file in args.files:
        print(file.name, flush=True)
        for test in tests:
            found = compare(args.llama_bench, file, test, options, args) | about | machine()
            append(args.out, [found])
            lines.append(found)
    print(render(lines))


if __name__ == "__main__":
    main()
