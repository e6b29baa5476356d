"""log p(option | context), the score of every option of a multiple-choice question.

Context and option are tokenised together, as lm-evaluation-harness does. A prefix that many contexts share runs through
the model once, and a context once for all its options; an option of one token is scored by the context's last logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from k2mini.data.prompts import shared_prefix
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE, World
from k2mini.inference.decoding import Decoding, not_finite
from k2mini.nn.kv_cache import KVCache, extend, pad_right
from k2mini.nn.layers import log_softmax, product
from k2mini.nn.llama import Llama
from k2mini.nn.uneven import uneven

TOKEN_BUDGET = 8192  # tokens, padding included, that run at a time
CACHE_BUDGET = 16384  # slots of the key/value cache: 8 GB of LLaMA-7B's in 16 bits
SHARED_AT_LEAST = 16
HEAD_ROWS = 4096  # of the vocabulary projection, converted at a time


@dataclass(frozen=True)
class Request:
    """What to score: `options`, each as token ids, after `prefix`.

    Attributes:
        group: requests of one group are likely to begin alike.
    """

    prefix: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    group: int = 0


@dataclass(frozen=True)
class OtherConfig:
    """Of a model's shape what is asked here: its context, and what results are known by beside the weights."""

    max_seq_len: int
    shape: dict[str, Any]

    def features(self) -> dict[str, Any]:
        return self.shape


class OtherModel(Protocol):
    """A model that is not k2mini's own, of transformers or behind an API, with what evaluation asks of a `Llama`.

    Attributes:
        path: of its directory.
        dtype: None where it is not known.
    """

    path: Path
    config: OtherConfig
    dtype: torch.dtype | None

    def require_tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises ValueError where there is none."""

    def fingerprint(self) -> str:
        """By what its weights are known again."""

    def score(
        self, requests: Sequence[Request], batch_size: int, mine: Callable[[Sequence[int]], bool]
    ) -> Iterator[tuple[int, list[float]]]:
        """As the function `score`: of all requests those batches of which `mine`, asked once of each, says yes."""

    def answers(self, prompts: list[list[int]], decoding: Decoding, stop_ids: Sequence[int]) -> Iterator[str]:
        """The text that continues each prompt, in their order."""


def split_jointly(
    tokenizer: Tokenizer,
    context: str,
    options: Sequence[str],
    *,
    eos: bool = False,
    bos: bool = True,
    special: bool = False,
) -> tuple[list[int], list[list[int]]]:
    """Tokenise context and option together, as one text, and find where the options begin.

    The context is the longest prefix that the encoded context and all joint encodings share; the rest belongs to the
    option. So white space that ends a context is scored with the option where the tokenizer joins
    the two ("The answer is: " + "A" ends in '▁A').

    Args:
        eos: the options end with EOS.
        bos, special: of `encode`, as a template has them.

    Returns: the context's ids, BOS first, and each option's. Where nothing is left of a context without BOS, it is EOS,
        as in lm-evaluation-harness.

    Raises ValueError where an option is empty.
    """
    joint = []
    for option in options:
        if not option:
            raise ValueError("an option is empty")
        joint.append(tokenizer.encode(context + option, bos=bos, eos=eos, special=special))
    first = tokenizer.encode(context, bos=bos, eos=False, special=special)
    common = boundary(first, joint)
    return first[:common] or [tokenizer.eos_id], [ids[common:] for ids in joint]


def boundary(context: Sequence[Any], joint: Sequence[Sequence[Any]]) -> int:
    """How many tokens a context and all that goes on from it begin with, which leaves each at least one of its own."""
    common = min(len(context), *(len(tokens) - 1 for tokens in joint))
    for tokens in joint:
        common = next((i for i in range(common) if tokens[i] != context[i]), common)
    return common


@torch.no_grad()  # not inference_mode: what sharded weights are gathered into is trained with afterwards
def score(
    model: Llama | OtherModel,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    share: bool = True,
    wanted: Collection[int] | None = None,
    world: World = ALONE,
) -> Iterator[tuple[int, list[float]]]:
    """Score many requests, the longest first.

    Args:
        batch_size: contexts at a time, at most.
        share: run what a group's contexts begin with once.
        wanted: the places that must be scored; None: all. The others run where they share a batch with one of these:
            batches stay the same, and with them the last bits of what is yielded.
        world: its ranks divide the batches among themselves; all of them call this.

    Yields: a request's place, and the summed log-probability of each of its options, in nats; of ranks, this one's.

    Raises ValueError where context and option do not fit the model's context, or the logits are not finite.
    """
    for place, request in enumerate(requests):
        over = len(request.prefix) + max(map(len, request.options)) - 1 - model.config.max_seq_len
        if over > 0:
            raise ValueError(
                f"request {place}: context and option are {over} tokens more than the model's "
                f"{model.config.max_seq_len}"
            )
    wanted = {*(range(len(requests)) if wanted is None else wanted)}
    tokens = tokens_to_run(requests, share=share) if world.size > 1 else [0] * len(requests)
    mine = partial(_is_mine, wanted, tokens, world, [0] * world.size)
    if not isinstance(model, Llama):
        yield from model.score(requests, batch_size, mine)
        return
    make = partial(KVCache, model.config, dtype=model.dtype, device=model.device)
    with uneven(model, world) if world.size > 1 else nullcontext():
        for places, common in share_prefixes(requests, share):
            shared = None
            for batch in _batches(places, requests, common, batch_size):
                if not mine(batch):
                    continue
                rows = [list(requests[place].prefix) for place in batch]
                if common and shared is None:
                    shared = make(1, capacity=common)
                    extend(model.hidden, [rows[0][:common]], shared)
                if shared is None:
                    cache = make(len(batch), capacity=max(map(len, rows)))
                else:
                    cache = shared.select(torch.zeros(len(batch), dtype=torch.int64, device=model.device))
                    rows = [row[common:] for row in rows]
                after = log_softmax(model.logits(extend(model.hidden, rows, cache), precise_product))  # (B, V)
                yield from zip(batch, _options(model, cache, after, [requests[place] for place in batch]), strict=True)


def _is_mine(wanted: set[int], tokens: Sequence[int], world: World, load: list[int], batch: Sequence[int]) -> bool:
    """Whether a batch is to run, and on this rank: on that with the least to do, which `load` counts in tokens."""
    if wanted.isdisjoint(batch):
        return False
    rank = load.index(min(load))
    load[rank] += sum(tokens[place] for place in batch)
    return rank == world.rank


def num_tokens(model: Llama | OtherModel, request: Request) -> list[int]:
    """How many tokens each option of a request has that was scored; an API's are its own."""
    return getattr(model, "lengths", {}).get(request) or [len(option) for option in request.options]


