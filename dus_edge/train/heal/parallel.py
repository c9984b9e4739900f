"""Many processes under torchrun: who is who, and each parameter's rows divided among them.

FSDP2 (`torch.distributed.fsdp.fully_shard`), a group for each layer: a process keeps its rows of
every parameter, its gradient and its moments, and sees whole weights only while a layer computes.
Each process reads its own rows from the base's files. One process needs none of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from dus_edge.calibrate.layer import as_tensor
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.errors import UsageError
from dus_edge.train.heal.network import Network, make_buffers


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

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        if not self.many:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return found.tolist()

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


def pick_device(name: str) -> str:
    """``cpu`` or ``cuda``, also for ``auto``.

    Raises:
        UsageError: no card is usable.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("no cuda device is usable here; use --device cpu.")
    return ("cuda" if there else "cpu") if name == "auto" else name


def free_card_bytes() -> int:
    """What is free on this process's card."""
    return torch.cuda.mem_get_info()[0]


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


def shard_network(network: Network, world: World, compute: torch.dtype) -> None:
    """Divide the parameters of an empty network; a group for each layer and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in network.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def load_shards(
    network: Network,
    checkpoint: Checkpoint,
    learned: Collection[str],
    device: torch.device,
    advance: Callable[[int], object] = lambda n: None,
) -> None:
    """Give this process's rows of every parameter their values, in float32."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    network.to_empty(device=device)
    specs = checkpoint.specs()
    for name, parameter in named_parameters(network):
        parameter.requires_grad_(name in learned)
        assert isinstance(parameter, DTensor)
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if shape[0]:
            rows = checkpoint.read(name, offset[0], offset[0] + shape[0])
            with torch.no_grad():
                parameter.to_local().copy_(as_tensor(rows))
        advance(specs[name].n_elements // max(1, dist.get_world_size()))
    make_buffers(network, device)


def named_parameters(network: Network) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the checkpoint's names; a tied head counts once, as the embedding."""
    return network.model.named_parameters()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor that is divided; every process must ask at the same time."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor
