"""Measure what quantizing costs the built-in base: perplexity and divergence from F16.

    python benchmarks/bench_perplexity.py [--presets q4_k_m,q6_k] [--bytes 100000]
    python benchmarks/bench_perplexity.py --markdown

pico is up-scaled by the default plan and exported to every preset by both quantizers; llama.cpp
runs the files over pico's held-out text. Each file of the text is cut into windows of the model's
context without overlap, each behind the start token, so that every token is scored exactly once;
log-sum-exp is in float64, and so are the sums. All models read a window before the next one is
read, so nothing but sums is kept. The divergence is KL(F16 || file) of the next token, mean over
tokens, against the F16 file of ggml's side. A file that is the same byte for byte by both
quantizers is read once. Figures do not depend on the number of threads.

By default a part of the text is read, drawn by hash and the same each time; `--bytes 1000000000`
reads all of it. One line for each GGUF file goes to `results/perplexity.jsonl`; `--markdown`
renders the newest.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import inspect
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np
from common import RESULTS, append, machine, read

from dus_edge.checkpoint.builtin import BUILTIN
from dus_edge.jobs.export.gguf import export_gguf
from dus_edge.quant import ggml
from dus_edge.quant.recipe import find_preset
from dus_edge.train.pico.corpus import SourceFile, choose_text, load_split, total_bytes
from dus_edge.upscale.model import plan_chooser
from dus_edge.words import markdown_table

QUANTIZERS = ("ggml", "native")
REFERENCE = "f16"
PRESETS = (REFERENCE, "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
#: Rows of logits that are float64 at once: 32 × 4096 stay in the cache.
ROWS = 32


# Text


def windows(ids: Sequence[int], bos: int, n_ctx: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, int32 of the same length: ``[bos, a, b]`` and ``[a, b, c]``."""
    for start in range(0, len(ids), n_ctx):
        targets = np.asarray(ids[start : start + n_ctx], np.int32)
        yield np.concatenate(([bos], targets[:-1])).astype(np.int32), targets


# llama.cpp


class Scorer:
    """One GGUF file, loaded: logits of whole windows."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.n_ctx = llama_cpp.llama_model_n_ctx_train(self._model)
        self._batch = llama_cpp.llama_batch_init(self.n_ctx, 0, 1)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = self.n_ctx
        context.n_threads = context.n_threads_batch = 1
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            sys.exit(f"llama.cpp makes no context for {path}")

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), out, len(out), False, False)
        if n < 0:
            sys.exit("llama.cpp cannot tokenize the text")
        return list(out[:n])

    def start_token(self) -> int:
        """The id that the tokenizer puts before a text."""
        if not llama_cpp.llama_vocab_get_add_bos(self._vocab):
            sys.exit("the windows need a tokenizer with a start token")
        return llama_cpp.llama_vocab_bos(self._vocab)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 (len(ids), n_vocab) from an empty context; good until the next call."""
        batch, n = self._batch, len(ids)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = int(ids[i])
            batch.pos[i] = i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        if status := llama_cpp.llama_decode(self._context, batch):
            sys.exit(f"llama_decode failed with {status}")
        pointer = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (n, self.n_vocab))

    def close(self) -> None:
        """Free all of it."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


@llama_cpp.llama_log_callback
def _no_log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp writes pages about every file."""


# Scores


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    """log Σ exp of the rows of a float64 (n, m), as (n,)."""
    top = x.max(axis=1)
    return top + np.log(np.exp(x - top[:, None]).sum(axis=1))


