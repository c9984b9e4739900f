"""Divergence of quantized files from their model: presets, quantizers, importance, mix, feedback.

    python benchmarks/bench_divergence.py run CHECKPOINT --work DIR [--presets q4_k_m,q3_k_m]
        [--ways ggml,native] [--seeds 0,1,2]
    python benchmarks/bench_divergence.py run CHECKPOINT --work DIR --presets int4_g64,int4_g32
        --ways gptq,GPTQModel --gptqmodel .venv-gptqmodel/bin/python
    python benchmarks/bench_divergence.py report

CHECKPOINT: `pico`, or SmolLM2-135M as `padded.py` writes it. Each file is made by `dus-edge gguf`,
read back block by block as float32, and run through the calibration engine over held-out text: the
English and the code of the built-in evaluation texts, and the English of Python's own reference, a
text of another kind than all that is calibrated on. What is measured is KL(model || file) of
every next token, in nats, in float32 on both sides; llama.cpp would round activations too. All ways
of one seed see the same 24 chunks of 512 tokens of the calibration texts, for importance,
sensitivity and feedback alike. Ratios are paired: chunks are drawn together 2,000 times.

`int4_g64` and `int4_g32` are GPTQ folders of four bits and groups of 64 and 32, ours and those of
GPTQModel with its defaults, which gets the same tokens; both are read by `gptq_dense.py`.

A run goes on where it was cut short. Results: `results/divergence.jsonl`, and for GPTQ
`results/divergence_gptq.jsonl`, a line a file and text, with the mean of each chunk.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_gptq import theirs
from common import RESULTS, append, machine, read, run_or_report
from gptq_dense import write_dense

from dus_edge.calibrate.engine import DTYPES, ComputeSettings, run_layers
from dus_edge.calibrate.layer import as_tensor, next_token_logits
from dus_edge.calibrate.streams import NullVisitor
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.export.gguf.mix import model_matrices
from dus_edge.export.gguf.sink import gguf_shapes
from dus_edge.export.gguf.weight_error import weight_errors
from dus_edge.jobs.export.calibration import TextChoice, read_chunks
from dus_edge.quant.choose import find_quantizer
from dus_edge.quant.gptq_format import GPTQSettings
from dus_edge.quant.imatrix import match, read_imatrix
from dus_edge.quant.sensitivity import Sensitivity, weights_identity, write_sensitivity
from dus_edge.text.chunks import make_chunks
from dus_edge.text.documents import Document, builtin_documents
from dus_edge.text.tokenizers import load_tokenizer
from dus_edge.upscale.model import find_model
from dus_edge.upscale.plan import identity

OUT, GPTQ_OUT = RESULTS / "divergence.jsonl", RESULTS / "divergence_gptq.jsonl"
CLI = [sys.executable, "-c", "from dus_edge.cli.main import main; main()"]
SETTINGS = ComputeSettings("cpu", "float32", 2048)
N_CTX, ROWS = 512, 256
#: Flags of `gguf`; IMATRIX, SENSITIVITY and WEIGHTS are replaced by files of the seed's text.
WAYS = {
    "ggml": "-q PRESET --quantizer ggml",
    "ggml+imatrix": "-q PRESET --quantizer ggml --imatrix IMATRIX",
    "native": "-q PRESET",
    "native+imatrix": "-q PRESET --imatrix IMATRIX",
    "weights": "--like PRESET --sensitivity WEIGHTS --imatrix IMATRIX",
    "mix": "--like PRESET --sensitivity SENSITIVITY --imatrix IMATRIX",
    "feedback": "-q PRESET --imatrix IMATRIX --feedback --chunks 24 --seed SEED",
    "mix+feedback": "--like PRESET --sensitivity SENSITIVITY --imatrix IMATRIX --feedback "
    "--chunks 24 --seed SEED",
}
#: GPTQ's, of folders and not of files.
GPTQ_WAYS = ("GPTQModel", "gptq")
TABLE = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k", "iq2_m", "iq2_s")
TABLE += ("int4_g64", "int4_g32")
#: Chunks of each held-out text, at most.
TEXTS = {"en": 16, "code": 8, "reference": 8}
#: What the report counts together: the English of both kinds.
ENGLISH = ("en", "reference")


def text_chunks(checkpoint: str, language: str, n_chunks: int) -> np.ndarray:
    """Held-out tokens ``(n_chunks, N_CTX)``."""
    model = find_model(checkpoint, identity, weights=True, say=lambda line: None)
    if language == "reference":
        topics = (topic.strip() for _, topic in sorted(pydoc_data.topics.topics.items()))
        documents = [Document(topic, "en", "pydoc_data.topics") for topic in topics]
    else:
        documents = [d for d in builtin_documents("evaluation") if d.language == language]
    tokenizer = load_tokenizer(model.source.folder, model.config.vocab_size)
    return make_chunks(documents, tokenizer, N_CTX, n_chunks=n_chunks).tokens


class Scored:
    """A model's final states of some tokens, and its head."""

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
        self.config = checkpoint.config
        self.states = run_layers(checkpoint, tokens, NullVisitor(), SETTINGS)
        names = ("final_norm", "embedding" if self.config.tied_head else "head")
        self.norm, self.head = (
            as_tensor(checkpoint.read(self.config.family.name(n))).to(DTYPES["float32"])
            for n in names
        )

    def log_probabilities(self, chunk: int, rows: slice) -> torch.Tensor:
        h = self.states[chunk, rows]
        return next_token_logits(h, self.norm, self.head, self.config).log_softmax(-1)


