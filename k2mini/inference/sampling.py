"""From logits to the next token: pure functions, one row independent of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token (greedy), whatever top_k and top_p say.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens that together have at least this probability (nucleus sampling, Holtzman
            et al. 2020, arXiv 1904.09751); 1 keeps all.

    Raises ValueError where a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or a positive number of tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but each row's k largest logits become -inf; ties with the k-th stay. (B, V) -> (B, V)."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """All but each row's nucleus becomes -inf; the likeliest token always stays. (B, V) -> (B, V)."""
    sorted_logits, order = logits.sort(descending=True, stable=True)
    probabilities = sorted_logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the mass of all likelier tokens
    outside = before >= p
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def transform(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p, in `promote_types(logits.dtype, float32)`. (B, V) -> (B, V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def sample(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw each row's next token.

    Args:
        logits: (B, V).
        generators: one a row, on the CPU (the same draws on every device), so that a row's tokens do not depend on
            its neighbours. Not used when greedy.

    Returns: (B,) int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = transform(logits, sampling).softmax(dim=-1)  # (B, V)
    # argmax(p / Exp(1) noise) is a draw from p (the exponential form of Gumbel-max), batched and free of loops.
    noise = torch.stack(
        [torch.empty(logits.shape[-1], dtype=torch.float64).exponential_(generator=g) for g in generators]
    )
    return (probabilities / noise.to(probabilities)).argmax(dim=-1)
