"""Each parameter's rows divided among the processes that torchrun started.

FSDP2 (`torch.distributed.fsdp.fully_shard`), a group for each layer: a process keeps its rows of
every parameter, its gradient and its moments, and sees whole weights only while a layer computes.
Each process reads its own rows from the base's files. One process needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist
from torch import nn

from dus_edge.calibrate.layer import as_tensor
from dus_edge.calibrate.world import World
from dus_edge.checkpoint.spec import Checkpoint
from dus_edge.train.heal.network import Network, make_buffers


def free_card_bytes() -> int:
    """What is free on this process's card."""
    return torch.cuda.mem_get_info()[0]


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
