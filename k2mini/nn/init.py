"""Values for a model that no checkpoint fills."""

from __future__ import annotations

import torch

from k2mini.nn.llama import Llama


def init_weights(model: Llama, seed: int, std: float = 0.02) -> None:
    """Fill a fresh model: normal matrices of the given standard deviation, norms of one, biases of zero.

    Repeats for a seed.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                parameter.normal_(0.0, std, generator=generator)
