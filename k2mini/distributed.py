"""The ranks that torchrun started: process group, device mesh, sharding (FSDP2), reductions of single numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from k2mini.config import ParallelSection


@dataclass(frozen=True)
class World:
    """This process among its equals. Without torchrun it is alone, and every call below does nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def all_reduce(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64; the same bits on all ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def ranks(device: torch.device, section: ParallelSection, *, alone_too: bool = False) -> Iterator[World]:
    """Join the ranks of torchrun, with NCCL on GPUs (one a rank) and gloo on CPUs; at the end of the block, leave them.

    Args:
        alone_too: make a process group of one, where torchrun did not start us (see `build.is_sharded`).

    Yields: this process' place among them.

    Raises ValueError where `parallel.replicate` does not divide the number of ranks.
    """
    launched = "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and not alone_too:
        yield World(device=device)
        return
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if size % section.replicate:
        raise ValueError(f"parallel.replicate ({section.replicate}) does not divide the {size} ranks")
    if launched and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        arguments: dict[str, Any] = {} if launched else {"store": HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(minutes=section.timeout_minutes),
            **arguments,
        )
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def device_mesh(world: World, section: ParallelSection) -> DeviceMesh:
    """The ranks in a row, or, where the model is replicated, in rows of which each holds one model."""
    if section.replicate == 1:
        return init_device_mesh(world.device.type, (world.size,))
    shape = (section.replicate, world.size // section.replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module,
    units: Iterable[nn.Module],
    forward_methods: tuple[str, ...],
    mesh: DeviceMesh,
    compute: torch.dtype | None,
    *,
    reshard_after_forward: bool,
) -> None:
    """Spread parameters, gradients and optimiser state over the ranks: unit by unit, and what is left as another.

    ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054), or ZeRO-2, or either within replicas (hybrid sharding).

    Args:
        units: modules that are gathered when they are called, and let go of after.
        forward_methods: of the model, which run it as its `forward` does.
        compute: gather parameters in this dtype (gradients are reduced in float32); None: as they are kept.
        reshard_after_forward: True: ZeRO-3, gather again for the backward pass; False: ZeRO-2, keep.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=None if compute is None else torch.float32,
        cast_forward_inputs=False,  # the embedding comes out as it should, and rotary tables stay in float32
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # What is left is needed until the end of the forward pass, and again at the beginning of the backward pass.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in forward_methods:
        register_fsdp_forward_method(model, name)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward pass has gathered and no backward pass will: the parameters are the shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """The first row of a parameter that this rank keeps, and the row after its last."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + shape[0]


def local_part(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter: a plain tensor that shares its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy whole values into a parameter; each rank takes the rows that it keeps."""
    start, stop = local_rows(parameter)
    with torch.no_grad():
        local_part(parameter).copy_(values[start:stop])
