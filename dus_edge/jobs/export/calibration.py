"""What the jobs that run text through a model share: the text, the machine, the kept state."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge import __version__
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.progress import progress
from dus_edge.text.chunks import DEFAULT_N_CTX, Chunks, make_chunks
from dus_edge.text.documents import builtin_documents, read_documents
from dus_edge.text.tokenizers import load_tokenizer
from dus_edge.upscale.model import Model, Say

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.engine import ComputeSettings as Compute
    from dus_edge.calibrate.engine import State


@dataclass(frozen=True)
class TextChoice:
    """Which text is run through a model.

    Attributes:
        paths: files or folders; none means the built-in mix.
        field: of JSON lines, which one is the text.
        n_ctx: tokens of a chunk; by default 512, or the model's context if that is shorter.
        n_chunks: at most so many; by default all there are.
        seed: of the draw, where there are more.
    """

    paths: tuple[Path, ...] = ()
    field: str | None = None
    n_ctx: int | None = None
    n_chunks: int | None = None
    seed: int = 0

    @property
    def label(self) -> str:
        """What the text is called in files made from it."""
        return ", ".join(p.name for p in self.paths) or "dus-edge's built-in mix"


@dataclass(frozen=True)
class Machine:
    """Where the model runs: see `engine.choose_settings`."""

    device: str = "auto"
    dtype: str | None = None


def read_chunks(model: Model, text: TextChoice, split: Any = "calibration") -> Chunks:
    """Text as chunks of the model's tokens.

    Raises:
        UsageError: the text is missing, empty or too short, or `n_ctx` beyond the model's context.
    """
    config = model.config
    if text.n_ctx and text.n_ctx > config.context_length:
        raise UsageError(
            f"{text.n_ctx} tokens are more than the model's context of "
            f"{config.context_length:,}; choose a smaller --ctx."
        )
    documents = read_documents(text.paths, text.field) if text.paths else builtin_documents(split)
    tokenizer = load_tokenizer(model.source.folder, config.vocab_size)
    n_ctx = text.n_ctx or min(DEFAULT_N_CTX, config.context_length)
    return make_chunks(documents, tokenizer, n_ctx, n_chunks=text.n_chunks, seed=text.seed)


def run_collector(
    checkpoint: Checkpoint,
    chunks: Chunks,
    collector: Any,
    compute: Compute,
    state: State,
    say: Say,
    between: Callable[[int, Any], None] = lambda layer, h: None,
) -> None:
    """Run text through a model layer by layer, with `engine.run_layers`' arguments."""
    from dus_edge.calibrate import engine

    n_chunks, n_ctx = chunks.tokens.shape
    languages = ", ".join(f"{n} {lang}" for lang, n in Counter(chunks.languages).items())
    say(f"Calibrating on {n_chunks} chunks of {n_ctx} tokens ({languages}), {compute.device}")
    total = engine.total_token_layers(checkpoint, chunks.tokens)
    with progress("Calibrating", total, unit="token-layers") as tick:
        engine.run_layers(
            checkpoint,
            chunks.tokens,
            collector,
            compute,
            state=state,
            between=between,
            advance=tick,
        )


def run_identity(model: Model, chunks: Chunks, compute: Compute, more: object) -> dict[str, Any]:
    """All that a run of text through a model depends on, as JSON takes it."""
    weights = model.source.weight_files
    return {
        "version": __version__,
        "config": dict(model.config.raw),
        "plan": list(model.plan.sources),
        **model.plan.method.as_json(),
        "weights": [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weights],
        "text": chunks.digest,
        "compute": asdict(compute),
        "adapter": model.adapter.identity if model.adapter else None,
        "more": more,
    }


@contextmanager
def kept_state(
    output: Path, model: Model, chunks: Chunks, compute: Compute, more: str, say: Say
) -> Iterator[State]:
    """Where finished layers are kept while `output` is made; it stays when the run is cut short."""
    from dus_edge.calibrate.engine import State

    identity = run_identity(model, chunks, compute, more)
    state = State(_state_folder(output), identity)
    if done := state.n_done():
        say(f"Going on behind layer {done - 1}: an earlier run of the same was cut short")
    try:
        yield state
    except CheckpointError:
        forget_state(output)  # going on would end at the same place
        raise
    except KeyboardInterrupt:
        if done := state.n_done():
            say(f"{done} of {model.config.n_layers} layers are kept; the same command goes on.")
        raise


def _state_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.calibration")


def forget_state(output: Path) -> None:
    shutil.rmtree(_state_folder(output), ignore_errors=True)
