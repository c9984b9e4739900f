"""One run of training within `heal`: of the up-scaled model, or of the base as its control."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dus_edge.calibrate.world import World
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.progress import progress
from dus_edge.train.heal import lora
from dus_edge.train.heal.heldout import HeldoutLoss, heldout_loss
from dus_edge.train.heal.loop import Pace, StepDone, run_steps
from dus_edge.train.heal.mode import ALL, LORA, TrainMode, learned_layers
from dus_edge.train.heal.network import (
    Network,
    checkpoint_layers,
    empty_network,
    learned_names,
    load_weights,
)
from dus_edge.train.heal.optim import Schedule, make_optimizer
from dus_edge.train.heal.parallel import (
    load_shards,
    named_parameters,
    shard_network,
    whole,
)
from dus_edge.train.heal.state import RunState
from dus_edge.train.heal.trained import in_stored_dtype
from dus_edge.train.recovery.data import HealData
from dus_edge.train.recovery.log import Log, heldout_json, step_json
from dus_edge.train.recovery.options import HealOptions
from dus_edge.upscale.model import Say
from dus_edge.upscale.plan import DepthPlan
from dus_edge.words import duration, figure

#: The first step makes the optimizer's moments, and libraries warm up.
_WARM_STEPS = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Runner:
    """What the runs of one `heal` share.

    Attributes:
        options: as asked.
        data: to train and to measure on.
        world: the processes.
        work: folder of the run's state.
        log: lines of all runs; only the first process writes.
        say: takes lines for the user.
        cost: of a token that is trained on, in forward passes; foretells the time.
    """

    options: HealOptions
    data: HealData
    world: World
    work: Path
    log: Log
    say: Say
    cost: float = 3.0

    def untrained(self, name: str, checkpoint: Checkpoint) -> HeldoutLoss:
        """Held-out loss of a checkpoint as it is; measured once in the life of a run."""
        found = self.log.start(name)
        if found is None:
            network, _ = self._network(checkpoint, [])
            found = heldout_loss(network, self.data.heldout, self.world)
            if self.world.first:
                self.log.add({"run": name, "step": 0, "tokens": 0, **heldout_json(found)})
        return found

    def train(
        self,
        name: str,
        checkpoint: Checkpoint,
        plan: DepthPlan,
        mode: TrainMode,
        identity: Mapping[str, object],
        teacher: Checkpoint | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """Train to the end; the learned weights as `checkpoint` stores them, by name.

        In other processes than the first what is returned is empty.
        """
        options, world = self.options, self.world
        torch.manual_seed(options.seed)
        names = (
            []
            if mode.kind == LORA
            else learned_names(checkpoint.config, learned_layers(mode, plan), mode.kind == ALL)
        )
        network, learned = self._network(checkpoint, names, mode.kind == LORA)
        measuring = 0.0
        if self.log.start(name) is None:
            begun = time.monotonic()
            found = heldout_loss(network, self.data.heldout, world)
            measuring = time.monotonic() - begun
            self._foretell(measuring)
            if world.first:
                self.log.add({"run": name, "step": 0, "tokens": 0, **heldout_json(found)})
        taught = None
        if teacher is not None and options.teacher:
            taught = self._network(teacher, [])[0], options.teacher
        optimizer = make_optimizer(options.optimizer, learned.values(), options.weight_decay)
        state = RunState(self.work / name, identity, world)
        done = state.steps()[-1] if state.steps() else 0
        if world.first:
            self.log.keep(name, done)
            if done:
                self.say(f"Going on behind step {done}: an earlier run of the same was cut short")
            if state.processes() != world.size:
                self.say(
                    f"It was of {state.processes()} processes and this is of {world.size}: losses "
                    "agree to about 1e-5, not digit by digit"
                )
        pace = Pace(
            Schedule(options.peak, options.n_steps),
            options.micro,
            evaluate=options.evaluate_every,
            save=options.save_every,
        )
        per_step = options.batch * options.length
        title = "Healing" if name == "heal" else "Training the control"
        with progress(title, (options.n_steps - done) * per_step, unit="tokens") as tick:

            def told(step: StepDone) -> None:
                if world.first:
                    self.log.add(step_json(step, name))
                    tick(per_step)
                    if step.number == done + _WARM_STEPS:
                        self._correct(step, measuring)
                    if step.heldout:
                        self.say(
                            f"step {step.number:,}: {step.tokens:,} tokens, loss {step.loss:.4f}, "
                            f"held-out {step.heldout.mean:.4f}"
                        )

            run_steps(
                network,
                learned,
                optimizer,
                self.data.batches,
                self.data.heldout,
                pace,
                world,
                state,
                told,
                taught,
            )
        return self._collect(name, network, checkpoint, names, mode)

    def _foretell(self, measuring: float) -> None:
        """Say how long the run will take, by the seconds of one held-out loss."""
        options, size = self.options, self.world.size
        window = measuring / -(-len(self.data.heldout) // size)
        step = window * self.cost * options.batch / size
        self.say(
            f"About {duration(self._seconds(options.n_steps, step, measuring))} here, at "
            f"{figure(options.batch * options.length / step)} tokens a second: reckoned from the "
            "held-out text"
        )

    def _correct(self, step: StepDone, measuring: float) -> None:
        """Say the same by a step that is done; `measuring` is 0 where a run goes on."""
        options = self.options
        left = self._seconds(options.n_steps - step.number, step.seconds, measuring)
        self.say(
            f"{figure(options.batch * options.length / step.seconds)} tokens a second in step "
            f"{step.number:,}, so about {duration(left)} more"
        )

    def _seconds(self, steps: int, step: float, measuring: float) -> float:
        return steps * step + steps / self.options.evaluate_every * measuring

    def _network(
        self, checkpoint: Checkpoint, names: list[str], with_lora: bool = False
    ) -> tuple[Network, dict[str, torch.nn.Parameter]]:
        """A network with its weights, and what learns in it."""
        options, world = self.options, self.world
        compute = _DTYPES[options.dtype]
        network = empty_network(checkpoint.config, compute)
        if world.many:
            shard_network(network, world, compute)
            load_shards(network, checkpoint, set(names), world.device)
        else:
            load_weights(network, checkpoint, set(names), compute, world.device)
        if with_lora:
            lora.add_adapters(network, options.rank)
        if options.checkpointing and (names or with_lora):
            checkpoint_layers(network)
        return network, {n: p for n, p in named_parameters(network) if p.requires_grad}

    def _collect(
        self,
        name: str,
        network: Network,
        checkpoint: Checkpoint,
        names: list[str],
        mode: TrainMode,
    ) -> Mapping[str, torch.Tensor]:
        """Learned weights as they are stored, and the held-out loss with those."""
        specs, found = checkpoint.specs(), {}
        merged = lora.merged_weights(network) if mode.kind == LORA else None
        parameters = dict(named_parameters(network))
        for number, key in enumerate(merged if merged is not None else names):
            weight = whole(merged[key] if merged is not None else parameters[key])
            kept = in_stored_dtype(weight, specs[key])
            if self.world.first:
                found[key] = self._on_disk(name, number, kept) if self.world.many else kept
            if merged is None and kept.dtype != torch.float32:
                with torch.no_grad():  # rows of other processes too
                    parameters[key].copy_(_like(kept, parameters[key]))
        if merged is None:
            loss = heldout_loss(network, self.data.heldout, self.world)
            if self.world.first:
                self.log.add({"run": name, "saved": True, **heldout_json(loss)})
        return found

    def _on_disk(self, name: str, number: int, weight: torch.Tensor) -> torch.Tensor:
        """The same weight, mapped from a file: one tensor at a time is in memory."""
        path = self.work / f"{name}-learned-{number:05}.bin"
        raw = weight.contiguous().view(torch.uint8).numpy()
        raw.tofile(path)
        mapped = np.memmap(path, np.uint8, mode="r+").reshape(raw.shape)
        return torch.from_numpy(mapped).view(weight.dtype).view(weight.shape)


def _like(weight: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A whole weight divided as a parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    wide = weight.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(wide, parameter.device_mesh, parameter.placements)
    return wide


def control_options(options: HealOptions) -> HealOptions:
    """The same, for the base: all of it learns, for it has no copies."""
    return replace(options, mode=TrainMode(ALL))
