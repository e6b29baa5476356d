"""`k2mini plan`: memory, communication and steps of a run, before anyone rents a cluster.

One training step of the real model runs on fake tensors (shapes without values), as rank 0 of a fake process group,
while the bytes that its tensors would take are counted; nothing is allocated or sent. Not counted is what PyTorch's
allocator does not hand out, for which a tenth of the device is left free: CUDA's context and libraries, some 0.5 GiB,
and NCCL's buffers of several ranks, 4 MiB a channel and connection, some 1.5 GiB. No step is compiled here: where
blocks are recomputed that makes no difference, else the compiler decides what to keep, and at 7B needs an eighth less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from k2mini import architectures
from k2mini.build import check_stored, is_sharded, kept_dtype, make_trainable
from k2mini.config import FinetuneConfig, PretrainConfig, RunConfig
from k2mini.config_file import check_context
from k2mini.data.corpus import is_prepared, read_corpus_manifest
from k2mini.distributed import World, device_mesh, local_part
from k2mini.dtypes import DTYPES
from k2mini.model_config import PRESETS, ModelConfig, parse_config, read_config_json
from k2mini.nn.layers import Mask
from k2mini.nn.llama import Llama
from k2mini.nn.loss import projected_loss
from k2mini.nn.packed import takes_varlen
from k2mini.sizes import readable
from k2mini.training.memory_tracker import MemoryTracker
from k2mini.training.samples import sources_of
from k2mini.training.step import build_optimizer, rank_share
from k2mini.weights.model_directory import model_directory

BUDGET = 0.9  # of a device's memory; the rest is for what is not counted:
ALLOWANCE = "CUDA's context (some 0.5 GiB)", " and NCCL's buffers (some 1.5 GiB)"
# What CUDA's allocator reserves beyond the peaks of the streams: measured, 1 to 2 % at 7B with expandable segments.
# Where NF4 is dequantised in parts of many sizes, and weights of all sizes come from the host and go again, up to a
# quarter: there the gaps are counted, and cuBLAS's workspaces, which are 64 MiB on a card of capability 9.0.
FRAGMENTATION, WORKSPACES = 0.03, 2**26


@dataclass(frozen=True)
class Plan:
    """The memory and communication of one rank, in bytes, and how long the run is.

    Attributes:
        parameters, trained: how many the model has, and how many of them train.
        peak: the most memory that tensors take within a step; `kinds` splits it up.
        host: what `parallel.offload` keeps in the host's memory.
        received: bytes that a rank receives from others in a step; at most, where rows are packed.
        checkpoint: bytes on disk of each checkpoint, all ranks together.
        step_tokens: of all ranks; at most, in instruction tuning.
        epoch_tokens, epoch_steps: None where the data is not prepared yet.
    """

    parameters: int
    trained: int
    peak: int
    host: int
    kinds: dict[str, int]
    received: int
    checkpoint: int
    step_tokens: int
    epoch_tokens: int | None
    epoch_steps: int | None


class _Planned(Llama):
    """A Llama whose loss takes every position as supervised, since fake labels do not tell which ones are."""

    def loss(
        self, tokens: Tensor, positions: Tensor | None, labels: Tensor, _places: Tensor | None = None, mask: Mask = None
    ) -> Tensor:
        hidden = self.model(tokens, positions, mask=mask).flatten(0, 1)
        return projected_loss(hidden, self.head_weight, labels.flatten())


def plan_run(config: RunConfig, world_size: int, *, exact: bool = True) -> Plan:
    """Plan a run on so many ranks.

    Args:
        exact: False: run models of 4 and of 8 blocks and extrapolate linearly, which takes seconds; `kinds` is empty.

    Raises ValueError where the configuration does not fit the number of ranks or the model's context, there is no model
    at `model.path`, or it is stored quantised in another way than `model.quantize` says.
    """
    if world_size < 1:
        raise ValueError(f"--world-size must be at least 1, not {world_size}")
    train = config.train
    if isinstance(config, FinetuneConfig) and config.data.packing:  # ranks may get unequal numbers of rows
        micro_steps = math.ceil(train.global_batch_size / (world_size * train.micro_batch_size))
    else:
        micro_steps = rank_share(train, world_size) // train.micro_batch_size
    tracked = min(2, micro_steps)  # from the second on there are gradients already; all others are like it
    shape, stored = planned_base(config.model.path)
    check_stored(Path(config.model.path), stored, config.model.quantize)
    check_context(config, shape.max_seq_len)
    with _ranks(config, world_size) as mesh:
        if exact or shape.num_layers <= 8:
            peak, host, received, parameters, trained, kinds = _track(config, shape, mesh, tracked)
        else:
            fewer, more = (_track(config, replace(shape, num_layers=n), mesh, tracked) for n in (4, 8))
            blocks = (shape.num_layers - 8) / 4
            pairs = zip(fewer[:5], more[:5], strict=True)
            peak, host, received, parameters, trained = (int(b + (b - a) * blocks) for a, b in pairs)
            kinds = {}
    reduced = 0  # adapters that each rank keeps whole: their gradients are summed once a step
    if mesh is None and world_size > 1:
        reduced = 2 * (world_size - 1) * trained * kept_dtype(config.model, None).itemsize // world_size
    epoch_tokens = epoch_steps = None
    row = config.data.seq_len if isinstance(config, PretrainConfig) else config.data.max_seq_len
    sources = sources_of(config.data)
    if isinstance(config, PretrainConfig) and all(is_prepared(Path(source.path)) for source in sources):
        counts = [(read_corpus_manifest(Path(s.path))["splits"]["train"]["tokens"], s.weight) for s in sources]
        epoch_tokens = sum(round(count * weight) for count, weight in counts)
        rows = sum(round((count - 1) // row * weight) for count, weight in counts)
        epoch_steps = math.ceil(rows / config.train.global_batch_size)
    return Plan(
        parameters=parameters,
        trained=trained,
        peak=peak,
        host=host,
        kinds=kinds,
        received=received * micro_steps // tracked + reduced,
        # Weights and AdamW's two moments, in float32 or float64.
        checkpoint=3 * trained * kept_dtype(config.model, None).itemsize,
        step_tokens=config.train.global_batch_size * row,
        epoch_tokens=epoch_tokens,
        epoch_steps=epoch_steps,
    )


def planned_base(path: str) -> tuple[ModelConfig, str | None]:
    """The shape of the model at a path or, where there is none, of the preset of its name (`llama-7b`).

    With it, how its matrices are stored quantised, by its config.json: 'int8', 'nf4' or None.

    Raises ValueError where there is neither, saying how to plan a run whose base does not exist yet.
    """
    name = Path(path).name
    if not Path(path).exists() and name in PRESETS:
        return PRESETS[name], None
    try:
        directory = model_directory(path, weights=False)
    except ValueError as error:
        raise ValueError(
            f"model.path: {error}; if another run has yet to make it, plan from a preset of its shape, such as "
            f"model.path=llama-7b (there are {', '.join(PRESETS)}), or from a directory with its config.json"
        ) from None
    raw = read_config_json(directory)
    said = raw.get("quantization_config")
    return parse_config(raw, directory), architectures.quantization(said) if said else None


@contextmanager
def _ranks(config: RunConfig, world_size: int) -> Iterator[DeviceMesh | None]:
    """The mesh of a process group of which only this rank exists; None where the run is not sharded."""
    if not is_sharded(config.model, config.parallel, config.lora, world_size):
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if world_size % (config.parallel.replicate or 1):
        raise ValueError(f"parallel.replicate ({config.parallel.replicate}) does not divide the {world_size} ranks")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield device_mesh(World(0, world_size), config.parallel)
    finally:
        dist.destroy_process_group()


def _track(
    config: RunConfig, shape: ModelConfig, mesh: DeviceMesh | None, micro_batches: int
) -> tuple[int, int, int, int, int, dict[str, int]]:
    """Peak of a step, the host's bytes, those received in a step, number of parameters, of those trained, and kinds."""
    lora = config.lora
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _of_dtype(shape, kept_dtype(config.model, lora))
        # The tracker can't look into compiled code. The device is "cuda", since attention on a CPU asks positions where
        # documents begin, and fake positions have no values.
        train = replace(config.train, compile=False)
        make_trainable(model, config.model, train, config.parallel, lora, torch.device("cuda"), mesh)
        # What is beside a quantised matrix is none, and in NF4 a byte holds two.
        weights = [p for name, p in model.named_parameters() if not name.endswith((".scale", ".absmax"))]
        sizes = [(p.numel() * (1 + (p.dtype == torch.uint8)), p.requires_grad) for p in weights]
        counts = [size for size, _ in sizes], [size for size, trained in sizes if trained]
        optimizer = build_optimizer(model, config.train)
        batch, mask = _fake_batch(config), None
        if batch[1] is not None and takes_varlen(torch.device("cuda"), DTYPES[config.model.dtype], shape.head_dim):
            mask = torch.zeros(2, dtype=torch.int32)  # any number of documents takes the same memory

        def step() -> None:
            # `train_step` without what reads a value, which fake tensors do not have: the loss, the gradient norm and
            # whether they are finite. The learning rate changes no memory.
            for _ in range(micro_batches):
                model.loss(*batch, mask=mask).backward()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        model.train()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()  # makes AdamW's moments, so that the tracker counts them as what a step begins with
        optimizer.zero_grad(set_to_none=True)
        offloaded, host = config.parallel.offload is not None, 0
        with MemoryTracker(model, optimizer, config.parallel.replicate or 1, offloaded=offloaded) as tracker:
            step()
    lost = int(FRAGMENTATION * tracker.peak)
    if offloaded or config.model.quantize == "nf4":
        lost += tracker.reserved - tracker.peak + WORKSPACES
    kinds = {**tracker.kinds(), "fragmentation": lost}
    if offloaded:  # weights and gradients are pinned, in blocks that CUDA rounds up to powers of two; moments are not
        pinned = [local_part(p) for p in model.parameters() for _ in range(1 + p.requires_grad)]
        moments = [local_part(v) for state in optimizer.state.values() for v in state.values()]
        host = sum(1 << (p.nbytes - 1).bit_length() for p in pinned if p.nbytes) + sum(v.nbytes for v in moments)
    return tracker.peak + lost, host, tracker.received, sum(counts[0]), sum(counts[1]), kinds


