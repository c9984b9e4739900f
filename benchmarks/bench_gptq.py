"""Measure our GPTQ beside GPTQModel's and rounding to nearest: quality and time.

    python benchmarks/bench_gptq.py [--gptqmodel .venv-gptqmodel/bin/python] [--rounds 3]
    python benchmarks/bench_gptq.py --speed MODEL --chunks N --ctx N [--rounds 1]
    python benchmarks/bench_gptq.py --markdown

pico is up-scaled by the default plan. Both sides get the same tokens (chunks of 512 of this
program's own Python sources), bits and group size, and the threads of this machine. GPTQModel runs
with its defaults in the environment that `make interop` sets up. Rounding to nearest is what GPTQ
tools mean by it: symmetric, the largest weight of a group on the last code. `dus-edge quality`
compares all with the up-scaled model in float32 on pico's held-out text; the second half of every
chunk counts.

Time is wall time of whole processes, Python's start and loading included, and of quantizing alone:
GPTQModel's `quantize`, which is given tokens, and our calibration behind reading the text; sides
alternate, and CPU time is that of the process. Peak memory is the kernel's maximum resident size
(wait4). `--speed` times another model, without quality. Lines go to `results/gptq.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from bench_imatrix import held_out, python_sources
from common import HERE, RESULTS, append, machine, read

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.export import gptq as sink
from dus_edge.jobs.export.calibration import TextChoice, read_chunks
from dus_edge.jobs.export.checkpoint import export_checkpoint
from dus_edge.quality import compare as quality_run
from dus_edge.quant import gptq, gptq_format
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.words import markdown_table

OUT = RESULTS / "gptq.jsonl"
SIDE = HERE / "gptqmodel_side.py"
#: Our command line, which says on its last line how long calibration took.
TIMED = """
import time
from dus_edge.cli.main import main
from dus_edge.jobs.export import gptq
run = gptq.run_collector
def timed(*args):
    start = time.perf_counter()
    run(*args)
    spent.append(time.perf_counter() - start)
spent, gptq.run_collector = [], timed
try:
    main()
finally:
    print(spent[0], flush=True)
"""
CLI = [sys.executable, "-c", TIMED]
CHOOSE = plan_chooser(None, None, (), True)


@dataclass
class Timed:
    """A process: wall and CPU seconds, those of quantizing alone, and peak resident bytes."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    quantize_s: float = 0.0


def timed(command: list[str], log: Path) -> Timed:
    """Run a process; a failure stops the benchmark."""
    start = time.perf_counter()
    with log.open("w") as file:
        # GPTQModel leaves a folder of logs where it runs.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            # It refuses machines of two cores else.
            env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    wall = time.perf_counter() - start
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Timed(wall, usage.ru_utime + usage.ru_stime, peak)


def nearest(folder: Path, settings: gptq_format.GPTQSettings) -> None:
    """A folder of weights rounded to nearest."""
    model = find_model(BUILTIN, CHOOSE, weights=True, say=print)
    checkpoint = model.open()
    arrays = {}
    for spec in checkpoint.specs().values():
        if not checkpoint.config.family.is_linear(spec.name):
            continue
        bits = checkpoint.read(spec.name).astype(np.uint32) << 16
        w = torch.from_numpy(bits.view(np.float32))
        n_out, n_in = w.shape
        groups = w.view(n_out, -1, settings.group_width(n_in))
        middle = 2 ** (settings.bits - 1)
        scales = (groups.abs().amax(2) / (settings.top / 2)).half()
        codes = (groups / scales[..., None].float()).round().add(middle).clamp(0, settings.top)
        solution = gptq.Solution(
            codes.view_as(w).to(torch.uint8),
            scales.T.contiguous(),
            torch.full(scales.T.shape, middle, dtype=torch.int32),
            torch.arange(n_in, dtype=torch.int32) // settings.group_width(n_in),
            0.0,
            0.0,
            None,
        )
        stem = spec.name.removesuffix(".weight")
        for part, array in gptq_format.stored(solution, settings).items():
            arrays[f"{stem}.{part}"] = array
    from safetensors.numpy import save_file

    codes_file = folder.with_suffix(".codes")
    save_file(arrays, codes_file)
    sink.write_checkpoint(checkpoint, folder, "", settings, [codes_file], n_threads=1)


def ours(base: str, options: list[str], out: Path) -> Timed:
    """Our side."""
    log = out.with_suffix(".log")
    command = [*CLI, "gptq", base, *options, "--device", "cpu", "-o", str(out), "--overwrite"]
    found = timed(command, log)
    found.quantize_s = float(log.read_text().splitlines()[-1])
    return found


def theirs(
    python: str, model: Path, tokens: Path, settings: gptq_format.GPTQSettings, out: Path
) -> Timed:
    """GPTQModel's side."""
    log = out.with_suffix(".log")
    sizes = [str(settings.bits), str(settings.group_size)]
    found = timed([python, str(SIDE), str(model), str(tokens), *sizes, str(out)], log)
    found.quantize_s = json.loads(log.read_text().splitlines()[-1])["quantize_s"]
    return found


