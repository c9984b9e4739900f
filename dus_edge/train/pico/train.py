"""The recipe that made ``pico``: ``python -m dus_edge.train.pico.train --out DIR --minutes 60``.

Everything is measured by the wall clock: the learning rate warms up, stays, and falls
linearly to zero when the minutes are over. A run that was interrupted goes on from its
newest checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dus_edge.train.pico import corpus, evaluate
from dus_edge.train.pico.batches import Stream
from dus_edge.train.pico.card import Run, pico_card
from dus_edge.train.pico.model import Pico, PicoConfig, initialise
from dus_edge.train.pico.optim import Muon
from dus_edge.train.pico.package import (
    PicoScores,
    continue_text,
    round_to_bf16,
    score,
    write_pico,
)
from dus_edge.train.pico.parallel import accumulate, make_pool, mean_loss
from dus_edge.train.pico.tokenizer import (
    encode_documents,
    load_sentencepiece,
    split_some,
    split_table,
    train_sentencepiece,
)
from dus_edge.upscale.plan import from_drop

PUBLISHED_M = 2
"""Layers dropped at each seam in the up-scaling which the card reports (8 -> 12)."""

SAMPLE_PROMPTS = ("def __init__(self", "import os\nimport ", "for i in range(")


@dataclass(frozen=True)
class Recipe:
    """The settings of one training run; lengths in tokens, times in minutes."""

    minutes: float = 60.0
    seed: int = 17
    threads: int = 2
    step_tokens: int = 4096
    micro_tokens: int = 512
    short_length: int = 256
    full_length: int = 512
    full_from: float = 0.6
    muon_lr: float = 7e-3
    adam_lr: float = 6e-3
    weight_decay: float = 0.1
    warmup: float = 0.015
    decay_from: float = 0.3
    library_share: float = 0.5
    late_library_share: float = 0.75
    late_from: float = 0.5
    split_rate: float = 0.015
    upscaled_every: int = 8
    upscaled_from: float = 0.6
    save_minutes: float = 3.0
    eval_minutes: float = 8.0
    compile: bool = True


@dataclass
class TrainingProgress:
    """What a checkpoint counts besides weights; ``seconds`` of training, evaluation included."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    drawn: dict[str, int] = field(default_factory=lambda: {"library": 0, "tests": 0})


@dataclass(frozen=True)
class Data:
    """The training streams and the held-out documents (ids that start with ``<s>``)."""

    library: Stream
    tests: Stream
    heldout: list[np.ndarray]
    heldout_sizes: list[int]


def schedule(done: float, recipe: Recipe) -> float:
    """Return the learning rate's factor (0..1) at the share ``done`` (0..1) of the budget."""
    if done < recipe.warmup:
        return max(0.01, done / recipe.warmup)
    return min(1.0, max(0.0, (1.0 - done) / (1.0 - recipe.decay_from)))


def make_tokenizer(split: corpus.Split, path: Path) -> bytes:
    """Train the tokenizer on the library part, or read it where a run has left it."""
    if not path.exists():
        path.write_bytes(train_sentencepiece(source.text for source in split.library))
    return path.read_bytes()


def make_data(split: corpus.Split, model: bytes, recipe: Recipe) -> Data:
    """Encode the split; the training streams get a few extra cuts (see ``split_some``)."""
    processor = load_sentencepiece(model)
    table = split_table(processor)
    rng = np.random.default_rng(recipe.seed)

    def stream(sources: tuple[corpus.SourceFile, ...]) -> Stream:
        documents = encode_documents(processor, [source.text for source in sources])
        cut = [split_some(ids, table, recipe.split_rate, rng) for ids in documents]
        return Stream(cut, recipe.seed)

    heldout = encode_documents(processor, [source.text for source in split.heldout])
    return Data(
        library=stream(split.library),
        tests=stream(split.tests),
        heldout=[ids[:-1] for ids in heldout],
        heldout_sizes=[source.size for source in split.heldout],
    )


def draw(
    data: Data, progress: TrainingProgress, rows: int, length: int, share: float
) -> torch.Tensor:
    """Draw int64 ids (rows, length + 1), a share of the rows from the library stream."""
    library = round(rows * share)
    picked = []
    for name, count in (("library", library), ("tests", rows - library)):
        stream = getattr(data, name)
        for _ in range(count):
            picked.append(stream.piece(progress.drawn[name], length))
            progress.drawn[name] += length
    # Short micro-batches are cut from this in order, so mix the two kinds of rows.
    order = np.random.default_rng(progress.drawn["library"]).permutation(rows)
    return torch.from_numpy(np.stack(picked)[order])