def _of_dtype(shape: ModelConfig, dtype: torch.dtype) -> _Planned:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters can't be cast afterwards
    try:
        return _Planned(shape)
    finally:
        torch.set_default_dtype(before)


def _fake_batch(config: RunConfig) -> tuple[Tensor, Tensor | None, Tensor]:
    rows = config.train.micro_batch_size
    data: Any = config.data
    length = data.seq_len if isinstance(config, PretrainConfig) else data.max_seq_len
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    masked = not isinstance(config, PretrainConfig) or data.document_mask
    return tokens, torch.zeros_like(tokens) if masked else None, torch.zeros_like(tokens)


def describe(plan: Plan, config: RunConfig, world_size: int) -> str:
    """A plan as text for the terminal."""
    kinds = ", ".join(f"{name} {readable(size)}" for name, size in plan.kinds.items())
    most = "at most " if isinstance(config, FinetuneConfig) else ""  # examples may be shorter than a row, or packed
    received = f"{most}{readable(plan.received)} received a rank and step" if plan.received else "none"
    copied = ", and as much of the hosts' memory (checkpoint.async_save)" if config.checkpoint.async_save else ""
    node = f", {readable(world_size * plan.host)} on a node that has all {world_size}" if world_size > 1 else ""
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    lines = [
        f"{plan.parameters:,} parameters, {plan.trained:,} of them trained, on {ranks}",
        f"peak memory     {readable(plan.peak)} a rank ({kinds})",
        *[f"host's memory   {readable(plan.host)} a rank{node} (parallel.offload)"] * bool(plan.host),
        f"communication   {received}",
        f"checkpoint      {readable(plan.checkpoint)} on disk{copied}",
        f"a step          {most}{plan.step_tokens:,} tokens",
        f"not counted     {ALLOWANCE[0]}{ALLOWANCE[1] * (world_size > 1)}",
    ]
    if plan.epoch_steps is not None:
        steps = f"{plan.epoch_steps:,} step{'' if plan.epoch_steps == 1 else 's'}"
        lines.append(f"an epoch        {plan.epoch_tokens:,} tokens, {steps}")
    return "\n".join(lines)
