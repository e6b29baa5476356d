"""Where heads look: patterns, their entropies, and two kinds of heads that are known."""

from __future__ import annotations

import torch
from torch import Tensor

from k2mini.audit.hooks import trace
from k2mini.nn.llama import Llama


@torch.inference_mode()
def patterns(model: Llama, tokens: list[int]) -> Tensor:
    """Who looks at whom. (L, H, T, T), on the CPU."""
    with trace(model, ["layers.*.attention.pattern"], device="cpu") as cache:
        model(torch.tensor([tokens], device=model.device))
    return torch.stack([cache[f"layers.{layer}.attention.pattern"][0] for layer in range(model.config.num_layers)])


def entropies(pattern: Tensor) -> Tensor:
    """The mean entropy of a head's looks, in nats. (…, T, S) -> (…)."""
    return -torch.special.xlogy(pattern, pattern).sum(dim=-1).mean(dim=-1)


def previous_token_scores(pattern: Tensor) -> Tensor:
    """How much a head looks at the token before. (…, T, T) -> (…)."""
    return pattern.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=-1)


def induction_scores(model: Llama, *, length: int = 32, rows: int = 4, seed: int = 0) -> Tensor:
    """How much heads look at what followed the same token before, on random tokens that are repeated once. (L, H).

    Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv 2209.11895.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(model.config.num_layers, model.config.num_heads)
    for _ in range(rows):
        half = torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
        found = patterns(model, half + half).float()
        # From place t of the second half to the one after its first occurrence: t - length + 1.
        total += found.diagonal(offset=1 - length, dim1=-2, dim2=-1)[..., 1:].mean(dim=-1)
    return total / rows
