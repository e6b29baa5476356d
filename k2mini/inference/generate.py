"""Continuing prompts, token by token. The engine knows token ids only; text is its callers' business."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from k2mini.data.prompts import check_prompts
from k2mini.inference.sampling import Beams, Sampling, sample
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.layers import log_softmax
from k2mini.nn.llama import Llama

PREFILL_CHUNK = 512  # tokens of each row in one forward pass of a long prompt
SHARED_AT_LEAST = 8  # tokens: a common prefix of at least this length is computed once
StoppingCriteria = Callable[[int, int], bool]  # (row, its new token) -> whether the row ends here


@dataclass(frozen=True)
class Decoding:
    """How prompts are answered.

    Args:
        max_new_tokens: of each answer.
        seed: row i of a batch draws with seed + i.
        stop: strings that end an answer and are not part of it. Callers that make text look for them.
        beams: search for the likeliest answer instead of sampling one.
        batch_size: prompts at a time.
        top_logprobs: None, or of how many of the likeliest tokens each step gives the log-probabilities.

    Raises ValueError where a value is out of range.
    """

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    seed: int = 0
    stop: tuple[str, ...] = ()
    beams: Beams | None = None
    batch_size: int = 8
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty")


@dataclass
class Completion:
    """What one prompt was continued with.

    Attributes:
        tokens: the new tokens, without the EOS that ended them.
        finish: 'eos'; 'stop' where the caller ended it; or 'length' where max_new_tokens were made.
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
    return tokens.to(device), positions.to(device)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    first, last = (list(pick(prompts, key=list)) for pick in (min, max))  # in lexical order, all lie between them
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(common, *(len(prompt) - 1 for prompt in prompts))


def extend(model: Llama, rows: Sequence[Sequence[int]], cache: KVCache, chunk: int = PREFILL_CHUNK) -> Tensor:
    """Run more tokens of every row through the model into the cache, whose rows all have the same length so far.

    Args:
        chunk: tokens of each row in one forward pass, which bounds the memory of a long prompt.

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


def check_finite(model: Llama, logits: Tensor) -> None:
    """Raise ValueError, naming the cause, where a row's largest of logits (…, V) is not finite."""
    if not bool(logits.amax(dim=-1).isfinite().all()):
        from k2mini.weights.info import nonfinite_tensor  # takes time to import

        name = nonfinite_tensor(model)
        overflow = f"all weights are finite, so activations overflow in {model.dtype}; try --dtype float32 or bfloat16"
        raise ValueError(f"the logits are not finite; {f'{name} holds NaN or infinity' if name else overflow}")


def prefill(
    model: Llama, prompts: Sequence[Sequence[int]], *, capacity: int, chunk: int = PREFILL_CHUNK
) -> tuple[KVCache, Tensor]:
    """Run prompts through the model. A prefix that all of them share is computed once and copied to every row.

    Args:
        capacity: positions to make room for.

    Returns: the cache, and the logits after each prompt's last token, (B, V).
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
    sampling = decoding.sampling
    generators = [torch.Generator().manual_seed(decoding.seed + row) for row in range(len(prompts))]
    history = [list(prompt) for prompt in prompts] if sampling.looks_back else [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the numbers of the rows still in the batch
    ended: set[int] = set()
    for step in range(decoding.max_new_tokens):
        logits = logits[:, :vocab_size]
        check_finite(model, logits)
        chosen = sample(logits, sampling, [generators[row] for row in rows], [history[row] for row in rows])  # (B,)
        details = _details(logits, chosen, decoding.top_logprobs)
        result: list[Step | None] = [None] * len(prompts)
        for row, entry in zip(rows, details, strict=True):
            if row not in ended:
                result[row] = entry
                history[row].append(entry.token)
        yield result
        for row, entry in zip(rows, details, strict=True):
            if row in ended:
                continue
            if entry.token in stop_ids or (stopping_criteria is not None and stopping_criteria(row, entry.token)):
                ended.add(row)
        open_rows = [place for place, row in enumerate(rows) if row not in ended]
        if step + 1 == decoding.max_new_tokens or not open_rows:
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
    check_prompts(prompts, decoding.max_new_tokens, model.config.max_seq_len)
    cache, logits = prefill(model, prompts, capacity=max(map(len, prompts)) + decoding.max_new_tokens)
    completions = [Completion() for _ in prompts]
    decode = partial(steps, model, logits, cache, prompts, decoding, stop_ids=stop_ids, vocab_size=vocab_size)
    decoded = decode(stopping_criteria=stopping_criteria)
    for _ in collect(completions, decoded, decoding.max_new_tokens, stop_ids):
        pass
    return completions


def collect(
    completions: Sequence[Completion],
    decoded: Iterable[list[Step | None]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
) -> Iterator[list[Step | None]]:
    """Pass steps on, each added to its row's completion first; so an interruption leaves what was made before it."""
    for number, row_steps in enumerate(decoded, start=1):
        for completion, step in zip(completions, row_steps, strict=True):
            if step is None:
                continue
            if step.token in stop_ids:
                completion.finish = "eos"
                continue
            completion.tokens.append(step.token)
            if step.logprob is not None:
                completion.logprobs.append(step.logprob)
                completion.top.append(list(step.top))
            if number == max_new_tokens:
                completion.finish = "length"
        yield row_steps
    for completion in completions:
        completion.finish = completion.finish or "stop"  # ended before the last step, and by no stop id
