"""Many processes under torchrun: who is who, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dus_edge.errors import UsageError


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: of this one, from 0.
        size: how many there are.
        device: of this one.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def share(self) -> slice:
        """Which of some things are this process's: every `size`-th."""
        return slice(self.rank, None, self.size)

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        if not self.many:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return found.tolist()

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor added up over all processes, where it was; the same bits in each."""
        if not self.many:
            return tensor
        found = tensor.to(self.device)
        dist.all_reduce(found)
        return found.to(tensor.device)

    def told(self, text: str) -> str:
        """What the first process says, in all of them."""
        if not self.many:
            return text
        said = [text]
        dist.broadcast_object_list(said, src=0, device=self.device)
        return said[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.many:
            dist.barrier()


#: A run of one process; where it computes is said elsewhere.
ALONE = World(0, 1, torch.device("cpu"))


def pick_device(name: str) -> str:
    """``cpu`` or ``cuda``, also for ``auto``.

    Raises:
        UsageError: no card is usable.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("no cuda device is usable here; use --device cpu.")
    return ("cuda" if there else "cpu") if name == "auto" else name


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """This process's place among those that torchrun started; alone without it.

    Args:
        device: ``cpu``, or ``cuda``, where each process takes the card of its local rank.

    Raises:
        UsageError: torchrun's variables are not all there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, torch.device(device))
        return
    try:
        rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    except (KeyError, ValueError):
        raise UsageError("WORLD_SIZE is set but RANK is not; start it with torchrun.") from None
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()
