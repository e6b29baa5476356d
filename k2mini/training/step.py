"""One optimiser step, and all that belongs to it: its batches, AdamW, the learning rate, gradients."""

from __future__ import annotations

import math

import torch
from torch import nn

from k2mini.config import TrainSection
from k2mini.data.batches import Batch, Samples
from k2mini.distributed import ALONE, World, is_dtensor, send
from k2mini.nn.llama import Llama, document_bounds
from k2mini.nn.lora import average_gradients
from k2mini.nn.loss import supervised
from k2mini.nn.packed import sent_bounds


def build_optimizer(model: nn.Module, section: TrainSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the parameters that train; norms have no weight decay.

    Raises ValueError where nothing trains.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model is set to train")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=trained[0].device.type in ("cpu", "cuda"),
    )


def lr_at(step: int, total_steps: int, section: TrainSection) -> float:
    """The learning rate of a step, where step is 0, 1, …, total_steps - 1.

    It rises linearly during the warm-up and reaches `train.lr` at its last step. After that it is constant, or falls
    linearly or as a cosine and would be 0 one step after the last.
    """
    warmup_steps = section.warmup_steps
    if section.warmup_ratio is not None:
        warmup_steps = math.ceil(section.warmup_ratio * total_steps)
    if step < warmup_steps:
        return section.lr * (step + 1) / warmup_steps
    if section.schedule == "constant":
        return section.lr
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if section.schedule == "linear":
        return section.lr * (1 - done)
    return section.lr * 0.5 * (1 + math.cos(math.pi * done))


def total_steps(section: TrainSection, num_samples: int) -> int:
    """Optimiser steps of a whole run: `train.max_steps`, or those of `train.epochs` over so many samples."""
    if section.max_steps is not None:
        return section.max_steps
    assert section.epochs is not None
    return max(1, math.ceil(section.epochs * num_samples / section.global_batch_size))


def rank_share(section: TrainSection, world_size: int) -> int:
    """Samples of each global batch that go to one rank.

    Raises ValueError where the ranks can't all get the same number of whole micro-batches.
    """
    share, rest = divmod(section.global_batch_size, world_size)
    if rest or share % section.micro_batch_size:
        raise ValueError(
            f"train.global_batch_size ({section.global_batch_size}) must be a multiple of train.micro_batch_size "
            f"({section.micro_batch_size}) times the {world_size} ranks"
        )
    return share


def local_batches(samples: Samples, position: int, section: TrainSection, world: World) -> list[Batch]:
    """This rank's micro-batches of the step whose global batch begins at sample `position`."""
    if samples.even:
        rank_share(section, world.size)
    return samples.rank_batches(position, section.global_batch_size, section.micro_batch_size, world.rank, world.size)


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    section: TrainSection,
    step: int,
    steps: int,
    world: World = ALONE,
) -> dict[str, float]:
    """One optimiser step: learning rate, gradients of the mean loss over the global batch, clipping, AdamW.

    Args:
        batches: this rank's micro-batches (see `local_batches`).
        step, steps: the step's number, from 0, and how many the run has; the learning rate follows from them.

    Returns: `loss` (nats a supervised token, before the step), `lr` and `grad_norm` (before clipping), the same on all
    ranks.

    Raises ValueError on all ranks, before any weight changes, where the loss or the gradient is not finite.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, steps, section)
    (count,) = world.all_reduce(sum(batch.num_supervised() for batch in batches))
    loss_share = accumulate(model, batches, count, world)
    # A GPU is waited for here, once a step.
    norm = clip_gradients(model, section.max_grad_norm).to(loss_share.device)  # offloaded gradients are on the host
    loss, grad_norm = torch.stack([loss_share, norm]).tolist()
    (loss,) = world.all_reduce(loss)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        first, last = step * section.global_batch_size, (step + 1) * section.global_batch_size - 1
        raise ValueError(
            f"stopped before step {step + 1} (samples {first} to {last}): its loss is {loss}, its gradient norm "
            f"{grad_norm}; the weights are those of step {step}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm}


def accumulate(model: Llama, batches: list[Batch], count: float, world: World = ALONE) -> torch.Tensor:
    """Add up the gradients of this rank's micro-batches.

    Args:
        count: the supervised tokens of the global batch, over all ranks. The loss of a step is the mean over them.

    Returns: the sum of this rank's losses / count, () float64. Summed over the ranks it is the global batch's loss.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in batches:
        part = loss_sum(model, batch) / max(count, 1)
        # Gradients are averaged over the ranks when they are reduced; this makes the average a sum.
        (part * world.size).backward()
        total += part.detach()
    if world.size > 1:
        average_gradients(model, world)
    return total


def clip_gradients(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients to a global L2 norm of at most `max_norm`.

    Returns: the norm before, () float64, the same on all ranks.
    """
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    return (norm.full_tensor() if is_dtensor(norm) else norm).double()


def loss_sum(model: Llama, batch: Batch) -> torch.Tensor:
    """The loss of a batch (on the CPU), summed over its supervised tokens; () on the model's device."""
    places, labels = supervised(batch.labels)  # on the CPU: a GPU would be waited for
    tokens, labels, places = (send(part, model.device) for part in (batch.tokens, labels, places))
    positions = None if batch.positions is None else send(batch.positions, model.device)
    mask = None
    if batch.positions is not None and model.device.type == "cuda":
        mask = sent_bounds(document_bounds(batch.positions), model.device, model.dtype, model.config.head_dim)
    return model.loss(tokens, positions, labels, places, mask)
