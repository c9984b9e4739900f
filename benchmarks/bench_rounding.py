"""What chance has in it: native beside ggml on models whose weights differ by less than a step.

    python benchmarks/bench_rounding.py run CHECKPOINT --work DIR --presets q4_k_m,q3_k_m
        [--draws 1,2,3,4,5]
    python benchmarks/bench_rounding.py report

The ratio of two files' divergences rests on one outcome of their roundings, and drawing chunks of
text again does not show that. Here the weights themselves are drawn again: each moves by up to half
a step of Q4_1 in its block of 32, which rounds most of them anew and makes a model of its own, the
reference of its two files. For each draw this measures the divergences as `bench_divergence.py`
does, on the same held-out text, and the squared error of all matrices, Σ (ΔW)². No importance
matrix. Lines go to `results/rounding.jsonl`. The report's intervals are Student's t over draws.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from bench_divergence import (
    ENGLISH,
    TABLE,
    TEXTS,
    Reference,
    Scored,
    divergences,
    made,
    open_file,
    text_chunks,
)
from common import RESULTS, append, machine, read, run_or_report
from padded import dithered
from safetensors.numpy import save_file

from dus_edge.calibrate.layer import as_tensor
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.upscale.model import find_model
from dus_edge.upscale.plan import identity

OUT = RESULTS / "rounding.jsonl"
WAYS = ("ggml", "native")
#: Student's t, two-sided 95 %, by degrees of freedom; of more than nine that of nine is taken.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor in float32."""
    return as_tensor(checkpoint.read(name)).float().numpy()


def redraw(checkpoint: str, draw: int, folder: Path) -> None:
    """A checkpoint in float32 whose matrices are up to half a step of Q4_1 away."""
    model = find_model(checkpoint, identity, weights=True, say=lambda line: None)
    opened, random = model.open(), np.random.default_rng(draw)
    found = {name: values(opened, name) for name in sorted(opened.specs())}
    found = {k: dithered(w, "Q4_1", random) if w.ndim == 2 else w for k, w in found.items()}
    folder.mkdir(parents=True)
    for path in model.source.folder.iterdir():
        if path.suffix in {".json", ".jinja", ".txt", ".model"} and "index" not in path.name:
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def squared_error(model: Checkpoint, file: Checkpoint) -> float:
    """Σ (ΔW)² over matrices."""
    shapes = {name: spec.shape for name, spec in model.specs().items()}
    names = [name for name, shape in shapes.items() if len(shape) == 2]
    deltas = (values(file, n) - values(model, n) for n in names)
    return float(sum(np.square(d, dtype=np.float64).sum() for d in deltas))


def run(args: argparse.Namespace) -> None:
    name = Path(args.checkpoint).name
    known = {(x["model"], x["preset"], x["draw"]) for x in read(OUT)}
    tokens = {t: text_chunks(args.checkpoint, t, n) for t, n in TEXTS.items()}
    for draw in map(int, args.draws.split(",")):
        left = [p for p in args.presets.split(",") if (name, p, draw) not in known]
        if not left:
            continue
        folder = args.work / "redrawn"
        shutil.rmtree(folder, ignore_errors=True)
        redraw(args.checkpoint, draw, folder)
        base = open_file(str(folder))
        reference = {t: Reference(base, x) for t, x in tokens.items()}
        for preset in left:
            lines = []
            for way in WAYS:
                path, _ = made(str(folder), preset, way, 0, args.work, None)
                file = open_file(str(path))
                line = {"model": name, "preset": preset, "draw": draw, "way": way}
                line["squared_error"] = squared_error(base, file)
                for text, held_out in tokens.items():
                    kl = divergences(reference[text], Scored(file, held_out))
                    line[text] = kl.round(9).tolist()
                lines.append(line | machine())
                print(preset, draw, way, *[f"{np.mean(line[t]):.6f} {t}" for t in tokens])
            append(OUT, lines)


def spread(ratios: np.ndarray) -> str:
    """Geometric mean of ratios ``(n_draws,)``, its interval, and the lowest and highest."""
    logs = np.log(ratios)
    wide = T95[min(len(logs) - 1, 9)] * logs.std(ddof=1) / np.sqrt(len(logs))
    middle, low, high = np.exp([logs.mean(), logs.mean() - wide, logs.mean() + wide])
    return f"{middle:.3f} ({low:.3f}–{high:.3f}); {ratios.min():.3f}–{ratios.max():.3f}"


def report() -> None:
    """A row for each model and preset, as Markdown."""
    lines = read(OUT)
    print(
        "| model | preset | draws | Σ (ΔW)² | English | code |\n| --- | --- | ---: |"
        + " ---: |" * 3
    )
    for model, preset in sorted(
        {(x["model"], x["preset"]) for x in lines}, key=lambda k: (k[0], TABLE.index(k[1]))
    ):
        here = [x for x in lines if (x["model"], x["preset"]) == (model, preset)]
        if len(here) <= len(WAYS):  # one draw says nothing of their spread
            continue
        sides = [sorted((x for x in here if x["way"] == w), key=lambda x: x["draw"]) for w in WAYS]
        cells = [np.array([x["squared_error"] for x in side]) for side in sides]
        row = [f"{np.median(cells[1] / cells[0]):.3f}"]
        for texts in (ENGLISH, ("code",)):
            kl = [np.array([np.mean([c for t in texts for c in x[t]]) for x in s]) for s in sides]
            row.append(spread(kl[1] / kl[0]))
        print(f"| {model} | {preset} | {len(sides[0])} | " + " | ".join(row) + " |")


def main() -> None:
    options = {
        "--presets": {"default": "q6_k,q4_k_m,q3_k_m"},
        "--draws": {"default": "1,2,3,4,5"},
    }
    run_or_report(__doc__, run, report, options)


if __name__ == "__main__":
    main()
