"""Continuing prompts, token by token. The engine knows token ids only; text is its callers' business."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from k2mini.data.prompts import rooms, shared_prefix
from k2mini.inference.replay import Replayed
from k2mini.inference.sampling import Sampler, Sampling
from k2mini.nn.kv_cache import GROWTH_STEP, KVCache
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama

PREFILL_CHUNK = 512  # tokens of each row in one forward pass of a long prompt; on a GPU, more of few rows:
PREFILL_TOKENS = 8192  # of all rows together
SHARED_AT_LEAST = 8  # tokens: a common prefix of at least this length is computed once
StoppingCriteria = Callable[[int, int], bool]  # (row, its new token) -> whether the row ends here


@dataclass(frozen=True)
class Decoding:
    """How prompts are answered.

    Args:
        max_new_tokens: of each answer, at most; one also ends where the model's context does.
        seed: row i of a batch draws with seed + i.
        stop: strings that end an answer and are not part of it. Callers that make text look for them.
        beams: search for the likeliest answer instead of sampling one: `Beams` of beam.py, which imports this file.
        batch_size: prompts at a time.
        top_logprobs: None, or of how many of the likeliest tokens each step gives the log-probabilities.

    Raises ValueError where a value is out of range.
    """

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    seed: int = 0
    stop: tuple[str, ...] = ()
    beams: Any = None
    batch_size: int = 8
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty")
        if (self.top_logprobs or 0) < 0:
            raise ValueError(f"top_logprobs must not be negative, it is {self.top_logprobs}")


@dataclass
class Completion:
    """What one prompt was continued with.

    Attributes:
        tokens: the new tokens, without the EOS that ended them.
        finish: 'eos'; 'stop' where the caller ended it; or 'length' where no more might follow.
        logprobs: each token's log-probability in nats, before any transform of the logits. Only with top_logprobs.
        top: each step's likeliest tokens with their log-probabilities. Only with top_logprobs.
        score: of a beam, as `beam_search` ranks it.
    """

    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    score: float | None = None


@dataclass(frozen=True)
class Step:
    """One row's new token; with top_logprobs also its log-probability and those of the likeliest tokens."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


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


def check_finite(model: Llama, logits: Tensor) -> None:
    """Raise `not_finite` where a row's largest of logits (…, V) is not finite."""
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise not_finite(model)


def not_finite(model: Llama) -> ValueError:
    """The error to raise where a model's logits are not finite; it names the cause."""
    from k2mini.weights.info import nonfinite_tensor  # takes time to import

    name = nonfinite_tensor(model)
    overflow = f"all weights are finite, so activations overflow in {model.dtype}; try --dtype float32 or bfloat16"
    return ValueError(f"the logits are not finite; {f'{name} holds NaN or infinity' if name else overflow}")


def can_replay(model: Llama) -> bool:
    """Whether steps are replayed: on a GPU, where no hook of the audit looks at what passes."""
    return model.device.type == "cuda" and "_hooks" not in model.__dict__


def new_cache(model: Llama, batch_size: int, capacity: int = GROWTH_STEP) -> KVCache:
    """An empty cache for a model's steps: fixed where they are compiled or replayed."""
    fixed = model.model.decode_block is not None or can_replay(model)
    return KVCache(model.config, batch_size, dtype=model.dtype, device=model.device, capacity=capacity, fixed=fixed)


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
    cache = new_cache(model, 1 if common else len(prompts), capacity)
    if common:
        extend(model, [prompts[0][:common]], cache, chunk)
        cache = cache.select(torch.zeros(len(prompts), dtype=torch.int64, device=model.device))
    return cache, model.logits(extend(model, [prompt[common:] for prompt in prompts], cache, chunk))


