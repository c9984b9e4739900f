"""The jobs that run text through a model: importance matrices and GPTQ checkpoints."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge import __version__
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.files import check_absent, check_writable
from dus_edge.jobs import (
    ChoosePlan,
    ImatrixSource,
    Model,
    Result,
    Say,
    Written,
    describe,
    find_model,
)
from dus_edge.progress import progress
from dus_edge.stream import default_threads

if TYPE_CHECKING:
    from dus_edge.calibrate.engine import Settings as Compute
    from dus_edge.calibrate.engine import State
    from dus_edge.checkpoint.spec import Checkpoint
    from dus_edge.quant.gptq_format import Settings
    from dus_edge.quant.imatrix import Importance
    from dus_edge.text.chunks import Chunks


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
    from dus_edge.text.chunks import DEFAULT_N_CTX, load_tokenizer, make_chunks
    from dus_edge.text.documents import builtin_documents, read_documents

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


def calibrate_importance(
    model: Model,
    checkpoint: Checkpoint,
    text: TextChoice,
    machine: Machine,
    keep: Path,
    say: Say,
) -> Importance:
    """The importance matrix of a model that is open already.

    Args:
        model: what is calibrated.
        checkpoint: its weights.
        text: what is run through it.
        machine: where.
        keep: beside which file the state of an interrupted run is kept.
        say: takes lines for the user.
    """
    from dus_edge.calibrate import engine
    from dus_edge.calibrate.imatrix import ImatrixCollector
    from dus_edge.export.gguf.tensors import gguf_name
    from dus_edge.quant.imatrix import Importance

    chunks = read_chunks(model, text)
    collector = ImatrixCollector()
    compute = engine.choose_settings(machine.device, machine.dtype)
    with _state(keep, model, chunks, compute, "imatrix", say) as state:
        _run(checkpoint, chunks, collector, compute, state, say)
    found = {gguf_name(name): value for name, value in collector.results().items()}
    n_chunks, n_ctx = chunks.tokens.shape
    return Importance(
        sums={name: sums.float().numpy() for name, (sums, _) in found.items()},
        counts={name: count for name, (_, count) in found.items()},
        chunk_size=n_ctx,
        n_chunks=n_chunks,
        datasets=(text.label,),
    )


def imatrix_source(
    choice: str, text: TextChoice, machine: Machine, folder: Path, say: Say
) -> ImatrixSource:
    """The importance matrix that `--imatrix` names.

    Args:
        choice: a file, or ``auto`` to collect it from the model.
        text: what is run through the model for ``auto``.
        machine: where.
        folder: where the outputs go; the state of an interrupted collection is kept in it.
        say: takes lines for the user.

    Raises:
        CheckpointError: the file is no importance matrix.
    """
    if choice != "auto":
        from dus_edge.quant.imatrix import read_imatrix

        read = read_imatrix(Path(choice))
        return ImatrixSource(choice, lambda model, checkpoint: read)
    from dus_edge.packages import require_packages

    require_packages()

    def collect(model: Model, checkpoint: Checkpoint) -> Importance:
        keep = folder / f"{model.name.stem}.imatrix"
        found = calibrate_importance(model, checkpoint, text, machine, keep, say)
        _forget(keep)
        return found

    return ImatrixSource("the importance matrix", collect)


def export_imatrix(
    base: str,
    choose: ChoosePlan,
    path: Path,
    text: TextChoice,
    machine: Machine,
    *,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Result:
    """Base to the importance matrix of its up-scaled model, in llama.cpp's GGUF format."""
    from dus_edge.export.gguf.imatrix import write_imatrix
    from dus_edge.packages import require_packages

    start = time.monotonic()
    require_packages()
    check_absent([path], overwrite)
    check_writable(path.parent)
    model = find_model(base, choose, weights=True, say=say)
    checkpoint = model.open()
    say(describe(model))
    importance = calibrate_importance(model, checkpoint, text, machine, path, say)
    write_imatrix(path, importance)
    _forget(path)
    output = Written(path, path.stat().st_size, types={"matrices": len(importance.sums)})
    return Result(model, (output,), time.monotonic() - start)


