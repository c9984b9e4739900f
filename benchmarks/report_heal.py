"""The table and the picture of `bench_heal.py`: `python benchmarks/report_heal.py [-o FOLDER]`.

Reads `results/heal.jsonl`, prints Markdown, and draws `heal.svg`. The gap is the held-out loss just
after up-scaling minus that of the control at the end, which is the base trained on the same tokens;
closed is the share of it that a run took away, per seed. Intervals are t's of 95 % over the seeds.
Tokens per CPU second are those of `results/heal_speed.jsonl` (SmolLM2, one thread, idle): losses do
not depend on what else a machine does, times do.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import HERE, RESULTS, read

#: t of 97.5 % by degrees of freedom, as far as seeds go here.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
COLOURS = {
    "control": "#666666",
    "all": "#1b5e8a",
    "lora": "#b3541e",
    "copies": "#2f7d4f",
    "seam:8": "#7a4b9a",
}


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half of the interval's width."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, T975[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def name_of(line: dict[str, Any]) -> str:
    """What a run is called."""
    plan = "" if line["plan"] in (None, "0:23,7:30") else f", plan {line['plan']}"
    scale = "" if line["branch_scale"] == 1 else f", branches × {line['branch_scale']:g}"
    return f"{line['variant']}{plan}{scale}"


def with_error(values: list[float], digits: int, factor: float = 1.0) -> str:
    mean, half = interval([factor * x for x in values])
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE)
    args = parser.parse_args()
    lines = read(RESULTS / "heal.jsonl")
    print("| what learns | rate | held-out loss after 6,144 tokens |\n|---|---:|---:|")
    for line in lines:
        if line["purpose"] == "rate":
            print(f"| {line['variant']} | {line['lr']:g} | {line['curve'][-1][1]:.4f} |")
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["purpose"] == "recovery":
            runs[name_of(line)].append(line)
    control = {line["seed"]: line["curve"][-1][1] for line in runs["control"]}
    speed: dict[str, list[float]] = defaultdict(list)
    for row in read(RESULTS / "heal_speed.jsonl"):
        if row["base"] == "smollm2":
            speed[row["case"]].append(row["tokens_per_cpu_s"])
    print(
        "\n| what learns | seeds | just up-scaled | at the end | gap closed | tokens per CPU s |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    for name, own in runs.items():
        starts = [line["curve"][0][1] for line in own]
        ends = [line["curve"][-1][1] for line in own]
        closed = [
            (s - e) / (s - control[line["seed"]])
            for s, e, line in zip(starts, ends, own, strict=True)
        ]
        rate = speed.get(own[0]["variant"])
        cells = [
            name,
            str(len(own)),
            with_error(starts, 4),
            with_error(ends, 4),
            "" if name == "control" else with_error(closed, 1, 100) + " %",
            "" if rate is None else f"{statistics.median(rate):.1f}",
        ]
        print(f"| {' | '.join(cells)} |")
    draw(runs, args.out / "heal.svg")


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out loss by tokens: seed 0, whose held-out text all runs share; other seeds faint."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "heal"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    ends = []
    for name, own in runs.items():
        colour = COLOURS[own[0]["variant"]]
        plain = name == own[0]["variant"]
        style = "-" if plain else ("--" if "plan" in name else ":")
        tokens = [point[0] for point in own[0]["curve"]]
        for line in own[1:]:
            axes.plot(tokens, [p[1] for p in line["curve"]], color=colour, alpha=0.25, lw=0.8)
        first = [point[1] for point in own[0]["curve"]]
        axes.plot(tokens, first, style, color=colour, lw=1.8, marker="o", ms=3)
        ends.append((first[-1], f"{name} {first[-1]:.3f}", colour))
    # Labels at the right, far enough apart.
    low, high = axes.get_ylim()
    gap, at = 0.045 * (high - low), -math.inf
    for value, label, colour in sorted(ends):
        at = max(value, at + gap)
        axes.annotate(
            label,
            (tokens[-1], value),
            (1.02, at),
            textcoords=("axes fraction", "data"),
            color=colour,
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5},
        )
    axes.set_xlabel("Tokens trained on")
    axes.set_ylabel("Held-out loss, nats a token")
    title = "SmolLM2-135M, 30 → 46 layers, healed on the Python reference; seed 0, others faint"
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