def steps(
    model: Llama,
    logits: Tensor,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
    stopping_criteria: StoppingCriteria | None = None,
) -> Iterator[list[Step | None]]:
    """Decode, one token of every row at a time. Rows that have ended leave the batch once they are half of it.

    Args:
        logits: (B, V), after the last token in the cache, as `prefill` returns them.
        prompts: the tokens in the cache, which repetition penalty and n-gram ban look back at.
        stop_ids: a row ends with the first of these.
        vocab_size: ids from here on are never chosen (rows of the embedding that no token has).
        stopping_criteria: called with a row's number and its new token; the row ends where it returns True.

    Yields: a list of B entries: the row's step (a stop id too), or None where the row has ended. While no row has left
    the batch, the cache holds every token yielded before the newest.
    """
    most = [min(decoding.max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    seeds = [decoding.seed + row for row in range(len(prompts))]
    sampler = Sampler(decoding.sampling, prompts, seeds, max(most), model.device)
    rows = list(range(len(prompts)))  # the numbers of the rows still in the batch
    ended: set[int] = set()

    def advance() -> None:
        sampler(model(sampler.out[:-1, None], cache=cache)[:, -1, :vocab_size])

    replayed = Replayed(advance, cache) if can_replay(model) else None
    sampler(logits[:, :vocab_size])
    for step in range(max(most)):
        *chosen, finite = sampler.out.tolist()  # a GPU is waited for here, once a step
        if not finite:
            raise not_finite(model)
        result: list[Step | None] = [None] * len(prompts)
        for row, entry in zip(rows, _details(sampler.logits, chosen, decoding.top_logprobs), strict=True):
            result[row] = entry if row not in ended else None
        yield result
        for row, token in zip(rows, chosen, strict=True):
            stop = row not in ended and (token in stop_ids or (stopping_criteria and stopping_criteria(row, token)))
            if stop or step + 1 == most[row]:
                ended.add(row)
        open_rows = [place for place, row in enumerate(rows) if row not in ended]
        if not open_rows:
            return
        few = 2 * len(open_rows) <= len(rows) and replayed is None  # a graph is of so many rows
        if few or any(step + 1 == most[row] for row in rows):
            kept = torch.tensor(open_rows).to(model.device, non_blocking=True)
            cache, rows = cache.select(kept), [rows[place] for place in open_rows]
            sampler.select(kept)
            cache.truncate(step + max(len(prompts[row]) for row in rows))  # no longer than the rows that are left
            replayed = replayed and Replayed(advance, cache)
        (replayed or advance)()


def _details(logits: Tensor, chosen: list[int], top_logprobs: int | None) -> list[Step]:
    if top_logprobs is None:
        return [Step(token) for token in chosen]
    return step_details(logits, chosen, top_logprobs)


def step_details(logits: Tensor, chosen: Sequence[int], num_top: int) -> list[Step]:
    """Tokens with their log-probabilities and those of the likeliest, of logits (N, V)."""
    logprobs = log_softmax(logits)  # (N, V)
    own = logprobs.gather(-1, torch.tensor(chosen, device=logits.device)[:, None]).squeeze(-1).tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return [
        Step(token, logprob, tuple(zip(names, scores, strict=True)))
        for token, logprob, names, scores in zip(chosen, own, ids.tolist(), values.tolist(), strict=True)
    ]


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
    stopping_criteria: StoppingCriteria | None = None,
) -> list[Completion]:
    """Continue a batch of prompts, of any lengths; a row's result does not depend on the others.

    Args:
        prompts: token ids, BOS included.
        stop_ids: a row ends with the first of these (usually EOS).
        vocab_size, stopping_criteria: as in `steps`.

    Raises ValueError: an empty prompt, or one too long for the model's context.
    """
    new = rooms(prompts, decoding.max_new_tokens, model.config.max_seq_len)
    capacity = max(len(prompt) + most for prompt, most in zip(prompts, new, strict=True))
    cache, logits = prefill(model, prompts, capacity=capacity)
    completions = [Completion() for _ in prompts]
    decode = partial(steps, model, logits, cache, prompts, decoding, stop_ids=stop_ids, vocab_size=vocab_size)
    for _ in collect(completions, decode(stopping_criteria=stopping_criteria), new, stop_ids):
        pass
    return completions


def collect(
    completions: Sequence[Completion], decoded: Iterable[list[Step | None]], new: Sequence[int], stop_ids: Sequence[int]
) -> Iterator[list[Step | None]]:
    """Pass steps on, each added before to its row's completion, of `new` tokens at most; an interruption loses none."""
    for row_steps in decoded:
        for completion, step, most in zip(completions, row_steps, new, strict=True):
            if step is None:
                continue
            if step.token in stop_ids:
                completion.finish = "eos"
                continue
            completion.tokens.append(step.token)
            if step.logprob is not None:
                completion.logprobs.append(step.logprob)
                completion.top.append(list(step.top))
            if len(completion.tokens) == most:
                completion.finish = "length"
        yield row_steps
    for completion in completions:
        completion.finish = completion.finish or "stop"  # ended before the last step, and by no stop id
