"""Continuing prompts, token by token. The engine knows token ids only; text is its callers' business."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from k2mini.inference.sampling import Sampling, sample
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama

PREFILL_CHUNK = 512  # tokens a row that run through the model at a time
SHARED_AT_LEAST = 8  # tokens: a common prefix from here on is computed once
StoppingCriteria = Callable[[int, int], bool]


@dataclass
class Completion:
    """What one prompt was continued with.

    Attributes:
        tokens: the new tokens, without the EOS that ended them.
        finish: 'eos'; 'stop' where the caller ended it; or 'length' where max_new_tokens were made.
        logprobs: of each token that was chosen, in nats, before any transform of the logits; where asked for.
        top: of each step the likeliest tokens and their log-probabilities; where asked for.
        score: of a beam, as `beam_search` ranks it.
    """

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    score: float | None = None


@dataclass(frozen=True)
class Step:
    """One row's new token, with its log-probability and the likeliest tokens' where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


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


def check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    """Raise ValueError where there is no prompt, or one of them can't be answered."""
    if not prompts:
        raise ValueError("there is no prompt")
    for prompt in prompts:
        check_length(len(prompt), max_new_tokens, max_seq_len)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch: tokens (B, T) and positions (B, T), -1 where padded."""
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    positions = torch.full((len(rows), longest), -1, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        positions[index, : len(row)] = torch.arange(len(row))
    return tokens.to(device), positions.to(device)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    first, last = (list(pick(prompts, key=list)) for pick in (min, max))  # in lexical order, all lie between them
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(common, *(len(prompt) - 1 for prompt in prompts))


def extend(model: Llama, rows: Sequence[Sequence[int]], cache: KVCache, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Run further tokens of every row through the model into the cache, whose rows are of one length so far.

    Args:
        chunk: tokens a row at a time; it bounds the memory of a long prompt.

    Returns: the hidden state after each row's last token, (B, D).
    """
    tokens, offsets = pad_right(rows, model.device)  # (B, T)
    start, ends = cache.length, offsets.amax(dim=1)  # (B,)
    ragged = len({len(row) for row in rows}) > 1
    positions = torch.where(offsets >= 0, offsets + start, -1)
    last = torch.zeros(len(rows), model.config.dim, dtype=model.dtype, device=model.device)
    for begin in range(0, tokens.shape[1], chunk):
        part = slice(begin, begin + chunk)
        hidden = model.hidden(tokens[:, part], positions[:, part] if ragged else None, cache)  # (B, t, D)
        here = ((ends >= begin) & (ends < begin + hidden.shape[1])).nonzero().flatten()
        last[here] = hidden[here, ends[here] - begin]
    return last


def prefill(
    model: Llama, prompts: Sequence[Sequence[int]], *, capacity: int, chunk: int = PREFILL_CHUNK
) -> tuple[KVCache, Tensor]:
    """Run prompts through the model; what all of them begin with is computed once, and its keys and values shared out.

    Args:
        capacity: positions to make room for.

    Returns: the cache, and the logits after each prompt's end, (B, V).
    """
    common = shared_prefix(prompts) if len(prompts) > 1 else 0
    fixed = model.model.decode_block is not None
    make = partial(KVCache, model.config, dtype=model.dtype, device=model.device, capacity=capacity, fixed=fixed)
    if common < SHARED_AT_LEAST:
        cache = make(len(prompts))
        return cache, model.logits(extend(model, prompts, cache, chunk))
    cache = make(1)
    extend(model, [prompts[0][:common]], cache, chunk)
    cache = cache.select(torch.zeros(len(prompts), dtype=torch.int64, device=model.device))
    return cache, model.logits(extend(model, [prompt[common:] for prompt in prompts], cache, chunk))