def compare(args: argparse.Namespace, work: Path) -> None:
    """Time both sides, then measure the quality of what they made."""
    settings = gptq_format.GPTQSettings(bits=args.bits, group_size=args.group_size)
    base = args.speed or BUILTIN
    plain = Path(args.speed) if args.speed else work / "plain"
    if not args.speed:
        export_checkpoint(BUILTIN, CHOOSE, plain)
    text = python_sources(work / "python")
    choice = TextChoice((text,), None, args.ctx, args.chunks)
    choose = plan_chooser(None, None, (), not args.speed)
    model = find_model(base, choose, weights=True, say=print)
    chunks = read_chunks(model, choice)
    tokens = work / "tokens.npy"
    np.save(tokens, chunks.tokens)
    sizes = ["--bits", str(args.bits), "--group-size", str(args.group_size)]
    texts = ["--text", str(text), "--ctx", str(args.ctx), "--chunks", str(args.chunks)]
    options = [*sizes, *texts, *(["--no-upscale"] if args.speed else [])]
    facts = machine() | {
        "model": model.source.name,
        "n_layers": model.config.n_layers,
        "n_parameters": model.n_parameters,
        "bits": args.bits,
        "group_size": args.group_size,
        "n_chunks": len(chunks.tokens),
        "n_ctx": args.ctx,
        "threads": torch.get_num_threads(),
    }
    for _ in range(args.rounds):
        runs = {"dus-edge": ours(base, options, work / "ours")}
        if args.gptqmodel:
            runs["GPTQModel"] = theirs(args.gptqmodel, plain, tokens, settings, work / "theirs")
        for side, run in runs.items():
            print(
                f"{side:10} {run.wall_s:7.1f} s, quantizing {run.quantize_s:7.1f} s, "
                f"CPU {run.cpu_s:7.1f} s, {run.peak_rss_bytes / 1e9:.2f} GB peak",
                flush=True,
            )
            append(OUT, [{"side": side} | asdict(run) | facts])
    if not args.speed:
        measure_quality(work, plain, settings, facts, args.bytes)


def measure_quality(
    work: Path, plain: Path, settings: gptq_format.GPTQSettings, facts: dict, max_bytes: int
) -> None:
    """Perplexity and divergence of every folder that is there."""
    nearest(work / "nearest", settings)
    sides = {"nearest": "nearest", "dus-edge": "ours", "GPTQModel": "theirs"}
    folders = {side: work / name for side, name in sides.items() if (work / name).exists()}
    results = quality_run.quality(
        str(plain), [str(f) for f in folders.values()], texts=held_out(work / "text", max_bytes)
    )
    for side, candidate in zip(folders, results.candidates, strict=True):
        total = candidate.total
        line = {
            "side": side,
            "perplexity": total.perplexity.value,
            "perplexity_reference": total.perplexity_reference.value,
            "log_ratio": total.log_ratio.value,
            "log_ratio_error": total.log_ratio.error,
            "kl": total.kl.value,
            "kl_error": total.kl.error,
            "n_tokens": total.n_tokens,
            "bytes": candidate.info.n_bytes,
        }
        append(OUT, [line | facts])
        print(
            f"{side:10} perplexity {line['perplexity']:.4f} "
            f"({100 * np.expm1(line['log_ratio']):+.3f} % ± {100 * line['log_ratio_error']:.3f}), "
            f"KL {line['kl']:.5f} ± {line['kl_error']:.5f}"
        )


def markdown() -> str:
    """Newest quality, and medians of all times of the newest commit of each model."""
    lines = read(OUT)
    quality = {line["side"]: line for line in lines if "kl" in line}
    rows = [
        [
            side,
            f"{line['perplexity']:.4f}",
            f"{100 * np.expm1(line['log_ratio']):+.2f} % ± {100 * line['log_ratio_error']:.2f}",
            f"{line['kl']:.5f} ± {line['kl_error']:.5f}",
        ]
        for side, line in quality.items()
    ]
    line = next(iter(quality.values()))
    reference = f"{line['perplexity_reference']:.4f}"
    head = ["4-bit, groups of 128", "perplexity", f"above {reference}", "KL"]
    text = markdown_table(head, rows)
    times: dict[tuple[str, str, int], list[dict]] = {}
    for line in lines:
        if "wall_s" in line:
            times.setdefault((line["model"], line["side"], line["n_chunks"]), []).append(line)
    rows = []
    for (model, side, n_chunks), runs in times.items():
        runs = [r for r in runs if r["commit"] == runs[-1]["commit"]]
        middle = {k: statistics.median(r[k] for r in runs) for k in ("wall_s", "quantize_s")}
        rows.append(
            [
                f"{model}, {runs[-1]['n_layers']} layers",
                side,
                f"{n_chunks} × {runs[-1]['n_ctx']}",
                str(len(runs)),
                f"{middle['wall_s']:.1f} s",
                f"{middle['quantize_s']:.1f} s",
                f"{max(r['peak_rss_bytes'] for r in runs) / 1e9:.2f} GB",
            ]
        )
    head = ["model", "side", "tokens", "runs", "whole process", "quantizing", "peak memory"]
    return f"{text}\n\n{markdown_table(head, rows, left=range(2))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="of its environment")
    parser.add_argument("--speed", metavar="MODEL", help="time this model, as it is")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=100_000, help="of held-out text")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--markdown", action="store_true", help="only render what is there")
    args = parser.parse_args()
    if args.markdown:
        print(markdown())
        return
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        compare(args, Path(work))


if __name__ == "__main__":
    main()
