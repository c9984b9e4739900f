"""The steps of a run: forward, backward, update; held-out loss and checkpoints on the way."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from dus_edge.calibrate.world import World
from dus_edge.errors import DusEdgeError
from dus_edge.train.heal.heldout import HeldoutLoss, heldout_loss
from dus_edge.train.heal.network import Network
from dus_edge.train.heal.optim import Schedule, set_rate
from dus_edge.train.heal.state import RunState
from dus_edge.train.packing.batches import NO_LABEL, Batch, Batches


@dataclass(frozen=True)
class Pace:
    """How the steps go.

    Attributes:
        schedule: of the learning rate; it has the number of steps.
        micro: windows that a process runs at a time.
        clip: the gradient's norm is cut to this; 0 leaves it.
        evaluate: steps between two held-out losses.
        save: steps between two checkpoints.
    """

    schedule: Schedule
    micro: int = 1
    clip: float = 1.0
    evaluate: int = 50
    save: int = 50


@dataclass(frozen=True)
class StepDone:
    """One step that is done.

    Attributes:
        number: from 1.
        loss: mean cross-entropy of its tokens before the update, nats.
        rate: learning rate.
        norm: of the gradient before it was cut.
        tokens: of the run so far.
        seconds: of this step.
        heldout: after it, where it was measured.
    """

    number: int
    loss: float
    rate: float
    norm: float
    tokens: int
    seconds: float
    heldout: HeldoutLoss | None = None


def run_steps(
    network: Network,
    learned: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    heldout: Sequence[tuple[str, Batch]],
    pace: Pace,
    world: World,
    state: RunState,
    told: Callable[[StepDone], object],
    teacher: tuple[Network, float] | None = None,
) -> None:
    """Train from the last checkpoint of `state`, or from the start, to the end.

    Args:
        network: with its weights.
        learned: parameters that learn, by the names under which `state` keeps them.
        optimizer: of those.
        batches: to train on.
        heldout: to measure on.
        pace: of the run.
        world: the processes.
        state: keeps checkpoints.
        told: takes each step.
        teacher: a network whose distribution is part of the target, and its share.

    Raises:
        DusEdgeError: the loss is no number; the last checkpoint stays.
        KeyboardInterrupt: after a step and a checkpoint.
    """
    done = state.load(learned, optimizer)
    steps = pace.schedule.steps
    with _asked_to_stop() as asked:
        for step in range(done, steps):
            begun = time.monotonic()
            rate = pace.schedule.rate(step)
            set_rate(optimizer, rate)
            loss = _backward(network, batches, step, pace.micro, world, teacher)
            if not math.isfinite(loss):
                raise _no_number(step + 1, state)
            norm = _clip(learned.values(), pace.clip)
            if not math.isfinite(norm):
                raise _no_number(step + 1, state)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.monotonic() - begun
            number, last = step + 1, step + 1 == steps
            measured = None
            if last or number % pace.evaluate == 0:
                measured = heldout_loss(network, heldout, world)
                if not math.isfinite(measured.mean):
                    raise _no_number(number, state, "held-out loss")
            stop = world.sum(float(bool(asked)))[0] > 0
            if last or stop or number % pace.save == 0:
                state.save(number, learned, optimizer)
            tokens = number * batches.batch * batches.length
            told(StepDone(number, loss, rate, norm, tokens, seconds, measured))
            if stop and not last:
                raise KeyboardInterrupt


def _backward(
    network: Network,
    batches: Batches,
    step: int,
    micro: int,
    world: World,
    teacher: tuple[Network, float] | None,
) -> float:
    """Gradients of the mean loss of a step; returns the mean against labels, over processes."""
    mine = batches.step(step, slice(world.rank, None, world.size))
    (n_labels,) = world.sum(float((mine.labels != NO_LABEL).sum()))
    total = 0.0
    for first in range(0, len(mine.ids), micro):
        part = slice(first, first + micro)
        ids, positions, labels = (
            torch.from_numpy(x[part]).to(world.device)
            for x in (mine.ids, mine.positions, mine.labels)
        )
        taught = None
        if teacher is not None:
            with torch.no_grad():
                states = teacher[0].hidden(ids, positions).flatten(0, 1)
            taught = (states, teacher[0].head, teacher[1])
        loss, plain = network(ids, positions, labels, taught)
        # FSDP takes the mean over processes, and the sum is wanted.
        (loss * (world.size / n_labels)).backward()
        total += plain.item()
    return world.sum(total)[0] / n_labels


def _clip(parameters: Sequence[torch.nn.Parameter], most: float) -> float:
    """Cut the gradient's norm; what it was."""
    found = torch.nn.utils.clip_grad_norm_(list(parameters), most or math.inf, foreach=True)
    full = getattr(found, "full_tensor", None)
    return float(full() if full is not None else found)


def _no_number(step: int, state: RunState, what: str = "loss") -> DusEdgeError:
    # What was saved just before this step has the weights that made it: none to go on from.
    state.forget(step - 1)
    kept = state.steps()
    place = f"the checkpoint of step {kept[-1]} is kept" if kept else "there is no checkpoint yet"
    return DusEdgeError(
        f"The {what} of step {step} is no number; {place} in {state.folder}. "
        "Start anew with a smaller --lr."
    )


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Ctrl-C in the block fills the list; a second one is an interrupt as usual."""
    asked: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        asked.append(signum)
        signal.signal(signum, before[signum])

    before = {}
    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, note)
    except ValueError:  # not the main thread
        before = {}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
