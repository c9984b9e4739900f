"""What the jobs that run text through a model share: the text, the machine, the kept state."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_edge import __version__
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import CheckpointError, UsageError
from dus_edge.files import check_free_space
from dus_edge.jobs.job import Job, Result, quiet, run_job
from dus_edge.progress import Advance, progress
from dus_edge.text.chunks import DEFAULT_N_CTX, Chunks, make_chunks
from dus_edge.text.documents import builtin_documents, read_documents
from dus_edge.text.tokenizers import load_tokenizer
from dus_edge.upscale.model import ChoosePlan, Model, Say, find_model
from dus_edge.words import format_bytes

if TYPE_CHECKING:  # these import torch
    from dus_edge.calibrate.engine import ComputeSettings as Compute
    from dus_edge.calibrate.engine import State
    from dus_edge.calibrate.fisher.descent import DownwardState
    from dus_edge.calibrate.streams import KeptStates
    from dus_edge.calibrate.world import World


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


def under_torchrun() -> bool:
    """Whether torchrun started this process as one of many."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def joined_machine(machine: Machine) -> Iterator[tuple[World, Machine]]:
    """This process's place among those that torchrun started, and the device that is its own.

    Raises:
        UsageError: there is no such device, or torchrun's variables are not all there.
    """
    from dus_edge.calibrate.world import ALONE, joined_world, pick_device

    if not under_torchrun():
        yield ALONE, machine
        return
    if machine.device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {machine.device} is not for many processes; under torchrun take cpu or cuda."
        )
    with joined_world(pick_device(machine.device)) as world:
        yield world, Machine(str(world.device), machine.dtype)


def run_shared(
    job: Job[Any],
    base: str,
    choose: ChoosePlan,
    say: Say,
    adapter: Path | None,
    world: World,
    take_part: Callable[[Model, Checkpoint], object],
) -> Result | None:
    """Do a job in the first process, and in the others what they have a part in.

    Args:
        job: of the first; it speaks and writes for all.
        base: as in `run_job`.
        choose: the same.
        say: the same.
        adapter: the same.
        world: the processes.
        take_part: what the others do with the open model: all that exchanges sums.

    Returns:
        the first's result, None in the others.
    """
    if world.first:
        return run_job(job, base, choose, say, adapter)
    model = find_model(
        base, choose, weights=True, say=quiet, adapter=adapter, tokenizer=job.tokenizer
    )
    take_part(model, model.open(job.dequantized))
    return None


def progress_of(world: World, title: str, total: int) -> AbstractContextManager[Advance]:
    """Progress in token-layers, shown by the first process alone."""
    if world.first:
        return progress(title, total, unit="token-layers")
    return nullcontext(lambda n: None)


def run_collector(
    checkpoint: Checkpoint,
    chunks: Chunks,
    collector: Any,
    compute: Compute,
    state: State,
    say: Say,
    between: Callable[[int, Any], None] = lambda layer, h: None,
) -> Any:
    """Run this process's share of a text through a model, with `engine.run_layers`' arguments.

    Returns:
        what they return: states behind the last layer.

    Raises:
        UsageError: a process would have no chunk.
    """
    from dus_edge.calibrate import engine

    world = state.world
    if len(chunks.tokens) < world.size:
        raise UsageError(
            f"{len(chunks.tokens)} chunks of text cannot be divided among {world.size} processes; "
            "give more text, or start fewer."
        )
    n_chunks, n_ctx = chunks.tokens.shape
    languages = ", ".join(f"{n} {lang}" for lang, n in Counter(chunks.languages).items())
    among = f", in {world.size} processes" if world.many else ""
    say(
        f"Calibrating on {n_chunks} chunks of {n_ctx} tokens ({languages}), {compute.device}{among}"
    )
    own = chunks.tokens[world.share]
    with progress_of(world, "Calibrating", engine.total_token_layers(checkpoint, own)) as tick:
        return engine.run_layers(
            checkpoint,
            own,
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
    output: Path,
    model: Model,
    chunks: Chunks,
    compute: Compute,
    more: str,
    say: Say,
    world: World | None = None,
) -> Iterator[State]:
    """Where finished layers are kept while `output` is made; it stays when the run is cut short."""
    from dus_edge.calibrate.engine import State
    from dus_edge.calibrate.world import ALONE

    world = world or ALONE
    # The processes of a run keep their states under one identity, whatever card each has.
    same = replace(compute, device=world.device.type) if world.many else compute
    more = f"{more}, {world.size} processes" if world.many else more
    state = State(_state_folder(output), run_identity(model, chunks, same, more), world)
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


@contextmanager
def gone_forward(
    checkpoint: Checkpoint,
    chunks: Chunks,
    collector: Any,
    compute: Compute,
    state: State,
    keep: Path,
    say: Say,
) -> Iterator[tuple[KeptStates, DownwardState]]:
    """Run a text through a model and keep the states before all layers, ready for the way down.

    Args:
        checkpoint: the model.
        chunks: the text, of all processes.
        collector: sees it on the way.
        compute: device and precision.
        state: of `kept_state`.
        keep: the output that it belongs to.
        say: takes lines for the user.

    Yields:
        the states, and how far an earlier run has gone down.
    """
    from dus_edge.calibrate.fisher.descent import DownwardState, n_slots
    from dus_edge.calibrate.streams import KeptStates, states_bytes

    config, world = checkpoint.config, state.world
    tokens = chunks.tokens[world.share]
    down = DownwardState(state.folder, state.identity, world)
    all_there = round(world.sum(down.has_states)[0]) == world.size
    if world.first and not all_there:
        forget_state(keep)
    world.wait()
    state.folder.mkdir(parents=True, exist_ok=True)
    n_bytes = states_bytes(config, tokens, compute.dtype, n_slots(config.n_layers))
    if not state.n_done():
        check_free_space(state.folder, n_bytes)
    say(f"A file of hidden states in {state.folder}: {format_bytes(n_bytes)}")
    with down.states() as fd:
        kept = KeptStates(fd, config, tokens, compute.dtype)
        run_collector(checkpoint, chunks, collector, compute, state, say, kept.put)
        yield kept, down


def _state_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.calibration")


def forget_state(output: Path) -> None:
    shutil.rmtree(_state_folder(output), ignore_errors=True)