def export_gptq(
    base: str,
    choose: ChoosePlan,
    folder: Path,
    settings: Settings,
    text: TextChoice,
    machine: Machine,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Result:
    """Base to a GPTQ checkpoint of its up-scaled model; no other copy of it is written."""
    from dus_edge.packages import require_packages

    start = time.monotonic()
    require_packages()
    from dus_edge.calibrate import engine
    from dus_edge.calibrate.gptq import GptqCollector
    from dus_edge.export import gptq as sink
    from dus_edge.export import hf
    from dus_edge.export.card import model_card

    model = find_model(base, choose, weights=True, say=say)
    checkpoint = model.open()
    sink.check_settings(checkpoint, settings)
    planned = sink.plan_tensors(checkpoint, settings)
    hf.check_outputs(checkpoint, folder, overwrite, planned)
    card = model_card(model.source, model.config, model.plan, model.name, model.n_parameters)
    chunks = read_chunks(model, text)
    compute = engine.choose_settings(machine.device, machine.dtype)
    say(describe(model))
    collector = GptqCollector(settings)
    more = f"gptq {settings}"
    with _state(folder, model, chunks, compute, more, say) as state:
        _run(checkpoint, chunks, collector, compute, state, say)
        sink.write_checkpoint(
            checkpoint,
            folder,
            card,
            settings,
            state.layer_files(model.config.n_layers),
            n_threads=n_threads or default_threads(),
            overwrite=overwrite,
        )
    _forget(folder)
    notes = tuple(
        f"{o.name} was rounded to nearest: {o.fallback}"
        for o in collector.outcomes.values()
        if o.fallback
    )
    output = Written(
        folder, sum(s.nbytes for s in planned), types=Counter(s.dtype for s in planned)
    )
    return Result(model, (output,), time.monotonic() - start, notes)


def _run(
    checkpoint: Checkpoint,
    chunks: Chunks,
    collector: Any,
    compute: Compute,
    state: State,
    say: Say,
) -> None:
    from dus_edge.calibrate import engine

    n_chunks, n_ctx = chunks.tokens.shape
    languages = ", ".join(f"{n} {lang}" for lang, n in Counter(chunks.languages).items())
    say(f"Calibrating on {n_chunks} chunks of {n_ctx} tokens ({languages}), {compute.device}")
    total = engine.total_work(checkpoint, chunks.tokens)
    with progress("Calibrating", total, unit="token-layers") as tick:
        engine.run(checkpoint, chunks.tokens, collector, compute, state=state, advance=tick)


@contextmanager
def _state(
    output: Path, model: Model, chunks: Chunks, compute: Compute, more: str, say: Say
) -> Iterator[State]:
    """Where finished layers are kept while `output` is made; it stays when the run is cut short."""
    from dus_edge.calibrate.engine import State

    weights = sorted(model.source.folder.glob("*.safetensors"))
    identity = {
        "version": __version__,
        "config": dict(model.config.raw),
        "plan": list(model.plan.sources),
        "weights": [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weights],
        "text": chunks.digest,
        "compute": asdict(compute),
        "more": more,
    }
    state = State(_state_folder(output), identity)
    if done := state.n_done():
        say(f"Going on behind layer {done - 1}: an earlier run of the same was cut short")
    try:
        yield state
    except CheckpointError:
        _forget(output)  # going on would end at the same place
        raise
    except KeyboardInterrupt:
        if done := state.n_done():
            say(f"{done} of {model.config.n_layers} layers are kept; the same command goes on.")
        raise


def _state_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.calibration")


def _forget(output: Path) -> None:
    shutil.rmtree(_state_folder(output), ignore_errors=True)
