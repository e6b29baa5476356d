"""Prompts through the model into a KV cache, all rows at once: what a beam search and a score begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from k2mini.data.prompts import shared_prefix
from k2mini.inference.replay import can_replay
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Llama

PREFILL_CHUNK = 512  # tokens of each row in one forward pass of a long prompt; on a GPU, more of few rows:
PREFILL_TOKENS = 8192  # of all rows together
SHARED_AT_LEAST = 8  # tokens: a common prefix of at least this length is computed once


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch: tokens (B, T) and positions (B, T), -1 where padded."""
    tokens = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)
    positions = pad_sequence([torch.arange(len(row)) for row in rows], batch_first=True, padding_value=-1)
    return tokens.to(device, non_blocking=True), positions.to(device, non_blocking=True)


def extend(model: Llama, rows: Sequence[Sequence[int]], cache: KVCache, chunk: int | None = None) -> Tensor:
    """Run more tokens of every row through the model into the cache, whose rows all have the same length so far.

    Args:
        chunk: tokens of each row in one forward pass, which bounds the memory of a long prompt; None: as many as suit.

    Returns: the hidden state after each row's last token, (B, D). The host does not wait for it.
    """
    tokens, offsets = pad_right(rows, model.device)  # (B, T)
    start, ends = cache.length, offsets.amax(dim=1)  # (B,)
    ragged = len({len(row) for row in rows}) > 1
    # Without a mask, padding is taken for tokens: it comes after the row's own, which do not see it.
    positions = torch.where(offsets >= 0, offsets + start, -1) if ragged and not cache.maskless else None
    chunk = chunk or (max(PREFILL_CHUNK, PREFILL_TOKENS // len(rows)) if cache.maskless else PREFILL_CHUNK)
    last, here = torch.empty(0), torch.arange(len(rows), device=model.device)
    for begin in range(0, tokens.shape[1], chunk):
        part = slice(begin, begin + chunk)
        hidden = model.hidden(tokens[:, part], None if positions is None else positions[:, part], cache)  # (B, t, D)
        newest = hidden[here, (ends - begin).clamp(0, hidden.shape[1] - 1)]  # of rows that end here
        last = torch.where((ends >= begin)[:, None], newest, last) if begin else newest
    if ragged and positions is None:
        cache.end(start + ends + 1)
    return last


def prefill(
    model: Llama, prompts: Sequence[Sequence[int]], *, capacity: int, chunk: int | None = None
) -> tuple[KVCache, Tensor]:
    """Run prompts through the model. A prefix that all of them share is computed once and copied to every row.

    Args:
        capacity: positions to make room for.

    Returns: the cache, and the logits after each prompt's last token, (B, V).
    """
    shared = shared_prefix(prompts) if len(prompts) > 1 else 0
    common = shared if shared >= SHARED_AT_LEAST else 0
    fixed = model.model.decode_block is not None or can_replay(model)  # single tokens are then compiled or replayed
    rows = 1 if common else len(prompts)
    cache = KVCache(model.config, rows, dtype=model.dtype, device=model.device, capacity=capacity, fixed=fixed)
    if common:
        extend(model, [prompts[0][:common]], cache, chunk)
        cache = cache.select(torch.zeros(len(prompts), dtype=torch.int64, device=model.device))
    return cache, model.logits(extend(model, [prompt[common:] for prompt in prompts], cache, chunk))
