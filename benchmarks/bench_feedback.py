"""Measure what error feedback is worth: divergence from the original at the same bytes.

    python benchmarks/bench_feedback.py [--base pico] [--presets q4_k_m,q3_k_m,q2_k]
        [--seeds 3] [--chunks 24] [--ctx 512] [--tokens 8192] [--work DIR] [--threads 1]
    python benchmarks/bench_feedback.py --markdown

Every preset is exported twice for each seed: with the importance matrix of some text, and with
error feedback from the same tokens. `pico` is up-scaled by the default plan; any other base is
taken as it is. The seed draws the chunks of the built-in calibration mix.

The files are read back and run by this program's own engine in float32, so what is compared is the
stored weights, without what a runtime adds by rounding activations. Mean KL from the original is
taken over the second half of every chunk, on two texts: the built-in evaluation mix, of other
documents than the calibration mix, and another domain, the Python standard library's modules that
are held out of pico's training. Lines go to `results/feedback.jsonl`; `--markdown` gives medians
over the seeds of the newest commit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench_imatrix import held_out
from common import RESULTS, append, machine, read

from dus_edge.calibrate import engine
from dus_edge.calibrate.imatrix import ImatrixCollector
from dus_edge.calibrate.layer import as_tensor, next_token_logits
from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.jobs.export.calibration import Machine, TextChoice, read_chunks
from dus_edge.jobs.export.feedback import FeedbackChoice
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.jobs.export.imatrix import imatrix_source
from dus_edge.quant.recipe import find_preset
from dus_edge.upscale.model import find_model, plan_chooser
from dus_edge.words import markdown_table

OUT = RESULTS / "feedback.jsonl"
AS_IT_IS = plan_chooser(None, None, (), False)
CPU = Machine("cpu")


def opened(name: str, upscale: bool = False) -> Checkpoint:
    """A model's weights."""
    choose = plan_chooser(None, None, (), upscale)
    return find_model(name, choose, weights=True, say=lambda line: None).open()


class Reference:
    """The original on some text: final hidden states, and the distributions that follow."""

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
        self.checkpoint, self.tokens = checkpoint, tokens
        self.states, self.head = final_states(checkpoint, tokens), head(checkpoint)

    @torch.inference_mode()
    def kl(self, checkpoint: Checkpoint) -> np.ndarray:
        """Mean KL(original || checkpoint) of each chunk's second half, in nats a token."""
        states, other = final_states(checkpoint, self.tokens), head(checkpoint)
        config, half = checkpoint.config, self.tokens.shape[1] // 2
        found = []
        for a, b in zip(self.states, states, strict=True):
            p = next_token_logits(a[half:], *self.head, config).log_softmax(-1)
            q = next_token_logits(b[half:], *other, config).log_softmax(-1)
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
        return np.array(found)


def final_states(checkpoint: Checkpoint, tokens: np.ndarray) -> torch.Tensor:
    """Hidden states behind the last layer ``(n_chunks, n_ctx, hidden)``."""
    return engine.run_layers(checkpoint, tokens, ImatrixCollector(), engine.choose_settings("cpu"))


def head(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """The final norm and the head, in float32."""
    family = checkpoint.config.family
    role = "embedding" if checkpoint.config.tied_head else "head"
    norm, matrix = (as_tensor(checkpoint.read(family.name(r))) for r in ("final_norm", role))
    return norm.float(), matrix.float()


def texts(base: str, upscale: bool, n_tokens: int, n_ctx: int, work: Path) -> dict[str, Reference]:
    """The original on both texts."""
    model = find_model(
        base, plan_chooser(None, None, (), upscale), weights=True, say=lambda line: None
    )
    checkpoint, n_chunks = model.open(), max(1, n_tokens // n_ctx)
    python = tuple(held_out(work / "python", 400_000))
    return {
        "evaluation mix": Reference(
            checkpoint,
            read_chunks(model, TextChoice((), None, n_ctx, n_chunks), "evaluation").tokens,
        ),
        "Python modules": Reference(
            checkpoint, read_chunks(model, TextChoice(python, None, n_ctx, n_chunks)).tokens
        ),
    }


def exports(args: argparse.Namespace, work: Path) -> Iterator[tuple[dict, Path]]:
    """Every file with what it was made with, one at a time."""
    choose = plan_chooser(None, None, (), args.base == BUILTIN)
    for seed in range(args.seeds):
        text = TextChoice((), None, args.ctx, args.chunks, seed)
        for preset in args.presets.split(","):
            for kind in ("importance", "feedback"):
                folder = work / "out"
                source = imatrix_source("auto", text, CPU, folder, print)
                more = (
                    {"imatrix": source}
                    if kind == "importance"
                    else {"feedback": FeedbackChoice(text, CPU)}
                )
                start = time.process_time()
                result = export_gguf(
                    args.base,
                    choose,
                    [find_preset(preset)],
                    folder,
                    n_threads=args.threads,
                    overwrite=True,
                    say=print,
                    **more,
                )
                facts = {
                    "preset": preset,
                    "kind": kind,
                    "seed": seed,
                    "n_calibration_tokens": args.chunks * args.ctx,
                    "cpu_s": time.process_time() - start,
                    "bytes": result.outputs[0].nbytes,
                    "notes": list(result.notes),
                }
                yield facts, result.outputs[0].path


def run(args: argparse.Namespace, work: Path) -> None:
    """Measure and write the results."""
    torch.set_num_threads(args.threads)
    references = texts(args.base, args.base == BUILTIN, args.tokens, args.ctx, work)
    facts = machine() | {"model": Path(args.base).name, "threads": args.threads}
    for made, path in exports(args, work):
        checkpoint = opened(str(path))
        for name, reference in references.items():
            kl = reference.kl(checkpoint)
            line = made | {
                "text": name,
                "kl": float(kl.mean()),
                "kl_chunks": [round(float(x), 6) for x in kl],
                "n_tokens": reference.tokens.size // 2,
            }
            append(OUT, [line | facts])
            print(f"{made['preset']:7} {made['kind']:10} {made['seed']} {name}: {line['kl']:.5f}")


def markdown() -> str:
    """Medians over seeds, by model, preset and text."""
    lines = read(OUT)
    lines = [line for line in lines if line["commit"] == lines[-1]["commit"]]
    keys = dict.fromkeys((line["model"], line["preset"], line["text"]) for line in lines)
    rows = []
    for key in keys:
        mine = [x for x in lines if (x["model"], x["preset"], x["text"]) == key]
        by_seed: dict[int, dict[str, float]] = {}
        for line in mine:
            by_seed.setdefault(line["seed"], {})[line["kind"]] = line["kl"]
        whole = [found for found in by_seed.values() if len(found) == 2]
        if not whole:
            continue
        plain, fed = (statistics.median(f[k] for f in whole) for k in ("importance", "feedback"))
        ratios = [found["feedback"] / found["importance"] for found in whole]
        low, high = min(ratios), max(ratios)
        ratio = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
        rows.append([key[0], key[1].upper(), key[2], f"{plain:.5f}", f"{fed:.5f}", ratio])
    head = ["model", "preset", "text", "KL, importance", "KL, feedback", "ratio, all seeds"]
    return markdown_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default=BUILTIN)
    parser.add_argument("--presets", default="q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=24, help="of calibration text")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text to compare on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--markdown", action="store_true", help="only render what is there")
    args = parser.parse_args()
    if args.markdown:
        print(markdown())
        return
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        run(args, Path(work))


if __name__ == "__main__":
    main()