def precise_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; of 16 bits on a CPU in float32, as it is summed: once rounded, logits of many options are the same number.

    x: (…, in); weight: (out, in). Returns (…, out).
    """
    if x.dtype.itemsize > 2 or x.device.type != "cpu":
        return product(x, weight)
    rows = x.float()
    return torch.cat([product(rows, part.float()) for part in weight.split(HEAD_ROWS)], dim=-1)


def tokens_to_run(requests: Sequence[Request], *, share: bool = True) -> list[int]:
    """How many tokens `score` runs for each request: its prefix without what its group shares, and its options.

    The first token of an option is scored by the logits at its prefix's end and does not run. Padding and the shared
    prefixes themselves are not counted.
    """
    tokens = [0] * len(requests)
    for places, common in share_prefixes(requests, share):
        for place in places:
            request = requests[place]
            options = [len(option) - 1 for option in request.options]
            tokens[place] = len(request.prefix) - common + sum(options)
    return tokens


def share_prefixes(requests: Sequence[Request], share: bool) -> list[tuple[list[int], int]]:
    """Of each group the places of its requests, the longest first, and how many tokens of their prefixes are shared."""
    groups: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.group, []).append(place)
    found = []
    for places in groups.values():
        places.sort(key=lambda place: -len(requests[place].prefix))
        common = shared_prefix([requests[place].prefix for place in places]) if share and len(places) > 1 else 0
        found.append((places, common if common >= SHARED_AT_LEAST else 0))
    return found


def _batches(places: Sequence[int], requests: Sequence[Request], common: int, batch_size: int) -> Iterator[list[int]]:
    """Split requests, longest first, into batches within the row limit and the token budget."""
    batch: list[int] = []
    for place in places:
        together = [requests[p] for p in (*batch, place)]
        longest = len(together[0].prefix)  # the first of a batch is its longest
        rows = [len(request.options) for request in together if max(map(len, request.options)) > 1]
        width = max(len(option) for request in together for option in request.options)
        tokens = max(len(together) * (longest - common), sum(rows) * width)
        slots = (len(together) + sum(rows)) * (longest + width)
        if batch and (len(batch) == batch_size or tokens > TOKEN_BUDGET or slots > CACHE_BUDGET):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _options(model: Llama, cache: KVCache, after: Tensor, requests: Sequence[Request]) -> list[list[float]]:
    """Each request's options: their first tokens from `after` (B, V), the others from one more pass."""
    rows = [row for row, request in enumerate(requests) for _ in request.options]
    options = [option for request in requests for option in request.options]
    total = after[_sent(rows, model), _sent([option[0] for option in options], model)]  # (N,)
    long = [number for number, option in enumerate(options) if len(option) > 1]
    if long:
        rest = _rest(model, cache, _sent([rows[n] for n in long], model), [options[n] for n in long])
        total[_sent(long, model)] += rest
    scores = total.tolist()  # a GPU is waited for here, once a batch
    if not all(map(math.isfinite, scores)):  # one NaN or infinite logit makes all log-probabilities of its row NaN
        raise not_finite(model)
    flat = iter(scores)
    return [[next(flat) for _ in request.options] for request in requests]


def _sent(numbers: Sequence[int], model: Llama) -> Tensor:
    return torch.tensor(numbers).to(model.device, non_blocking=True)


def _rest(model: Llama, cache: KVCache, rows: Tensor, options: Sequence[Sequence[int]]) -> Tensor:
    """The sum of log-probabilities of each option's tokens after its first. (N,)"""
    tokens, offsets = pad_right(options, model.device)  # (N, T)
    # The last token of an option predicts nothing that is scored.
    positions = torch.where(offsets[:, 1:] >= 0, offsets[:, :-1] + cache.lengths[rows, None], -1)
    hidden = model.hidden(tokens[:, :-1], positions, cache.select(rows))  # (N, T-1, D)
    scored = [row * hidden.shape[1] + i for row, option in enumerate(options) for i in range(len(option) - 1)]
    places = _sent(scored, model)  # of N * (T-1)
    logprobs = log_softmax(
        model.logits(hidden.flatten(0, 1)[places], precise_product)
    )  # only what is scored meets the vocabulary
    picked = torch.zeros(positions.numel(), dtype=logprobs.dtype, device=logprobs.device)
    picked[places] = logprobs.gather(-1, tokens[:, 1:].flatten()[places, None]).squeeze(-1)
    return picked.view_as(positions).sum(dim=-1)