class Reference:
    """A window's distributions under the reference file, kept while the other files read it."""

    def __init__(self, logits: np.ndarray) -> None:
        """`logits`: float32 (n, n_vocab)."""
        self.p = np.empty(logits.shape, np.float64)
        self.entropy = np.empty(len(logits))
        for i in range(0, len(logits), ROWS):
            x = logits[i : i + ROWS].astype(np.float64)
            x -= log_sum_exp(x)[:, None]
            p = np.exp(x, out=self.p[i : i + ROWS])
            self.entropy[i : i + ROWS] = -np.einsum("ij,ij->i", p, x)

    def score(self, logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
        """Nats of the targets (int32 (n,)), and the sum of KL(reference || logits), nats."""
        nats = kl = 0.0
        for i in range(0, len(logits), ROWS):
            x = logits[i : i + ROWS].astype(np.float64)
            norm = log_sum_exp(x)
            nats += float((norm - x[np.arange(len(x)), targets[i : i + ROWS]]).sum())
            # Σ p (log p − log q), with log q = x − norm and Σ p = 1.
            cross = norm - np.einsum("ij,ij->i", self.p[i : i + ROWS], x)
            kl += float((cross - self.entropy[i : i + ROWS]).sum())
        return nats, kl


def paired_error(a: np.ndarray, b: np.ndarray, n_tokens: np.ndarray) -> float:
    """Standard error of the mean difference a token, from the windows' sums.

    A ratio estimator over windows, whose tokens lean on each other: Cochran, Sampling Techniques,
    3rd edition, 6.4.
    """
    d, count = a - b, len(a)
    residuals = d - d.sum() / n_tokens.sum() * n_tokens
    return float(np.sqrt((residuals**2).sum() * count / max(1, count - 1)) / n_tokens.sum())


def score_all(
    paths: Sequence[Path], pairs: Sequence[tuple[np.ndarray, np.ndarray]], n_threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every file's sums, window by window.

    Args:
        paths: GGUF files; the first is the reference.
        pairs: inputs and targets of the windows.
        n_threads: windows that are read at the same time, each by one thread.

    Returns:
        float64 (files, windows) each: nats of the windows' tokens, and the tokens' KL divergences
        from the reference, nats.
    """
    nats, kl = np.zeros((2, len(paths), len(pairs)))
    all_scorers = [[Scorer(path) for path in paths] for _ in range(n_threads)]
    start = time.monotonic()

    def work(worker: int) -> None:
        for i in range(worker, len(pairs), n_threads):
            inputs, targets = pairs[i]
            reference = None
            for k, scorer in enumerate(all_scorers[worker]):
                logits = scorer.logits(inputs)
                reference = reference or Reference(logits)
                nats[k, i], kl[k, i] = reference.score(logits, targets)
            if (i + 1) % max(1, len(pairs) // 10) == 0:
                seconds = time.monotonic() - start
                print(f"{i + 1} of {len(pairs)} windows, {seconds:.0f} s", file=sys.stderr)

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(work, range(n_threads)))
    for scorers in all_scorers:
        for scorer in scorers:
            scorer.close()
    return nats, kl


# Files


def export(presets: Sequence[str], quantizer: str, folder: Path) -> dict[str, Path]:
    """The up-scaled base's GGUF files by preset, made by one quantizer."""
    options = {}
    if "quantizer" in inspect.signature(export_gguf).parameters:
        options["quantizer"] = quantizer
    else:
        print(f"The export knows one quantizer only; {quantizer}: the same", file=sys.stderr)
    result = export_gguf(
        BUILTIN,
        plan_chooser(None, None, (), True),
        [find_preset(name) for name in presets],
        folder / quantizer,
        overwrite=True,
        **options,
    )
    return {str(written.preset): written.path for written in result.outputs}


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_windows(
    path: Path, text: Sequence[SourceFile]
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """The text's windows as the GGUF file's tokenizer cuts it, and the file's context."""
    scorer = Scorer(path)
    bos, n_ctx = scorer.start_token(), scorer.n_ctx
    pairs = [pair for f in text for pair in windows(scorer.tokenize(f.text), bos, n_ctx)]
    scorer.close()
    return pairs, n_ctx


# Printing

HEAD = """\
             perplexity             ours/ggml - 1 ± s.e.      KL to F16, nats
preset         ggml      ours                          ggml      ours  ratio"""


def by_preset(lines: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """The newest line of each quantizer, by preset, in the order of `PRESETS`."""
    found: dict[str, dict[str, dict]] = {}
    for line in lines:
        found.setdefault(line["preset"], {})[line["quantizer"]] = line
    known = [p for p in PRESETS if p in found]
    return {p: found[p] for p in (*known, *found) if len(found[p]) == len(QUANTIZERS)}


def kl_ratio(ours: float, theirs: float) -> str:
    """ours/ggml, or a dash where the reference is the same."""
    return f"{ours / theirs:.3f}" if theirs > 1e-12 else "–"


def printed(preset: str, lines: Mapping[str, dict]) -> str:
    """A row of the table, within 80 columns."""
    a, b = lines["ggml"], lines["native"]
    change, error = 100 * math.expm1(b["log_ratio"]), 100 * b["log_ratio_error"]
    text = f"{preset:8} {a['perplexity']:10.4f}{b['perplexity']:10.4f}"
    text += f" {change:+11.3f} % ± {error:5.3f}"
    return text + f"   {a['kl']:10.6f}{b['kl']:10.6f} {kl_ratio(b['kl'], a['kl']):>6}"


def render(lines: list[dict]) -> str:
    """The newest figures as a Markdown table, with what they were measured on."""
    # Figures of another text do not belong beside the newest ones.
    found = by_preset(x for x in lines if x["text_sha256"] == lines[-1]["text_sha256"])
    if not found:
        return "No results."
    head = ["preset", "perplexity, ggml", "ours", "ours/ggml − 1", "bits/byte, ggml", "ours"]
    head += ["KL to F16, ggml", "ours", "ratio"]
    rows = []
    for preset, both in found.items():
        a, b = both["ggml"], both["native"]
        change, error = 100 * math.expm1(b["log_ratio"]), 100 * b["log_ratio_error"]
        rows.append(
            [
                preset.upper(),
                *(f"{x['perplexity']:.4f}" for x in (a, b)),
                f"{change:+.3f} % ± {error:.3f}",
                *(f"{x['bits_per_byte']:.4f}" for x in (a, b)),
                *(f"{x['kl']:.6f}" for x in (a, b)),
                kl_ratio(b["kl"], a["kl"]),
            ]
        )
    any_line = next(iter(found.values()))["native"]
    about = (
        "{files} held-out files, {text_bytes:,} bytes, {tokens:,} tokens in windows of {n_ctx};\n"
        "± is the paired standard error over windows; KL in nats a token (commit {commit},\n"
        "{date}, llama-cpp-python {llama_cpp_python}):"
    ).format(**any_line)
    return f"{about}\n\n{markdown_table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--bytes", type=int, default=250_000, help="of text, in whole files")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--work", type=Path, default=Path("build/bench/perplexity"))
    parser.add_argument("--out-suffix", default="", help="results/perplexity<suffix>.jsonl")
    parser.add_argument("--markdown", action="store_true", help="only render what is there")
    args = parser.parse_args()

    results = RESULTS / f"perplexity{args.out_suffix}.jsonl"
    if args.markdown:
        print(render(read(results)))
        return
    llama_cpp.llama_log_set(_no_log, ctypes.c_void_p(0))
    # The reference comes first, whether it was asked for or not.
    presets = list(dict.fromkeys((REFERENCE, *args.presets.lower().split(","))))
    paths = {q: export(presets, q, args.work) for q in QUANTIZERS}
    files = {(p, q): paths[q][p] for p in presets for q in QUANTIZERS}
    hashes = {key: sha256_of(path) for key, path in files.items()}
    # Each content once; the first path of it stands for the others.
    different = {digest: files[key] for key, digest in reversed(hashes.items())}
    order = list(dict.fromkeys(hashes.values()))

    text = choose_text(load_split().heldout, args.bytes)
    pairs, n_ctx = read_windows(files[REFERENCE, "ggml"], text)
    n_tokens = np.array([len(targets) for _, targets in pairs])
    about = {
        "files": len(text),
        "text_bytes": total_bytes(text),
        "text_sha256": hashlib.sha256("".join(f.text for f in text).encode()).hexdigest(),
        "tokens": int(n_tokens.sum()),
        "n_ctx": n_ctx,
        "llama_cpp_python": ggml.version(),
        **machine(),
    }
    print(
        "{files} held-out files, {text_bytes:,} bytes, {tokens:,} tokens".format(**about)
        + f"; {len(order)} different GGUF files",
        flush=True,
    )
    nats, kl = score_all([different[digest] for digest in order], pairs, args.threads)

    lines = []
    for (preset, quantizer), digest in hashes.items():
        k, pair = order.index(digest), order.index(hashes[preset, "ggml"])
        per_token = nats[k].sum() / about["tokens"]
        line = {
            "preset": preset,
            "quantizer": quantizer,
            "file_bytes": files[preset, quantizer].stat().st_size,
            "file_sha256": digest,
            "perplexity": math.exp(per_token),
            "bits_per_byte": nats[k].sum() / math.log(2) / about["text_bytes"],
            "kl": kl[k].sum() / about["tokens"],
            "log_ratio": per_token - nats[pair].sum() / about["tokens"],
            "log_ratio_error": paired_error(nats[k], nats[pair], n_tokens),
        }
        lines.append(line | about)
    append(results, lines)
    print(f"\n{HEAD}")
    for preset, both in by_preset(lines).items():
        print(printed(preset, both))


if __name__ == "__main__":
    main()