class Reference(Scored):
    """The same, with all that it predicts kept."""

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
        super().__init__(checkpoint, tokens)
        self.kept: dict[tuple[int, int], torch.Tensor] = {}

    def log_probabilities(self, chunk: int, rows: slice) -> torch.Tensor:
        place = chunk, rows.start
        if place not in self.kept:
            self.kept[place] = super().log_probabilities(chunk, rows)
        return self.kept[place]


def divergences(reference: Scored, candidate: Scored) -> np.ndarray:
    """Mean KL of each chunk ``(n_chunks,)``, nats."""
    n_chunks, n_ctx, _ = reference.states.shape
    found = np.zeros(n_chunks)
    with torch.inference_mode():
        for chunk in range(n_chunks):
            for first in range(0, n_ctx - 1, ROWS):
                rows = slice(first, min(first + ROWS, n_ctx - 1))
                p, q = (x.log_probabilities(chunk, rows) for x in (reference, candidate))
                kl = torch.linalg.vecdot(p.exp(), p - q)
                found[chunk] += kl.double().sum().item() / (n_ctx - 1)
    return found


def open_file(path: str) -> Checkpoint:
    return find_model(path, identity, weights=True, say=lambda line: None).open()


def call(words: Sequence[str]) -> None:
    done = subprocess.run([*CLI, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-3000:]}")


def calibration(checkpoint: str, kind: str, seed: int, work: Path) -> Path:
    """A file of a seed's tokens, made once."""
    path = work / f"{kind}-{seed}.{'gguf' if kind == 'imatrix' else 'json'}"
    if path.exists():
        return path
    if kind == "weights":
        keep_weight_errors(checkpoint, calibration(checkpoint, "imatrix", seed, work), path)
        return path
    words = [kind, checkpoint, "--no-upscale", "--chunks", "24", "--seed", str(seed)]
    if kind == "sensitivity":
        words += ["--imatrix", str(calibration(checkpoint, "imatrix", seed, work))]
    call([*words, "-o", str(path)])
    return path


def keep_weight_errors(checkpoint: str, imatrix: Path, path: Path) -> None:
    """Σ w (ΔW)² of every tensor and type in place of divergence, for a knapsack by weights."""
    model = find_model(checkpoint, identity, weights=True, say=lambda line: None)
    opened, matrices = model.open(), model_matrices(model.config, model.shapes)
    shapes = gguf_shapes(model.config.family, model.shapes)
    importance = match(read_imatrix(imatrix), shapes).weights
    errors = weight_errors(opened, matrices, find_quantizer("native"), importance)
    kept = Sensitivity(weights_identity(opened), 1, "errors of weights", errors)
    write_sensitivity(path, kept)


def made(
    checkpoint: str, preset: str, way: str, seed: int, work: Path, gptqmodel: str | None
) -> tuple[Path, float]:
    """A file, and the seconds that its export took."""
    if way in GPTQ_WAYS:
        return made_gptq(checkpoint, preset, way, seed, work, gptqmodel)
    words = []
    for word in WAYS[way].split():
        if word.lower() in {"imatrix", "sensitivity", "weights"} and word.isupper():
            words.append(str(calibration(checkpoint, word.lower(), seed, work)))
        else:
            words.append(word.replace("PRESET", preset).replace("SEED", str(seed)))
    out = work / "files"
    shutil.rmtree(out, ignore_errors=True)
    begun = time.monotonic()
    call(["gguf", checkpoint, "--no-upscale", *words, "-o", str(out)])
    return next(out.glob("*.gguf")), time.monotonic() - begun


def made_gptq(
    checkpoint: str, preset: str, way: str, seed: int, work: Path, gptqmodel: str | None
) -> tuple[Path, float]:
    """A plain folder of what a GPTQ folder's weights are, and the seconds that GPTQ took."""
    base, folder = work / "base", work / "gptq"
    group = preset.removeprefix("int4_g")
    if not base.exists():
        call(["upscale", checkpoint, "--no-upscale", "-o", str(base)])
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.monotonic()
    if way == "gptq":
        words = ["gptq", checkpoint, "--no-upscale", "--bits", "4", "--group-size", group]
        call([*words, "--chunks", "24", "--seed", str(seed), "-o", str(folder)])
    else:
        if gptqmodel is None:
            sys.exit("--gptqmodel PYTHON: of the environment that make interop sets up")
        model = find_model(checkpoint, identity, weights=True, say=lambda line: None)
        tokens = work / "tokens.npy"
        np.save(tokens, read_chunks(model, TextChoice(n_chunks=24, seed=seed)).tokens)
        settings = GPTQSettings(bits=4, group_size=int(group))
        theirs(gptqmodel, base, tokens, settings, folder)
    seconds = time.monotonic() - begun
    write_dense(folder, base, work / "dense")
    return work / "dense", seconds


