"""Attention patterns and their measures: entropy, previous-token heads, induction heads."""

from __future__ import annotations

import torch
from torch import Tensor

from k2mini.audit.hooks import trace
from k2mini.inference.decoding import check_finite
from k2mini.nn.llama import Llama


@torch.inference_mode()
def attention_patterns(model: Llama, tokens: list[int]) -> Tensor:
    """The attention pattern of every head over a prompt. (L, H, T, T), rows look at columns; on the CPU."""
    with trace(model, ["layers.*.attention.pattern"], device="cpu") as cache:
        check_finite(model, model(torch.tensor([tokens], device=model.device)))
    return torch.stack([cache[f"layers.{layer}.attention.pattern"][0] for layer in range(model.config.num_layers)])


def entropies(pattern: Tensor) -> Tensor:
    """The entropy of a pattern's rows, in nats, averaged over the rows. (…, T, S) -> (…)."""
    return -torch.special.xlogy(pattern, pattern).sum(dim=-1).mean(dim=-1)


def previous_token_scores(pattern: Tensor) -> Tensor:
    """The weight that a pattern puts on the token before, averaged over the tokens. (…, T, T) -> (…)."""
    return pattern.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=-1)


def induction_scores(model: Llama, *, length: int = 32, rows: int = 4, seed: int = 0) -> Tensor:
    """The weight that a head puts on the token that followed the current token's first occurrence. (L, H).

    Measured on random sequences that are repeated once, averaged over the tokens of the second half.

    Source: Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv 2209.11895.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(model.config.num_layers, model.config.num_heads)
    for _ in range(rows):
        half = torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()
        found = attention_patterns(model, half + half).float()
        # Position t of the second half looks at t - length + 1: the token after its first occurrence.
        total += found.diagonal(offset=1 - length, dim1=-2, dim2=-1)[..., 1:].mean(dim=-1)
    return total / rows
