"""Continuing prompts, token by token. The engine knows token ids only; text is its callers' business."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2mini.inference.sampling import Sampling, sample
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Llama


@dataclass
class Completion:
    """What one prompt was continued with.

    Attributes:
        tokens: the new tokens, without the EOS that ended them.
        finish: 'eos', or 'length' where max_new_tokens were made.
    """

    tokens: list[int] = field(default_factory=list)
    finish: str = ""


def check_length(prompt_tokens: int, max_new_tokens: int, max_seq_len: int) -> None:
    """Raise ValueError, with the remedy, where prompt and answer do not fit the model's context together."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if prompt_tokens == 0:
        raise ValueError("the prompt is empty")
    over = prompt_tokens + max_new_tokens - max_seq_len
    if over > 0:
        room = max_seq_len - prompt_tokens
        remedy = f"ask for at most {room} new ones or shorten it" if room > 0 else "shorten it"
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones are {over} more than the model's "
            f"context of {max_seq_len}; {remedy}"
        )


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch: tokens (B, T) and positions (B, T), -1 where padded."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.full((len(rows), longest), -1, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        positions[index, : len(row)] = torch.arange(len(row))
    return tokens.to(device), positions.to(device)


def prefill(model: Llama, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
    """Run the prompts through the model into the (empty) cache. Returns the logits after each one's end, (B, V)."""
    tokens, positions = pad_right(prompts, model.device)
    ragged = len({len(prompt) for prompt in prompts}) > 1
    hidden = model.model(tokens, positions if ragged else None, cache)  # (B, T, D)
    rows = torch.arange(len(prompts), device=model.device)
    return model.logits(hidden[rows, cache.lengths - 1])


def steps(
    model: Llama,
    logits: Tensor,
    cache: KVCache,
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    vocab_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Decode, one token a row at a time.

    Args:
        logits: (B, V), after the last token in the cache, as `prefill` returns them.
        seeds: one a row.
        stop_ids: a row ends with the first of these.
        vocab_size: ids from here on are never chosen (rows of the embedding that no token has).

    Yields: a list of B entries: the row's new token (a stop id too), or None where the row has ended. The cache
    then holds every token yielded before, not the newest.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=model.device)
    ended = torch.zeros(len(seeds), dtype=torch.bool, device=model.device)
    for step in range(max_new_tokens):
        token = sample(logits[:, :vocab_size], sampling, generators)  # (B,)
        yield [None if over else value for over, value in zip(ended.tolist(), token.tolist(), strict=True)]
        ended = ended | torch.isin(token, stop)
        if step + 1 == max_new_tokens or bool(ended.all()):
            return
        logits = model(token[:, None], cache=cache)[:, -1]


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[Completion]:
    """Continue a batch of prompts, of any lengths; a row's result does not depend on the others.

    Args:
        prompts: token ids, BOS included.
        stop_ids: a row ends with the first of these (usually EOS).
        sampling: greedy where None.
        seed: row i draws with seed + i.

    Raises ValueError: an empty prompt, or one too long for the model's context.
    """
    if not prompts:
        raise ValueError("there is no prompt")
    for prompt in prompts:
        check_length(len(prompt), max_new_tokens, model.config.max_seq_len)
    longest = max(len(prompt) for prompt in prompts)
    cache = KVCache(
        model.config, len(prompts), dtype=model.dtype, device=model.device, capacity=longest + max_new_tokens
    )
    completions = [Completion() for _ in prompts]
    tokens = steps(
        model,
        prefill(model, prompts, cache),
        cache,
        sampling=sampling or Sampling(),
        seeds=range(seed, seed + len(prompts)),
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        vocab_size=vocab_size,
    )
    for row_tokens in tokens:
        for completion, token in zip(completions, row_tokens, strict=True):
            if token in stop_ids:
                completion.finish = "eos"
            elif token is not None:
                completion.tokens.append(token)
    for completion in completions:
        completion.finish = completion.finish or "length"
    return completions
