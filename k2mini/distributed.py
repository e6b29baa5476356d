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
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from k2mini.config import ParallelSection


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run. Without torchrun it is the only one, and the collectives do nothing.

    `all_reduce` is for steps: ranks that wait longer than `parallel.timeout_minutes` give up. The others, over
    `patient`, are for what rank 0 does alone (preparing, exporting), and wait as long as it takes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone logs and writes files."""
        return self.rank == 0

    def all_reduce(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64; the same bits on all ranks. No GPU is waited for."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        if self.size > 1:
            dist.barrier(self.patient)


ALONE = World()  # one process on the CPU
PATIENCE = timedelta(days=30)  # torchrun ends the others where one has died


@contextmanager
def ranks(device: torch.device, section: ParallelSection, *, alone_too: bool = False) -> Iterator[World]:
    """Join the ranks that torchrun started, with NCCL on GPUs (one a rank) or gloo on CPUs, until the block ends.

    Args:
        device: what this rank trains on (see `build.pick_device`).
        alone_too: make a process group of one rank where there is no torchrun, as sharding needs one
            (see `build.is_sharded`).

    Yields: this process's rank, the number of ranks and its device.

    Raises ValueError where `parallel.replicate` does not divide the number of ranks, or a CPU is to be offloaded to
    itself.
    """
    if section.offload is not None and device.type == "cpu":
        raise ValueError(
            "parallel.offload moves to the host's memory what a GPU lacks room for; on a CPU, set it to null"
        )
    launched = "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and not alone_too:
        yield World(device=device)
        return
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if size % (section.replicate or 1):
        raise ValueError(f"parallel.replicate ({section.replicate}) does not divide the {size} ranks")
    made = not dist.is_initialized()
    if made:
        arguments: dict[str, Any] = {} if launched else {"store": HashStore(), "rank": 0, "world_size": 1}
        if device.type == "cuda":
            arguments["device_id"] = device
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(minutes=section.timeout_minutes),
            **arguments,
        )
    patient = dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    yield World(dist.get_rank(), dist.get_world_size(), device, patient)
    # Not after an error: leaving waits for ranks that may still be in a collective, and the process ends anyway.
    if made:
        dist.destroy_process_group()


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device; those that go to a GPU are copied while the host goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def device_mesh(world: World, section: ParallelSection) -> DeviceMesh:
    """The mesh that shards the model: (world size,), or (replicate, shard) where `parallel.replicate` is above 1."""
    if section.replicate in (None, 1):
        return init_device_mesh(world.device.type, (world.size,))
    shape = (section.replicate, world.size // section.replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module,
    units: Iterable[nn.Module],
    forward_methods: tuple[str, ...],
    mesh: DeviceMesh,
    compute: torch.dtype | None,
    section: ParallelSection,
) -> None:
    """Shard parameters, gradients and optimiser state over the ranks: each unit by itself, the rest as one more.

    ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054), or ZeRO-2, or either within replicas (hybrid sharding).

    Args:
        units: modules whose parameters are gathered when they are called, and freed after the call.
        forward_methods: the model's methods that run it, beside `forward`.
        compute: gather parameters in this dtype (gradients are reduced in float32); None: in the dtype they have.
        section: `reshard_after_forward`: ZeRO-3, units free their parameters after the forward pass and gather them
            again for the backward pass; if false, ZeRO-2, they keep them until then. `offload`: parameters, gradients
            and the optimiser's state are kept in the host's memory, where AdamW runs, too; what is gathered is sent to
            the device, and what is reduced comes back (ZeRO-Offload, Ren et al. 2021, arXiv 2101.06840).
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=None if compute is None else torch.float32,
        cast_forward_inputs=False,  # the embedding comes out as it should, and rotary tables stay in float32
    )
    kept = OffloadPolicy() if section.offload is None else CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    how: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": kept}
    for unit in units:
        fully_shard(unit, **how, reshard_after_forward=section.reshard_after_forward)
    # The rest (final norm, head) ends the forward pass and begins the backward pass, so freeing it between is no use.
    fully_shard(model, **how, reshard_after_forward=False)
    for name in forward_methods:
        register_fsdp_forward_method(model, name)


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """The rows of a parameter that this rank keeps: the first one, and one past the last."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + shape[0]


def local_part(parameter: Tensor) -> Tensor:
    """This rank's shard of a parameter, as a plain tensor that shares its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy `values`, of the whole parameter's shape, into a parameter that may be sharded."""
    start, stop = local_rows(parameter)
    with torch.no_grad():
        local_part(parameter).copy_(values[start:stop])
