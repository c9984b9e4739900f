"""What a run needs to go on: learned weights, the optimizer's moments, the step.

By torch.distributed.checkpoint, so that a run of another number of processes reads it too. A
checkpoint is written beside its name and renamed when it is whole; the last few are kept. Weights
that do not learn are the base's and are not in it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dus_edge.calibrate.world import World
from dus_edge.errors import OutputError, UsageError
from dus_edge.files import write_text

_PREFIX = "step-"
_PARTIAL = ".partial"
_IDENTITY = "run.json"
_STEP = "step.json"


class RunState:
    """Checkpoints of one run in a folder.

    Args:
        folder: of the run.
        identity: what the run is: base, plan, text, settings. A folder of another is refused.
        world: the processes.
        keep: checkpoints that stay.

    Raises:
        UsageError: the folder is that of another run; the differing fields are named.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], world: World, keep: int = 2
    ) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self._identity = json.loads(json.dumps(dict(identity)))
        path = folder / _IDENTITY
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            keys = {k for k in {*before, *self._identity} if before.get(k) != self._identity.get(k)}
            if keys:
                named = ", ".join(sorted(keys))
                raise UsageError(
                    f"{folder} is of a run with another {named}; give what it was started with, "
                    "or remove the folder to start anew."
                )
        world.wait()
        if world.first and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(self._identity, indent=1) + "\n")

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, in order."""
        found = []
        for path in self.folder.glob(f"{_PREFIX}*"):
            if path.suffix != _PARTIAL and (path / _STEP).is_file():
                found.append(int(path.name.removeprefix(_PREFIX)))
        return sorted(found)

    def processes(self) -> int:
        """Of how many processes the last checkpoint is; of this run's without one."""
        steps = self.steps()
        if not steps:
            return self.world.size
        file = self.folder / f"{_PREFIX}{steps[-1]:08}" / _STEP
        return int(json.loads(file.read_text(encoding="utf-8"))["processes"])

    def save(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Keep what stands after so many steps.

        Raises:
            OutputError: the disk is full or cannot be written; earlier checkpoints stay.
        """
        final = self.folder / f"{_PREFIX}{step:08}"
        partial = final.with_name(final.name + _PARTIAL)
        if self.world.first:
            shutil.rmtree(partial, ignore_errors=True)
        self.world.wait()
        try:
            with _quiet():
                dcp.save(
                    _tree(weights, optimizer), checkpoint_id=partial, no_dist=not self.world.many
                )
            if self.world.first:
                about = {"step": step, "processes": self.world.size}
                write_text(partial / _STEP, json.dumps(about) + "\n")
                partial.replace(final)
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.folder / f"{_PREFIX}{old:08}", ignore_errors=True)
        # The library wraps what the disk says in a BaseException of its own.
        except (Exception, CheckpointException) as e:
            if self.world.first:
                shutil.rmtree(partial, ignore_errors=True)
            if any(isinstance(x, KeyboardInterrupt) for x in _chain(e)):
                raise KeyboardInterrupt from None
            kept = self.steps()
            before = f"that of step {kept[-1]} is kept" if kept else "there is none before it"
            raise OutputError(
                f"{final}: the checkpoint cannot be written ({_root(e)}), {before}; make room and "
                "run the same command again."
            ) from None
        self.world.wait()

    def forget(self, step: int) -> None:
        """Remove the checkpoint of a step, if there is one; every process must ask."""
        if self.world.first:
            shutil.rmtree(self.folder / f"{_PREFIX}{step:08}", ignore_errors=True)
        self.world.wait()

    def load(self, weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Take the last checkpoint, in place.

        Returns:
            the steps that are done; 0 without a checkpoint.
        """
        steps = self.steps()
        if not steps:
            return 0
        _fill_moments(optimizer)
        tree = _tree(weights, optimizer)
        with _quiet():
            dcp.load(
                tree,
                checkpoint_id=self.folder / f"{_PREFIX}{steps[-1]:08}",
                no_dist=not self.world.many,
            )
        _take_counts(tree, weights, optimizer)
        return steps[-1]


def _tree(
    weights: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Everything by name, the tensors themselves."""
    tree: dict[str, torch.Tensor] = {}
    for name, parameter in weights.items():
        tree[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, int):
                tree[f"{key}.{name}"] = torch.tensor(value)
            elif isinstance(value, torch.Tensor):
                tree[f"{key}.{name}"] = value
    return tree


def _take_counts(
    tree: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Numbers, which cannot be filled in place as tensors are (bitsandbytes counts steps so)."""
    for name, parameter in weights.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, int):
                optimizer.state[parameter][key] = int(tree[f"{key}.{name}"])


def _fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state, by a step of nothing at a rate of nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@contextmanager
def _quiet() -> Iterator[None]:
    """torch says at length that one process saves alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _root(e: BaseException) -> str:
    """What the innermost error says, in one line."""
    for error in _chain(e):
        if isinstance(error, OSError):
            return error.strerror or str(error)
    text = str(e).strip().splitlines()
    return text[-1] if text else type(e).__name__


def _chain(e: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while e is not None and e not in found:
        found.append(e)
        inner = getattr(e, "failures", None)
        if isinstance(inner, Mapping):
            found += [v[0] if isinstance(v, tuple) else v for v in inner.values()]
        e = e.__cause__ or e.__context__
    return found
