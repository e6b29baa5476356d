"""From logits to the next token: pure functions, one row independent of the others.

The transforms are those of transformers, in its order: repetition penalty, no repeated n-gram, forbidden tokens; then,
for sampling, temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token (greedy), whatever top_k and top_p say.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens that together have at least this probability (nucleus sampling, Holtzman
            et al. 2020, arXiv 1904.09751); 1 keeps all.
        repetition_penalty: the logits of tokens that have occurred, in the prompt too, are divided by it where positive
            and multiplied where negative (Keskar et al. 2019, arXiv 1909.05858, section 4.1); 1 changes nothing.
        no_repeat_ngram_size: no n tokens in a row occur twice, those of the prompt included; 0 is off.
        forbidden: ids that are never chosen.
        min_p: keep the tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024, arXiv
            2407.01082); 0 keeps all.
        presence_penalty, frequency_penalty: subtracted from the logits of new tokens that have occurred, once or as
            often as they have (OpenAI's API).
        logit_bias: (id, what is added to its logit).

    Raises ValueError where a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forbidden: tuple[int, ...] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be 0 (off) or a positive number of tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"--repetition-penalty must be a positive number, not {self.repetition_penalty}")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"--no-repeat-ngram-size must be 0 (off) or positive, not {self.no_repeat_ngram_size}")
        if any(token < 0 for token in self.forbidden):
            raise ValueError(f"forbidden must be token ids, not {min(self.forbidden)}")
        if any(token < 0 or not math.isfinite(bias) for token, bias in self.logit_bias):
            raise ValueError(f"logit_bias must be token ids and finite numbers, not {self.logit_bias}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, not {self.min_p}")

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on a row's tokens so far."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0

    @property
    def counts_new(self) -> bool:
        """Whether it depends on how often a row's new tokens have occurred."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def as_history(rows: Sequence[Sequence[int]], more: int, device: torch.device) -> Tensor:
    """Rows of tokens as (B, T) int64, -1 after each row's last, with room for so many more."""
    padded = [torch.tensor([*row, *[-1] * more], dtype=torch.int64) for row in rows]
    return pad_sequence(padded, batch_first=True, padding_value=-1).to(device, non_blocking=True)


def _among(tokens: Tensor, logits: Tensor) -> Tensor:
    """Which ids stand in tokens (B, T), where -1 is none. (B, V) bool."""
    width = logits.shape[-1]
    places = torch.where((tokens < 0) | (tokens >= width), width, tokens)
    among = torch.zeros(logits.shape[0], width + 1, dtype=torch.bool, device=logits.device)
    return among.scatter_(1, places, True)[:, :width]


def ban_repeated_ngrams(logits: Tensor, history: Tensor, size: int) -> Tensor:
    """Tokens that would repeat an n-gram of `size` become -inf. (B, V) -> (B, V)."""
    if history.shape[1] < size:
        return logits
    lengths = (history >= 0).sum(dim=1, keepdim=True)  # (B, 1)
    windows = history.unfold(1, size, 1)  # (B, N, size)
    first, inside = (torch.arange(number, device=history.device) for number in (windows.shape[1], size - 1))
    last = history.gather(1, (lengths - size + 1 + inside).clamp(min=0))  # (B, size - 1)
    repeated = (windows[..., :-1] == last[:, None]).all(dim=-1) & (first + size <= lengths)  # (B, N)
    return logits.masked_fill(_among(torch.where(repeated, windows[..., -1], -1), logits), -torch.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """All but each row's k largest logits become -inf; ties with the k-th stay. (B, V) -> (B, V)."""
    return logits.masked_fill(logits < logits.topk(min(k, logits.shape[-1])).values[..., -1:], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """All but each row's nucleus becomes -inf; the likeliest token always stays. (B, V) -> (B, V)."""
    sorted_logits, order = logits.sort(descending=True, stable=True)
    probabilities = sorted_logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the mass of all likelier tokens
    outside = before >= p
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def penalize_new(logits: Tensor, new: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtract the penalties of tokens that occur in new (B, T), where -1 is none. (B, V) -> (B, V)."""
    width = logits.shape[-1]
    counts = logits.new_zeros(logits.shape[0], width + 1)
    counts.scatter_add_(
        1, torch.where((new < 0) | (new >= width), width, new), torch.ones_like(new, dtype=logits.dtype)
    )
    counts = counts[:, :width]
    return logits - frequency * counts - presence * (counts > 0)


def constrain(logits: Tensor, sampling: Sampling, history: Tensor | None, new: Tensor | None = None) -> Tensor:
    """Apply bias, penalties, n-gram ban and forbidden tokens to logits or log-probabilities. (B, V) -> (B, V).

    Args:
        history: (B, T), each row's tokens so far, prompt included, as of `as_history`; None: not `sampling.looks_back`.
        new: those without the prompt; None: not `sampling.counts_new`.
    """
    if biased := [(token, bias) for token, bias in sampling.logit_bias if token < logits.shape[-1]]:
        logits = logits.clone()
        for token, bias in biased:  # one by one, as below
            logits[:, token] += bias
    if new is not None:
        logits = penalize_new(logits, new, sampling.presence_penalty, sampling.frequency_penalty)
    if history is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        less_likely = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(_among(history, logits), less_likely, logits)
    if history is not None and sampling.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, history, sampling.no_repeat_ngram_size)
    if banned := [token for token in sampling.forbidden if token < logits.shape[-1]]:
        logits = logits.clone()
        for token in banned:  # one by one: a list of them would have to be sent to the device
            logits[:, token] = -torch.inf
    return logits


def transform(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, top-p and min-p, in `promote_types(logits.dtype, float32)`. (B, V) -> (B, V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        probabilities = logits.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def uniforms(seeds: Sequence[int], number: int) -> Tensor:
    """What rows draw with: (B, number) float64 in [0, 1), each row's from its own generator, on the CPU."""
    rows = [torch.rand(number, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) * (1 - 2**-40)  # times a sum, it stays below the sum


def sample(
    logits: Tensor,
    sampling: Sampling,
    drawn: Tensor | None = None,
    history: Tensor | None = None,
    new: Tensor | None = None,
) -> Tensor:
    """Choose each row's next token, on the logits' device; the host waits for nothing.

    Args:
        logits: (B, V).
        drawn: (B,) of `uniforms`. Not used when greedy.
        history, new: as in `constrain`.

    Returns: (B,) int64.
    """
    logits = constrain(logits, sampling, history, new)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    assert drawn is not None
    # The inverse of the distribution function: the first token whose cumulated probability is above the draw.
    cumulated = transform(logits, sampling).softmax(dim=-1).double().cumsum(dim=-1)  # (B, V)
    return (cumulated <= drawn[:, None] * cumulated[:, -1:]).sum(dim=-1)