def plan_for(
    micro: int, step: int, done: float, recipe: Recipe, layers: int
) -> Sequence[int] | None:
    """Return the plan of one micro-batch: now and then an up-scaled one, else None.

    Running some text through layers [0..L-m) + [m..L) teaches the layers to stand being
    repeated, which is what up-scaling does to them later.
    """
    every = recipe.upscaled_every
    if not every or done < recipe.upscaled_from:
        return None
    micros = recipe.step_tokens // recipe.micro_tokens
    if (step * micros + micro) % every:
        return None
    m = int(np.random.default_rng((recipe.seed, step)).choice([1, 2, 2, 3]))
    return from_drop(layers, m).sources


def train_step(
    model: Pico,
    data: Data,
    progress: TrainingProgress,
    done: float,
    recipe: Recipe,
    pool: ThreadPoolExecutor,
) -> tuple[float, float]:
    """Accumulate one step's gradients; return mean nats/token, plain and up-scaled (or nan)."""
    length = recipe.full_length if done >= recipe.full_from else recipe.short_length
    share = recipe.late_library_share if done >= recipe.late_from else recipe.library_share
    batch = draw(data, progress, recipe.step_tokens // length, length, share)
    chunks = batch.split(recipe.micro_tokens // length)
    jobs = [
        (ids, plan_for(micro, progress.step, done, recipe, model.config.layers))
        for micro, ids in enumerate(chunks)
    ]
    # The long jobs go first, so that the workers end together.
    jobs.sort(key=lambda job: job[1] is None)
    losses = accumulate(model, jobs, pool, recipe.threads)
    progress.tokens += batch.shape[0] * length
    plain = [nats for is_plain, nats in losses if is_plain]
    scaled = [nats for is_plain, nats in losses if not is_plain]
    return float(np.mean(plain)), float(np.mean(scaled)) if scaled else math.nan


def make_optimisers(
    model: Pico, recipe: Recipe, pool: ThreadPoolExecutor
) -> list[torch.optim.Optimizer]:
    """Give the hidden matrices to Muon, and the embedding and norms to AdamW."""
    hidden = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    ids = {id(weight) for weight in hidden}
    rest = [weight for weight in model.parameters() if id(weight) not in ids]
    return [
        Muon(hidden, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, pool=pool),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def compile_layers(model: Pico, recipe: Recipe) -> None:
    """Compile the layers for both sequence lengths, before any worker thread calls them."""
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    for length in (recipe.short_length, recipe.full_length):
        ids = torch.zeros(recipe.micro_tokens // length, length + 1, dtype=torch.int64)
        mean_loss(model, ids, None).backward()
    model.zero_grad(set_to_none=True)


def quick_scores(model: Pico, data: Data, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """Return bits per byte (plain, up-scaled) on the first 1024 tokens of 16 held-out files.

    This follows a run cheaply; its byte count is taken from each file's mean bytes per token.
    The card's figures come from :func:`dus_edge.train.pico.evaluate.bits_per_byte` on whole files.
    """
    every = max(1, len(data.heldout) // 16)
    pairs = list(zip(data.heldout, data.heldout_sizes, strict=True))[::every]
    documents = [ids[:1024] for ids, _ in pairs]
    size = sum(n * len(part) / len(ids) for part, (ids, n) in zip(documents, pairs, strict=True))
    plan = from_drop(model.config.layers, PUBLISHED_M).sources
    plain = pool.map(partial(evaluate.document_bits, model), documents)
    scaled = pool.map(partial(evaluate.document_bits, partial(model, plan=plan)), documents)
    return sum(plain) / size, sum(scaled) / size


def save_state(path: Path, model: Pico, optimisers: list, progress: TrainingProgress) -> None:
    """Write a resumable checkpoint, so that an interruption never leaves half of one."""
    state = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "progress": asdict(progress),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path, model: Pico, optimisers: list) -> TrainingProgress:
    """Load a checkpoint of :func:`save_state`; a fresh :class:`TrainingProgress` if there is none.

    Without optimisers only the weights are loaded.
    """
    if not path.exists():
        return TrainingProgress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=bool(optimisers)):
        optimiser.load_state_dict(saved)
    return TrainingProgress(**state["progress"])


def log_point(path: Path, **point: float | int | None) -> None:
    """Append one line to the JSON-lines log and show it."""
    line = json.dumps(point)
    with path.open("a", encoding="utf-8") as log:
        log.write(line + "\n")
    print("  ".join(f"{key} {value}" for key, value in point.items()), flush=True)


def mean_bits(losses: list[float]) -> float | None:
    """Return the mean of nats in bits, leaving out nan; None if nothing is left."""
    real = [loss for loss in losses if not math.isnan(loss)]
    return round(float(np.mean(real)) / math.log(2), 4) if real else None


def draw_samples(model: Pico, tokenizer: bytes) -> list[tuple[str, str]]:
    """Return (title, text) of the card's samples: the first draws, whatever they are."""
    plan = from_drop(model.config.layers, PUBLISHED_M).sources
    greedy = [
        (f"{kind}, greedy", continue_text(model, tokenizer, prompt, 40, layers))
        for kind, layers in (("8 layers", None), ("12 layers", plan))
        for prompt in SAMPLE_PROMPTS
    ]
    drawn = [
        (
            f"{kind}, temperature 0.7, seed 0",
            continue_text(model, tokenizer, SAMPLE_PROMPTS[0], 160, layers, temperature=0.7),
        )
        for kind, layers in (("8 layers", None), ("12 layers", plan))
    ]
    return greedy + drawn


def finish(out: Path, recipe: Recipe, command: str, history: str) -> PicoScores:
    """Score the run in ``out`` and write its checkpoint with card to ``out/model``."""
    split = corpus.load_split()
    tokenizer = (out / "tokenizer.model").read_bytes()
    model = Pico(PicoConfig())
    progress = load_state(out / "state.pt", model, [])
    round_to_bf16(model)
    with make_pool(recipe.threads) as pool:
        scores = score(model, split, tokenizer, pool)
    samples = draw_samples(model, tokenizer)
    run = Run(
        steps=progress.step,
        tokens=progress.tokens,
        minutes=progress.seconds / 60.0,
        parameters=sum(weight.numel() for weight in model.parameters()),
        command=command,
        history=history,
    )
    folder = out / "model"
    write_pico(folder, model, tokenizer)
    card = pico_card(split, scores, run, recipe, samples)
    (folder / "README.md").write_text(card, encoding="utf-8")
    log_point(
        out / "training.jsonl",
        step=progress.step,
        tokens=progress.tokens,
        minutes=round(progress.seconds / 60.0, 2),
        **{f"heldout_{name}_bits_per_byte": round(n, 4) for name, n in asdict(scores).items()},
    )
    return scores


def train(out: Path, recipe: Recipe) -> tuple[Pico, TrainingProgress]:
    """Train (or go on training) in the folder ``out`` and return the model."""
    torch.set_num_threads(1)
    pool = make_pool(recipe.threads)
    split = corpus.load_split()
    data = make_data(split, make_tokenizer(split, out / "tokenizer.model"), recipe)
    model = Pico(PicoConfig())
    initialise(model, recipe.seed)
    optimisers = make_optimisers(model, recipe, pool)
    base_rates = [recipe.muon_lr, recipe.adam_lr]
    progress = load_state(out / "state.pt", model, optimisers)
    if recipe.compile:
        compile_layers(model, recipe)
    budget = 60.0 * recipe.minutes
    begun = time.monotonic() - progress.seconds
    saved = evaluated = progress.seconds
    plain_losses: list[float] = []
    scaled_losses: list[float] = []
    while progress.seconds < budget:
        done = progress.seconds / budget
        plain, scaled = train_step(model, data, progress, done, recipe, pool)
        plain_losses.append(plain)
        scaled_losses.append(scaled)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, rate in zip(optimisers, base_rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(done, recipe)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        progress.seconds = time.monotonic() - begun
        finished = progress.seconds >= budget
        if finished or progress.seconds - evaluated >= 60.0 * recipe.eval_minutes:
            with torch.compiler.set_stance("force_eager"):
                score, scaled_score = quick_scores(model, data, pool)
            log_point(
                out / "training.jsonl",
                step=progress.step,
                tokens=progress.tokens,
                minutes=round(progress.seconds / 60.0, 2),
                train_bits_per_token=round(np.nanmean(plain_losses) / math.log(2), 4),
                upscaled_train_bits_per_token=mean_bits(scaled_losses),
                heldout_subset_bits_per_byte=round(score, 4),
                upscaled_heldout_subset_bits_per_byte=round(scaled_score, 4),
            )
            plain_losses, scaled_losses = [], []
            evaluated = progress.seconds = time.monotonic() - begun
        if finished or progress.seconds - saved >= 60.0 * recipe.save_minutes:
            save_state(out / "state.pt", model, optimisers, progress)
            saved = progress.seconds
        elif progress.step % 20 == 0:
            print(
                f"step {progress.step} tokens {progress.tokens} "
                f"s {progress.seconds:.0f} nats {plain:.3f} {scaled:.3f}",
                flush=True,
            )
    return model, progress


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dus_edge.train.pico.train", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--history", default="", help="a sentence on the run, for the card")
    defaults = Recipe()
    for name in ("minutes", "muon_lr", "adam_lr", "upscaled_from", "eval_minutes"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, default=getattr(defaults, name))
    for name in ("seed", "threads", "step_tokens", "upscaled_every"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(defaults, name))
    return parser.parse_args()


def train_pico() -> None:
    """Run the recipe."""
    arguments = vars(parse_arguments())
    out = arguments.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    history = arguments.pop("history")
    recipe = Recipe(**arguments)
    train(out, recipe)
    command = f"python -m dus_edge.train.pico.train --out DIR --minutes {recipe.minutes:g}"
    finish(out, recipe, command, history)


if __name__ == "__main__":
    train_pico()
