"""From logits to the next token: pure functions, one row independent of the others.

The transforms are those of transformers, in its order: repetition penalty, no repeated n-gram, forbidden tokens; then,
for sampling, temperature, top-k, top-p.
"""

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
        repetition_penalty: the logits of tokens that have occurred, in the prompt too, are divided by it where positive
            and multiplied where negative (Keskar et al. 2019, arXiv 1909.05858, section 4.1); 1 changes nothing.
        no_repeat_ngram_size: no n tokens in a row occur twice, those of the prompt included; 0 is off.
        forbidden: ids that are never chosen.

    Raises ValueError where a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forbidden: tuple[int, ...] = ()

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

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on a row's tokens so far."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


@dataclass(frozen=True)
class Beams:
    """How many hypotheses a beam search keeps, and how it ranks them.

    Args:
        num_beams: hypotheses a prompt.
        length_penalty: above 0, longer hypotheses gain; below, shorter ones.
        early_stopping: True ends a prompt's search as soon as `num_beams` hypotheses have ended; False when the best
            open one, at its present length, can't beat the worst of them; 'never' when it can't at any length.
        num_return_sequences: hypotheses returned of each prompt.

    Raises ValueError where a value is out of range.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"--num-beams must be at least 1, not {self.num_beams}")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(f"num_return_sequences must be 1 to num_beams ({self.num_beams})")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping must be true, false or 'never', not {self.early_stopping!r}")


def penalize_repetition(logits: Tensor, history: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Make every token of a row's history less likely. (B, V) -> (B, V)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in enumerate(history):
        seen[row, torch.tensor(tokens, dtype=torch.int64, device=logits.device)] = True
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def repeated_ngram_ends(tokens: Sequence[int], size: int) -> list[int]:
    """The tokens that, coming next, would repeat an n-gram of `size` that `tokens` contain."""
    if len(tokens) < size:
        return []
    start = tuple(tokens[len(tokens) - size + 1 :])
    return [tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tuple(tokens[i : i + size - 1]) == start]


def ban_repeated_ngrams(logits: Tensor, history: Sequence[Sequence[int]], size: int) -> Tensor:
    """Tokens that would repeat an n-gram become -inf. (B, V) -> (B, V)."""
    ends = [repeated_ngram_ends(tokens, size) for tokens in history]
    rows = [row for row, tokens in enumerate(ends) for _ in tokens]
    if not rows:
        return logits
    banned = torch.zeros_like(logits, dtype=torch.bool)
    banned[rows, [token for tokens in ends for token in tokens]] = True
    return logits.masked_fill(banned, -torch.inf)


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


def constrain(logits: Tensor, sampling: Sampling, history: Sequence[Sequence[int]]) -> Tensor:
    """Apply repetition penalty, n-gram ban and forbidden tokens to logits or log-probabilities. (B, V) -> (B, V).

    Args:
        history: each row's tokens so far, prompt included; not used unless `sampling.looks_back`.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, history, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        logits = ban_repeated_ngrams(logits, history, sampling.no_repeat_ngram_size)
    if sampling.forbidden:
        ids = torch.tensor(sampling.forbidden, device=logits.device)
        logits = logits.index_fill(-1, ids[ids < logits.shape[-1]], -torch.inf)
    return logits


def transform(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, then top-p, in `promote_types(logits.dtype, float32)`. (B, V) -> (B, V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def sample(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    history: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Choose each row's next token.

    Args:
        logits: (B, V).
        generators: one a row, so that a row's tokens do not depend on the others; on the CPU, so that draws are the
            same on every device. Not used when greedy.
        history: as in `constrain`.

    Returns: (B,) int64.
    """
    logits = constrain(logits, sampling, history)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = transform(logits, sampling).softmax(dim=-1)  # (B, V)
    # argmax(p / Exp(1) noise) is a draw from p (the exponential form of Gumbel-max), batched and free of loops.
    noise = torch.stack(
        [torch.empty(logits.shape[-1], dtype=torch.float64).exponential_(generator=g) for g in generators]
    )
    return (probabilities / noise.to(probabilities)).argmax(dim=-1)
