"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from k2mini.config import TrainSection


def build_optimizer(model: nn.Module, section: TrainSection) -> torch.optim.AdamW:
    """AdamW over the parameters that train; weight decay on matrices only, not on norms.

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
    """The learning rate of step 0, 1, …, total_steps - 1.

    It rises linearly over the warm-up, whose last step has `lr` in full; then it stays, or falls towards 0, which the
    step after the last would have.
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
