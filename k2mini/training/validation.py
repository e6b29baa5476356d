"""The loss on data that is not trained on."""

from __future__ import annotations

import math

import torch

from k2mini.data.batches import Samples
from k2mini.distributed import ALONE, World, reshard
from k2mini.nn.llama import Llama
from k2mini.training.step import loss_sum


@torch.no_grad()
def validation_loss(model: Llama, samples: Samples, batch_size: int, world: World = ALONE) -> float:
    """The mean loss (nats a token) over an epoch's supervised tokens, without dropout. ValueError: it is not finite."""
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for start in range(0, samples.num_samples, batch_size * world.size):
        mine = start + world.rank * batch_size
        size = min(batch_size, samples.num_samples - mine)
        # A forward pass gathers weights from all ranks, so a rank without samples runs it as well.
        batch = samples.batch(mine, size) if size > 0 else samples.batch(0, 1).unsupervised()
        total += loss_sum(model, batch)
        count += batch.num_supervised()
    model.train(was_training)
    reshard(model)
    loss, tokens = world.all_reduce(total.item(), count)
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss}; go on from the last checkpoint with a lower train.lr")
    return loss / max(1, tokens)