def run(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    name = Path(args.checkpoint).name
    known = {(x["model"], x["preset"], x["way"], x["seed"], x["text"]) for x in everything()}
    tokens = {t: text_chunks(args.checkpoint, t, n) for t, n in TEXTS.items()}
    base = find_model(args.checkpoint, identity, weights=True, say=lambda line: None).open()
    reference = {t: Reference(base, x) for t, x in tokens.items()}
    for seed in map(int, args.seeds.split(",")):
        for preset in args.presets.split(","):
            for way in args.ways.split(","):
                drawn = seed if way in GPTQ_WAYS or "IMATRIX" in WAYS[way] else 0
                wanted = [t for t in tokens if (name, preset, way, drawn, t) not in known]
                if not wanted:
                    continue
                known |= {(name, preset, way, drawn, t) for t in wanted}
                how = preset, way, drawn, args.work, args.gptqmodel
                path, seconds = made(args.checkpoint, *how)
                checkpoint = open_file(str(path))
                folder = args.work / "gptq" / "model.safetensors"
                size = (folder if way in GPTQ_WAYS else path).stat().st_size
                lines: list[dict[str, Any]] = []
                for text in wanted:
                    held_out = tokens[text]
                    kl = divergences(reference[text], Scored(checkpoint, held_out))
                    line = {"model": name, "preset": preset, "way": way, "seed": drawn}
                    line |= {"text": text, "n_tokens": held_out.size, "kl": float(kl.mean())}
                    line |= {"bytes": size, "export_s": round(seconds, 1)}
                    lines.append(line | {"by_chunk": kl.round(9).tolist()} | machine())
                append(GPTQ_OUT if way in GPTQ_WAYS else OUT, lines)
                print(
                    *[f"{x['kl']:.6f} {x['text']}" for x in lines], preset, way, drawn, flush=True
                )


def everything() -> list[dict]:
    """All lines of both files."""
    return read(OUT) + read(GPTQ_OUT)


def ratio(ours: Sequence[dict], others: Sequence[dict]) -> tuple[float, float, float]:
    """Of mean KL over seeds, with its 95 % interval over chunks drawn together."""
    a, b = (np.mean([x["by_chunk"] for x in lines], axis=0) for lines in (ours, others))
    draw = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    many = a[draw].mean(axis=1) / b[draw].mean(axis=1)
    low, high = np.quantile(many, (0.025, 0.975))
    return a.mean() / b.mean(), low, high


def gathered(lines: Sequence[dict], texts: Sequence[str]) -> list[dict]:
    """Lines of files that were measured on all of some texts, with the chunks of all."""
    found: dict[tuple, dict[str, dict]] = {}
    for x in lines:
        found.setdefault((x["model"], x["preset"], x["way"], x["seed"]), {})[x["text"]] = x
    whole = [by_text for by_text in found.values() if all(t in by_text for t in texts)]
    chunks = [[kl for t in texts for kl in by_text[t]["by_chunk"]] for by_text in whole]
    return [
        by_text[texts[0]] | {"by_chunk": one, "kl": float(np.mean(one))}
        for by_text, one in zip(whole, chunks, strict=True)
    ]


def report() -> None:
    """Tables as Markdown."""
    for label, texts in (("English", ENGLISH), ("code", ("code",))):
        lines = gathered(everything(), texts)
        for model in sorted({x["model"] for x in lines}):
            print(f"\n**{model}, {label}**\n")
            table([x for x in lines if x["model"] == model])


def table(lines: Sequence[dict]) -> None:
    """One model's files, a row a preset."""
    ways = [w for w in (*WAYS, *GPTQ_WAYS) if any(x["way"] == w for x in lines)]
    print("| preset | " + " | ".join(ways) + " |")
    print("| --- |" + " ---: |" * len(ways))
    for preset in TABLE:
        here = {w: [x for x in lines if (x["preset"], x["way"]) == (preset, w)] for w in ways}
        if any(here.values()):
            print(f"| {preset} | " + " | ".join(cell(way, here) for way in ways) + " |")


def cell(way: str, here: dict[str, list[dict]]) -> str:
    """The median over seeds, and how it compares with ggml's."""
    other = {"native": "ggml", "gptq": "GPTQModel"}.get(way, "ggml+imatrix")
    ours, against = here[way], here.get(other)
    if not ours:
        return ""
    text = f"{np.median([x['kl'] for x in ours]):.5f}"
    if way in ("ggml", "ggml+imatrix", "GPTQModel") or not against:
        return text
    r, low, high = ratio(ours, against)
    return f"{text} ({r:.2f}, {low:.2f}–{high:.2f})"


def main() -> None:
    options = {
        "--presets": {"default": ",".join(TABLE)},
        "--ways": {"default": "ggml,native,ggml+imatrix,native+imatrix"},
        "--seeds": {"default": "0"},
        "--gptqmodel": {"metavar": "PYTHON", "help": "of its environment"},
    }
    run_or_report(__doc__, run, report, options)


if __name__ == "__main__":
    main()