def steps(
    model: Llama,
    logits: Tensor,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    vocab_size: int | None = None,
    stopping_criteria: StoppingCriteria | None = None,
    top_logprobs: int | None = None,
) -> Iterator[list[Step | None]]:
    """Decode, one token a row at a time. Rows that have ended leave the batch, once they are half of it.

    Args:
        logits: (B, V), after the last token in the cache, as `prefill` returns them.
        prompts: what the cache holds, for the transforms that look back.
        seeds: one a row.
        stop_ids: a row ends with the first of these.
        vocab_size: ids from here on are never chosen (rows of the embedding that no token has).
        stopping_criteria: called with a row's number and its new token; a row ends where it says so.
        top_logprobs: None, or how many of the likeliest tokens come with each step's log-probabilities.

    Yields: a list of B entries: the row's step (a stop id too), or None where the row has ended. While no row has left
    the cache holds every token yielded before, not the newest.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    history = [list(prompt) for prompt in prompts] if sampling.looks_back else [[] for _ in prompts]
    stops = frozenset(stop_ids)
    rows = list(range(len(seeds)))  # of those still in the batch, their numbers
    ended: set[int] = set()
    for step in range(max_new_tokens):
        logits = logits[:, :vocab_size]
        chosen = sample(logits, sampling, [generators[row] for row in rows], [history[row] for row in rows])  # (B,)
        details = _details(logits, chosen, top_logprobs)
        result: list[Step | None] = [None] * len(seeds)
        for row, entry in zip(rows, details, strict=True):
            if row not in ended:
                result[row] = entry
                history[row].append(entry.token)
        yield result
        for row, entry in zip(rows, details, strict=True):
            if row in ended:
                continue
            if entry.token in stops or (stopping_criteria is not None and stopping_criteria(row, entry.token)):
                ended.add(row)
        open_rows = [place for place, row in enumerate(rows) if row not in ended]
        if step + 1 == max_new_tokens or not open_rows:
            return
        if 2 * len(open_rows) <= len(rows):
            kept = torch.tensor(open_rows, device=model.device)
            cache, chosen, rows = cache.select(kept), chosen[kept], [rows[place] for place in open_rows]
        logits = model(chosen[:, None], cache=cache)[:, -1]


def _details(logits: Tensor, chosen: Tensor, top_logprobs: int | None) -> list[Step]:
    if top_logprobs is None:
        return [Step(token) for token in chosen.tolist()]
    logprobs = log_softmax(logits)  # (B, V)
    own = logprobs.gather(-1, chosen[:, None]).squeeze(-1).tolist()
    values, ids = logprobs.topk(min(top_logprobs, logprobs.shape[-1]), dim=-1)
    return [
        Step(token, logprob, tuple(zip(names, scores, strict=True)))
        for token, logprob, names, scores in zip(chosen.tolist(), own, ids.tolist(), values.tolist(), strict=True)
    ]


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
    stopping_criteria: StoppingCriteria | None = None,
    top_logprobs: int | None = None,
) -> list[Completion]:
    """Continue a batch of prompts, of any lengths; a row's result does not depend on the others.

    Args:
        prompts: token ids, BOS included.
        stop_ids: a row ends with the first of these (usually EOS).
        sampling: greedy where None.
        seed: row i draws with seed + i.
        stopping_criteria, top_logprobs: as in `steps`.

    Raises ValueError: an empty prompt, or one too long for the model's context.
    """
    check_prompts(prompts, max_new_tokens, model.config.max_seq_len)
    longest = max(len(prompt) for prompt in prompts)
    cache, logits = prefill(model, prompts, capacity=longest + max_new_tokens)
    completions = [Completion() for _ in prompts]
    decoded = steps(
        model,
        logits,
        cache,
        prompts,
        sampling=sampling or Sampling(),
        seeds=range(seed, seed + len(prompts)),
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
        vocab_size=vocab_size,
        stopping_criteria=stopping_criteria,
        top_logprobs=top_logprobs,
    )
    last = max_new_tokens - 1
    for number, row_steps in enumerate(decoded):
        for completion, step in zip(completions, row_steps, strict=True):
            if step is not None:
                add_step(completion, step, stop_ids)
                if number == last:
                    completion.finish = completion.finish or "length"
    for completion in completions:
        completion.finish = completion.finish or "stop"  # ended before the last step, and by no stop id
    return completions


def add_step(completion: Completion, step: Step, stop_ids: Sequence[int]) -> None:
    """Take one more token into a completion; a stop id ends it and is not kept."""
    if step.token in stop_ids:
        completion.finish = "eos"
        return
    completion.tokens.append(step.token)
    if step.logprob is not None:
        completion.logprobs.append(step.logprob)
        completion.top.append(list(step.top))
